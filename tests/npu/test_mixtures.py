"""Mixtures of experts on the NPU backend: real torch_npu on a simulated device.

A bfloat16 mixture is the CPU's to the last bit. The fused kernel of int8 experts is not, by its
definition (npu/experts.py): its codes may be one off, so that its tokens are compared where they do
not hang on that.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import ascend_sim
import pytest
import torch
import torch_npu
from support import tiny_models

from qwen3_ascend import Recipe, SamplingParams, convert_checkpoint, load
from qwen3_ascend.checkpoint.config import ExpertsConfig, Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import EXAMPLES, W4A8
from qwen3_ascend.errors import CheckpointError, DeviceError
from qwen3_ascend.runtime import LLM, backends, conformance
from qwen3_ascend.runtime.backends.base import Backend, Mixture
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.backends.npu import backend, experts, self_check
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities, last_forms, probe
from qwen3_ascend.runtime.backends.npu.experts import ChooseExperts, GateExperts
from qwen3_ascend.runtime.backends.npu.operators import Form
from qwen3_ascend.runtime.model.loader import load_model
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

pytestmark = pytest.mark.opposite_modes

SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)
BUCKETS = (1, 2, 4, 8, 17)
GATES = [form for form in experts.EXPERT_GATES if hasattr(torch_npu, form.name.split(",")[0])]
"""Those that the wheel has: CANN 8.3's lacks the first."""

RULES = {
    "w8a16": "w8a16",
    "w4a16": "{name: w4a16, group: 64}",
    "w4a16-zero-points": "{name: w4a16, group: 64, zero_points: true}",
    "w4a8": "w4a8",
}
"""Schemes of experts beside those of the recipes that ship."""

DEFINED = experts.EXPERT_GATES[2]
"""npu_grouped_matmul, npu_dequant_swiglu_quant."""

CHOICE = ["aclnnMatmul", "aclnnMoeGatingTopKSoftmaxV2"]
"""The router and the choice."""

FLOAT_LAUNCHES = [
    *CHOICE, "aclnnMoeInitRoutingV3", "aclnnGroupedMatmulWeightNz", "aclnnSwiGlu",
    "aclnnGroupedMatmulWeightNz", "aclnnMoeTokenUnpermute",
]  # fmt: skip
INT8_LAUNCHES = [
    *CHOICE, "aclnnDynamicQuantV2", "aclnnMoeInitRoutingV3",
    *({
        "npu_grouped_matmul_swiglu_quant_v2": ["aclnnGroupedMatmulSwigluQuantWeightNzV2"],
        "npu_grouped_matmul_swiglu_quant": [
            "aclnnCumsum", "aclnnGroupedMatmulSwigluQuantWeightNZ"
        ],
    }[GATES[0].name]),
    "aclnnGroupedMatmulWeightNz", "aclnnMoeTokenUnpermute",
]  # fmt: skip

FORMS: dict[str, dict[str, Any]] = {
    "normalized": {},
    "not-normalized-some-dense": {"norm_topk_prob": False, "mlp_only_layers": [0]},
    "one-of-nine": {"num_experts": 9, "num_experts_per_tok": 1},
    "all-of-three": {"num_experts": 3, "num_experts_per_tok": 3},
}


def mixture(**changes: Any) -> dict[str, Any]:
    sizes = {"head_dim": 128, "num_experts": 6, "moe_intermediate_size": 64}
    return tiny_models.mixture(**{**sizes, **changes})


