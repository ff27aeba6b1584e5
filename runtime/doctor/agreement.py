"""Whether two ways of computing say the same.

Where the same kernels compute the same rows, tokens are equal. Where another kernel, or the same
one with another number of rows, rounds a sum at another place, two tokens that are all but equally
probable may change places; what follows is another text, and tells nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen3_ascend.runtime.doctor.report import Status
from qwen3_ascend.runtime.engine.engine import Engine, TokenEvent
from qwen3_ascend.runtime.engine.request import SamplingParams

PROMPTS = tuple(tuple((37 * i + 11 * n) % 1000 for i in range(n)) for n in (5, 127, 130))
"""Prompts of random tokens; two of them cross a block of 128 while they decode."""

NEW_TOKENS = 24

CANDIDATES = 5
"""Most probable tokens that are looked at."""

TIE = 0.5
"""Difference of two logarithms of probabilities that rounding can turn."""


@dataclass(frozen=True)
class Answer:
    """Generated tokens, and the logarithms of what was most probable at each."""

    tokens: tuple[int, ...]
    likely: tuple[Mapping[int, float], ...]


def generate(engine: Engine, batch: int) -> list[Answer]:
    """Answers to the last `batch` prompts, computed together."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, logprobs=CANDIDATES)
    requests = [engine.add(prompt, params, frozenset()) for prompt in PROMPTS[-batch:]]
    likely: dict[int, list[Mapping[int, float]]] = {one.number: [] for one in requests}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, TokenEvent) and event.logprobs is not None:
                likely[event.request.number].append(dict(event.logprobs.top))
    return [Answer(tuple(one.output), tuple(likely[one.number])) for one in requests]


def agreement(answers: list[Answer], expected: list[Answer], exact: bool) -> tuple[Status, str]:
    """(ok or failed, how many tokens are equal); if not exact, a tie may end the equality."""
    same = [_common(*pair) for pair in zip(answers, expected, strict=True)]
    detail = f"{'/'.join(map(str, same))} of {len(expected[0].tokens)} tokens equal"
    apart = [
        _distance(mine, other, at)
        for mine, other, at in zip(answers, expected, same, strict=True)
        if at < len(other.tokens)
    ]
    if not apart:
        return "ok", detail
    detail += f"; the first others were {max(apart):.2g} less probable"
    if exact:
        return "failed", f"{detail}, but all should be equal"
    return ("ok" if max(apart) <= TIE else "failed"), f"{detail}, {TIE:g} allowed"


def _common(left: Answer, right: Answer) -> int:
    pairs = enumerate(zip(left.tokens, right.tokens, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(left.tokens))


def _distance(answer: Answer, expected: Answer, at: int) -> float:
    """How much less probable than the expected token the other one is, by what was expected."""
    likely = expected.likely[at]
    return max(likely.values()) - likely.get(answer.tokens[at], float("-inf"))
