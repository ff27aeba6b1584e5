"""An evaluation in words for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qwen3_ascend.evaluation.bootstrap import FEWEST_WINDOWS
from qwen3_ascend.evaluation.result import (
    FEW_WINDOWS,
    Comparison,
    Evaluation,
    Interval,
    ModelFigures,
)
from qwen3_ascend.files.text import size_text

Show = Callable[[float], str]


def percent(value: float) -> str:
    """A share, such as 95.62 %."""
    return f"{100 * value:.2f} %"


def change(value: float) -> str:
    """A share with its sign, such as +0.08 %."""
    return f"{100 * value:+.2f} %"


def thousandths(value: float) -> str:
    """A KL divergence in thousandths of a nat, such as 0.645e-3."""
    return f"{1000 * value:.3g}e-3"


def with_interval(figure: Interval, show: Show) -> str:
    """A figure and its interval."""
    if figure.low is None or figure.high is None:
        return show(figure.value)
    return f"{show(figure.value)} [{show(figure.low)}, {show(figure.high)}]"


def caution(found: Evaluation) -> str | None:
    """What is to be known of the intervals; None if there is nothing."""
    if found.windows < FEWEST_WINDOWS:
        return (
            f"{found.windows} windows are too few for intervals, which need {FEWEST_WINDOWS}: "
            f"differences may be chance"
        )
    if found.windows < FEW_WINDOWS:
        return f"few windows: the intervals are rough below {FEW_WINDOWS}"
    return None


def lines(found: Evaluation) -> list[str]:
    """What `qwen3-ascend eval` prints."""
    head = (
        f"{found.text}: {found.windows} windows of {found.window}, {found.tokens:,} tokens scored; "
        f"{found.device}, {found.dtype}"
    )
    rows = [*_model("", found.model, found.reference, found.comparison)]
    if found.other is not None and found.kl_difference is not None:
        rows += [
            ("", ""),
            *_model("compared ", found.other, found.reference, found.other_comparison),
        ]
        rows.append(("KL difference", with_interval(found.kl_difference, thousandths)))
    width = max(len(name) for name, _ in rows)
    shown = [f"{name.ljust(width)}  {said}".rstrip() for name, said in rows]
    noted = caution(found)
    return [head, "", *shown, *(["", noted] if noted else [])]


def _model(
    prefix: str, model: ModelFigures, reference: ModelFigures | None, comparison: Comparison | None
) -> Iterator[tuple[str, str]]:
    yield f"{prefix}model", _named(model)
    if reference is not None:
        yield "reference", _named(reference)
    size = f"{model.bits_per_weight:.2f}, {size_text(model.nbytes)}"
    if reference is not None:
        size += f" ({percent(model.nbytes / reference.nbytes)} of the reference)"
    yield "bits per weight", size
    yield "perplexity", with_interval(model.perplexity, "{:.4f}".format)
    if comparison is None or reference is None:
        return
    yield "of the reference", with_interval(reference.perplexity, "{:.4f}".format)
    yield (
        "change",
        f"{with_interval(comparison.perplexity_change, change)}: {verdict_text(comparison)}",
    )
    peak = comparison.kl_max
    yield "KL divergence", with_interval(comparison.kl, thousandths)
    yield "  99 %", thousandths(comparison.kl_99)
    yield (
        "  largest",
        f"{peak.value:.3g} after token {peak.token} of window {peak.window}, {peak.text!r}",
    )
    yield "same top token", with_interval(comparison.same_top_token, percent)
    yield "right token", f"{with_interval(comparison.right_token, change)} of probability"


def _named(model: ModelFigures) -> str:
    return f"{model.name}, recipe {model.recipe}" if model.recipe else model.name


def verdict_text(comparison: Comparison) -> str:
    verdict = comparison.verdict
    return "too few windows to tell" if verdict == "unknown" else verdict
