"""From logits to the next token of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from qwen3_ascend.runtime.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities at one generated token.

    Attributes:
        chosen: of the generated token.
        top: (token, logarithm) of the most probable ones, the first of them first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """A chosen token, with logarithms of probabilities if the request asked for them."""

    token: int
    logprobs: Logprobs | None


class Sampler:
    """Chooses tokens; keeps one random generator for each request that wants one."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> list[Choice]:
        """The next token of each request, from float32 logits [B, vocab]."""
        if all(is_plain_greedy(request.params) for request in requests):
            tokens: list[int] = logits.argmax(dim=-1).tolist()
            return [Choice(token, None) for token in tokens]
        host = logits.cpu()
        return [self._choose(row, request) for row, request in zip(host, requests, strict=True)]

    def forget(self, number: int) -> None:
        """Drops the generator of a finished request."""
        self._generators.pop(number, None)

    def _choose(self, logits: Tensor, request: Request) -> Choice:
        params = request.params
        token = self._token(penalize(logits, request), request)
        if params.logprobs is None:
            return Choice(token, None)
        return Choice(token, logprobs_of(logits, token, params.logprobs))

    def _token(self, logits: Tensor, request: Request) -> int:
        if request.params.temperature == 0:
            return int(logits.argmax())
        probabilities = candidate_probabilities(logits, request.params)
        return int(torch.multinomial(probabilities, 1, generator=self._generator(request)))

    def _generator(self, request: Request) -> torch.Generator:
        if request.number not in self._generators:
            generator = torch.Generator()
            seed = sample_seed(request)
            generator.seed() if seed is None else generator.manual_seed(seed)
            self._generators[request.number] = generator
        return self._generators[request.number]


def sample_seed(request: Request) -> int | None:
    """The seed of a request's generator: the one asked for, or for further answers to the same
    prompt one that follows from it and from the answer's number. None if none was asked for."""
    seed = request.params.seed
    if seed is None or request.sample == 0:
        return seed
    return int.from_bytes(blake3(f"{seed}/{request.sample}".encode()).digest(8), "little")


def logprobs_of(logits: Tensor, token: int, count: int) -> Logprobs:
    """Logarithms of the probabilities of a token and of the `count` most probable ones, from
    float32 logits [vocab]."""
    logarithms = logits.log_softmax(dim=-1)
    values, tokens = logarithms.topk(min(count, logits.numel()))
    top = zip(tokens.tolist(), values.tolist(), strict=True)
    return Logprobs(float(logarithms[token]), tuple(top))


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the next token is the one with the largest logit, and nothing else is asked."""
    penalties = (params.repetition_penalty, params.presence_penalty)
    return params.temperature == 0 and penalties == (1.0, 0.0) and params.logprobs is None


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
