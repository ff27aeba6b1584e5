"""Command-line options made from the fields of option dataclasses.

The command line has no defaults of its own: what is not given is not passed on, so that the
default of the dataclass applies, which `--help` prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import click
from typing_extensions import override

from qwen3_ascend.files.paths import user_path
from qwen3_ascend.options import Option, described

F = TypeVar("F", bound=Callable[..., Any])


class UserPath(click.Path):
    """A path in which ~ stands for the user's home, also where no shell has seen it."""

    def __init__(self, allow_dash: bool = False) -> None:
        super().__init__(allow_dash=allow_dash, path_type=Path)

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return user_path(os.fsdecode(super().convert(value, param, ctx)))


def options_of(*kinds: type) -> Callable[[F], F]:
    """Gives a command an option for every field of some option dataclasses, in their order."""

    def decorate(command: F) -> F:
        made = [_click_option(kind, name, one) for kind in kinds for name, one in _named(kind)]
        for decorator in reversed(made):
            command = decorator(command)
        return command

    return decorate


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the user has given; click fills the rest with None, or () for what may be repeated."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def default_text(kind: type, name: str) -> str:
    """The default of an option for people to read."""
    default, unset = getattr(kind, name), described(kind)[name].unset
    if default in (None, ()):
        return unset or "none"
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default}"


def _named(kind: type) -> list[tuple[str, Option]]:
    return [(item.name, described(kind)[item.name]) for item in fields(kind)]


def _click_option(kind: type, name: str, option: Option) -> Callable[[F], F]:
    annotation, default = get_type_hints(kind)[name], getattr(kind, name)
    types = [one for one in get_args(annotation) or (annotation,) if one is not type(None)]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        flag += f"/--no-{flag[2:]}" if default else ""
    return click.option(
        flag,
        name,
        type=option.parse or (str if str in types else types[0]),
        is_flag=isinstance(default, bool),
        multiple=isinstance(default, tuple),
        default=None,
        metavar=option.metavar,
        callback=lambda ctx, param, value: _checked(value, option),
        help=f"{option.help}  [default: {default_text(kind, name)}]",
    )


def _checked(value: Any, option: Option) -> Any:
    """A value that the option's own rule has passed, or click's error, which names the option."""
    if value is not None:
        try:
            option.rule(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return value
