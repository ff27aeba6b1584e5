"""What an evaluation found, as data: what `--json` prints, `--save` writes and `report` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3_ascend.errors import CheckpointError, ConfigError
from qwen3_ascend.files.json_file import (
    Count,
    Finite,
    Name,
    Size,
    check_keys,
    plain,
    read_json_object,
    typed,
)

FORMAT = "qwen3-ascend-evaluation"
FORMAT_VERSION = 1

FEW_WINDOWS = 30
"""Below this an interval is itself uncertain, and is marked."""

Verdict = Literal["worse", "not distinguishable", "better", "unknown"]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; the ends are None where there are too few windows."""

    value: Finite
    low: Finite | None
    high: Finite | None


@dataclass(frozen=True)
class Peak:
    """The token at which two models differ most.

    Attributes:
        value: its KL divergence in nats.
        window, token: where the prediction stands, each counted from 0; the token is the last one
            that the models have read.
        text: of that token.
    """

    value: Finite
    window: Count
    token: Count
    text: str


@dataclass(frozen=True)
class ModelFigures:
    """One model.

    Attributes:
        name: as the user gave it.
        recipe: of a converted checkpoint; None for a model as its source has it.
        weights: how many it has.
        nbytes: of its tensors.
        perplexity: exp of the mean negative log-likelihood of a token, in nats.
    """

    name: Name
    recipe: Name | None
    weights: Size
    nbytes: Size
    perplexity: Interval

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales and padding included."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Comparison:
    """A model against the reference, paired token by token.

    Attributes:
        perplexity_change: ratio of the perplexities minus 1.
        kl: mean over tokens of KL(reference || model), in nats.
        kl_99: 99 % of the tokens have no larger KL.
        kl_max: the largest.
        same_top_token: share of tokens at which both have the same most probable token.
        right_token: mean change of the probability of the token that follows in the text.
    """

    perplexity_change: Interval
    kl: Interval
    kl_99: Finite
    kl_max: Peak
    same_top_token: Interval
    right_token: Interval

    @property
    def verdict(self) -> Verdict:
        """In perplexity: whether the interval of its change leaves zero out."""
        low, high = self.perplexity_change.low, self.perplexity_change.high
        if low is None or high is None:
            return "unknown"
        return "worse" if low > 0 else "better" if high < 0 else "not distinguishable"


@dataclass(frozen=True)
class Evaluation:
    """Everything that one evaluation found.

    Attributes:
        text, text_blake3: name of the file, and the BLAKE3 of its bytes.
        window: tokens of a window.
        windows: that were read.
        device, dtype: what computed, in which type.
        model: the checkpoint.
        reference: what it was held against, if anything.
        comparison: of the model with the reference.
        other: a second checkpoint, held against the same reference.
        other_comparison: of the second.
        kl_difference: KL of the second minus that of the first, paired.
    """

    text: Name
    text_blake3: Name
    window: Count
    windows: Count
    device: Name
    dtype: Name
    model: ModelFigures
    reference: ModelFigures | None = None
    comparison: Comparison | None = None
    other: ModelFigures | None = None
    other_comparison: Comparison | None = None
    kl_difference: Interval | None = None

    @property
    def tokens(self) -> int:
        """Tokens that were scored."""
        return self.windows * (self.window - 1)

    def to_json(self) -> dict[str, Any]:
        """The object that is printed and saved."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **plain(self)}

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Reads a saved evaluation; CheckpointError naming the file if it is none."""
        advice = "make one with: qwen3-ascend eval OUT --text FILE --save FILE.json"
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; {advice}")
        try:
            data = read_json_object(path)
            if (data.pop("format", None), data.pop("format_version", None)) != (
                FORMAT,
                FORMAT_VERSION,
            ):
                raise ValueError(f"it is no evaluation of this version; {advice}")
            found = typed(data, cls, "it")
            check_keys(data, plain(found), "it")
        except (ValueError, ConfigError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        return found
