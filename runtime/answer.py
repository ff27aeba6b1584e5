"""An answer on its way: what the engine's events come to for whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qwen3_ascend.runtime.engine.engine import Event, LogitsEvent, TokenEvent
from qwen3_ascend.runtime.engine.request import FinishReason, Request
from qwen3_ascend.runtime.engine.sampler import Logprobs
from qwen3_ascend.runtime.text_stream import StopFilter
from qwen3_ascend.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One finished answer.

    Attributes:
        text: without special tokens and without the stop string; empty if the checkpoint has no
            tokenizer.
        token_ids: every generated token, the end-of-sequence token included.
        prompt_token_ids: what the model was given.
        finish_reason: "stop" (end of sequence or a stop string) or "length".
        index: which of the answers to its prompt it is, counted from 0.
        logprobs: for each generated token, if SamplingParams asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    index: int = 0
    logprobs: tuple[Logprobs, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """What an answer has got since somebody last looked.

    Attributes:
        text: empty while a character, or what may become a stop string, is not complete.
        token_ids: of the new tokens.
        logprobs: of the same tokens; empty unless SamplingParams asked for them.
        finish_reason: why the answer has ended; None if it goes on.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: FinishReason | None


class Answer:
    """A request and the text it has produced so far, fed by the engine's events."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._stream = tokenizer.stream()
        self._filter = StopFilter(request.params.stop_strings)
        self._seen = 0  # how many tokens, and letters of the text, somebody has looked at
        self._shown = 0

    def take(self, event: Event) -> None:
        """Decodes a token; a stop string that it completes ends the answer."""
        assert isinstance(event, TokenEvent)
        self._tokens.append(event.token)
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)
        self.text += self._filter.push(self._stream.push(event.token))
        if event.finish_reason and not self._filter.stopped:
            self.text += self._filter.push(self._stream.finish())
            self.text += self._filter.finish()
        self.finish_reason = "stop" if self._filter.stopped else event.finish_reason

    def news(self) -> Piece:
        """What has come since the last call; all pieces together are the completion."""
        seen, shown = self._seen, self._shown
        self._seen, self._shown = len(self._tokens), len(self.text)
        return Piece(
            self.text[shown:],
            tuple(self._tokens[seen:]),
            tuple(self._logprobs[seen:]),
            self.finish_reason,
        )

    def completion(self) -> Completion:
        """The answer so far."""
        request = self.request
        return Completion(
            text=self.text,
            token_ids=tuple(self._tokens),
            prompt_token_ids=tuple(request.tokens[: request.prompt_length]),
            finish_reason=self.finish_reason or "length",
            index=request.sample,
            logprobs=None if request.params.logprobs is None else tuple(self._logprobs),
        )


class Score:
    """A prompt of which the logits of every token are wanted, fed by the engine's events."""

    def __init__(self, request: Request, use: Callable[[Tensor], None]) -> None:
        """Takes what is to become of the logits, which come as float32 [R, vocab] on the CPU, in
        order and a few hundred rows at a time."""
        self.request = request
        self.finish_reason: FinishReason | None = None
        self._use = use

    def take(self, event: Event) -> None:
        """Hands the rows on."""
        assert isinstance(event, LogitsEvent)
        self._use(event.rows)
        self.finish_reason = event.request.finish_reason


Work = Answer | Score
"""What an engine is given to do."""