@pytest.fixture(scope="module", params=FORMS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixtures")
    source = tiny_models.write(root / "source", mixture(**FORMS[request.param]))
    for recipe in ("bf16", "w8a8-plain"):
        convert_checkpoint(source, root / recipe, recipe)
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    source = tiny_models.write(root / "source", mixture())
    for recipe in ("bf16", "w8a8-plain"):
        convert_checkpoint(source, root / recipe, recipe)
    return root


def recipe(name: str) -> Recipe:
    """One whose experts have a scheme of RULES, and all else the nearest dense one."""
    return Recipe.parse(
        f"""
        schema: 1
        name: {name}
        rules:
          - {{match: "*.mlp.experts.*", scheme: {RULES[name]}}}
          - {{match: "*", scheme: w8a8}}
        """,
        name,
    )


@pytest.fixture(scope="module", params=RULES)
def coded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts of a scheme of RULES, in shapes that all of them take."""
    root = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256}
    source = tiny_models.write(root / "source", mixture(**sizes))
    convert_checkpoint(source, root / "out", recipe(request.param))
    return root / "out"


def prompts(count: int) -> list[list[int]]:
    drawn = random.Random(count)
    return [drawn.choices(range(320), k=5 + 7 * number) for number in range(count)]


def open_npu(path: Path, **options: Any) -> LLM:
    return load(
        path, device="npu", block_size=128, kv_cache_tokens=8192, max_batch=17,
        **{"buckets": BUCKETS, **options},
    )  # fmt: skip


def tokens_of(llm: LLM, count: int) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in llm.generate(prompts(count), SHORT)]


def tokens_are_the_cpus(path: Path, graph: bool) -> None:
    """One to 17 answers at a time: with one there are experts without a row."""
    cpu = load(path, device="cpu", kv_cache_tokens=8192, max_batch=17)
    llm = open_npu(path, graph=graph)
    for count in (1, 2, 3, 8, 17):
        expected = tokens_of(cpu, count)
        assert tokens_of(llm, count) == expected
    assert len(set(expected)) > 8


@pytest.mark.parametrize("graph", [False, True])
def test_tokens_of_floats_are_the_cpus(folders: Path, graph: bool) -> None:
    tokens_are_the_cpus(folders / "bf16", graph)


def test_logits_of_floats_are_the_cpus(folders: Path) -> None:
    (ids,) = prompts(1)
    cpu = load(folders / "bf16", device="cpu", kv_cache_tokens=1024)
    llm = open_npu(folders / "bf16", graph=False)
    assert torch.equal(llm.logits(ids * 20), cpu.logits(ids * 20))


@pytest.fixture
def gate_as_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of the gate that rounds as the definition does."""

    def probed(config: Qwen3Config) -> Capabilities:
        return probe(config).using("expert_gate", DEFINED)

    monkeypatch.setattr(backend, "probe", probed)


@pytest.mark.usefixtures("gate_as_defined")
@pytest.mark.parametrize("graph", [False, True])
def test_tokens_of_int8_experts_are_the_cpus(folders: Path, graph: bool) -> None:
    tokens_are_the_cpus(folders / "w8a8-plain", graph)


@pytest.mark.parametrize("graph", [False, True])
def test_tokens_of_experts_of_every_scheme_are_the_cpus(coded: Path, graph: bool) -> None:
    tokens_are_the_cpus(coded, graph)


@pytest.mark.parametrize("gate", GATES, ids=lambda form: form.name)
def test_every_gate_is_near_the_definition(plain: Path, gate: Form[GateExperts]) -> None:
    """A mixture of 300 tokens: outputs differ by what single codes and one rounding do."""
    reader = CheckpointReader(plain / "w8a8-plain")
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    capabilities = probe(reader.config).using("expert_gate", gate)
    device = NpuBackend(reader.config, DeviceOptions(graph=False), capabilities)
    definition = backends.reference_backend(reader.config)
    expected, found = (
        computed.mixture(computed.upload(x), mixture_of(reader, computed)).cpu().float()
        for computed in (definition, device)
    )
    error = (found - expected).abs()
    assert error.max() < 0.03 * expected.abs().max()
    assert error.mean() < 0.01 * expected.abs().mean()  # a code is 1/127 of a row's largest
    assert (error.max() == 0) == (gate is DEFINED)


def mixture_of(reader: CheckpointReader, computed: Backend[LayerKV]) -> Mixture:
    found = load_model(reader, computed).layers[0].mlp
    assert isinstance(found, Mixture)
    return found


def test_a_layer_launches(plain: Path) -> None:
    """Of one step of decoding, from the router on; nothing is copied in hiding."""
    for recipe, launches in (("bf16", FLOAT_LAUNCHES), ("w8a8-plain", INT8_LAUNCHES)):
        reader = CheckpointReader(plain / recipe)
        device = NpuBackend(reader.config, DeviceOptions(graph=False))
        mixture = mixture_of(reader, device)
        x = torch.randn(4, 64).bfloat16().to("npu")
        device.mixture(x, mixture)
        torch_npu.npu.synchronize()
        ascend_sim.reset_trace()
        device.mixture(x, mixture)
        torch_npu.npu.synchronize()
        done = ascend_sim.trace.launches()
        assert [launch.name for launch in done] == launches
        assert ascend_sim.trace.hidden_copies(done) == 0


@pytest.mark.parametrize("recipe", ["bf16", "w8a8-plain"])
def test_each_byte_is_copied_once_and_never_cast(plain: Path, recipe: str) -> None:
    bytes_are_copied_once(plain / recipe)


def test_each_byte_of_codes_is_copied_once(coded: Path) -> None:
    bytes_are_copied_once(coded)


def bytes_are_copied_once(path: Path) -> None:
    reader = CheckpointReader(path)
    device = NpuBackend(reader.config, DeviceOptions())
    load_model(reader, device)  # what checks the first of a kind is not counted
    torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    before = torch_npu.npu.memory_allocated()
    torch_npu.npu.reset_peak_memory_stats()
    model = load_model(reader, device)
    torch_npu.npu.synchronize()
    assert ascend_sim.trace.format_casts() == []
    for layer, spec in zip(model.layers, (0, 1), strict=True):
        for name in ("gate_up", "down"):
            weight = getattr(layer.mlp, name).weight
            stored = reader.linear(f"model.layers.{spec}.mlp.experts.{name}_proj").weight
            start = weight.untyped_storage().data_ptr()
            inside = [
                copy.bytes
                for copy in ascend_sim.trace.copies("host_to_device")
                if start <= copy.destination < start + stored.nbytes
            ]
            assert sum(inside) == stored.nbytes
    held = torch_npu.npu.memory_allocated() - before
    peak = torch_npu.npu.max_memory_allocated() - before
    tensors = reader.manifest.stored()
    weights = sum(tensor.nbytes for tensor in tensors.values())
    wider = sum(  # the kernel wants scales of groups in int64
        entry.tensors["scale"].nbytes
        for entry in reader.manifest.linears.values()
        if isinstance(entry.scheme, W4A8)
    )
    assert held <= weights + wider + 1024 * len(tensors)
    assert peak <= held + wider  # nothing of a weight is there twice, but for such scales


@pytest.mark.parametrize("recipe", ["bf16", "w8a8-plain"])
def test_the_kernels_see_every_expert(plain: Path, recipe: str) -> None:
    every_expert_is_seen(plain / recipe)


def test_the_kernels_see_every_expert_of_codes(coded: Path) -> None:
    every_expert_is_seen(coded)


def every_expert_is_seen(path: Path) -> None:
    """And a wrong order of the experts is noticed."""
    reader = CheckpointReader(path)
    device = NpuBackend(reader.config, DeviceOptions())
    linear = reader.linear("model.layers.0.mlp.experts.gate_up_proj")
    loaded = device.experts(linear)
    assert self_check.kernel_sees_experts(linear, loaded)
    turned = {suffix: tensor.flip(0) for suffix, tensor in linear.tensors.items()}
    other = type(linear)(linear.scheme, linear.shape, linear.layout, turned)
    assert not self_check.kernel_sees_experts(other, loaded)


def test_experts_that_the_kernels_read_otherwise_are_refused(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen3_ascend.runtime.backends.npu.mixtures.kernel_sees_experts", lambda *asked: False
    )
    with pytest.raises(DeviceError, match="other weights of experts than the file holds"):
        open_npu(plain / "bf16")


def test_every_form_is_tried_at_the_models_sizes(plain: Path) -> None:
    config = CheckpointReader(plain / "bf16").config
    found = probe(config)
    assert found.expert_route is not None and found.expert_gate is not None
    assert found.expert_choice is not None
    assert found.expert_choice.form is experts.CHOICES[0]
    assert found.expert_gate.form is GATES[0]
    assert found.expert_route.form.name == "npu_moe_init_routing_v2 of codes"
    last = last_forms(found)
    assert last.expert_gate is not None
    assert last.expert_gate.form is experts.EXPERT_GATES[-1]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", experts.CHOICES, ids=lambda form: form.name)
def test_every_form_chooses_alike(form: Form[ChooseExperts], normalize: bool) -> None:
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = form.call(logits.to("npu"), 4, normalize)
    values, chosen = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.chosen.cpu().long(), chosen[:, :4])
    weights = values[:, :4].softmax(-1) if normalize else values.softmax(-1)[:, :4]
    assert found.weights.dtype is torch.bfloat16
    torch.testing.assert_close(found.weights.cpu().float(), weights, rtol=2**-8, atol=0)


