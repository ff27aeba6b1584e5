"""The doctor finds a healthy simulated device healthy, and planted faults by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ascend_sim
import pytest
import torch
from click.testing import CliRunner

from qwen3_ascend.checkpoint.schemes import SCHEMES
from qwen3_ascend.cli import main
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.npu import diagnose
from qwen3_ascend.runtime.conformance import Comparison, compare_backends
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG


def compare() -> list[Comparison]:
    cpu = backends.get(SMALL_CONFIG, DeviceOptions("cpu"))
    npu = backends.get(SMALL_CONFIG, DeviceOptions("npu", graph=False))
    return list(compare_backends(cpu, npu, SMALL_CONFIG))


@pytest.mark.every_mode
def test_every_operation_conforms_for_every_scheme_and_shape() -> None:
    found = compare()
    assert [comparison for comparison in found if not comparison.ok] == []
    names = " ".join(comparison.name for comparison in found)
    for word in (*SCHEMES, "linear", "norm", "add_norm", "gated", "prefill", "chunk", "decode"):
        assert word in names


@pytest.mark.every_mode
def test_a_wrong_operator_does_not_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are tight enough to notice an activation on the wrong half."""
    import torch_npu

    right = torch_npu.npu_swiglu
    swapped = lambda x, dim: right(torch.cat(x.chunk(2, dim)[::-1], dim), dim=dim)  # noqa: E731
    monkeypatch.setattr(torch_npu, "npu_swiglu", swapped)
    wrong = {comparison.name for comparison in compare() if not comparison.ok}
    assert wrong and all(name.startswith("gated (bf16") for name in wrong)


@pytest.mark.every_mode
def test_the_whole_examination(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = CliRunner().invoke(main, ["doctor", str(checkpoints["w8a8"]), "--json", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["ok"] and report["environment"]["torch_npu"] == torch.__version__.split("+")[0]
    areas = {check["area"] for check in report["checks"]}
    assert areas == {"layout", "operators", "generation"}
    assert all(check["status"] == "ok" for check in report["checks"])


@pytest.mark.every_mode
def test_another_tile_order_is_found() -> None:
    diagnose.card()
    with ascend_sim.faults.transposed_nz_tiles():
        failed = [name for name, holds in diagnose.layout_checks() if holds is False]
    assert {name[:2] for name in failed} == {"S1", "S2", "S3"}
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
