"""Models side by side on the same windows: one layer in memory at a time, logits a few rows.

The windows are read in groups, each through all layers of one model after the other, so that
memory depends neither on the length of the text nor on the number of layers:

- hidden states of one group: at most STATES_BYTES for all models together, and as much again while
  a layer is computed;
- weights: one layer, and at the end of a group the output projections of all models;
- logits: LOGIT_ROWS rows of the vocabulary, about four times for two models;
- four bytes for each scored token and model, and the tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.evaluation.subject import Subject
from qwen3_ascend.runtime.streaming import LayerStream

STATES_BYTES = 512 << 20
STATE_BYTES = 4
"""Of one number of a hidden state, at most."""

STEP_TOKENS = 2048
"""Tokens that go through a layer together."""

Window = Sequence[int]
Progress = Callable[[int, int], None]
"""(layers done, layers in all), over all groups and models."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on W windows of T tokens, T - 1 of which are scored.

    Attributes:
        loss: float64 [W], mean negative log-likelihood in nats.
        kl: float32 [W, T - 1], KL(reference || model) in nats; None for the reference itself.
        same_top: float64 [W], share of tokens with the reference's most probable token.
        right_token: float64 [W], mean change of the probability of the token that follows.
    """

    loss: NDArray[np.float64]
    kl: NDArray[np.float32] | None = None
    same_top: NDArray[np.float64] | None = None
    right_token: NDArray[np.float64] | None = None


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject],
    windows: Sequence[Window],
    progress: Progress = lambda done, total: None,
) -> list[Scores]:
    """Scores of each model.

    Args:
        subjects: the models; the others are held against the first.
        windows: of tokens, all of the same length.
        progress: is told after each layer.

    Raises:
        CheckpointError: if a model gives logits that are not finite.
    """
    size = group_size(subjects, len(windows[0]))
    groups = [windows[start : start + size] for start in range(0, len(windows), size)]
    ticks = _ticks(progress, len(groups) * sum(s.config.num_layers for s in subjects))
    rows = [_read_group(subjects, group, ticks) for group in groups]
    return [_join([group[index] for group in rows], len(windows)) for index in range(len(subjects))]


def group_size(subjects: Sequence[Subject], window: int) -> int:
    """Windows whose hidden states may be in memory together."""
    widths = sum(subject.config.hidden_size for subject in subjects)
    return max(1, STATES_BYTES // (window * widths * STATE_BYTES))


def _ticks(progress: Progress, total: int) -> Callable[[], None]:
    counter = iter(range(1, total + 1))
    return lambda: progress(next(counter), total)


Rows = dict[str, Tensor]
"""A figure for each scored token of a group [windows, T - 1], by the names of the fields."""


def _read_group(
    subjects: Sequence[Subject], group: Sequence[Window], tick: Callable[[], None]
) -> list[Rows]:
    logits = [_logits(subject, group, tick) for subject in subjects]
    following = torch.tensor([[*window[1:], 0] for window in group]).flatten()
    found: list[list[Rows]] = [[] for _ in subjects]
    start = 0
    for rows in zip(*logits, strict=True):
        right = following[start : start + len(rows[0])]
        start += len(right)
        for index, scored in enumerate(score(rows, right)):
            found[index].append(scored)
    return [_by_window(parts, len(group)) for parts in found]


def _logits(
    subject: Subject, group: Sequence[Window], tick: Callable[[], None]
) -> Iterator[Tensor]:
    """Logits on the host of all tokens of a group, some rows at a time; the layers are read at
    once, before the first rows are asked for."""
    stream = LayerStream(subject.backend, subject.config.rms_norm_eps, group, STEP_TOKENS)
    hidden = stream.read(subject.model, tick)
    norm, head = subject.model.final_norm(), subject.model.head()

    def rows() -> Iterator[Tensor]:
        for states in hidden:
            for logits in stream.logits(states, norm, head):
                if not bool(torch.isfinite(logits).all()):
                    raise CheckpointError(f"{subject.name} gives logits that are not finite")
                yield logits.cpu()

    return rows()


def score(rows: Sequence[Tensor], right: Tensor) -> list[Rows]:
    """The figures of each token.

    Args:
        rows: logits of each model, float32 [R, vocab]; the first is the reference.
        right: the tokens that follow, int64 [R].

    Returns:
        For each model its figures, float32 [R].
    """
    reference = rows[0].log_softmax(-1)
    said = _picked(reference, right)
    found: list[Rows] = [{"loss": -said}]
    top = reference.argmax(-1)
    for logits in rows[1:]:
        log_p = logits.log_softmax(-1)
        picked = _picked(log_p, right)
        found.append({
            "loss": -picked,
            "same_top": (log_p.argmax(-1) == top).float(),
            "right_token": picked.exp() - said.exp(),
            "kl": (reference - log_p).mul_(reference.exp()).sum(-1),
        })  # fmt: skip
    return found


def _picked(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return log_probabilities.gather(1, tokens[:, None])[:, 0]


def _by_window(parts: Sequence[Rows], windows: int) -> Rows:
    """The rows of a group by window, without the last of each, which nothing follows."""
    return {
        name: torch.cat([part[name] for part in parts]).view(windows, -1)[:, :-1]
        for name in parts[0]
    }


def _join(groups: Sequence[Rows], windows: int) -> Scores:
    def means(name: str) -> NDArray[np.float64]:
        return np.concatenate([group[name].double().mean(1).numpy() for group in groups])

    if "kl" not in groups[0]:
        return Scores(means("loss"))
    kl = np.concatenate([group["kl"].numpy() for group in groups])
    return Scores(means("loss"), kl, means("same_top"), means("right_token"))
