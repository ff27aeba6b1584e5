"""What happened on the device, in order, as frozen records."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from . import runtime

_ENTRY = struct.Struct("=8q2Q64s")
# kernel number -> door, name, arguments, hidden copies
_notes: dict[int, tuple[str, str, object, int]] = {}

FORMAT_CASTS = frozenset(("aclnnNpuFormatCast", "TransData", "Identity"))


class Kind(IntEnum):
    LAUNCH = 0
    COPY = 1
    SET = 2
    PREFETCH = 3
    REPLAY = 4
    UPDATE = 5
    SYNC = 6
    COLLECTIVE = 7


@dataclass(frozen=True)
class TraceEntry:
    """One event.  `bytes` belongs to copies, prefetches and collectives (what this rank sends),
    `source` and `destination` to copies and prefetches; `graph` and
    `launches` (how many kernels the graph holds) to replays and updates."""

    kind: Kind
    name: str
    door: str  # aclnn | aclop | atb | fallback for launches, else the runtime call
    stream: int  # -1: synchronous, no stream
    captured: bool  # recorded into a graph instead of run
    is_update: bool  # issued between graph_task_update_begin and _end
    summary: str = ""
    bytes: int = 0
    source: int = 0
    destination: int = 0
    asynchronous: bool = False
    graph: int = 0
    launches: int = 0
    hidden_copies: int = 0  # kernels that this launch needs besides: copies of strided arguments

    @property
    def is_format_cast(self) -> bool:
        return self.kind is Kind.LAUNCH and self.name in FORMAT_CASTS


def note(kernel: int, door: str, name: str, arguments: object, hidden_copies: int = 0) -> None:
    """Remembers what a kernel number stands for; the text is made only when somebody reads it."""
    _notes[kernel] = (door, name, arguments, hidden_copies)


def read() -> list[TraceEntry]:
    runtime.flush_queue()
    count = runtime.library.sim_log_size()
    if not count:
        return []
    data = ctypes.string_at(runtime.library.sim_log_entries(), count * _ENTRY.size)
    return [_entry(*fields) for fields in _ENTRY.iter_unpack(data)]


def reset() -> None:
    runtime.flush_queue()
    runtime.library.sim_log_clear()
    _notes.clear()


def _entry(
    kind: int,
    kernel: int,
    stream: int,
    captured: int,
    update: int,
    count: int,
    graph: int,
    flag: int,
    source: int,
    destination: int,
    name: bytes,
) -> TraceEntry:
    text = name.split(b"\0", 1)[0].decode()
    unknown = ("runtime", text, None, 0)
    door, text, arguments, hidden_copies = _notes.get(kernel, unknown) if kernel else unknown
    return TraceEntry(
        kind=Kind(kind),
        name=text,
        door=door,
        stream=stream,
        captured=bool(captured),
        is_update=bool(update),
        summary="" if arguments is None else _summary(arguments),
        bytes=0 if kind == Kind.REPLAY else count,
        source=source,
        destination=destination,
        asynchronous=kind == Kind.COPY and bool(flag),
        graph=graph,
        launches=flag if kind == Kind.REPLAY else 0,
        hidden_copies=count if kind == Kind.REPLAY else hidden_copies,
    )


def _summary(arguments: object) -> str:
    shown = arguments if isinstance(arguments, (list, tuple)) else [arguments]
    return ", ".join(repr(value) for value in shown if value is not None)


# ------------------------------------------------------------------ questions tests ask
def launches(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    return [entry for entry in _or_all(entries) if entry.kind is Kind.LAUNCH]


def hidden_copies(entries: Iterable[TraceEntry] | None = None) -> int:
    """How many kernels more than launches() and the `launches` of replays() a card runs: it copies
    strided arguments by itself. What is only captured does not run yet."""
    running = (e for e in _or_all(entries) if not e.captured)
    return sum(entry.hidden_copies for entry in running)


def copies(direction: str, entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    """`direction`: host_to_device, device_to_host or device_to_device."""
    name = f"copy_{direction}"
    return [e for e in _or_all(entries) if e.kind is Kind.COPY and e.name == name]


def format_casts(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    return [entry for entry in _or_all(entries) if entry.is_format_cast]


def prefetches(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    return [entry for entry in _or_all(entries) if entry.kind is Kind.PREFETCH]


def host_updates(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    """One per updated task group: the host work that each graph replay costs."""
    return [entry for entry in _or_all(entries) if entry.kind is Kind.UPDATE]


def replays(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    return [entry for entry in _or_all(entries) if entry.kind is Kind.REPLAY]


def synchronizations(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    return [entry for entry in _or_all(entries) if entry.kind is Kind.SYNC]


def collectives(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    """Meetings with other processes, in the order they were issued; not those of replays."""
    return [entry for entry in _or_all(entries) if entry.kind is Kind.COLLECTIVE]


def fallbacks(entries: Iterable[TraceEntry] | None = None) -> list[TraceEntry]:
    return [entry for entry in _or_all(entries) if entry.door == "fallback"]


def _or_all(entries: Iterable[TraceEntry] | None) -> Iterable[TraceEntry]:
    return read() if entries is None else entries
