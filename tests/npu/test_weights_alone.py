"""w8a16 and w4a16 on the device: the stored bytes, read by npu_weight_quant_batchmatmul."""

from __future__ import annotations

import dataclasses
import warnings

import ascend_sim
import pytest
import torch
import torch_npu
from torch import Tensor

from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import W4A16, W8A16, Scheme, w4a16
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.runtime.backends.npu import formats, self_check
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.npu.linears import DividedLinear, WeightOnlyLinear
from qwen3_ascend.runtime.backends.reference import FloatLinear
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

pytestmark = pytest.mark.opposite_modes

Shape = tuple[int, int]
CASES: list[tuple[Scheme, Shape]] = [
    (W8A16(), (192, 256)),
    (W8A16(), (100, 72)),
    (W4A16(128), (192, 256)),
    (W4A16(64), (192, 256)),
    (W4A16(32), (192, 256)),  # row by row: a group of 32,
    (W4A16(128), (200, 256)),  # outputs that fill no strip,
    (W4A16(128), (192, 576)),  # and inputs that fill no group
    (W4A16(128, zero_points=True), (192, 256)),
    (W4A16(32, zero_points=True), (192, 256)),
    (W4A16(128, zero_points=True), (192, 576)),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stored(scheme: Scheme, shape: Shape, bias: bool = False) -> Linear:
    layout = ASCEND_A2_A3.layout(scheme, "", shape)
    return quantize(scheme, random(*shape), random(shape[0], seed=1) if bias else None, layout)


@pytest.fixture
def backend() -> NpuBackend:
    return NpuBackend(SMALL_CONFIG, DeviceOptions("npu", graph=False))


@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=str)
def test_the_kernel_reads_every_stored_code(
    scheme: Scheme, shape: Shape, backend: NpuBackend
) -> None:
    """All of them bit for bit, from bytes that were copied and never cast; and their scales."""
    linear = stored(scheme, shape)
    ascend_sim.reset_trace()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = backend.linear(linear)
    assert ascend_sim.trace.format_casts() == []
    codes = linear.codes()["weight"]
    assert torch.equal(loaded.probe(torch.arange(shape[1])), codes.t())
    expected = formats.ACL_FORMAT_FRACTAL_NZ if linear.layout.format == "nz" else 2
    assert formats.format_of(loaded.weight) == expected
    held = loaded.weight.untyped_storage().nbytes()
    assert held == linear.weight.nbytes and loaded.weight.shape[0] == shape[1]
    assert self_check.reads_back(linear, loaded)
    assert self_check.kernel_decodes_weight(linear, loaded)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "shape"), CASES, ids=str)
