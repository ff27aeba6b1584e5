"""What is sent back: the objects of OpenAI's interface, whole or in chunks.

A reply writes one answer. It is given pieces of the answer in order; a whole reply is that of one
piece which holds everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from qwen3_ascend.runtime.answer import Piece
from qwen3_ascend.runtime.engine.request import FinishReason
from qwen3_ascend.runtime.engine.sampler import Logprobs
from qwen3_ascend.runtime.text_stream import REPLACEMENT_CHARACTER
from qwen3_ascend.runtime.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; the same number as OpenAI's and vLLM's."""


class Usage(Struct, frozen=True):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(Struct, frozen=True):
    """Of each token: its text, logarithm, alternatives, and where its text begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def followed_by(self, others: TextLogprobs) -> TextLogprobs:
        """Those of these tokens and then of others."""
        return TextLogprobs(
            self.tokens + others.tokens,
            self.token_logprobs + others.token_logprobs,
            self.top_logprobs + others.top_logprobs,
            self.text_offset + others.text_offset,
        )


class TextChoice(Struct, frozen=True):
    """An answer to a prompt of /v1/completions, or a chunk of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TokenLogprob(Struct, frozen=True):
    """A token with the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct, frozen=True):
    """The same of a generated token, with the most probable ones at its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Of each token of a message."""

    content: list[ChatTokenLogprob]


class Message(Struct, frozen=True):
    """The assistant's turn. In a chunk, what is not set has not changed."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """An answer of /v1/chat/completions."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Struct, frozen=True):
    """A part of one."""

    index: int
    delta: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


Choice = TextChoice | ChatChoice | ChatChunk


class Completion(Struct, frozen=True):
    """A response, or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Choice]
    usage: Usage | UnsetType | None = UNSET

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)


@dataclass(frozen=True)
class Spelling:
    """Tokens as text, for reports of their probabilities."""

    tokenizer: Tokenizer

    def of(self, token: int) -> str:
        """The text of a token; its number, as vLLM writes it, where it has none of its own, such as
        a part of a character."""
        return self._text(token) or f"token_id:{token}"

    def report(self, token: int, logprob: float) -> TokenLogprob:
        """A token and its logarithm, as a chat reports them."""
        text = self._text(token)
        utf8 = None if text is None else [*text.encode()]
        return TokenLogprob(self.of(token), _finite(logprob), utf8)

    def _text(self, token: int) -> str | None:
        text = self.tokenizer.spell(token)
        return None if not text or REPLACEMENT_CHARACTER in text else text


@dataclass(frozen=True)
class Echo:
    """A prompt that its answers begin with.

    Attributes:
        text: of it.
        tokens: of it.
        logprobs: of each token after the first, if they are wanted; there once they are computed.
    """

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[Logprobs]


class Reply(Protocol):
    """Writes one answer."""

    def opening(self) -> Sequence[Choice]:
        """The chunks before the first piece."""

    def chunk(self, piece: Piece) -> Choice:
        """The chunk of a piece."""

    def whole(self, piece: Piece) -> Choice:
        """All of it, in place of chunks."""


class ChatReply:
    """The assistant's turn in a conversation."""

    def __init__(self, index: int, spelling: Spelling, logprobs: bool) -> None:
        self._index, self._spelling, self._wants_logprobs = index, spelling, logprobs

    def opening(self) -> Sequence[Choice]:
        """Whose turn it is."""
        return [ChatChunk(self._index, Message("assistant", ""), None, None)]

    def chunk(self, piece: Piece) -> Choice:
        """What the turn goes on with."""
        delta = Message(content=piece.text) if piece.text or not piece.finish_reason else Message()
        return ChatChunk(self._index, delta, self._logprobs(piece), piece.finish_reason)

    def whole(self, piece: Piece) -> Choice:
        """The turn."""
        message = Message("assistant", piece.text)
        return ChatChoice(self._index, message, self._logprobs(piece), piece.finish_reason)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        pairs = zip(piece.token_ids, piece.logprobs, strict=True)
        return ChatLogprobs([self._logprob(token, found) for token, found in pairs])

    def _logprob(self, token: int, found: Logprobs) -> ChatTokenLogprob:
        one = self._spelling.report(token, found.chosen)
        top = [self._spelling.report(*other) for other in found.top]
        return ChatTokenLogprob(one.token, one.logprob, one.bytes, top)


class TextReply:
    """A text that goes on, with or without its beginning."""

    def __init__(
        self, index: int, spelling: Spelling, logprobs: bool, echo: Echo | None = None
    ) -> None:
        self._index, self._spelling, self._wants_logprobs = index, spelling, logprobs
        self._echo, self._offset = echo, 0

    def opening(self) -> Sequence[Choice]:
        """The prompt, if it is to be echoed."""
        return [] if self._echo is None else [self._prompt(self._echo)]

    def chunk(self, piece: Piece) -> Choice:
        """What the text goes on with."""
        logprobs = self._logprobs(piece.token_ids, piece.logprobs)
        return TextChoice(self._index, piece.text, logprobs, piece.finish_reason)

    def whole(self, piece: Piece) -> Choice:
        """The text."""
        if self._echo is None:
            return self.chunk(piece)
        prompt = self._prompt(self._echo)
        logprobs = self._logprobs(piece.token_ids, piece.logprobs)
        if prompt.logprobs is not None and logprobs is not None:
            logprobs = prompt.logprobs.followed_by(logprobs)
        return TextChoice(self._index, prompt.text + piece.text, logprobs, piece.finish_reason)

    def _prompt(self, echo: Echo) -> TextChoice:
        return TextChoice(
            self._index, echo.text, self._logprobs(echo.tokens, [None, *echo.logprobs]), None
        )

    def _logprobs(
        self, tokens: Sequence[int], found: Sequence[Logprobs | None]
    ) -> TextLogprobs | None:
        if not self._wants_logprobs:
            return None
        report = TextLogprobs([], [], [], [])
        for token, one in zip(tokens, found, strict=True):
            text = self._spelling.of(token)
            report.tokens.append(text)
            report.text_offset.append(self._offset)
            self._offset += len(text)
            report.token_logprobs.append(None if one is None else _finite(one.chosen))
            report.top_logprobs.append(None if one is None else self._top(token, one))
        return report

    def _top(self, token: int, found: Logprobs) -> dict[str, float]:
        """The most probable tokens, and the one that is there; of two that look alike the more
        probable one counts."""
        top: dict[str, float] = {}
        for other, logprob in (*found.top, (token, found.chosen)):
            top.setdefault(self._spelling.of(other), _finite(logprob))
        return top


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
