"""From logits to the next token of each sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_ascend.runtime.engine.request import Request, SamplingParams


class Sampler:
    """Chooses tokens; keeps one random generator for each sequence that wants one."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits: Tensor, sequences: Sequence[Request]) -> list[int]:
        """The next token of each sequence, from float32 logits [B, vocab]."""
        if all(_is_plain_greedy(sequence.params) for sequence in sequences):
            greedy: list[int] = logits.argmax(dim=-1).tolist()
            return greedy
        host = logits.cpu()
        return [self._choose(row, sequence) for row, sequence in zip(host, sequences, strict=True)]

    def forget(self, number: int) -> None:
        """Drops the generator of a finished sequence."""
        self._generators.pop(number, None)

    def _choose(self, logits: Tensor, sequence: Request) -> int:
        params = sequence.params
        logits = penalize(logits, sequence)
        if params.temperature == 0:
            return int(logits.argmax())
        probabilities = candidate_probabilities(logits, params)
        generator = self._generator(sequence)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    def _generator(self, sequence: Request) -> torch.Generator:
        if sequence.number not in self._generators:
            generator = torch.Generator()
            seed = sequence.params.seed
            generator.seed() if seed is None else generator.manual_seed(seed)
            self._generators[sequence.number] = generator
        return self._generators[sequence.number]


def _is_plain_greedy(params: SamplingParams) -> bool:
    penalties = (params.repetition_penalty, params.presence_penalty)
    return params.temperature == 0 and penalties == (1.0, 0.0)


def penalize(logits: Tensor, sequence: Request) -> Tensor:
    """Logits [vocab] with the sequence's repetition and presence penalties applied."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)))
        values, penalty = logits[seen], params.repetition_penalty
        punished = torch.where(values > 0, values / penalty, values * penalty)
        logits = logits.index_copy(0, seen, punished)
    if params.presence_penalty != 0.0 and sequence.output:
        seen = torch.tensor(sorted(set(sequence.output)))
        logits = logits.index_copy(0, seen, logits[seen] - params.presence_penalty)
    return logits


def candidate_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [vocab] after temperature, then top_k, top_p and min_p, in this order.

    A later filter sees what the earlier ones left, renormalised; at least the most probable token
    always stays.
    """
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        threshold = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if params.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(dim=-1)
        beyond = share.cumsum(dim=-1) - share >= params.top_p
        logits = logits.index_fill(0, order[beyond], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if params.min_p > 0.0:
        floor = params.min_p * probabilities.max()
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    return probabilities / probabilities.sum()
