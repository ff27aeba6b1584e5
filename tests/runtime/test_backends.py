"""The CPU backend computes what the reference defines; layers can be run one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.group_scheme import NZ, GroupInt4

from qwen3_ascend import native
from qwen3_ascend.checkpoint.architecture import model_spec
from qwen3_ascend.checkpoint.config import ExpertsConfig, Qwen3Config
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16, W4A16, W8A8
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.native.library import PATHS
from qwen3_ascend.runtime import backends, conformance
from qwen3_ascend.runtime.backends.base import Backend, Mixture, StepBounds
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.cpu.backend import CpuBackend
from qwen3_ascend.runtime.backends.reference import ReferenceBackend
from qwen3_ascend.runtime.conformance import compare_backends
from qwen3_ascend.runtime.engine.batch import Batch, Chunk, step_inputs
from qwen3_ascend.runtime.engine.request import Request, SamplingParams
from qwen3_ascend.runtime.model.loader import load_layer, load_model
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, decoder_layer
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG, SyntheticWeights

ODD = dataclasses.replace(
    SMALL_CONFIG, hidden_size=168, intermediate_size=200, num_heads=6, num_kv_heads=2, head_dim=36
)
BLOCK = 16


WIDE = dataclasses.replace(SMALL_CONFIG, num_heads=10, num_kv_heads=2, head_dim=128)
"""Heads of Qwen3's size, of which five share one of the cache."""


EXPERTS = dataclasses.replace(SMALL_CONFIG, experts=ExpertsConfig(16, 4, 256, True))
FEW_EXPERTS = dataclasses.replace(ODD, experts=ExpertsConfig(5, 3, 72, False))


def paths() -> list[str]:
    """How a layer may be computed here: torch, and each processor path that this machine has."""
    return ["torch", *(path for path in PATHS if native.load(path))]


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "config",
    [ODD, SMALL_CONFIG, WIDE, EXPERTS, FEW_EXPERTS],
    ids=["odd", "small", "wide", "experts", "few experts"],
)
def test_the_cpu_is_the_reference(
    config: Qwen3Config, dtype: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One linear is large to be divided, which the CPU does not do: a small one stands for it."""
    monkeypatch.setattr(conformance, "DIVIDED", (96, 128))
    name, value = ("NATIVE", "0") if path == "torch" else ("CPU", path)
    monkeypatch.setenv(f"QWEN3_ASCEND_{name}", value)
    definition = backends.reference_backend(config, dtype)
    cpu = backends.get(config, DeviceOptions("cpu", dtype))
    assert isinstance(cpu, CpuBackend) == (path != "torch")
    compared = [*compare_backends(definition, cpu, config)]
    assert len(compared) > 30
    assert [one for one in compared if not one.ok] == []


def test_a_wrong_attention_is_found() -> None:
    class Wrong(ReferenceBackend):
        def attend(
            self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> torch.Tensor:
            return super().attend(query, keys, values.flip(0))

    compared = compare_backends(backends.reference_backend(ODD), Wrong(ODD, torch.bfloat16), ODD)
    assert any(one.name.startswith("attention") and not one.ok for one in compared)


def test_layers_one_by_one_are_the_whole(tiny_w8a8: Path) -> None:
    """As a calibration would: load a layer, run it, drop it."""
    reader = CheckpointReader(tiny_w8a8)
    config, spec = reader.config, model_spec(reader.config)
    backend = backends.get(config, DeviceOptions("cpu"))
    model = load_model(reader, backend)
    request = Request(0, SamplingParams(), [*range(5, 45)], 40, 41, frozenset())
    request.block_table = [1, 2, 3]
    request.wants_logits = True
    step = backend.open_step(step_inputs(Batch((Chunk.next_of(request, 40),)), BLOCK))
    with torch.inference_mode():
        whole = model.forward(step, backend.allocate_cache(StepBounds(1, BLOCK, 4)))
        hidden, delta = backend.embed(step.inputs.tokens, model.embedding), None
        for layer in spec.layers:
            (cache, *_) = backend.allocate_cache(StepBounds(1, BLOCK, 4))
            weights = load_layer(reader, backend, layer)
            hidden, delta = decoder_layer(
                backend, weights, config.rms_norm_eps, hidden, delta, step, cache
            )
        x, _ = backend.add_norm(hidden, delta, model.final_norm, config.rms_norm_eps, model.lm_head)
        assert torch.equal(model.lm_head(x).float(), whole)


def test_every_weight_goes_to_the_place_of_its_name() -> None:
    """Two norms of a layer have one shape: only their names tell them apart."""
    config = dataclasses.replace(ODD, num_layers=2)
    source = SyntheticWeights(config, "bf16")
    layers = load_model(source, backends.reference_backend(config)).layers
    for spec, layer in zip(model_spec(config).layers, layers, strict=True):
        for name in ("input_norm", "query_norm", "key_norm", "post_attention_norm"):
            expected = source.tensor(getattr(spec, name).name)
            assert torch.equal(getattr(layer, name), expected), name
    assert {field.name for field in dataclasses.fields(DecoderLayer)} == {
        field.name for field in dataclasses.fields(model_spec(config).layers[0])
    }


def test_a_scheme_without_a_kernel_names_itself() -> None:
    weight = torch.randn(64, 64)
    for backend in (
        backends.reference_backend(SMALL_CONFIG),
        backends.get(SMALL_CONFIG, DeviceOptions("cpu")),
    ):
        with pytest.raises(CheckpointError, match="no kernel for the scheme group-int4"):
            backend.linear(quantize(GroupInt4(32), weight, None, NZ))


def test_a_linear_that_is_fed_the_wrong_form_says_so() -> None:
    backend = backends.reference_backend(SMALL_CONFIG)
    linear = quantize(W8A8(), torch.randn(64, 64), None, ASCEND_A2_A3.layouts["w8a8"])
    with pytest.raises(AssertionError, match="fed floats"):
        backend.linear(linear)(torch.randn(2, 64))


def test_experts_of_which_only_some_have_a_kernel() -> None:
    """int4 of 40 outputs lies as no kernel reads it; what comes before has one."""
    config = dataclasses.replace(
        SMALL_CONFIG, hidden_size=40, experts=ExpertsConfig(3, 2, 64, True)
    )
    cpu, definition = backends.get(config, DeviceOptions("cpu")), backends.reference_backend(config)
    router = torch.randn(3, 40).bfloat16()
    shapes = {BF16(): (3, 128, 40), W4A16(32): (3, 40, 64)}
    gate_up, down = (
        quantize(scheme, torch.randn(shape), None, ASCEND_A2_A3.layout(scheme, "", shape))
        for scheme, shape in shapes.items()
    )

    def mixture(backend: Backend[LayerKV]) -> Mixture:
        experts = backend.experts(gate_up), backend.experts(down)
        return Mixture(backend.dense(router), *experts, 2, True)

    x = torch.randn(5, 40).bfloat16()
    found, expected = (backend.mixture(x, mixture(backend)) for backend in (cpu, definition))
    bound = 2**-6
    torch.testing.assert_close(
        found, expected, rtol=bound, atol=bound * float(expected.abs().max())
    )
