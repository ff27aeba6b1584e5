"""The texts that a calibrated conversion reads, and the windows of tokens that it takes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.manifest import CalibrationRecord
from qwen3_ascend.convert.options import CalibrationOptions
from qwen3_ascend.convert.usable import unpacked
from qwen3_ascend.errors import OptionError, RequestError, os_errors
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.files.json_file import refuse_pointer
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.files.text import size_text
from qwen3_ascend.runtime.tokenizer import Message, has_vocabulary, load_tokenizer

WINDOW_TOKENS = 512
"""Tokens that are read as one text; of a model with a shorter context as many as that has."""

MOST_BYTES = 256 << 20
"""Of a file. Its text is tokenized as a whole, so that the windows can be spread over it."""

SHIPPED = "the shipped texts"
RANDOM = "random token ids"
SEED = 0

Document = str | tuple[Message, ...]
"""A text, or a conversation."""


@dataclass(frozen=True)
class CalibrationText:
    """A file of texts.

    Attributes:
        name: for people and for the manifest.
        blake3: of its bytes.
        documents: in their order.
    """

    name: str
    blake3: str
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Calibration:
    """What a conversion will be calibrated with; known before any weight is read.

    Attributes:
        record: what the manifest will say of it.
        text: None for random token ids.
    """

    record: CalibrationRecord
    text: CalibrationText | None

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.record.tokens // self.record.windows


def plan_calibration(
    options: CalibrationOptions,
    config: Qwen3Config,
    names: Collection[str],
) -> Calibration:
    """Reads the texts, and settles how much of them is taken.

    Random token ids take their place where the model has no tokenizer: what quantization loses
    depends less on the text than on the layer (measured: two thirds of GPTQ's gain is kept).

    Args:
        options: which file, how many tokens, and the device.
        config: of the model.
        names: of its small files.

    Raises:
        OptionError: in one line, if a file cannot be used.
    """
    length = min(WINDOW_TOKENS, config.context_length)
    windows = max(1, options.calibration_tokens // length)
    device = options.calibration_device
    text = read_text(options.calibration)
    if has_vocabulary(names):
        record = CalibrationRecord(text.name, text.blake3, windows * length, windows, device)
        return Calibration(record, text)
    if options.calibration is not None:
        raise OptionError(
            f"calibration: the model has no tokenizer to read {text.name} with; leave "
            f"--calibration out to take random token ids"
        )
    return Calibration(CalibrationRecord(RANDOM, None, windows * length, windows, device), None)


def read_text(file: str | None) -> CalibrationText:
    """The documents of a file: of JSON lines if its name ends in .jsonl, else one plain text.

    Args:
        file: a path; None for the texts that ship with the package.

    Raises:
        OptionError: in one line, if there is no such file or it is not what its name says.
    """
    if file is None:
        data = (files("qwen3_ascend.convert.calibration") / "default.jsonl").read_bytes()
        return CalibrationText(SHIPPED, bytes_blake3(data), _lines(data, SHIPPED))
    path = user_path(file)
    refuse_pointer(path, OptionError)
    with os_errors(OptionError):
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise OptionError(
                f"{path} has {size_text(path.stat().st_size)}, more than the "
                f"{size_text(MOST_BYTES)} that calibration reads: give a part of it"
            )
        data = path.read_bytes()
    documents = _lines(data, str(path)) if path.suffix == ".jsonl" else (_decoded(data, str(path)),)
    if not any(documents):
        raise OptionError(f"{path} is empty: there is nothing to calibrate with")
    return CalibrationText(path.name, bytes_blake3(data), documents)


def choose_windows(
    calibration: Calibration,
    config: Qwen3Config,
    carried: Mapping[str, bytes],
    note: Callable[[str], None],
) -> tuple[tuple[int, ...], ...]:
    """Token ids of windows that are spread evenly over the texts; the same for a tokenizer.

    Args:
        calibration: the texts.
        config: of the model.
        carried: the small files of the model by name, its tokenizer among them.
        note: is told of what is done instead.

    Raises:
        OptionError: if there are too few tokens, or a conversation cannot be rendered.
    """
    count, length = calibration.record.windows, calibration.length
    if calibration.text is None:
        note(f"the model has no tokenizer: it is calibrated with {RANDOM}")
        return _random_windows(count, length, config.vocab_size)
    with unpacked(carried) as folder:
        tokens = _tokens(calibration.text, folder)
    windows = _spread(tokens, count, length, calibration.text.name)
    largest = max(map(max, windows))
    if largest >= config.vocab_size:
        raise OptionError(
            f"calibration: the tokenizer makes token {largest} of {calibration.text.name}, but the "
            f"model has {config.vocab_size}: its tokenizer is that of another model"
        )
    return windows


def _lines(data: bytes, where: str) -> tuple[Document, ...]:
    lines = _decoded(data, where).split("\n")
    return tuple(
        _document(line, f"{where}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    )


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{where} is not UTF-8 text (byte {error.start}): give plain text, or JSON lines"
        ) from error


def _document(line: str, where: str) -> Document:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where} is not JSON: {error}") from error
    found = data if isinstance(data, dict) else {}
    text, messages = found.get("text"), found.get("messages")
    if isinstance(text, str) and messages is None:
        return text
    is_list = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
    if is_list and messages and text is None:
        return tuple(messages)
    raise OptionError(
        f'{where} is neither {{"text": "..."}} nor {{"messages": [{{"role": ..., "content": '
        f"...}}, ...]}}"
    )


def _tokens(text: CalibrationText, folder: Path) -> list[int]:
    """All documents, one after the other, by the tokenizer of a folder that will not stay. Without
    a chat template a conversation is its words."""
    tokenizer, found = load_tokenizer(folder), list[int]()
    for number, document in enumerate(text.documents, 1):
        try:
            if isinstance(document, str):
                found += tokenizer.encode(document)
            elif tokenizer.has_chat_template:
                rendered = tokenizer.render(document, add_generation_prompt=False)
                found += tokenizer.encode(rendered, add_special_tokens=False)
            else:
                found += tokenizer.encode("\n\n".join(str(m.get("content")) for m in document))
        except RequestError as error:
            said = str(error).replace(f"{folder}/", "")
            raise OptionError(f"calibration: {text.name}, text {number}: {said}") from error
    return found


def _spread(
    tokens: Sequence[int], count: int, length: int, name: str
) -> tuple[tuple[int, ...], ...]:
    """`count` windows that do not overlap, at equal distances."""
    if len(tokens) < count * length:
        most = len(tokens) // length * length
        instead = f", or pass --calibration-tokens {most}" if most else ""
        raise OptionError(
            f"calibration: {name} comes to {len(tokens)} tokens, and {count * length} are wanted: "
            f"give more text{instead}"
        )
    distance = len(tokens) // count
    starts = range(0, count * distance, distance)
    return tuple(tuple(tokens[start : start + length]) for start in starts)


def _random_windows(count: int, length: int, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (count, length), generator=generator)
    return tuple(tuple(row) for row in ids.tolist())
