"""One request: how its tokens are to be chosen, and how far it has come. Host only, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qwen3_ascend.errors import RequestError
from qwen3_ascend.options import option

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; each field says what it is for.

    Raises:
        RequestError: on construction, for a value out of range.
    """

    temperature: float = option(
        0.0, "0 takes the most probable token; otherwise logits are divided by it."
    )
    top_k: int = option(0, "Keep the k most probable tokens; 0 keeps all.")
    top_p: float = option(
        1.0, "Keep the smallest set of tokens whose probabilities reach this sum."
    )
    min_p: float = option(
        0.0, "Drop tokens that are less probable than this share of the most probable one."
    )
    repetition_penalty: float = option(
        1.0,
        "Divides positive and multiplies negative logits of every token that occurs in the prompt "
        "or the output (arXiv 1909.05858); 1 is off.",
    )
    presence_penalty: float = option(
        0.0, "Subtracted once from the logit of every token in the output; 0 is off."
    )
    frequency_penalty: float = option(
        0.0,
        "Subtracted from the logit of a token once for each time it is in the output; 0 is off.",
    )
    seed: int | None = option(
        None, "Seed of this request's own random numbers.", unset="another one each time"
    )
    stop: str | tuple[str, ...] = option(
        (),
        "A string that ends the output and is no part of it; there may be several.",
        unset="none",
    )
    max_new_tokens: int = option(512, "Upper bound on the tokens generated.")
    ignore_eos: bool = option(False, "Go on after an end-of-sequence token.")
    n: int = option(
        1,
        "Answers to each prompt. They share the computation of the prompt; with a seed, each draws "
        "from random numbers of its own that follow from the seed.",
    )
    logprobs: int | None = option(
        None,
        "How many of the most probable tokens to report, with their log-probabilities, at each "
        "generated token; 0 reports the generated one only. They are the model's own, before "
        "penalties, temperature and filters.",
        unset="nothing is reported",
    )

    def __post_init__(self) -> None:
        checks = {
            "temperature must be 0 or more": 0 <= self.temperature < math.inf,
            "top_k must be 0 (off) or more": isinstance(self.top_k, int) and self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be between 0 and 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": 0 < self.repetition_penalty < math.inf,
            "presence_penalty must be a number": math.isfinite(self.presence_penalty),
            "frequency_penalty must be a number": math.isfinite(self.frequency_penalty),
            "seed must fit into 64 bits": -(1 << 63) <= (self.seed or 0) < 1 << 64,
            "max_new_tokens must be 1 or more": self.max_new_tokens >= 1,
            "n must be 1 or more": isinstance(self.n, int) and self.n >= 1,
            "logprobs must be 0 or more": self.logprobs is None or self.logprobs >= 0,
            "stop strings must not be empty": self.stop == () or all(self.stop_strings),
        }
        for message, holds in checks.items():
            if not holds:
                raise RequestError(message)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass
class Request:
    """A request on its way; the engine moves it forward.

    Attributes:
        number: tells requests apart, and which came first.
        tokens: prompt and output token ids.
        prompt_length: how many of them are the prompt.
        max_length: bound on len(tokens), from max_new_tokens and the context.
        sample: which of the `n` answers to its prompt this is, counted from 0.
        wants_logits: of every row; such a request chooses no token.
        computed: how many tokens have their keys and values in the cache.
        in_flight: how many more the device has been given to compute.
        promised: tokens that only the device knows so far: it has chosen them, or is about to.
        retired: whether it is finished or given up, so that nothing more is told of it.
        block_table: the blocks that hold them.
        prefix_keys: a name for the content of each full block; see BlockPool.
    """

    number: int
    params: SamplingParams
    tokens: list[int]
    prompt_length: int
    max_length: int
    eos_ids: frozenset[int]
    sample: int = 0
    wants_logits: bool = False
    computed: int = 0
    in_flight: int = 0
    promised: int = 0
    retired: bool = False
    finish_reason: FinishReason | None = None
    block_table: list[int] = field(default_factory=list)
    prefix_keys: list[bytes] = field(default_factory=list)

    @property
    def output(self) -> Sequence[int]:
        """The generated token ids."""
        return self.tokens[self.prompt_length :]

    @property
    def begun(self) -> int:
        """How many tokens are computed or in flight."""
        return self.computed + self.in_flight

    @property
    def length(self) -> int:
        """How many tokens there are, the promised ones among them."""
        return len(self.tokens) + self.promised

    @property
    def pending(self) -> int:
        """How many tokens are still to be given to the device. The last token of an answer is
        chosen, but never computed."""
        if self.promised and self.length >= self.max_length:
            return 0
        return self.length - self.begun

    def append(self, token: int) -> None:
        """Adds a generated token, promised or not, and notes whether it is the last."""
        self.promised = max(self.promised - 1, 0)
        self.tokens.append(token)
        if token in self.eos_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_length:
            self.finish_reason = "length"
