"""The kernels of mixtures of experts: routing as it is defined, exact integers, sums in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3_ascend import native
from qwen3_ascend.checkpoint.layout import Layout, nz_pack
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.schemes import W4A8, W4A16, W8A16, Scheme, w4a8, w4a16, w8a16
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.native import Fed, FloatExperts, GroupExperts, Int8Experts, MixtureKernels
from qwen3_ascend.native.floats import FLOAT_PATHS
from qwen3_ascend.native.mixture import Routed
from qwen3_ascend.native.products import INSTRUCTIONS
from qwen3_ascend.runtime.backends.cpu.float_linears import stored_weight

kernels = native.mixture_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels are not compiled")


@pytest.fixture
def mixture() -> MixtureKernels:
    assert kernels is not None
    return kernels


def experts_of(routed: Routed) -> Tensor:
    """The expert of each routed row."""
    counts = routed.starts.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "per_token"), [(1, 4, 1), (3, 128, 8), (70, 5, 5), (9, 16, 3)]
)
def test_tokens_go_to_the_experts_of_their_greatest_logits(
    mixture: MixtureKernels,
    tokens: int,
    experts: int,
    per_token: int,
    dtype: torch.dtype,
    normalize: bool,
) -> None:
    logits = 3 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    logits = logits.to(dtype)
    routed = mixture.route(logits, per_token, normalize)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :per_token]
    expected = logits.float().softmax(-1).gather(-1, order)
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    chosen = experts_of(routed)[routed.places.long()]
    assert torch.equal(chosen, order)
    bound = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    assert ((routed.weights - expected).abs() <= bound * expected).all()
    if dtype is torch.bfloat16:
        assert torch.equal(routed.weights.bfloat16().float(), routed.weights)


def test_equal_logits_go_to_the_first_experts(mixture: MixtureKernels) -> None:
    routed = mixture.route(torch.zeros(4, 6), 3, True)
    assert routed.starts.tolist() == [0, 4, 8, 12, 12, 12, 12]
    assert routed.places.tolist() == [[t, 4 + t, 8 + t] for t in range(4)]
    assert routed.sources.tolist() == [0, 1, 2, 3] * 3


def test_every_row_finds_its_token(mixture: MixtureKernels) -> None:
    routed = mixture.route(torch.randn(33, 8), 3, True)
    codes = torch.randint(-128, 128, (33, 24), dtype=torch.int8)
    scales = torch.rand(33)
    found = mixture.gather(Fed(codes, scales), routed)
    sources = routed.sources.long()
    assert torch.equal(found.values, codes[sources])
    assert found.scales is not None and torch.equal(found.scales, scales[sources])
    assert torch.equal(sources[routed.places.long()], torch.arange(33)[:, None].expand(33, 3))


@pytest.mark.parametrize("instructions", [n for n in INSTRUCTIONS if native.products(n)])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_integers_of_every_expert_are_exact(
    mixture: MixtureKernels, tokens: int, instructions: str
) -> None:
    experts, outputs, inputs = 7, 70, 52
    weights = torch.randint(-127, 128, (experts, outputs, inputs), dtype=torch.int8)
    scales = torch.rand(experts, outputs)
    products = native.products(instructions)
    assert products is not None
    strips = nz_pack(weights.transpose(1, 2))
    product = Int8Experts(products, strips, (outputs, inputs), scales, torch.float32)
    routed = mixture.route(torch.randn(tokens, experts), 2, True)
    codes = torch.randint(-128, 128, (2 * tokens, inputs), dtype=torch.int8)
    row_scales = torch.rand(2 * tokens)
    found = product(Fed(codes, row_scales), routed)
    for row, expert in enumerate(experts_of(routed).tolist()):
        exact = (weights[expert].long() @ codes[row].long()).float()
        assert torch.equal(found[row], exact * row_scales[row] * scales[expert])


@pytest.mark.parametrize("path", [name for name in FLOAT_PATHS if native.float_products(name)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_of_every_expert(mixture: MixtureKernels, dtype: torch.dtype, path: str) -> None:
    experts, outputs, inputs = 5, 36, 48
    weights = torch.randn(experts, outputs, inputs).bfloat16()
    products, packed = native.float_products(path), nz_pack(weights)
    first = native.stored_runs(packed[0], (outputs, inputs))
    assert products is not None and first is not None
    routed = mixture.route(torch.randn(30, experts), 2, False)
    x = torch.randn(60, inputs).to(dtype)
    found = FloatExperts(products, packed, first, dtype)(Fed(x, None), routed)
    for row, expert in enumerate(experts_of(routed).tolist()):
        expected = weights[expert].double() @ x[row].double()
        assert (found[row].double() - expected).abs().max() < (1e-4 if dtype.itemsize > 2 else 0.1)


@pytest.mark.parametrize("path", [name for name in FLOAT_PATHS if native.float_products(name)])
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        (W8A16(), w8a16.NZ),
        (W4A16(32), w4a16.ROWS),
        (W4A16(64), w4a16.NZ),
        (W4A16(32, zero_points=True), w4a16.ROWS),
    ],
    ids=str,
)
def test_codes_of_every_expert(
    mixture: MixtureKernels, scheme: Scheme, layout: Layout, tokens: int, path: str
) -> None:
    """Beside float32 they are what they stand for, but for the order of sums."""
    experts, outputs, inputs = 5, 64, 80
    stored = quantize(scheme, torch.randn(experts, outputs, inputs), None, layout)
    products, first = native.float_products(path), stored_weight(stored.matrix(0))
    assert products is not None and first is not None
    routed = mixture.route(torch.randn(tokens, experts), 2, False)
    x = torch.randn(2 * tokens, inputs)
    found = FloatExperts(products, stored.weight, first, torch.float32)(Fed(x, None), routed)
    weights = stored.dequantize().double()
    for row, expert in enumerate(experts_of(routed).tolist()):
        assert (found[row].double() - weights[expert] @ x[row].double()).abs().max() < 1e-4


@pytest.mark.parametrize("path", [name for name in FLOAT_PATHS if native.float_products(name)])
@pytest.mark.parametrize("tokens", [1, 30])
def test_groups_of_every_expert_are_exact(mixture: MixtureKernels, tokens: int, path: str) -> None:
    experts, outputs, inputs, scheme = 5, 64, 512, W4A8()
    stored = quantize(scheme, torch.randn(experts, outputs, inputs), None, w4a8.ROWS)
    products, first = native.float_products(path), stored_weight(stored.matrix(0))
    assert products is not None and first is not None
    shared = stored.tensors["scale"], w4a8.shift_of(stored.tensors)
    product = GroupExperts(products, stored.weight, first, shared, torch.float32)
    routed = mixture.route(torch.randn(tokens, experts), 2, False)
    x = torch.randn(2 * tokens, inputs)
    codes, scales = quantize_tokens(x)
    found = product(Fed(codes, scales), routed)
    for row, expert in enumerate(experts_of(routed).tolist()):
        codes_of_expert = stored.matrix(expert).codes()
        assert torch.equal(found[row], scheme.product(codes_of_expert, x[row : row + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 512, 700])
def test_outputs_are_added_up_in_the_order_of_the_weights(
    mixture: MixtureKernels, columns: int, dtype: torch.dtype
) -> None:
    routed = mixture.route(torch.randn(13, 6), 4, True)
    outputs = torch.randn(52, columns).to(dtype)
    total = torch.zeros(13, columns)
    for rank in range(4):
        rows = outputs[routed.places[:, rank].long()].float()
        total += rows * routed.weights[:, rank, None]
    assert torch.equal(mixture.combine(outputs, routed), total.to(dtype))


def test_a_logit_that_is_no_number_chooses_somebody(mixture: MixtureKernels) -> None:
    """What follows is no number either; nothing beyond the weights of the experts is read."""
    logits = torch.full((2, 4), torch.nan)
    routed = mixture.route(logits, 2, True)
    assert routed.starts.tolist()[-1] == 4 and routed.weights.isnan().all()
