"""Options as fields of frozen dataclasses: default, help text and rule are written once, here.

A field made by `option` is at the same time a keyword of the Python interface, a line of
`qwen3-ascend COMMAND --help`, and a value that both check by the same rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from qwen3_ascend.errors import OptionError

T = TypeVar("T")

Rule = Callable[[Any], object]
"""Raises ValueError, saying what is wrong, for a value that an option does not take."""

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """What an option is beside its name, type and default.

    Attributes:
        help: a sentence that says what it is for.
        metavar: how its value is written on the command line.
        unset: in words, what a default of None or () comes to.
        rule: the values that it takes; None is always taken if it is the default.
        parse: makes a value of the text on the command line, where the type does not say how.
    """

    help: str
    metavar: str | None
    unset: str | None
    rule: Rule
    parse: Callable[[str], object] | None


def option(
    default: T,
    help: str,
    *,
    metavar: str | None = None,
    unset: str | None = None,
    choices: tuple[str, ...] = (),
    least: int | None = None,
    rule: Rule | None = None,
    parse: Callable[[str], object] | None = None,
) -> T:
    """A field of an option dataclass.

    Args:
        default: the one default, of Python and of the command line.
        help: see Option, as for what follows.
        metavar: by default the choices.
        unset: needed where the default is None or ().
        choices: the values that it takes, if they are few.
        least: the smallest whole number that it takes.
        rule: any other rule.
        parse: for values that are no single number or word.
    """
    chosen = rule or _rule(default, choices, least)
    made = Option(help, metavar or "|".join(choices) or None, unset, chosen, parse)
    made_field: T = field(default=default, metadata={_KEY: made})
    return made_field


def described(kind: type) -> dict[str, Option]:
    """The options of a dataclass by name, in their order."""
    return {item.name: item.metadata[_KEY] for item in fields(kind)}


def check_options(options: Any) -> None:
    """Checks every field by its rule; for `__post_init__`.

    Raises:
        OptionError: naming the first option whose value is not taken.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        if value is None and item.default is None:
            continue
        try:
            item.metadata[_KEY].rule(value)
        except ValueError as error:
            raise OptionError(f"{item.name}: {error}") from None


def share(values: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """The values that each of several option dataclasses takes, by name.

    Raises:
        OptionError: naming a value that none of them takes, and the option that was meant.
    """
    names = [name for kind in kinds for name in described(kind)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known options: {', '.join(names)}"
            raise OptionError(f"there is no option {name}; {meant}")
    return [{name: values[name] for name in described(kind) if name in values} for kind in kinds]


def _rule(default: object, choices: tuple[str, ...], least: int | None) -> Rule:
    if isinstance(default, bool):
        return _true_or_false
    if choices:
        return lambda value: _one_of(value, choices)
    return _anything if least is None else lambda value: _at_least(value, least)


def _anything(value: object) -> None:
    """Takes every value."""


def _true_or_false(value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither True nor False")


def _one_of(value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{value!r} is not known; known: {', '.join(choices)}")


def _at_least(value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    if value < least:
        raise ValueError(f"{value} is too small; give {least} or more")
