"""Real SGLang on the simulated device loads what `export` writes, bit for bit, and computes of it
what vllm-ascend computes.

Its own Qwen3 does, with its own loaders of ModelSlim's and compressed-tensors' formats. What is
replaced, and why, is in sglang_patches.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handover.conftest import converted
from handover.engines import Engines, Report
from handover.test_exports import exported
from qwen3_ascend.checkpoint.reader import CheckpointReader

FORMATS = ("ascendv1", "compressed-tensors")
NEAR = 1e-5
"""Nats. Both engines make the same sums of the same integers; measured is 0.000002."""

FRACTAL_NZ, PLAIN = 29, 2
PARTLY_READ = ("nsupported", "not found in params_dict", "no SGLang implementation")
"""What SGLang says, and goes on, when it does not know what a tensor is for."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention in bf16, the rest in int8."""
    return converted(tmp_path_factory, "w8a8-attention-bf16")


@pytest.fixture(scope="module", params=["checkpoint", "mixed"])
def source(request: pytest.FixtureRequest) -> Path:
    """The checkpoint that is exported."""
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module", params=FORMATS)
def model(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return exported(source, request.param, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def report(engines: Engines, model: Path, prompts: list[list[int]]) -> Report:
    return engines.on_sglang(model, prompts[::5])


def test_native_code_reads_every_tensor(report: Report) -> None:
    (loading,) = report.loading
    assert loading["loader"] == "DefaultModelLoader"
    assert loading["model"] == "sglang.srt.models.qwen3.Qwen3ForCausalLM"
    assert loading["fallbacks"] == []
    log = (report.folder / "log").read_text()
    assert "Load weight end" in log
    assert not [words for words in PARTLY_READ if words in log]


def test_the_device_holds_the_codes_and_scales_of_the_checkpoint(
    report: Report, source: Path
) -> None:
    (loading,) = report.loading
    reader = CheckpointReader(source)
    held = torch.load(report.folder / "weights-0.pt")
    for name, entry in reader.manifest.linears.items():
        codes = reader.linear(name).codes()
        weight, stored = held.pop(f"{name}.weight"), loading["parameters"][f"{name}.weight"]
        if entry.scheme.name == "bf16":
            assert stored["format"] == PLAIN
            assert torch.equal(weight, codes["weight"])
            continue
        assert stored["format"] == FRACTAL_NZ
        assert torch.equal(weight.t(), codes["weight"]), name
        assert torch.equal(held.pop(f"{name}.weight_scale").float(), codes["scale"]), name
        offset = held.pop(f"{name}.weight_offset", None)
        assert offset is None or not offset.any()
    for name, tensor in held.items():
        assert torch.equal(tensor, reader.tensor(name)), name


def test_loading_casts_each_quantized_linear_once(report: Report, source: Path) -> None:
    """On the device, after one copy that transposes it: the work that raw bytes do not need."""
    (loading,) = report.loading
    linears = CheckpointReader(source).manifest.linears.values()
    assert loading["format_casts"] == sum(entry.scheme.name != "bf16" for entry in linears)


def test_tokens_are_those_of_vllm_ascend(
    engines: Engines, model: Path, report: Report, prompts: list[list[int]]
) -> None:
    other = engines.on_ascend(model, prompts[::5])
    assert report.tokens == other.tokens
    for ours, theirs in zip(report.answers, other.answers, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=NEAR)
        assert ours.prompt_logprobs == pytest.approx(theirs.prompt_logprobs, abs=NEAR)


def test_a_quantized_head_is_read_in_one_format_only(
    engines: Engines, prompts: list[list[int]], checkpoint_with_head: Path, tmp_path: Path
) -> None:
    """SGLang's ModelSlim loader has no head but a plain one. It warns that it has no use for the
    scales, and takes the codes for weights; docs/exporting.md says so."""
    few = prompts[::5]
    raw = engines.on_ascend(checkpoint_with_head, few)
    model = exported(checkpoint_with_head, "compressed-tensors", tmp_path)
    assert engines.on_sglang(model, few).tokens == raw.tokens
    wrong = engines.on_sglang(exported(checkpoint_with_head, "ascendv1", tmp_path), few)
    assert "lm_head.weight_scale not found in params_dict" in (wrong.folder / "log").read_text()
    assert wrong.tokens != raw.tokens
