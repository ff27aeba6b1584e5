"""The doctor finds a healthy simulated device healthy, and planted faults by name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ascend_sim
import pytest
import torch
import torch_npu
from click.testing import CliRunner
from npu.lacks import LACKS

from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.cli import main
from qwen3_ascend.errors import DeviceError, DeviceStuckError
from qwen3_ascend.runtime import backends, doctor
from qwen3_ascend.runtime.backends.npu import capabilities, diagnose, graph
from qwen3_ascend.runtime.backends.npu.attention import FusedAttention
from qwen3_ascend.runtime.backends.npu.capabilities import OPERATIONS
from qwen3_ascend.runtime.backends.npu.device import open_device
from qwen3_ascend.runtime.backends.npu.graph_updates import Support
from qwen3_ascend.runtime.conformance import compare_backends
from qwen3_ascend.runtime.doctor import agreement as answers
from qwen3_ascend.runtime.doctor import examination, generation, machine
from qwen3_ascend.runtime.doctor.agreement import Answer, agreement
from qwen3_ascend.runtime.doctor.generation import VARIANTS
from qwen3_ascend.runtime.doctor.recorder import Recorder
from qwen3_ascend.runtime.engine import candidates
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

SMALLEST = dataclasses.replace(
    SMALL_CONFIG,
    hidden_size=256,
    intermediate_size=512,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=1024,
)
"""Sizes that the kernels of every scheme take."""


def test_a_wrong_operator_does_not_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are tight enough to notice an activation on the wrong half."""
    right = torch_npu.npu_swiglu
    swapped = lambda x, dim: right(torch.cat(x.chunk(2, dim)[::-1], dim), dim=dim)  # noqa: E731
    monkeypatch.setattr(torch_npu, "npu_swiglu", swapped)
    cpu = backends.get(SMALLEST, DeviceOptions("cpu"))
    npu = backends.get(SMALLEST, DeviceOptions("npu", graph=False))
    found = compare_backends(cpu, npu, SMALLEST)
    wrong = {comparison.name for comparison in found if not comparison.ok}
    users = ("gated (bf16", "gated (w8a8-static")  # the latter quantizes what it gives
    assert wrong and all(name.startswith(users) for name in wrong)


AREAS = {
    "environment", "capabilities", "forms", "layout", "load", "operators", "sampling", "generation"
}  # fmt: skip


SKIPPED_VARIANT = ("generation", "skipped")


def examine(checkpoint: Path | None) -> doctor.Report:
    return doctor.run(checkpoint, lambda check: None)


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those who look at the rest of an examination: the whole one takes the operators in the
    sizes of a published model, and says more."""
    monkeypatch.setattr(examination, "SMALL_CONFIG", SMALLEST)
    monkeypatch.setattr(answers, "NEW_TOKENS", 6)  # the fewest that cross a block, and some more


@pytest.mark.opposite_modes
def test_the_whole_examination(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = CliRunner().invoke(main, ["doctor", str(checkpoints["w8a8"]), "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["ok"] and report["environment"]["torch_npu"] == version("torch_npu")
    assert {check["area"] for check in report["checks"]} == AREAS
    noted = {one["area"] for one in report["checks"] if one["status"] == "noted"}
    lacking = not ascend_sim.cann.current().cache_mode  # an older CANN is pretended
    assert noted == ({"capabilities", "forms"} if lacking else set())
    names = [check["name"] for check in report["checks"]]
    assert "w8a8: linear (w8a8, [1536, 256], 17 tokens)" in names  # the model's own sizes
    published = " ".join(name for name in names if name.startswith("small: "))
    for word in (*SCHEMES, "linear", "norm", "add_norm", "gated", "prefill", "chunk", "decode"):
        assert word in published
    left_out = [
        one["name"] for one in report["checks"] if (one["area"], one["status"]) == SKIPPED_VARIANT
    ]
    assert len(report["speeds"]) == 2 * (len(VARIANTS) - len(left_out))
    assert all("NPUGraph.update" in name for name in left_out)
    assert all(0 < speed["host_us"] <= 1000 * speed["step_ms"] for speed in report["speeds"])
    _, paste = result.output.split("Paste this into an issue:")
    fastest = min((s for s in report["speeds"] if s["batch"] == 1), key=lambda s: s["step_ms"])
    assert f"fastest for w8a8, batch 1: {fastest['settings']} (" in paste
    assert "| CANN |" in paste and "GB/s" in paste


@pytest.mark.usefixtures("smallest")
def test_without_a_checkpoint_small_random_models_are_examined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each scheme one that needs no ranges of inputs; here of three schemes, in two of the ways
    that the other tests go through with a checkpoint."""
    monkeypatch.setattr(generation, "VARIANTS", VARIANTS[1:3])
    few = {name: SCHEMES[name] for name in ("bf16", "w8a8-static", "w4a16")}
    monkeypatch.setattr(examination, "SCHEMES", few)
    report = examine(None)
    assert report.ok
    assert {speed.model for speed in report.speeds} == {"random bf16", "random w4a16"}


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_named_and_nothing_fails(lack: str) -> None:
    plant, field, form, reason = LACKS[lack]
    operation = OPERATIONS[field]
    open_device()
    with plant():
        found = [*machine.capabilities(SMALL_CONFIG)]
        tried = {check.name: check.status for check in machine.forms(SMALL_CONFIG)}
    noted = {check.name: check.detail for check in found if check.status == "noted"}
    if "ATB" in lack:
        assert "OSError" in noted.pop("paged attention")
    assert [*noted] == [operation.name]
    assert noted[operation.name].startswith(operation.forms[form].name)
    assert reason in noted[operation.name]
    refused = [name for name, status in tried.items() if status == "noted"]
    assert refused == [f"{operation.name} with {each.name}" for each in operation.forms[:form]]


