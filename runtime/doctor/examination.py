"""The order of the examination: the machine, its layouts and operators, then whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import SCHEMES, Input
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.doctor import generation, machine, sampling
from qwen3_ascend.runtime.doctor.recorder import Recorder
from qwen3_ascend.runtime.doctor.report import Check, Report, Speed
from qwen3_ascend.runtime.model.loader import WeightSource
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG, SyntheticWeights


def run(checkpoint: Path | None, on_check: Callable[[Check], None]) -> Report:
    """Runs every check.

    Args:
        checkpoint: a converted model, whose sizes are examined and which generates; None for small
            random ones.
        on_check: receives each finding as it is made.

    Raises:
        CheckpointError: if there is none in that folder.
    """
    models = _models(checkpoint)
    facts, recorder = diagnose.environment(), Recorder(on_check)

    def card() -> Iterator[Check]:
        facts.update(diagnose.card())
        yield Check("environment", "an NPU that can be used", "ok", facts["card"])

    recorder.run("environment", "an NPU that can be used", card)
    if recorder.checks[-1].status == "failed":
        return Report(facts, tuple(recorder.checks))
    recorder.run("environment", "torch_npu and CANN", lambda: machine.pairing(facts))
    _examine_machine(recorder, models)
    speeds: list[Speed] = []
    for name, source in models:
        speeds += generation.examine(recorder, name, source)
    return Report(facts, tuple(recorder.checks), tuple(speeds))


def _examine_machine(recorder: Recorder, models: list[tuple[str, WeightSource]]) -> None:
    sizes = {"small": SMALL_CONFIG}
    sizes |= {name: source.config for name, source in models if source.config != SMALL_CONFIG}
    config = [*sizes.values()][-1]
    recorder.run("capabilities", "probing", lambda: machine.capabilities(config))
    recorder.run("forms", "trying each", lambda: machine.forms(config))
    recorder.run("layout", "self-checks", machine.layouts)
    recorder.run("load", "copying into FRACTAL_NZ", machine.copying)
    for name, each in sizes.items():
        machine.operators(recorder, name, each)
    sampling.examine(recorder, config.vocab_size)


def _models(checkpoint: Path | None) -> list[tuple[str, WeightSource]]:
    """What generates: a checkpoint, or a random model of each scheme. One with static inputs would
    need their ranges, which nobody has measured; its operators are examined like all others."""
    if checkpoint is not None:
        return [(checkpoint.resolve().name, CheckpointReader(checkpoint))]
    names = [name for name, kind in SCHEMES.items() if kind.input is not Input.INT8_STATIC]
    return [(f"random {name}", SyntheticWeights(SMALL_CONFIG, name)) for name in names]
