"""Whether the files that travel along can be used: asked before any weight is converted.

What `load` would refuse is refused here, and what it would warn of is a note.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qwen3_ascend.errors import CheckpointError, ConfigError, RequestError, SourceError
from qwen3_ascend.runtime.generation import default_params, eos_ids
from qwen3_ascend.runtime.tokenizer import NoTokenizer, load_tokenizer

PROBE = [{"role": "user", "content": "Hello"}]


def check_usable(files: Mapping[str, bytes], where: str, note: Callable[[str], None]) -> None:
    """Loads tokenizer, chat template and generation settings as `load` will.

    Args:
        files: the small files of a model by name.
        where: the model's name, for errors.
        note: is told of what works only in part.

    Raises:
        SourceError: naming the file that makes the result unusable.
    """
    with unpacked(files) as folder:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                found = _problems(folder)
        except (CheckpointError, ConfigError) as error:
            raise SourceError(str(error).replace(str(folder), where)) from error
    found += [str(warning.message) for warning in caught if warning.category is UserWarning]
    for line in found:
        note(line.replace(str(folder), where))


@contextmanager
def unpacked(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder that holds small files of a model, by name, and that goes with the block."""
    with tempfile.TemporaryDirectory(prefix="qwen3-ascend-") as folder:
        for name, data in files.items():
            _write(Path(folder) / name, data)
        yield Path(folder)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _problems(folder: Path) -> list[str]:
    """A line for each thing that works only in part."""
    tokenizer = load_tokenizer(folder)
    default_params(folder)
    eos_ids(folder, tokenizer)
    if isinstance(tokenizer, NoTokenizer):
        return [f"{folder} has no tokenizer: the result will take and give token ids only"]
    if not tokenizer.has_chat_template:
        return []
    try:
        tokenizer.render(PROBE)
    except RequestError as error:
        return [f"{error}; raw prompts will work, or give another with --chat-template"]
    return []
