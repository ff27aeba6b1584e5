"""Evaluates a checkpoint on a text, beside the model it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3_ascend.errors import CheckpointError, OptionError
from qwen3_ascend.evaluation.bootstrap import Values, interval
from qwen3_ascend.evaluation.measuring import Progress, Scores, Window, measure
from qwen3_ascend.evaluation.options import EvaluationOptions
from qwen3_ascend.evaluation.result import (
    Comparison,
    Evaluation,
    Interval,
    ModelFigures,
    Peak,
)
from qwen3_ascend.evaluation.subject import Note, Subject, open_subject
from qwen3_ascend.evaluation.text import read_text, windows_of
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.runtime.tokenizer import NoTokenizer, Tokenizer

SHARE = 0.99
"""Of the tokens, those that kl_99 is of."""

MOST_LOSS = 700.0
"""Nats a token whose perplexity is still a float64."""


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    compare: str | Path | None = None,
    options: EvaluationOptions = EvaluationOptions(),
    progress: Progress = lambda done, total: None,
    note: Note = lambda line: None,
) -> Evaluation:
    """Measures how well a model predicts a text, and how far it is from its reference.

    Memory is bounded whatever the model and the text: see `measuring`.

    Args:
        model: a converted checkpoint; also a folder or a hub's id, as `convert` takes it.
        text: a UTF-8 file.
        against: the reference, likewise; without it perplexity alone is found.
        compare: a second model that is held against the same reference.
        options: see the fields of EvaluationOptions.
        progress: called with (layers done, layers in all).
        note: called with a line for people about a download.

    Raises:
        OptionError: if the text is too short, is not UTF-8, or the models have other tokens.
        UserError: if a model cannot be opened, does not fit the device, or gives no predictions
            that can be measured.
    """
    if compare is not None and against is None:
        raise OptionError(
            "compare: two models are compared by their distance from a reference; "
            "say which by --against"
        )
    path = user_path(text)
    said, blake3 = read_text(path)
    with ExitStack() as stack:
        first = stack.enter_context(open_subject(str(model), options, note=note))
        subjects = [first]
        for place in (compare, against):
            if place is not None:
                opened = open_subject(str(place), options, first.made_of, note)
                subjects.append(stack.enter_context(opened))
        windows = _common_windows(subjects, said, path, options)
        for line in _known_texts(subjects, blake3):
            note(line)
        order = [subjects[-1], *subjects[:-1]]  # the reference is measured first
        scores = measure(order, windows, progress)
        sides = [_Side(subject, found) for subject, found in zip(order, scores, strict=True)]
        for side in sides:
            side.check()
        alone = Evaluation(
            text=path.name,
            text_blake3=blake3,
            window=options.window,
            windows=len(windows),
            device=first.backend.name,
            dtype=str(first.backend.dtype).removeprefix("torch."),
            model=sides[min(1, len(sides) - 1)].figures(),
        )
        return alone if against is None else _compared(alone, sides, windows)


def _compared(alone: Evaluation, sides: Sequence[_Side], windows: Sequence[Window]) -> Evaluation:
    """An evaluation with what the sides say of each other: reference, model, and a second one."""
    reference, model, *others = sides
    found = replace(
        alone, reference=reference.figures(), comparison=model.against(reference, windows)
    )
    for other in others:
        found = replace(
            found,
            other=other.figures(),
            other_comparison=other.against(reference, windows),
            kl_difference=_estimate(other.kl - model.kl),
        )
    return found


def _known_texts(subjects: Sequence[Subject], text_blake3: str) -> Iterator[str]:
    """A line for each model that has seen the text before."""
    for subject in subjects:
        calibration = subject.made_of.calibration if subject.made_of else None
        if calibration is not None and calibration.blake3 == text_blake3:
            yield f"{subject.name} was calibrated with this text: it looks better than it is"


def _common_windows(
    subjects: Sequence[Subject], said: str, path: Path, options: EvaluationOptions
) -> list[list[int]]:
    """The windows of a text; OptionError if the models do not share their tokens."""
    first = subjects[0]
    for other in subjects[1:]:
        if other.config.vocab_size != first.config.vocab_size:
            raise OptionError(
                f"{first.name} has {first.config.vocab_size} tokens and {other.name} has "
                f"{other.config.vocab_size}: only models with the same tokens can be compared"
            )
    for subject in subjects:
        if options.window > subject.config.context_length:
            raise OptionError(
                f"window: {options.window} is longer than the context of {subject.name}, "
                f"{subject.config.context_length} tokens"
            )
    readers = [s for s in subjects if not isinstance(s.tokenizer, NoTokenizer)]
    if not readers:
        raise OptionError(
            f"{first.name} has no tokenizer, which is needed to read {path}: put tokenizer.json "
            f"beside its config.json"
        )
    windows = windows_of(said, path, readers[0].tokenizer, options)
    if (largest := max(map(max, windows))) >= first.config.vocab_size:
        raise OptionError(
            f"the tokenizer of {readers[0].name} makes token {largest} of {path}, but the model "
            f"has {first.config.vocab_size}: its tokenizer is that of another model"
        )
    for other in readers[1:]:
        if windows_of(said, path, other.tokenizer, options) != windows:
            raise OptionError(
                f"the tokenizers of {readers[0].name} and {other.name} divide {path} differently: "
                f"only models with the same tokens can be compared"
            )
    return windows


@dataclass(frozen=True)
class _Side:
    """A model, and what was measured of it."""

    subject: Subject
    scores: Scores

    def check(self) -> None:
        """CheckpointError if a window is lost beyond all measure."""
        if (worst := float(self.scores.loss.max())) > MOST_LOSS:
            raise CheckpointError(
                f"{self.subject.name} loses {worst:.0f} nats a token, which is no language model "
                f"any more: its weights are damaged, or its tokenizer is that of another model"
            )

    def figures(self) -> ModelFigures:
        """The model by itself."""
        subject = self.subject
        return ModelFigures(
            subject.name, subject.recipe, subject.weights, subject.nbytes,
            _estimate(self.scores.loss, math.exp),
        )  # fmt: skip

    def against(self, reference: _Side, windows: Sequence[Window]) -> Comparison:
        """The model beside its reference."""
        scores = self.scores
        assert scores.kl is not None and scores.same_top is not None
        assert scores.right_token is not None
        return Comparison(
            perplexity_change=_estimate(scores.loss - reference.scores.loss, math.expm1),
            kl=_estimate(self.kl),
            kl_99=float(np.quantile(scores.kl, SHARE)),
            kl_max=_peak(scores.kl, windows, self.subject.tokenizer),
            same_top_token=_estimate(scores.same_top),
            right_token=_estimate(scores.right_token),
        )

    @property
    def kl(self) -> Values:
        """The mean KL of each window."""
        assert self.scores.kl is not None
        return np.asarray(self.scores.kl.mean(1, dtype=np.float64))


def _estimate(values: Values, scale: Callable[[float], float] = float) -> Interval:
    """The mean over windows and its interval, on an increasing scale."""
    ends = interval(values)
    low, high = (None, None) if ends is None else (scale(ends[0]), scale(ends[1]))
    return Interval(scale(float(values.mean())), low, high)


def _peak(kl: NDArray[np.float32], windows: Sequence[Window], tokenizer: Tokenizer) -> Peak:
    window, token = divmod(int(kl.argmax()), kl.shape[1])
    spelt = tokenizer.spell(windows[window][token])
    return Peak(float(kl[window, token]), window, token, spelt)
