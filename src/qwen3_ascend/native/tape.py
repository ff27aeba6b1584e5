"""Calls of kernels that were made once, to be made again on the same memory.

    with recording() as tape:
        y = forward(x)          # computes, and notes every call
    x.copy_(...)                # the next input, where the last one lay
    tape.replay()               # y holds what comes of it

A step of decoding makes some hundreds of calls, each of which Python prepares anew: it allocates
the result, looks at shapes and fills in structures. All of that is the same in the next step.
Whoever records sees to it that nothing but kernels and what is given to `note` computes in between,
and that the memory of what they were given stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Call = tuple[Callable[..., object], tuple[object, ...]]
"""A function and what it was called with."""


class Tape:
    """Calls in their order, and the tensors whose memory they use."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._kept: list[Tensor] = []
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def note(self, function: Callable[..., object], *arguments: object) -> None:
        """Adds a call that was made."""
        self._calls.append((function, arguments))

    def keep(self, tensor: Tensor) -> Tensor:
        """Keeps the memory of a tensor for as long as the tape."""
        self._kept.append(tensor)
        return tensor

    def scratch(self, count: int) -> Tensor:
        """Bytes for one call, which all calls share: they come one after the other."""
        if self._scratch.numel() < count:
            self._scratch = self.keep(torch.empty(count, dtype=torch.uint8))
        return self._scratch

    def replay(self) -> None:
        """Makes all calls again."""
        for function, arguments in self._calls:
            function(*arguments)


_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextmanager
def recording() -> Iterator[Tape]:
    """A tape of the calls that this thread makes within."""
    tape = Tape()
    token = _TAPE.set(tape)
    try:
        yield tape
    finally:
        _TAPE.reset(token)


def note(function: Callable[..., object], *arguments: object) -> None:
    """Adds a call that was made to the tape, if there is one."""
    tape = _TAPE.get()
    if tape is not None:
        tape.note(function, *arguments)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, for the result of a kernel."""
    tensor, tape = torch.empty(shape, dtype=dtype), _TAPE.get()
    return tensor if tape is None else tape.keep(tensor)


def scratch(count: int) -> Tensor:
    """uint8 for one call of a kernel: at least `count` bytes, whose contents are nothing."""
    tape = _TAPE.get()
    return torch.empty(count, dtype=torch.uint8) if tape is None else tape.scratch(count)


def keep(tensor: Tensor) -> None:
    """Keeps the memory of a tensor for as long as the tape, if there is one."""
    tape = _TAPE.get()
    if tape is not None:
        tape.keep(tensor)
