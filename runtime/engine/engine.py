"""The loop: schedule, compute, sample, and tell what happened."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.engine.batch import Batch, step_inputs
from qwen3_ascend.runtime.engine.request import FinishReason, Request, SamplingParams
from qwen3_ascend.runtime.engine.sampler import Logprobs, Sampler
from qwen3_ascend.runtime.engine.scheduler import Scheduler


@dataclass(frozen=True)
class TokenEvent:
    """A request has got a token.

    Attributes:
        request: which one.
        token: its id.
        logprobs: if the request asked for them.
        finish_reason: why this is the last token; None if it is not.
    """

    request: Request
    token: int
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class LogitsEvent:
    """Rows [R, vocab] of a request that wants the logits of every token, float32 on the CPU."""

    request: Request
    rows: Tensor


Event = TokenEvent | LogitsEvent


class Engine:
    """Runs requests to their end, a step at a time."""

    def __init__(
        self, config: Qwen3Config, forward: Forward, scheduler: Scheduler, block_size: int
    ) -> None:
        self.config, self.scheduler = config, scheduler
        self._forward, self._block_size = forward, block_size
        self._sampler = Sampler()
        self._numbers = itertools.count()
        self._undelivered: list[Event] = []

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return self.scheduler.busy

    def request(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        eos_ids: frozenset[int],
        sample: int = 0,
    ) -> Request:
        """A checked request that holds nothing yet; `queue` lets it run.

        Args:
            tokens: of the prompt.
            params: how to continue it.
            eos_ids: tokens that end the answer.
            sample: which of the `params.n` answers this is to be.

        Raises:
            RequestError: if the prompt is empty, holds an unknown token, or leaves no room in the
                context or in the cache.
        """
        self._check_tokens(tokens)
        context = self.config.context_length
        if len(tokens) >= context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, but the model's context is {context}, "
                f"of which at least one must be left for the answer; shorten the prompt"
            )
        max_length = min(len(tokens) + params.max_new_tokens, context)
        self._check_room(max_length)
        return Request(
            next(self._numbers), params, list(tokens), len(tokens), max_length, eos_ids, sample
        )

    def queue(self, request: Request) -> None:
        """Lets a request run as soon as there is room."""
        self.scheduler.add(request)

    def add(
        self, tokens: Sequence[int], params: SamplingParams, eos_ids: frozenset[int]
    ) -> Request:
        """Checks a request and queues it; see `request`."""
        request = self.request(tokens, params, eos_ids)
        self.queue(request)
        return request

    def step(self) -> list[Event]:
        """Runs one step and tells what came of it, in the order of the batch; only while `busy`.

        A request that is finished has been forgotten already.
        """
        if self._undelivered:
            events, self._undelivered = self._undelivered, []
            return events
        return self._advance()

    def abort(self, request: Request) -> None:
        """Frees everything a request holds, finished or not; no further event is about it."""
        self.scheduler.retire(request)
        self._sampler.forget(request.number)
        self._undelivered = [one for one in self._undelivered if one.request is not request]

    def score(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Teacher-forced logits, float32 [R, vocab] on the CPU, a few hundred rows at a time.

        Row i of them all predicts token i + 1. Other requests go on meanwhile; what happens to them
        is told by the next `step`.

        Raises:
            RequestError: if there are no tokens, or one is unknown, or they do not fit.
        """
        self._check_tokens(tokens)
        if len(tokens) > self.config.context_length:
            raise RequestError(
                f"{len(tokens)} tokens exceed the context of {self.config.context_length}"
            )
        self._check_room(len(tokens))
        request = Request(
            next(self._numbers), SamplingParams(), list(tokens), len(tokens), len(tokens),
            frozenset(), wants_logits=True,
        )  # fmt: skip
        return self._scored(request)

    def _scored(self, request: Request) -> Iterator[Tensor]:
        self.queue(request)
        try:
            while request.finish_reason is None:
                events = self._advance()
                # Before the yield, at which somebody else may ask for the next step.
                self._undelivered += [event for event in events if event.request is not request]
                for event in events:
                    if isinstance(event, LogitsEvent) and event.request is request:
                        yield event.rows
        finally:
            self.abort(request)

    @torch.inference_mode()
    def _advance(self) -> list[Event]:
        batch = self.scheduler.next()
        logits = self._forward(step_inputs(batch, self._block_size))
        events = self._events(batch, logits)
        for chunk in batch.chunks:
            if chunk.request.finish_reason:
                self.abort(chunk.request)
        return events

    def _events(self, batch: Batch, logits: Tensor) -> list[Event]:
        """What a computed batch and its logits [R, vocab] come to."""
        rows: dict[int, Tensor] = {}
        choosing: list[Request] = []
        chosen: list[int] = []
        row = 0
        for chunk in batch.chunks:
            count = chunk.logit_rows
            if chunk.request.wants_logits:
                rows[chunk.request.number] = logits[row : row + count].cpu()
            elif count:
                choosing.append(chunk.request)
                chosen.append(row)
            row += count
        self.scheduler.computed(batch)
        for chunk in batch.chunks:
            if chunk.request.wants_logits and not chunk.request.pending:
                chunk.request.finish_reason = "length"
        events: list[Event] = [
            LogitsEvent(chunk.request, rows[chunk.request.number])
            for chunk in batch.chunks
            if chunk.request.number in rows
        ]
        if choosing:
            if len(chosen) < len(logits):
                logits = logits.index_select(0, torch.tensor(chosen, device=logits.device))
            events += self._tokens(choosing, logits)
        return events

    def _tokens(self, requests: Sequence[Request], logits: Tensor) -> list[TokenEvent]:
        events = []
        for request, choice in zip(requests, self._sampler(logits, requests), strict=True):
            request.append(choice.token)
            reason = request.finish_reason
            events.append(TokenEvent(request, choice.token, choice.logprobs, reason))
        return events

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise RequestError("the prompt is empty")
        vocabulary = self.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise RequestError(f"token {token} is not in the vocabulary of {vocabulary}")

    def _check_room(self, length: int) -> None:
        capacity = self.scheduler.pool.capacity
        if length > capacity:
            raise RequestError(
                f"the request needs room for {length} tokens, but the key/value cache holds "
                f"{capacity}; load with a larger kv_cache_tokens, or ask for fewer new tokens"
            )
