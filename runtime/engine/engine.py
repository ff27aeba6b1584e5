"""The loop: schedule, compute, sample, and tell what happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.backends.base import Download, Forward
from qwen3_ascend.runtime.engine.batch import Batch, step_inputs
from qwen3_ascend.runtime.engine.request import FinishReason, Request, SamplingParams
from qwen3_ascend.runtime.engine.sampler import Choice, Logprobs, Sampler, is_plain_greedy
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


@dataclass(frozen=True)
class IssuedStep:
    """A step that the device has been given.

    Attributes:
        batch: what it computes.
        logits: what comes of it, float32 [R, vocab] on the device. The next step may overwrite
            them.
        chosen: [C] int64 on the device, the tokens of `batch.choosing`, if the device chooses them
            itself; None if the host has to see the logits.
        tokens: the same on their way to the host.
    """

    batch: Batch
    logits: Tensor
    chosen: Tensor | None
    tokens: Download | None


class Engine:
    """Runs requests to their end, a step at a time.

    A device that computes on its own is given a step before the tokens of the last one are read,
    if it chooses all of those itself: it then goes on while the host sees to what came of the last
    step. Where a token turns out to have been the last, a row of the new step was in vain.
    """

    def __init__(
        self,
        config: Qwen3Config,
        forward: Forward,
        scheduler: Scheduler,
        block_size: int,
        download: Callable[[Tensor], Download] = lambda tensor: tensor.cpu,
        *,
        most_probable: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(dim=-1),
        runs_ahead: bool = False,
    ) -> None:
        """An engine without requests.

        Args:
            config: of the model.
            forward: computes a step.
            scheduler: without requests.
            block_size: of the cache.
            download: of the device; see Backend.
            most_probable: of the device; see Backend.
            runs_ahead: whether to give the device a step before the last one is read.
        """
        self.config, self.scheduler = config, scheduler
        self._forward, self._block_size = forward, block_size
        self._download, self._most_probable = download, most_probable
        self._runs_ahead = runs_ahead
        self._sampler = Sampler()
        self._numbers = itertools.count()
        self._in_flight: IssuedStep | None = None

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

    def scoring(self, tokens: Sequence[int]) -> Request:
        """A checked request for the logits of every token, which chooses none; `queue` lets it run.

        Its LogitsEvents have a few hundred rows each. Row i of them all predicts token i + 1.

        Raises:
            RequestError: if there are no tokens, or one is unknown, or they do not fit.
        """
        self._check_tokens(tokens)
        if len(tokens) > self.config.context_length:
            raise RequestError(
                f"{len(tokens)} tokens exceed the context of {self.config.context_length}"
            )
        self._check_room(len(tokens))
        return Request(
            next(self._numbers), SamplingParams(), list(tokens), len(tokens), len(tokens),
            frozenset(), wants_logits=True,
        )  # fmt: skip

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Runs one step and tells what came of it, in the order of the batch; only while `busy`.

        A request that is finished has been forgotten already.
        """
        step = self._in_flight or self._issue(self.scheduler.next(), None)
        self._in_flight = None
        if self._runs_ahead and step.chosen is not None:
            batch = self.scheduler.ahead()
            self._in_flight = None if batch is None else self._issue(batch, step)
        events = self._read(step)
        for chunk in step.batch.chunks:
            if chunk.request.finish_reason and not chunk.request.retired:
                self.abort(chunk.request)
        if not self.scheduler.busy:
            self._in_flight = None  # all of it is in vain: nobody waits for it
        return events

    def abort(self, request: Request) -> None:
        """Frees everything a request holds, finished or not; no further event is about it."""
        self.scheduler.retire(request)
        self._sampler.forget(request.number)

    def _issue(self, batch: Batch, before: IssuedStep | None) -> IssuedStep:
        """Gives the device a step; `before` is what came before it, if that is not read yet."""
        carried = _carried(batch, before)
        logits = self._forward(step_inputs(batch, self._block_size, carried))
        chosen, tokens = self._chosen_by_device(batch, logits)
        self.scheduler.issued(batch, chosen is not None)
        return IssuedStep(batch, logits, chosen, tokens)

    def _chosen_by_device(
        self, batch: Batch, logits: Tensor
    ) -> tuple[Tensor, Download] | tuple[None, None]:
        """The tokens of `batch.choosing`, where they are and on their way to the host; nothing if
        the host has to see the logits."""
        requests = batch.choosing
        if any(chunk.request.wants_logits for chunk in batch.chunks):
            return None, None
        if not all(is_plain_greedy(request.params) for request in requests):
            return None, None
        if not requests:  # chunks of prompts alone, and no kernel takes an empty tensor
            nothing = torch.empty(0, dtype=torch.int64)
            return nothing, nothing.cpu
        chosen = self._most_probable(logits)
        return chosen, self._download(chosen)

    def _read(self, step: IssuedStep) -> list[Event]:
        """Waits for a step, and tells what it comes to for the requests that still want it."""
        self.scheduler.computed(step.batch)
        if step.tokens is not None:
            tokens: list[int] = step.tokens().tolist()
            choices = [Choice(token, None) for token in tokens]
            return self._tokens(step.batch.choosing, choices)
        return self._of_logits(step.batch, step.logits)

    def _of_logits(self, batch: Batch, logits: Tensor) -> list[Event]:
        """What a computed batch and its logits [R, vocab] come to, where the host sees them."""
        events: list[Event] = []
        chosen: list[int] = []
        requests: list[Request] = []
        row = 0
        for chunk in batch.chunks:
            rows = range(row, row + chunk.logit_rows)
            if chunk.request.wants_logits and not chunk.request.retired:
                wanted = logits[rows.start : rows.stop].to("cpu", copy=True)
                events.append(LogitsEvent(chunk.request, wanted))
                if not chunk.request.pending:
                    chunk.request.finish_reason = "length"
            elif chunk.chooses and not chunk.request.retired:
                chosen.append(row)
                requests.append(chunk.request)
            row = rows.stop
        if chosen:
            if len(chosen) < len(logits):
                logits = logits.index_select(0, torch.tensor(chosen, device=logits.device))
            events += self._tokens(requests, self._sampler(logits, requests))
        return events

    def _tokens(self, requests: Sequence[Request], choices: Sequence[Choice]) -> list[Event]:
        events: list[Event] = []
        for request, choice in zip(requests, choices, strict=True):
            if request.retired:
                continue
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


def _carried(batch: Batch, before: IssuedStep | None) -> Tensor | None:
    """[C] int64 on the device, the tokens of the carried chunks, which the step before chose."""
    wanted = [chunk.request for chunk in batch.chunks if chunk.is_carried]
    if not wanted:
        return None
    assert before is not None and before.chosen is not None, "nothing is unread"
    places = {request.number: place for place, request in enumerate(before.batch.choosing)}
    rows = [places[request.number] for request in wanted]
    if rows == [*range(len(before.chosen))]:
        return before.chosen
    return before.chosen.index_select(0, torch.tensor(rows, device=before.chosen.device))
