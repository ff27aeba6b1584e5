"""Planted absences: what an older torch_npu wheel does not have, hidden from the installed one.

Each is a context manager, does nothing where the wheel lacks the thing anyway, and shows what the
older wheel shows: the same kind of error from an attribute, a schema or a call.  The C++ below
stays as it is.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

NAMESPACES = ("npu", "atb")


class _Namespace:
    """torch.ops.npu or torch.ops.atb, with one operator hidden (None) or replaced."""

    def __init__(self, real: Any, name: str, operator: Any) -> None:
        self._real, self._name, self._operator = real, name, operator

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._real, name)
        if self._operator is None:
            kind = f"'_OpNamespace' '{self._real.name}' object"
            raise AttributeError(f"{kind} has no attribute '{name}'")
        return self._operator

    def __dir__(self) -> list[str]:
        hidden = {self._name} if self._operator is None else set()
        return sorted(set(dir(self._real)) - hidden)


class _Schema:
    """A schema that lacks an argument, as far as anybody reads schemas."""

    def __init__(self, real: Any, argument: str) -> None:
        self.name, self.returns = real.name, real.returns
        self.arguments = [each for each in real.arguments if each.name != argument]
        self._text = _without_parameter(str(real), argument)

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


class _Shortened:
    """An operator, or one of its overloads, that does not know an argument."""

    def __init__(self, real: Any, argument: str) -> None:
        self._real, self._argument = real, argument

    def __call__(self, *values: Any, **named: Any) -> Any:
        if self._argument in named:
            schema = self._schema if hasattr(self._real, "_schema") else self.default._schema
            operator = schema.name
            rule = f"Unknown keyword argument '{self._argument}' for operator '{operator}'"
            raise RuntimeError(f"{rule}. Schema: {schema}")
        return self._real(*values, **named)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name == "_schema":
            return _Schema(found, self._argument)
        return _Shortened(found, self._argument) if hasattr(found, "_schema") else found


def _without_parameter(schema: str, argument: str) -> str:
    """The text of a schema without a parameter; an asterisk left with nothing behind goes too."""
    start, end = schema.index("("), schema.rindex(") ->")
    parameters = re.split(r", (?![^()\[\]]*[)\]])", schema[start + 1 : end])
    kept = [each for each in parameters if each.split("=")[0].split()[-1] != argument]
    if kept and kept[-1] == "*":
        kept.pop()
    return schema[: start + 1] + ", ".join(kept) + schema[end:]


@contextlib.contextmanager
def changed_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` becomes `value`, or goes away for None; put back afterwards."""
    had, before = name in vars(owner), vars(owner).get(name)
    if value is not None:
        setattr(owner, name, value)
    elif had:
        delattr(owner, name)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)


@contextlib.contextmanager
def _changed_operator(name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """torch.ops.<namespace>.<name> becomes what `change` makes of it, wherever it is defined."""
    import torch

    with contextlib.ExitStack() as changes:
        for namespace in NAMESPACES:
            real = getattr(torch.ops, namespace)
            operator = getattr(real, name, None)
            if operator is not None:
                proxy = _Namespace(real, name, change(operator))
                changes.enter_context(changed_attribute(torch.ops, namespace, proxy))
        yield


@contextlib.contextmanager
def without_attribute(name: str) -> Iterator[None]:
    """`torch_npu.<name>` does not exist; the operator behind it still does."""
    import torch_npu

    with changed_attribute(torch_npu, name, None):
        yield


@contextlib.contextmanager
def without_operator(name: str) -> Iterator[None]:
    """Neither `torch_npu.<name>` nor `torch.ops.npu.<name>` nor its schema exists."""
    with without_attribute(name), _changed_operator(name, lambda operator: None):
        yield


@contextlib.contextmanager
def without_argument(name: str, argument: str) -> Iterator[None]:
    """An operator whose schema does not know `argument`: a call with it is refused by torch, in
    torch's words, and a call without it means the operator's default."""
    import torch_npu

    def shortened(operator: Any) -> Any:
        return _Shortened(operator, argument)

    function = getattr(torch_npu, name, None)
    with contextlib.ExitStack() as changes:
        if function is not None:
            changes.enter_context(changed_attribute(torch_npu, name, shortened(function)))
        changes.enter_context(_changed_operator(name, shortened))
        yield
