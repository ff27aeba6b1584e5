"""SHA-256 of several byte streams at once: by our own kernel where the processor can, or hashlib.

One stream keeps a core waiting for itself, so whoever has two things to hash should hash them
together; csrc/sha256.c says how much that brings. This module needs no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwen3_ascend.native.library import Library, NativeUnavailable, open_library

STATE_BYTES = 104
HASH_BYTES = 32
MOST_TOGETHER = 64
"""Streams that the kernel takes in one call."""


class Digest(Protocol):
    """A SHA-256 under way, as hashlib has it."""

    def update(self, data: memoryview, /) -> None:
        """Appends bytes."""

    def hexdigest(self) -> str:
        """The hash of what there was so far, in 64 hexadecimal digits."""


Stream = tuple[Digest, memoryview]
"""A digest and the bytes that come next in it."""


class Digests(Protocol):
    """One way to hash; every way gives the same digits."""

    def start(self) -> Digest:
        """A digest of nothing yet."""

    def update(self, streams: Sequence[Stream]) -> None:
        """Appends bytes to several digests of this way; of one digest in the order given."""


@dataclass(frozen=True)
class HashlibDigests:
    """One stream after the other."""

    def start(self) -> Digest:
        """See Digests."""
        return hashlib.sha256()

    def update(self, streams: Sequence[Stream]) -> None:
        """See Digests."""
        for digest, data in streams:
            digest.update(data)


@dataclass(frozen=True)
class NativeDigest:
    """A digest of NativeDigests."""

    owner: NativeDigests
    state: ctypes.Array[ctypes.c_char]

    def update(self, data: memoryview, /) -> None:
        """See Digest."""
        self.owner.update([(self, data)])

    def hexdigest(self) -> str:
        """See Digest."""
        digits = ctypes.create_string_buffer(HASH_BYTES)
        self.owner.library.digest("sha256_finish", self.state, digits)
        return digits.raw.hex()


@dataclass(frozen=True)
class NativeDigests:
    """Up to three streams in step."""

    library: Library
    beginning: bytes
    """The state of a digest of nothing."""

    @classmethod
    def open(cls, library: Library) -> NativeDigests:
        """With a library whose has_sha256() is true."""
        state = ctypes.create_string_buffer(STATE_BYTES)
        library.digest("sha256_start", state)
        return cls(library, state.raw)

    def start(self) -> Digest:
        """See Digests."""
        return NativeDigest(self, ctypes.create_string_buffer(self.beginning, STATE_BYTES))

    def update(self, streams: Sequence[Stream]) -> None:
        """See Digests."""
        rest = [stream for stream in streams if stream[1].nbytes]
        while rest:
            # The kernel wants each digest once; what comes later for the same one waits its turn.
            now: dict[int, Stream] = {}
            later = []
            for stream in rest:
                if id(stream[0]) in now or len(now) == MOST_TOGETHER:
                    later.append(stream)
                else:
                    now[id(stream[0])] = stream
            self._update([*now.values()])
            rest = later

    def _update(self, streams: Sequence[Stream]) -> None:
        count = len(streams)
        digests, data, nbytes = (
            (ctypes.c_void_p * count)(), (ctypes.c_void_p * count)(), (ctypes.c_int64 * count)()
        )  # fmt: skip
        for i, (digest, view) in enumerate(streams):
            assert isinstance(digest, NativeDigest)
            digests[i] = ctypes.addressof(digest.state)
            data[i] = address(view)
            nbytes[i] = view.nbytes
        self.library.digest("sha256_update", count, digests, data, nbytes)


def address(data: memoryview) -> int:
    """Where contiguous bytes lie in memory; they must outlive the use that is made of this."""
    return int(np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0])


def digests() -> Digests:
    """The fastest way to hash on this processor."""
    try:
        library = open_library()
    except NativeUnavailable:
        return HashlibDigests()
    return NativeDigests.open(library) if library.has_sha256() else HashlibDigests()
