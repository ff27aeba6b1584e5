"""What an interrupted run had finished: .partial/journal.jsonl, one JSON object a line.

The first line tells what is being made, the following ones each a finished item. A line begins
with a hash of itself, so that a torn or damaged one ends the journal instead of being believed. The
journal promises nothing about the disk: who resumes hashes the tensors again, which is why nothing
has to be forced to disk, and in order, while the work goes on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec import Struct

from qwen3_ascend.files.hashing import bytes_blake3

JOURNAL = "journal.jsonl"

CHECK_DIGITS = 16

Identity = Mapping[str, str]
"""All that decides the bytes of an output, in words that a user understands."""


class Done(Struct, frozen=True, forbid_unknown_fields=True):
    """A finished item.

    Attributes:
        name: of the linear or tensor.
        blake3: of each of its stored tensors, by full name.
        source: BLAKE3 of each source tensor that it was made of, by name.
        sqnr_db: its error, see LinearEntry; None for what was not quantized just now.
        experts_sqnr_db: so of each expert, if there are experts.
        unreached: see LinearEntry.
    """

    name: str
    blake3: Mapping[str, str]
    source: Mapping[str, str]
    sqnr_db: float | None
    experts_sqnr_db: tuple[float | None, ...] = ()
    unreached: tuple[int, ...] = ()


class Publication(Struct, frozen=True, forbid_unknown_fields=True):
    """The point of no return: which files move into the output, and which old ones go."""

    names: tuple[str, ...]
    old: tuple[str, ...]
    seal_blake3: str


class Line(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one line says; it has one of these keys."""

    identity: Identity | None = None
    done: Done | None = None
    publish: Publication | None = None


@dataclass(frozen=True)
class Record:
    """A journal as it was found."""

    identity: Identity
    done: Mapping[str, Done] = field(default_factory=dict)
    publication: Publication | None = None


class Journal:
    """A journal being written; lines may be added from any thread."""

    def __init__(self, staging: Path, identity: Identity, done: Iterable[Done]) -> None:
        """Replaces the journal of a staging folder by one that holds only this."""
        lines = [Line(identity=identity), *(Line(done=item) for item in done)]
        path, fresh = staging / JOURNAL, staging / f"{JOURNAL}.new"
        fresh.write_bytes(b"".join(map(_encode, lines)))
        os.replace(fresh, path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, done: Done) -> None:
        """Notes a finished item."""
        self._write(Line(done=done))

    def publish(self, publication: Publication) -> None:
        """Notes that publishing begins, and makes sure that this is on disk before it does."""
        self._write(Line(publish=publication))
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _write(self, line: Line) -> None:
        text = _encode(line)
        if os.write(self._descriptor, text) != len(text):
            raise OSError(errno.ENOSPC, "the journal could not be written", JOURNAL)


def read_journal(staging: Path) -> Record | None:
    """The journal of a staging folder; None if there is none that can be believed."""
    try:
        lines = (staging / JOURNAL).read_bytes().split(b"\n")
    except OSError:
        return None
    identity: Identity | None = None
    done: dict[str, Done] = {}
    publication = None
    for line in map(_decode, lines):
        if line is None:
            break
        identity = line.identity or identity
        publication = line.publish or publication
        if line.done is not None:
            done[line.done.name] = line.done
    return None if identity is None else Record(identity, done, publication)


def difference(before: Identity, now: Identity) -> str | None:
    """What differs between two outputs, in words; None if they are the same."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not changed:
        return None
    key = changed[0]
    more = f" (and {len(changed) - 1} more differences)" if len(changed) > 1 else ""
    return f"{key}: {before.get(key, 'none')} then, {now.get(key, 'none')} now{more}"


def _encode(line: Line) -> bytes:
    text = msgspec.json.encode(line)
    return bytes_blake3(text)[:CHECK_DIGITS].encode() + b" " + text + b"\n"


def _decode(line: bytes) -> Line | None:
    """What a line says; None if it is not whole, or of another version."""
    check, _, text = line.partition(b" ")
    if check.decode(errors="replace") != bytes_blake3(text)[:CHECK_DIGITS]:
        return None
    try:
        return msgspec.json.decode(text, type=Line)
    except msgspec.DecodeError:
        return None
