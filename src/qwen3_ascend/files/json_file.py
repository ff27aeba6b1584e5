"""JSON files as other people write them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from qwen3_ascend.errors import ConfigError, UserError

T = TypeVar("T")

Hook = Callable[[type, Any], object]


POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has not fetched; source: the specification of Git LFS."""


def refuse_pointer(path: Path, kind: type[UserError]) -> None:
    """An error of a kind if a file is the pointer that Git LFS leaves in the place of the file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(POINTER)) == POINTER
    except OSError:
        return
    if is_pointer:
        raise kind(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its "
            f"repository, or download it again"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; ConfigError naming the file if there is none."""
    refuse_pointer(path, ConfigError)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: this is not a Hugging Face model folder") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""A number of things, or bytes."""

Size = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
"""A number of things of which there is at least one."""

Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A number that is neither infinite nor not a number."""

Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
"""A finite number above zero."""

Name = Annotated[str, Meta(min_length=1)]
"""Text that names something."""

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
"""The 256 bits of a hash, BLAKE3 or SHA-256, in hexadecimal."""


def typed(data: object, kind: type[T], place: str, hook: Hook | None = None) -> T:
    """A JSON value as a dataclass or another annotated type.

    Args:
        data: as json.loads gives it.
        kind: what it has to be, in every detail.
        place: the value's name, for errors.
        hook: (type, value) to an instance, for types that msgspec does not know.

    Raises:
        ValueError: one line that names the place and what is wrong there.
    """
    try:
        return msgspec.convert(data, kind, dec_hook=hook)
    except msgspec.ValidationError as error:
        said, _, path = str(error).partition(" - at ")
        within = path.strip("`").removeprefix("$")
        raise ValueError(f"{place}{within}: {said}") from error


def plain(value: object, hook: Callable[[Any], object] | None = None) -> Any:
    """The JSON value of dataclasses, as json.loads gives it back; the inverse of `typed`."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=hook))


def indented(value: object) -> bytes:
    """A JSON file for people: keys in their order, two spaces for each level."""
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()


def check_keys(data: object, written: object, place: str, optional: Collection[str] = ()) -> None:
    """Holds JSON data against what was made of it, so that no key goes unread or unsaid.

    Args:
        data: as json.loads gives it.
        written: `plain` of what `typed` has made of it.
        place: the value's name, for errors.
        optional: keys that may be left out for their default.

    Raises:
        ValueError: naming the first key that is unknown or missing, and the keys there are.
    """
    if isinstance(data, list) and isinstance(written, list):
        for number, (one, other) in enumerate(zip(data, written, strict=True)):
            check_keys(one, other, f"{place}[{number}]", optional)
    if not isinstance(data, dict) or not isinstance(written, dict):
        return
    for key in data:
        if key not in written:
            known = ", ".join(written)
            raise ValueError(f"{place} has the key {key!r}, which is unknown; known keys: {known}")
    for key, value in written.items():
        if key in data:
            check_keys(data[key], value, f"{place}.{key}", optional)
        elif key not in optional:
            raise ValueError(f"{place}: the key {key!r} is missing")
