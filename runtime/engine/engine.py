"""The loop: schedule, compute, sample, commit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.engine.batch import decode_inputs, prefill_inputs
from qwen3_ascend.runtime.engine.request import Request, SamplingParams
from qwen3_ascend.runtime.engine.sampler import Sampler
from qwen3_ascend.runtime.engine.scheduler import Decode, Prefill, Scheduler


class Engine:
    """Runs sequences to their end, a step at a time."""

    def __init__(
        self, config: Qwen3Config, forward: Forward, scheduler: Scheduler, block_size: int
    ) -> None:
        self.config, self.scheduler = config, scheduler
        self._forward, self._block_size = forward, block_size
        self._sampler = Sampler()
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether any sequence is not finished."""
        return self.scheduler.busy

    def request(
        self, tokens: Sequence[int], params: SamplingParams, eos_ids: frozenset[int]
    ) -> Request:
        """A checked request that holds nothing yet; `queue` lets it run.

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
        return Request(next(self._numbers), params, list(tokens), len(tokens), max_length, eos_ids)

    def queue(self, sequence: Request) -> None:
        """Lets a request run as soon as there is room."""
        self.scheduler.add(sequence)

    def add(
        self, tokens: Sequence[int], params: SamplingParams, eos_ids: frozenset[int]
    ) -> Request:
        """Checks a request and queues it; see `request`."""
        sequence = self.request(tokens, params, eos_ids)
        self.queue(sequence)
        return sequence

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise RequestError("the prompt is empty")
        vocabulary = self.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise RequestError(f"token {token} is not in the vocabulary of {vocabulary}")

    def _check_room(self, length: int) -> None:
        capacity = self.scheduler.allocator.capacity
        if length > capacity:
            raise RequestError(
                f"the request needs room for {length} tokens, but the key/value cache holds "
                f"{capacity}; load with a larger kv_cache_tokens, or ask for fewer new tokens"
            )

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Runs one step; returns the sequences that got a token. Finished ones are retired."""
        work = self.scheduler.next()
        sequences = self._prefill(work) if isinstance(work, Prefill) else self._decode(work)
        for sequence in sequences:
            if sequence.finish_reason:
                self.retire(sequence)
        return sequences

    def retire(self, sequence: Request) -> None:
        """Frees everything a sequence holds, finished or not."""
        self.scheduler.retire(sequence)
        self._sampler.forget(sequence.number)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Teacher-forced logits: float32 [T, vocab] on the CPU; only while nothing else runs."""
        if self.busy:
            raise RequestError("an answer is still being streamed; finish or close it first")
        self._check_tokens(tokens)
        if len(tokens) > self.config.context_length:
            raise RequestError(
                f"{len(tokens)} tokens exceed the context of {self.config.context_length}"
            )
        self._check_room(len(tokens))
        sequence = Request(
            next(self._numbers), SamplingParams(), list(tokens), len(tokens), len(tokens),
            frozenset(),
        )  # fmt: skip
        self.scheduler.add(sequence)
        pieces = []
        try:
            while sequence.computed < len(tokens):
                work = self.scheduler.next()
                assert isinstance(work, Prefill)
                pieces.append(self._forward_prefill(work, all_logits=True).cpu())
        finally:
            self.retire(sequence)
        return torch.cat(pieces)

    def _prefill(self, work: Prefill) -> list[Request]:
        completes = work.completes
        logits = self._forward_prefill(work, all_logits=False)
        if not completes:
            return []
        self.scheduler.prefilled(work.sequence)
        return self._commit(logits, [work.sequence])

    def _forward_prefill(self, work: Prefill, all_logits: bool) -> Tensor:
        step = prefill_inputs(work.sequence, work.length, self._block_size, all_logits)
        logits = self._forward(step)
        work.sequence.computed += work.length
        return logits

    def _decode(self, work: Decode) -> list[Request]:
        logits = self._forward(decode_inputs(work.sequences, self._block_size))
        for sequence in work.sequences:
            sequence.computed += 1
        return self._commit(logits, list(work.sequences))

    def _commit(self, logits: Tensor, sequences: list[Request]) -> list[Request]:
        for sequence, token in zip(sequences, self._sampler(logits, sequences), strict=True):
            sequence.append(token)
        return sequences