@pytest.mark.usefixtures("smallest")
def test_without_atb_and_updates_their_modes_are_left_out(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(argument: object) -> Support:
        return Support("graph update", False, "no table knows it")

    no_atb = Support("paged", False, "no ATB")
    monkeypatch.setattr(capabilities, "update_support", lacking)
    monkeypatch.setattr(capabilities, "bound_support", lambda: lacking(None))
    monkeypatch.setattr(capabilities, "paged_support", lambda config: no_atb)
    report = examine(checkpoints["w8a8"])
    assert report.ok
    skipped = {check.detail for check in report.checks if check.area == "generation"}
    assert {"graph update: no table knows it; graph update: no table knows it", "no ATB"} <= skipped
    assert {speed.settings for speed in report.speeds} == {
        "--attention fused --no-graph --prefetch off",
        "--attention fused --no-graph --prefetch auto",
        "--attention fused --graph --graph-lengths masked --prefetch off",
    }
    (chosen,) = (check for check in report.checks if check.name == "graph_lengths=auto")
    assert chosen.status == "noted" and chosen.detail.startswith("masked, because graph update")


def crashing(*arguments: object, **named: object) -> Any:
    raise KeyError("not even an error of torch")


@pytest.mark.usefixtures("smallest")
def test_a_crash_of_any_check_is_a_finding_and_the_others_go_on(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each area at once; a KeyError is nobody's way to refuse."""
    for owner, name in (
        (machine, "published_cann"),
        (diagnose, "layout_checks"),
        (diagnose, "copy_speed"),
        (torch_npu, "npu_swiglu"),
        (torch_npu, "npu_prefetch"),
        (candidates, "_rest"),
        (graph.GraphRunner, "_capture"),
    ):
        monkeypatch.setattr(owner, name, crashing)
    report = examine(checkpoints["w8a8"])
    failed = [check for check in report.checks if check.status == "failed"]
    assert {check.area for check in failed} == AREAS - {"capabilities", "forms"}
    assert all("KeyError: 'not even an error of torch'" in check.detail for check in failed)
    ok = {check.area for check in report.checks if check.status == "ok"}
    assert ok == AREAS - {"layout"}
    assert {speed.settings for speed in report.speeds} == {
        "--attention fused --no-graph --prefetch off",
        "--attention paged --no-graph --prefetch off",
    }
    assert not report.ok and report.to_markdown() and json.dumps(report.to_json())


def test_a_crash_before_anything_else_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "card", crashing)
    report = examine(None)
    (check,) = report.checks
    assert (check.area, check.status) == ("environment", "failed")
    assert check.detail.startswith("KeyError")


@pytest.mark.usefixtures("smallest")
def test_wrong_tokens_have_no_speed(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay that keeps the lengths of the capture is not the fastest of anything."""
    right = FusedAttention.update
    stale = lambda self, lengths: right(self, (1,) * len(lengths))  # noqa: E731
    monkeypatch.setattr(FusedAttention, "update", stale)
    fused_only = tuple(each for each in VARIANTS if each.attention == "fused")
    monkeypatch.setattr(generation, "VARIANTS", fused_only)
    report = examine(checkpoints["w8a8"])
    failed = [check.name for check in report.checks if check.status == "failed"]
    assert len(failed) == 4 and all("graph" in name for name in failed)
    fused = {speed.settings for speed in report.speeds if "fused --graph" in speed.settings}
    assert fused == {"--attention fused --graph --graph-lengths masked --prefetch off"}


def answer(*tokens: int) -> Answer:
    """One that found 7 a little, and 9 much less probable than 5, whatever it chose."""
    return Answer(tokens, ({5: -1.0, 7: -1.1, 9: -3.0},) * len(tokens))


def test_a_tie_may_end_equality_only_where_kernels_round_otherwise() -> None:
    plain = [answer(5, 5)]
    assert agreement([answer(5, 5)], plain, exact=True)[0] == "ok"
    assert agreement([answer(5, 7)], plain, exact=False)[0] == "ok"
    assert agreement([answer(5, 7)], plain, exact=True)[0] == "failed"
    for other in (9, 11):  # improbable, and not among the candidates
        assert agreement([answer(5, other)], plain, exact=False)[0] == "failed"


def test_nothing_is_waited_for_once_the_device_is_stuck() -> None:
    seen: list[doctor.Check] = []
    recorder = Recorder(seen.append)

    def stuck() -> Iterator[doctor.Check]:
        yield doctor.Check("generation", "first", "ok")
        raise DeviceStuckError("it waits for ever")

    def never() -> Iterable[doctor.Check]:
        raise AssertionError("this would hang")

    recorder.run("generation", "graph", stuck)
    recorder.run("generation", "next", never)
    assert [(check.name, check.status) for check in seen] == [
        ("first", "ok"), ("graph", "failed"), ("next", "skipped")
    ]  # fmt: skip
    assert seen[-1].detail == "the device is stuck"


def test_warnings_of_ours_are_findings() -> None:
    recorder = Recorder(lambda check: None)

    def warning() -> Iterator[doctor.Check]:
        filename = "src/qwen3_ascend/runtime/somewhere.py"
        for _ in range(2):
            warnings.warn_explicit("weights are cast", UserWarning, filename, 1)
        warnings.warn_explicit("torch is old", UserWarning, "site-packages/torch/x.py", 1)
        yield doctor.Check("load", "loading", "ok")

    recorder.run("load", "loading", warning)
    assert [(check.status, check.detail) for check in recorder.checks] == [
        ("ok", ""), ("noted", "weights are cast")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wheel", "cann", "status", "said"),
    [
        ("2.10.0.post4", "9.1.0", "ok", "CANN 9.1"),
        ("2.10.0", "9.1.0", "noted", "torch_npu==2.10.0.post4"),
        ("2.13.0", "9.0.0", "skipped", "no table tells"),
        ("2.10.0", "not found", "skipped", "no table tells"),
    ],
)
def test_whether_wheel_and_cann_are_a_pair(wheel: str, cann: str, status: str, said: str) -> None:
    facts = {"torch": "2.10.0", "torch_npu": wheel, "CANN": cann}
    (check,) = machine.pairing(facts)
    assert check.status == status and said in check.detail


@pytest.mark.opposite_modes
def test_another_tile_order_is_found() -> None:
    diagnose.card()
    with ascend_sim.faults.transposed_nz_tiles():
        failed = [name for name, holds in diagnose.layout_checks() if holds is False]
    assert {name[:2] for name in failed} == {"S1", "S2", "S3", "S4"}
    assert all(holds for _, holds in diagnose.layout_checks())


def without_simulator(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where torch_npu finds no CANN, as on any ordinary machine."""
    command = [sys.executable, "-m", "qwen3_ascend.cli", *arguments]
    variables = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run(
        command, capture_output=True, text=True, env=variables | environment, timeout=120
    )


def test_the_real_wheel_without_cann_is_explained_not_a_traceback(
    checkpoints: dict[str, Path],
) -> None:
    done = without_simulator("doctor")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "CANN is missing or not set up" in done.stdout
    done = without_simulator("generate", str(checkpoints["w8a8"]), "-p", "x", "--device", "npu")
    assert done.returncode == 1 and done.stderr.startswith("Error: torch_npu does not load")


def test_auto_says_why_it_takes_the_cpu(checkpoints: dict[str, Path]) -> None:
    done = without_simulator("generate", str(checkpoints["w8a8"]), "-p", "What does river mean?")
    assert done.returncode == 0, done.stderr
    assert "stream of water" in done.stdout
    assert "using the CPU, because torch_npu does not load" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"), [("TASK_QUEUE_ENABLE", "2"), ("ASCEND_LAUNCH_BLOCKING", "1")]
)
def test_settings_that_cannot_capture_are_refused_only_with_graphs(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(DeviceError, match=f"{variable}={value}; unset it, or use graph=off"):
        backends.get(SMALL_CONFIG, DeviceOptions("npu"))
    assert backends.get(SMALL_CONFIG, DeviceOptions("npu", graph=False)).name == "npu"
