"""How far an engine's answers are from what our own runtime computes of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from handover.engines import Answer
from handover.own_runtime import OwnRuntime


@dataclass(frozen=True)
class Agreement:
    """Of greedy answers, each token being judged after the engine's own earlier tokens.

    Attributes:
        tokens: that were chosen.
        gaps: of the tokens that our runtime would not have chosen: how much less likely it holds
            them than its own choice, in nats.
        difference: mean absolute difference of the log-probabilities of prompt tokens, in nats.
        perplexity: of the prompts by the engine.
        own_perplexity: by our runtime.
    """

    tokens: int
    gaps: tuple[float, ...]
    difference: float
    perplexity: float
    own_perplexity: float

    @property
    def share(self) -> float:
        """Tokens that both choose, of all."""
        return 1 - len(self.gaps) / self.tokens


def agreement(
    checkpoint: Path,
    answers: Sequence[Answer],
    ranks: int = 1,
    dtype: torch.dtype = torch.float32,
    nudged: bool = False,
) -> Agreement:
    """Computes every sequence again, teacher-forced; `ranks` and `dtype` as in OwnRuntime.

    With `nudged`, a gap is the smaller of two, the other being that of a runtime whose linears are
    fed values that differ in the last bit: in a mixture such a bit may choose another expert, and
    move a gap further than engines may differ.
    """
    runtime = OwnRuntime(checkpoint, ranks, dtype)
    other = OwnRuntime(checkpoint, ranks, dtype, nudged=True) if nudged else None
    gaps: list[float] = []
    engine: list[float] = []
    own: list[float] = []
    for answer in answers:
        whole = [*answer.prompt, *answer.tokens]
        logprobs = runtime.logprobs(whole)
        opinions = [logprobs] if other is None else [logprobs, other.logprobs(whole)]
        for place, token in enumerate(answer.tokens, start=len(answer.prompt) - 1):
            if int(logprobs[place].argmax()) != token:
                gaps.append(min(_gap(each[place], token) for each in opinions))
        engine += answer.prompt_logprobs
        own += _of_prompt(logprobs, answer.prompt)
    return Agreement(
        tokens=sum(len(answer.tokens) for answer in answers),
        gaps=tuple(gaps),
        difference=_mean_difference(engine, own),
        perplexity=math.exp(-sum(engine) / len(engine)),
        own_perplexity=math.exp(-sum(own) / len(own)),
    )


def rounding_noise(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> float:
    """How far our runtime is from itself if what goes into its linears differs in the last bit: the
    mean absolute difference of the log-probabilities of prompt tokens, in nats.

    An activation that lies between two codes falls to either side of it, and the next layers see a
    step between codes. No engine that sums in an order of its own can be nearer than this. It has
    to be every linear: what comes out of one with fixed scales is the same to the last bit unless a
    code has moved, so that a difference of the embeddings alone ends in the first layer.
    """
    runtime, nudged = OwnRuntime(checkpoint), OwnRuntime(checkpoint, nudged=True)
    one: list[float] = []
    other: list[float] = []
    for prompt in prompts:
        one += _of_prompt(runtime.logprobs(prompt), prompt)
        other += _of_prompt(nudged.logprobs(prompt), prompt)
    return _mean_difference(one, other)


def _gap(row: Tensor, token: int) -> float:
    """How much less likely a token is than the likeliest, in nats."""
    return float(row.max() - row[token])


def _of_prompt(logprobs: Tensor, prompt: Sequence[int]) -> list[float]:
    """Of each token of a prompt but its first."""
    following = torch.tensor([*prompt[1:]])[:, None]
    found: list[float] = logprobs[: len(prompt) - 1].gather(1, following)[:, 0].tolist()
    return found


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