def test_the_product_is_the_definition(
    scheme: Scheme, shape: Shape, bias: bool, tokens: int, backend: NpuBackend
) -> None:
    """In bfloat16, to which the decoded weight is rounded on the host as well."""
    linear, x = stored(scheme, shape, bias), random(tokens, shape[1], seed=2)
    found = backend.linear(linear)(x.to("npu"))
    expected = FloatLinear.load(linear, torch.bfloat16)(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    scale = expected.float().abs().clamp(min=float(expected.float().abs().mean()))
    assert float(((found.cpu().float() - expected.float()).abs() / scale).max()) <= 2**-7


@pytest.mark.parametrize("form", ["nd", "nz"])
def test_the_layout_is_that_of_the_wheels_own_packing(form: str) -> None:
    """npu_convert_weight_to_int4pack, which runs on the host, and never with our code."""
    torch_npu.npu.config.allow_internal_format = True
    codes = torch.randint(-8, 8, (192, 256), dtype=torch.int8)
    plain = codes.t().contiguous().int().to("npu")
    if form == "nz":
        plain = torch_npu.npu_format_cast(plain, formats.ACL_FORMAT_FRACTAL_NZ)
    packed = torch_npu.npu_convert_weight_to_int4pack(plain)
    layout = w4a16.NZ if form == "nz" else w4a16.ROWS
    ours = layout.pack(codes)
    assert torch.equal(formats.raw_bytes(packed), ours.flatten().view(torch.uint8))
    if form == "nz":
        assert tuple(ours.shape) == (192 // 64, 256 // 16, 16, 8)


@pytest.mark.parametrize(
    "scheme", [W8A16(), W4A16(64), W4A16(64, zero_points=True), W4A16(32)], ids=str
)
@pytest.mark.parametrize("outputs", [65535 // 64 * 64, 65536, 151936])
def test_more_outputs_than_a_kernel_takes(
    scheme: Scheme, outputs: int, backend: NpuBackend
) -> None:
    """As those of a head: each part is a range of the stored bytes, cut between words and strips.

    The last size is the vocabulary of every published Qwen3."""
    linear = stored(scheme, (outputs, 96 if scheme == W4A16(32) else 128))
    loaded, x = backend.linear(linear), random(3, linear.shape[1], seed=2)
    assert isinstance(loaded, WeightOnlyLinear if outputs <= 65535 else DividedLinear)
    expected = x.float() @ linear.dequantize().bfloat16().float().t()
    assert torch.allclose(loaded(x.to("npu")).cpu().float(), expected, rtol=2**-7, atol=0.05)
    rows = torch.tensor([0, 50, linear.shape[1] - 1])
    assert torch.equal(loaded.probe(rows), linear.codes()["weight"][:, rows].t())


@pytest.mark.parametrize(("scheme", "shape"), CASES[:3], ids=str)
def test_another_order_of_tiles_is_noticed_and_got_round(
    scheme: Scheme, shape: Shape, backend: NpuBackend
) -> None:
    """int4 words, which no cast knows, then lie row by row."""
    linear = stored(scheme, shape)
    with (
        ascend_sim.faults.transposed_nz_tiles(),
        pytest.warns(UserWarning, match="casting each weight on the device"),
    ):
        loaded = backend.linear(linear)
        assert self_check.kernel_sees_weight(linear, loaded)
        if isinstance(scheme, W4A16):
            assert formats.format_of(loaded.weight) == formats.ACL_FORMAT_ND


def test_a_kernel_that_ignores_signs_of_scales_is_found(
    backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4, which `doctor` runs; the other checks see codes alone."""
    linear = stored(W4A16(128), (192, 256))
    loaded = backend.linear(linear)
    assert bool((linear.tensors["scale"] < 0).any())
    right = torch_npu.npu_weight_quant_batchmatmul

    def unsigned(
        x: Tensor, weight: Tensor, scale: Tensor, *more: object, **named: object
    ) -> Tensor:
        return right(x, weight, scale.abs(), *more, **named)

    monkeypatch.setattr(torch_npu, "npu_weight_quant_batchmatmul", unsigned)
    assert self_check.kernel_sees_weight(linear, loaded)
    assert not self_check.kernel_decodes_weight(linear, loaded)


def test_a_kernel_that_ignores_offsets_is_found(
    backend: NpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = stored(W4A16(128, zero_points=True), (192, 256))
    loaded = backend.linear(linear)
    assert bool((linear.tensors["offset"] != 0).any())
    right = torch_npu.npu_weight_quant_batchmatmul

    def symmetric(x: Tensor, weight: Tensor, scale: Tensor, _: object, **more: object) -> Tensor:
        return right(x, weight, scale, **more)

    assert self_check.kernel_decodes_weight(linear, loaded)
    monkeypatch.setattr(torch_npu, "npu_weight_quant_batchmatmul", symmetric)
    assert self_check.kernel_sees_weight(linear, loaded)
    assert not self_check.kernel_decodes_weight(linear, loaded)


def test_a_part_that_the_kernel_does_not_take_is_refused(backend: NpuBackend) -> None:
    half = stored(W4A16(128), (192, 256)).narrow("inputs", [(0, 128)])
    with pytest.raises(CheckpointError, match=r"\[192, 128\].*more inputs than a group of 128"):
        backend.linear(half)


def test_a_wrong_orientation_is_caught(backend: NpuBackend) -> None:
    right = stored(W4A16(128), (256, 256))
    turned = w4a16.NZ.pack(right.codes()["weight"].t())
    wrong = dataclasses.replace(right, tensors={**right.tensors, "weight": turned})
    loaded = WeightOnlyLinear.load(wrong, formats.upload_packed)
    assert self_check.reads_back(wrong, loaded)
    assert not self_check.kernel_sees_weight(right, loaded)
