"""Text to tokens and back: tokenizer.json, the chat template, and text that arrives in pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

from qwen3_ascend.errors import CheckpointError, ConfigError, RequestError
from qwen3_ascend.files.json_file import read_json_object

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}; templates may read further keys (tool_calls, ...)."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A checkpoint's Jinja template, rendered in Jinja's sandbox.

    The environment is the one that Hugging Face templates are written for: trimmed blocks, loop
    controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        """CheckpointError if the template is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: oldest first.
            enable_thinking: Qwen3's switch; None leaves the template's default.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: anything else the template reads, such as tools.

        Raises:
            RequestError: if the template refuses the messages.
        """
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **variables,
            )
        except (TemplateError, TypeError) as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from error


class Tokenizer:
    """The tokenizer of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """CheckpointError if tokenizer.json is missing or unreadable."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy it from the original model")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not readable: {error}") from error
        config_path = folder / "tokenizer_config.json"
        self._config = read_json_object(config_path) if config_path.is_file() else {}
        self.chat_template = self._load_template(folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens spelled out in it are recognised.

        Raises:
            RequestError: for lone surrogates, which is how Python passes on bytes that are no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is not valid UTF-8 text: {error.reason}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        """Id of one token by its spelling."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token that tokenizer_config.json names."""
        name = self._special_tokens().get("eos_token")
        return None if name is None else self.token_id(name)

    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""
        return TextStream(self._tokenizer)

    def _special_tokens(self) -> dict[str, str]:
        named = {key: self._config.get(key) for key in SPECIAL_TOKENS}
        texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    def _load_template(self, folder: Path) -> ChatTemplate | None:
        path = folder / "chat_template.jinja"
        if path.is_file():
            return ChatTemplate(path.read_text(encoding="utf-8"), self._special_tokens())
        text = self._config.get("chat_template")
        if isinstance(text, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in text}
            text = named.get("default")
        return None if text is None else ChatTemplate(text, self._special_tokens())


class TextStream:
    """Text of a growing list of tokens; never half a character.

    All pieces together equal the text of all tokens decoded at once.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._tokens.append(token)
        piece: str = self._stream.step(self._tokenizer, token) or ""
        self._length += len(piece)
        return piece

    def finish(self) -> str:
        """What is left at the end, such as the replacement for an unfinished character."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return whole[self._length :]


class StopFilter:
    """Withholds stop strings, and text that may yet become one, from a stream of pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is safe to show; sets `stopped` once a stop string is complete.

        Of several, the one that is complete first counts (and of two that end together, the
        longer), so that the result does not depend on how the text was cut into pieces.
        """
        self._held += piece
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was withheld for a stop string that never came."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def eos_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json (Qwen3 has two), else of
    config.json, else of the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json_object(path).get("eos_token_id") if path.is_file() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(number, int) for number in ids):
                raise ConfigError(f"{path}: eos_token_id is {value!r}, not token ids")
            return frozenset(ids)
    number = tokenizer.eos_token_id
    return frozenset(() if number is None else (number,))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
