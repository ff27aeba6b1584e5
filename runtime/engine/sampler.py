"""From logits to the next token of each sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from qwen3_ascend.runtime.engine.candidates import choose, enough, greatest, whole_row
from qwen3_ascend.runtime.engine.penalties import Penalties, has_penalties
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
    """Chooses tokens; keeps one random generator for each request that wants one.

    Logits stay where they were computed. What comes to the host is a token for each greedy row,
    some candidates for each sampled one, and whole rows only of requests that want logarithms of
    probabilities and where the candidates leave a token open.
    """

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}
        self._penalties = Penalties()

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> list[Choice]:
        """The next token of each request, from float32 logits [B, vocab] on any device.

        A request's token does not depend on the others of the batch.
        """
        params = [request.params for request in requests]
        penalized = self._penalties(logits, requests)
        greedy = [row for row, one in enumerate(params) if one.temperature == 0]
        drawn = [row for row, one in enumerate(params) if one.temperature > 0]
        tokens = dict(zip(greedy, _most_probable(penalized, greedy), strict=True))
        tokens |= zip(drawn, self._draw(penalized, drawn, requests), strict=True)
        reports = _logprobs(logits, requests, tokens)
        return [Choice(tokens[row], reports.get(row)) for row in range(len(requests))]

    def forget(self, number: int) -> None:
        """Drops what is kept for a finished request."""
        self._generators.pop(number, None)
        self._penalties.forget(number)

    def _draw(self, logits: Tensor, rows: list[int], requests: Sequence[Request]) -> list[int]:
        """A token of each of these rows, with one random number for each."""
        if not rows:
            return []
        logits = _select(logits, rows)
        params = [requests[row].params for row in rows]
        numbers = [self._number(requests[row]) for row in rows]
        count = min(max(enough(one) for one in params), logits.shape[1])
        tokens = choose(greatest(logits, params, count), params, numbers)
        return [
            draw_from_row(logits[at], params[at], numbers[at]) if token is None else token
            for at, token in enumerate(tokens)
        ]

    def _number(self, request: Request) -> float:
        """The next of the request's random numbers, from [0, 1)."""
        generator = self._generator(request)
        return float(torch.rand((), dtype=torch.float64, generator=generator))

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
    """Whether the token is the argmax of the row, and nothing else is wanted of it."""
    return params.temperature == 0 and params.logprobs is None and not has_penalties(params)


def draw_from_row(logits: Tensor, params: SamplingParams, number: float) -> int:
    """The token that a number from [0, 1) means, from a whole row of float32 logits [vocab] with
    penalties applied; see candidates.py."""
    (token,) = choose(whole_row(logits.cpu()), [params], [number])
    assert token is not None, "a whole row leaves nothing open"
    return token


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    """These rows, in ascending order; the tensor itself if they are all."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def _most_probable(logits: Tensor, rows: list[int]) -> list[int]:
    if not rows:
        return []
    tokens: list[int] = _select(logits, rows).argmax(dim=-1).tolist()
    return tokens


def _logprobs(
    logits: Tensor, requests: Sequence[Request], tokens: Mapping[int, int]
) -> dict[int, Logprobs]:
    """What the requests want to know of their rows of logits, before any penalty, by row."""
    counts = {
        row: request.params.logprobs
        for row, request in enumerate(requests)
        if request.params.logprobs is not None
    }
    if not counts:
        return {}
    host = _select(logits, list(counts)).cpu()
    return {
        row: logprobs_of(values, tokens[row], count)
        for (row, count), values in zip(counts.items(), host, strict=True)
    }
