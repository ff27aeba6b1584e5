"""Chat templates of plain conversations, rendered as transformers renders them, without it.

A template is a program of strangers. It runs in Jinja's sandbox, with the names that transformers
gives it (utils/chat_template_utils.py, `_compile_jinja_template`), and sees texts only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

PLAIN_KEYS = {"role", "content"}


def render_plain(
    template: str, messages: Sequence[Mapping[str, Any]], enable_thinking: bool | None
) -> str | None:
    """The prompt text of a conversation with the opening of the assistant's turn.

    Args:
        template: Jinja.
        messages: oldest first.
        enable_thinking: Qwen3's switch; None leaves the template's default.

    Returns:
        None if the messages are more than roles and texts, or if anything is wrong: transformers
        has to say then what it makes of them.
    """
    if not messages or "_token" in template:  # such as eos_token, which transformers fills in
        return None
    switch = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        plain = [_plain(message) for message in messages]
        return (
            _environment()
            .from_string(template)
            .render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **switch
            )
        )
    except Exception:  # a template can fail in any way
        return None


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """A message of a role and a text; ValueError for any other."""
    if set(message) != PLAIN_KEYS or any(type(value) is not str for value in message.values()):
        raise ValueError("more than a role and a text")
    return dict(message)


def _environment() -> SandboxedEnvironment:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GuardedNamespace(Namespace):
        """Takes no names that begin with an underscore, which may lead out of the sandbox."""

        def __init__(self, **values: Any) -> None:
            super().__init__()
            for name, value in values.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise ValueError(f"{name} is no name for a template")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": GuardedNamespace,
    }
    return environment


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML gives a meaning."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
