"""Which token a random number means: the filters, and a draw from what they leave.

The tokens of a row are put in order: by descending logit, equal logits by ascending token. With
weights exp((logit - greatest) / temperature), top_k, top_p and min_p each keep the tokens from the
first to some place in that order, so together they keep the shortest of these stretches. A number
from [0, 1), multiplied by the weight of what is kept, falls on one token: the first whose weight,
with all before it, is greater. This is the definition, in float64, and it needs a whole row.

A few hundred greatest logits and bounds on what the rest weighs nearly always say the same. If
both bounds lead to one token, it is that of the definition; if not, nothing is said, and the whole
row has to be looked at. So how many candidates there were changes no token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.runtime.engine.request import SamplingParams

WITHOUT_TOP_K = 1024
"""Candidates of a row whose filters do not say how many tokens they leave."""

MOST = 4096
"""Candidates of a row at most; beyond, whole rows are hardly dearer."""

REST_ERROR = 2.0**-12
"""Bound on the relative error of a device's float32 sum over a vocabulary: some 2400 additions in
each of 64 lanes. A bound so wide asks for at most a quarter more whole rows, since the places where
it matters are WITHOUT_TOP_K borders between candidates, each as wide as this part of the rest."""

ROUNDING = 1e-9
"""Bound on the relative error of float64 sums of some 100 000 weights, in whatever order."""


@dataclass(frozen=True)
class Candidates:
    """The greatest logits of R rows, on the host and in order.

    Attributes:
        tokens: int64 [R, K].
        logits: of these tokens, float64 [R, K], descending; equal ones by ascending token, except
            that the last and its equals may leave out tokens that are equal too.
        rest: of all tokens whose logit is not above the last one, float64 [R]: the sum of
            exp((logit - last) / temperature), to REST_ERROR. Of no meaning for rows with a top_k.
        whole: whether these are all tokens.
    """

    tokens: Tensor
    logits: Tensor
    rest: Tensor
    whole: bool


def enough(params: SamplingParams) -> int:
    """How many candidates nearly always suffice.

    Logits that come from bfloat16 are often equal, so twice top_k and some are asked for.
    """
    return min(2 * params.top_k + 24, MOST) if params.top_k else WITHOUT_TOP_K


def greatest(logits: Tensor, params: Sequence[SamplingParams], count: int) -> Candidates:
    """The `count` greatest of each row of float32 logits [R, vocab], brought to the host in one
    copy of 8 bytes each."""
    values, tokens = logits.topk(count)
    parts = [values.view(torch.int32), tokens.to(torch.int32)]
    whole = count == logits.shape[1]
    if not whole and any(not one.top_k for one in params):
        temperatures = torch.tensor([[one.temperature] for one in params], device=logits.device)
        rest = _rest(logits, values[:, -1:].contiguous(), temperatures)
        parts.append(rest.view(torch.int32))
    host = torch.cat(parts, dim=1).cpu()
    floats = host.view(torch.float32)
    rest = floats[:, 2 * count :].sum(dim=1, dtype=torch.float64)
    return _ordered(host[:, count : 2 * count].long(), floats[:, :count], rest, whole)


def whole_row(logits: Tensor) -> Candidates:
    """All tokens of a row of float32 logits [vocab] on the host."""
    ordered, tokens = logits.sort(descending=True, stable=True)
    return Candidates(
        tokens[None], ordered[None].double(), torch.zeros(1, dtype=torch.float64), whole=True
    )


def choose(
    found: Candidates, params: Sequence[SamplingParams], numbers: Sequence[float]
) -> list[int | None]:
    """The token that each row's number in [0, 1) means; None where the candidates do not say.

    Raises:
        FloatingPointError: if a greatest logit is not a finite number.
    """
    if not bool(found.logits[:, 0].isfinite().all()):
        raise FloatingPointError("the model has computed logits that are no finite numbers")
    rows = Rows(found, params)
    kept, known = rows.kept()
    number = torch.tensor(numbers, dtype=torch.float64)
    target = kept.scaled(number).widened(rows.rounding)
    low, high = rows.places(target.least), rows.places(target.most)
    known &= (low == high) & (target.most < rows.end)
    tokens = rows.tokens.gather(1, low.clamp(max=rows.tokens.shape[1] - 1)[:, None])[:, 0]
    pairs = zip(tokens.tolist(), known.tolist(), strict=True)
    return [token if sure else None for token, sure in pairs]


@dataclass(frozen=True)
class _Weight:
    """Bounds on a weight of each row, float64 [R]; the heaviest token weighs 1."""

    least: Tensor
    most: Tensor

    def widened(self, error: float) -> _Weight:
        return _Weight(self.least * (1 - error), self.most * (1 + error))

    def scaled(self, factor: Tensor) -> _Weight:
        return _Weight(self.least * factor, self.most * factor)

    def or_else(self, other: _Weight, where: Tensor) -> _Weight:
        """The other one in the rows where it is to be taken."""
        least = torch.where(where, other.least, self.least)
        return _Weight(least, torch.where(where, other.most, self.most))

    def or_less(self, other: _Weight) -> _Weight:
        """The lesser of the two."""
        return _Weight(self.least.minimum(other.least), self.most.minimum(other.most))


class Rows:
    """Weights of candidates, and what each filter keeps of them.

    Without the whole row, only candidates above the last one have a place that is certain; the
    last one and its equals belong to the rest.

    Attributes:
        tokens: int64 [R, K], as in Candidates.
        weights: of each, float64 [R, K]; the first weighs 1, those of uncertain place nothing.
        before: the weight of all before it, float64 [R, K].
        end: the weight of all, float64 [R].
        rounding: by which sums may be wrong, relatively.
    """

    def __init__(self, found: Candidates, params: Sequence[SamplingParams]) -> None:
        self.tokens, self.rounding = found.tokens, 0.0 if found.whole else ROUNDING
        self._params, self._whole, self._width = params, found.whole, found.tokens.shape[1]
        self._temperature = _column(one.temperature for one in params)
        self._first, self._last = found.logits[:, 0], found.logits[:, -1]
        beyond = (found.logits <= self._last[:, None]) & (not found.whole)
        self._logits = found.logits.masked_fill(beyond, -torch.inf)
        self.weights = self._weight(self._logits)
        self._sums = self.weights.cumsum(dim=1)
        self.before = torch.nn.functional.pad(self._sums[:, :-1], (1, 0))
        self.end = self._sums[:, -1]
        self._each_beyond = self._weight(self._last[:, None])[:, 0] * (not found.whole)
        rest = found.rest.where(self._each_beyond > 0, 0) * self._each_beyond
        self._all = _Weight(
            self.end + rest * (1 - REST_ERROR), self.end + rest * (1 + REST_ERROR)
        ).widened(self.rounding)

    def places(self, target: Tensor) -> Tensor:
        """The place of the first token whose sum is greater, int64 [R]."""
        return (self._sums <= target[:, None]).sum(dim=1)

    def kept(self) -> tuple[_Weight, Tensor]:
        """The weight of what all filters keep, and in which rows it is known at all."""
        by_top_k, known = self._top_k()
        return by_top_k.or_less(self._top_p(by_top_k)).or_less(self._min_p()), known

    def _weight(self, logits: Tensor) -> Tensor:
        """Of logits [R, N]."""
        return ((logits - self._first[:, None]) / self._temperature[:, None]).exp()

    def _sum_of(self, count: Tensor) -> Tensor:
        """The weight of the first `count` [R] tokens; a count of 0 is taken for 1."""
        return self._sums.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]

    def _top_k(self) -> tuple[_Weight, Tensor]:
        """What equals the k-th stays."""
        k = torch.tensor([one.top_k for one in self._params])
        limited = (k > 0) & ~((k >= self._width) & self._whole)
        kth = (k - 1).clamp(0, self._width - 1)[:, None]
        border = self._logits.gather(1, kth)
        kept = self._sum_of((self._logits >= border).sum(dim=1))
        # The k-th must be above the candidates of uncertain place, which are -inf here.
        certain = (k <= self._width) & (border[:, 0] > -torch.inf)
        weight = self._all.or_else(_Weight(kept, kept).widened(self.rounding), limited)
        return weight, certain | ~limited | self._whole

    def _top_p(self, whole: _Weight) -> _Weight:
        """The shortest stretch that weighs this share of what top_k left."""
        top_p = _column(one.top_p for one in self._params)
        share = whole.scaled(top_p)
        shortest, longest = (
            self._sum_of((self.before < bound[:, None]).sum(dim=1))
            for bound in (share.least, share.most)
        )
        reached = self.end >= share.most
        kept = _Weight(
            shortest.maximum(share.least),
            torch.where(reached, longest, share.most + self._each_beyond),
        )
        return whole.or_else(kept, top_p < 1)

    def _min_p(self) -> _Weight:
        """Without bounds where it is off."""
        logarithms = _column(
            one.temperature * (math.log(one.min_p) if one.min_p else -math.inf)
            for one in self._params
        )
        floor = self._first + logarithms
        kept = self._sum_of((self._logits >= floor[:, None]).sum(dim=1))
        reached = (floor > self._last) | self._whole
        bounds = _Weight(kept, kept.where(reached, torch.inf))
        off = torch.full_like(floor, torch.inf)
        return bounds.or_else(_Weight(off, off), floor == -torch.inf)


def _rest(logits: Tensor, last: Tensor, temperatures: Tensor) -> Tensor:
    """What tokens weigh whose logits are not above the last [R, 1], in units of that one: [R, 1].

    In these units nothing overflows, and what counts loses nothing to rounding.
    """
    weights = (logits - last).div_(temperatures).masked_fill_(logits > last, -torch.inf).exp_()
    return weights.sum(dim=1, keepdim=True)


def _ordered(tokens: Tensor, logits: Tensor, rest: Tensor, whole: bool) -> Candidates:
    """Candidates from what a device has found, in whatever order it puts equal ones."""
    tokens, places = tokens.sort(dim=1)
    ordered, order = logits.double().gather(1, places).sort(dim=1, descending=True, stable=True)
    return Candidates(tokens.gather(1, order), ordered, rest, whole)


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
