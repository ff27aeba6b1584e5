"""The loop: schedule, compute, sample, commit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.errors import RequestError
from qwen3_ascend.checkpoint.model import Qwen3Config
from qwen3_ascend.runtime.backends.base import Forward
from qwen3_ascend.runtime.sampler import Sampler
from qwen3_ascend.runtime.scheduler import Decode, Prefill, Scheduler
from qwen3_ascend.runtime.sequence import SamplingParams, Sequence
from qwen3_ascend.runtime.step import decode_inputs, prefill_inputs


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
        self, tokens: SequenceOf[int], params: SamplingParams, eos_ids: frozenset[int]
    ) -> Sequence:
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
        return Sequence(next(self._numbers), params, list(tokens), len(tokens), max_length, eos_ids)

    def queue(self, sequence: Sequence) -> None:
        """Lets a request run as soon as there is room."""
        self.scheduler.add(sequence)

    def add(
        self, tokens: SequenceOf[int], params: SamplingParams, eos_ids: frozenset[int]
    ) -> Sequence:
        """Checks a request and queues it; see `request`."""
        sequence = self.request(tokens, params, eos_ids)
        self.queue(sequence)
        return sequence

    def _check_tokens(self, tokens: SequenceOf[int]) -> None:
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
    def step(self) -> list[Sequence]:
        """Runs one step; returns the sequences that got a token. Finished ones are retired."""
        work = self.scheduler.next()
        sequences = self._prefill(work) if isinstance(work, Prefill) else self._decode(work)
        for sequence in sequences:
            if sequence.finish_reason:
                self.retire(sequence)
        return sequences

    def retire(self, sequence: Sequence) -> None:
        """Frees everything a sequence holds, finished or not."""
        self.scheduler.retire(sequence)
        self._sampler.forget(sequence.number)

    @torch.inference_mode()
    def logits(self, tokens: SequenceOf[int]) -> Tensor:
        """Teacher-forced logits: float32 [T, vocab] on the CPU; only while nothing else runs."""
        if self.busy:
            raise RequestError("an answer is still being streamed; finish or close it first")
        self._check_tokens(tokens)
        if len(tokens) > self.config.context_length:
            raise RequestError(
                f"{len(tokens)} tokens exceed the context of {self.config.context_length}"
            )
        self._check_room(len(tokens))
        sequence = Sequence(
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

    def _prefill(self, work: Prefill) -> list[Sequence]:
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

    def _decode(self, work: Decode) -> list[Sequence]:
        logits = self._forward(decode_inputs(work.sequences, self._block_size))
        for sequence in work.sequences:
            sequence.computed += 1
        return self._commit(logits, list(work.sequences))

    def _commit(self, logits: Tensor, sequences: list[Sequence]) -> list[Sequence]:
        for sequence, token in zip(sequences, self._sampler(logits, sequences), strict=True):
            sequence.append(token)
        return sequences