def test_scales_that_bfloat16_does_not_have_are_refused(plain: Path) -> None:
    reader = CheckpointReader(plain / "w8a8-plain")
    linear = reader.linear("model.layers.0.mlp.experts.down_proj")
    tensors = {**linear.tensors, "scale": linear.tensors["scale"] * 1.001}
    other = type(linear)(linear.scheme, linear.shape, linear.layout, tensors)
    with pytest.raises(CheckpointError, match="no numbers of bfloat16"):
        NpuBackend(reader.config, DeviceOptions()).experts(other)


def test_operations_agree_with_their_definition() -> None:
    """In the shapes of a small model, as `doctor` holds a card against it: of every scheme that
    experts may have, in shapes in which w8a16 is computed by rows of int8."""
    config = replace(SMALL_CONFIG, hidden_size=256, experts=ExpertsConfig(20, 4, 512, True))
    definition = backends.reference_backend(config)
    device = NpuBackend(config, DeviceOptions(graph=False))
    mixtures = [
        case for case in conformance.cases(definition, device, config) if "mix" in case.name
    ]
    compared = [one for case in mixtures for one in case.compare()]
    assert len(compared) == 3 * (len(EXAMPLES) - 1)  # no static scales
    assert [one for one in compared if not one.ok] == []


def test_a_wrong_mixture_is_no_small_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL_CONFIG, experts=ExpertsConfig(16, 4, 192, True))
    definition = backends.reference_backend(config)
    device = NpuBackend(config, DeviceOptions(graph=False))
    load_right = device.experts

    def load_turned(linear: Linear) -> experts.NpuExperts:
        turned = {suffix: tensor.flip(0) for suffix, tensor in linear.tensors.items()}
        return load_right(Linear(linear.scheme, linear.shape, linear.layout, turned))

    monkeypatch.setattr(device, "experts", load_turned)
    case = [*conformance.cases(definition, device, config)][-1]
    assert case.name.startswith("mixture") and not any(one.ok for one in case.compare())
