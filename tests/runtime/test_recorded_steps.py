"""Steps of decoding that the CPU records and replays give what computing them anew gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.static_inputs import write_static
from support.tiny_models import DATA

from qwen3_ascend import SamplingParams, load, native
from qwen3_ascend.convert.conversion import convert_checkpoint
from qwen3_ascend.runtime.backends.cpu import steps
from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend
from qwen3_ascend.runtime.backends.cpu.steps import (
    MOST_RECORDED,
    CpuStep,
    Recorded,
    RecordedSteps,
)
from qwen3_ascend.runtime.llm import LLM

RECIPES = ("w8a8", "w8a8-head", "w8a8-static", "bf16", "w8a16", "w4a16-plain", "w4a8-plain")

pytestmark = pytest.mark.skipif(native.layer_kernels() is None, reason="not compiled")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model by every scheme."""
    root = tmp_path_factory.mktemp("recorded")
    for recipe in RECIPES:
        if recipe == "w8a8-static":
            write_static(DATA, root / recipe)
        else:
            convert_checkpoint(DATA, root / recipe, recipe)
    return {recipe: root / recipe for recipe in RECIPES}


def prompts(*lengths: int) -> list[Sequence[int]]:
    return [[7 + (31 * i + length) % 900 for i in range(length)] for length in lengths]


def answers(llm: LLM, *lengths: int, new: int = 40) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    return [[*one.token_ids] for one in llm.generate(prompts(*lengths), params)]


def unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is computed as it comes."""
    monkeypatch.setattr(
        RecordedSteps, "__call__", lambda self, step: self._forward(self._open(step))
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_are_those_of_steps_that_are_not_recorded(
    checkpoints: dict[str, Path], recipe: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over borders of blocks, with answers that begin and end at different times, and a long prompt
    in between, for which scratch memory grows."""
    work = ((5, 9, 30, 17), (700,), (3, 60))

    def run() -> list[list[list[int]]]:
        llm = load(
            checkpoints[recipe], device="cpu", dtype=dtype, block_size=16, kv_cache_tokens=4096,
            max_batch=3,
        )  # fmt: skip
        return [answers(llm, *lengths) for lengths in work]

    recorded = run()
    unrecorded(monkeypatch)
    assert recorded == run()


def test_a_step_is_recorded_once(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in another number of threads anew; the oldest is forgotten."""
    recorded: list[CpuStep] = []
    original = RecordedSteps._record

    def record(self: RecordedSteps, step: CpuStep) -> Recorded:
        recorded.append(step)
        return original(self, step)

    monkeypatch.setattr(RecordedSteps, "_record", record)
    llm = load(checkpoints["w8a8"], device="cpu", kv_cache_tokens=4096, max_batch=12)
    expected = answers(llm, 5)
    assert len(recorded) == 1
    assert answers(llm, 5) == expected
    assert len(recorded) == 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert answers(llm, 5) == expected
    finally:
        torch.set_num_threads(before)
    assert len(recorded) == 2
    for batch in range(2, MOST_RECORDED + 2):
        answers(llm, *[5] * batch, new=3)
    count = len(recorded)
    answers(llm, *[5] * (MOST_RECORDED + 1), new=3)
    assert len(recorded) == count
    assert answers(llm, 5) == expected
    assert len(recorded) == count + 1


def test_logits_that_were_given_stay_what_they_are(checkpoints: dict[str, Path]) -> None:
    """A scored text may go through steps of one token, whose logits lie in one place."""
    ids = prompts(30)[0]
    whole = load(checkpoints["w8a8"], device="cpu").logits(ids)
    single = load(checkpoints["w8a8"], device="cpu", step_tokens=1).logits(ids)
    assert torch.allclose(single, whole, atol=0.2)
    assert len({tuple(row.tolist()) for row in single}) == len(ids)


def test_linears_of_torch_are_not_recorded(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RecordedSteps] = []
    monkeypatch.setattr(steps.RecordedSteps, "__init__", lambda self, *given: made.append(self))
    monkeypatch.setattr(native, "float_products", lambda: None)
    llm = load(checkpoints["bf16"], device="cpu")
    assert not made
    assert len(answers(llm, 5)[0]) == 40


def test_the_backend_of_these_tests(checkpoints: dict[str, Path]) -> None:
    from qwen3_ascend.checkpoint.reader import CheckpointReader
    from qwen3_ascend.runtime import backends
    from qwen3_ascend.runtime.options import DeviceOptions

    config = CheckpointReader(checkpoints["w8a8"]).config
    assert isinstance(backends.get(config, DeviceOptions("cpu")), CpuBackend)
