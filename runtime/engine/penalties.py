"""Penalties on tokens that a request has seen, applied where the logits are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_ascend.runtime.engine.request import Request, SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """Whether logits are changed at all before a token is chosen."""
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0)


class Penalties:
    """Penalizes a batch; remembers what each request has seen, so that a step reads new tokens
    only."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Logits float32 [B, vocab] with the requests' penalties, on the same device.

        One gather and one scatter for the batch. The logits that are given stay as they are; they
        are given back where nothing is to be changed.
        """
        changes = [
            self._changes(request, row * logits.shape[1])
            for row, request in enumerate(requests)
            if has_penalties(request.params)
        ]
        if not sum(len(places) for places, _ in changes):
            return logits
        places = torch.cat([places for places, _ in changes]).to(logits.device)
        penalties = torch.cat([values for _, values in changes], dim=1).to(logits.device)
        repetition, subtracted = penalties.unbind()
        flat = logits.flatten()
        seen = flat.index_select(0, places)
        seen = torch.where(seen > 0, seen / repetition, seen * repetition) - subtracted
        return flat.index_put((places,), seen).view_as(logits)

    def forget(self, number: int) -> None:
        """Drops what is remembered of a finished request."""
        self._seen.pop(number, None)

    def _changes(self, request: Request, offset: int) -> tuple[Tensor, Tensor]:
        """Where a request's row changes, int64 [N], and there its repetition penalty and what is
        subtracted, float32 [2, N]. No place occurs twice."""
        params = request.params
        seen = self._seen.setdefault(request.number, _Seen(request))
        seen.read(request)
        subtracted = (seen.times > 0) * params.presence_penalty
        subtracted = subtracted + seen.times * params.frequency_penalty
        repetition = torch.full_like(subtracted, params.repetition_penalty)
        return seen.tokens + offset, torch.stack((repetition, subtracted))


class _Seen:
    """The distinct tokens of a request, and how often each occurs in its output.

    The prompt counts for the repetition penalty only, and is left out without one.

    Attributes:
        tokens: int64 [N].
        times: float32 [N], whole numbers.
    """

    def __init__(self, request: Request) -> None:
        self.tokens, self.times = torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._places: dict[int, int] = {}
        whole = request.params.repetition_penalty != 1.0
        self._next = 0 if whole else request.prompt_length

    def read(self, request: Request) -> None:
        """Takes in the tokens that have come since the last time."""
        new = request.tokens[self._next :]
        prompt = max(0, request.prompt_length - self._next)
        self._next = len(request.tokens)
        self._add(new)
        said = torch.tensor([self._places[token] for token in new[prompt:]], dtype=torch.int64)
        self.times.index_add_(0, said, torch.ones(len(said)))

    def _add(self, tokens: Sequence[int]) -> None:
        unseen = [token for token in dict.fromkeys(tokens) if token not in self._places]
        self._places |= zip(unseen, itertools.count(len(self._places)), strict=False)
        self.tokens = torch.cat((self.tokens, torch.tensor(unseen, dtype=torch.int64)))
        self.times = torch.cat((self.times, torch.zeros(len(unseen))))
