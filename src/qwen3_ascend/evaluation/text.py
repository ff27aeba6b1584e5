"""A text as windows of tokens."""

from __future__ import annotations

from pathlib import Path

from qwen3_ascend.errors import OptionError, os_errors
from qwen3_ascend.evaluation.options import EvaluationOptions
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.runtime.tokenizer import Tokenizer


@os_errors(OptionError)
def read_text(path: Path) -> tuple[str, str]:
    """The text of a file, which may be a pipe, and the BLAKE3 of its bytes; OptionError if it
    cannot be read or is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig"), bytes_blake3(data)
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; give a "
            f"plain text"
        ) from None


def windows_of(
    text: str, path: Path, tokenizer: Tokenizer, options: EvaluationOptions
) -> list[list[int]]:
    """The windows of a text, which do not overlap; what is left at the end is left out.

    Raises:
        OptionError: if the text has not as many tokens as are asked for.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False)
    window, there = options.window, len(tokens) // options.window
    if there == 0:
        raise OptionError(
            f"{path} has {len(tokens)} tokens, fewer than one window of {window}: give a longer "
            f"text, or a smaller --window"
        )
    if options.windows is not None and options.windows > there:
        raise OptionError(
            f"{path} has {len(tokens)} tokens, which are {there} windows of {window} and not "
            f"{options.windows}: give a longer text, or fewer --windows"
        )
    count = options.windows or there
    return [tokens[start : start + window] for start in range(0, count * window, window)]
