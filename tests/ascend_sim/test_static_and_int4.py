"""Fixed scales and 4-bit weights: npu_quantize, npu_add_rms_norm_quant, and npu_quant_matmul with
groups. Each against a reference that is written another way, and every rule of a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

from ascend_sim import cann, nz, trace
from ascend_sim.test_refusals import (
    FULL,
    HALF,
    INT8,
    INT32,
    INT64,
    Cases,
    as_nz,
    dev,
    make,
    refused,
)

EPSILON = 1e-6


def codes_of(x: torch.Tensor, scale: float, offset: int) -> torch.Tensor:
    """One number at a time, by Python's own rounding of halves."""
    numbers = [
        [max(-128, min(127, round((v * scale + offset).item()))) for v in row] for row in x.float()
    ]
    return torch.tensor(numbers, dtype=torch.int8)


@pytest.mark.parametrize("per_column", [False, True])
def test_quantize(per_column: bool) -> None:
    x = torch.randn(5, 48).to(HALF) * 20
    x[0, :4] = torch.tensor([0.25, 0.75, 1.25, -500.0])
    scale = torch.full((48 if per_column else 1,), 2.0, dtype=HALF)
    offset = torch.full_like(scale, -7)
    found = torch_npu.npu_quantize(x.npu(), scale.npu(), offset.npu(), torch.qint8, -1, False)
    assert torch.equal(found.cpu(), codes_of(x, 2.0, -7))
    assert found[0, :4].cpu().tolist() == [-6, -6, -4, -128]  # halves go to the even neighbour
    assert [entry.name for entry in trace.launches()] == ["aclnnAscendQuantV3"]


QUANTIZE: Cases = {
    "scale dtype": ("scales must have the dtype of input", dict(scales=lambda: dev(1, dtype=FULL))),
    "scale size": ("scales must have 1 or 64 elements", dict(scales=lambda: dev(32))),
    "offset dtype": (
        "zero_points must have the dtype of scales",
        dict(zero_points=lambda: dev(1, **INT32)),
    ),
    "offset shape": ("zero_points must have shape", dict(zero_points=lambda: dev(64))),
    "integers": ("input must be one of", dict(input=lambda: dev(4, 64, **INT8))),
}


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize_refuses(case: str) -> None:
    rule, changes = QUANTIZE[case]
    base: dict[str, Any] = dict(
        input=dev(4, 64), scales=dev(1), zero_points=dev(1), dtype=torch.qint8, axis=-1,
        div_mode=False,
    )  # fmt: skip
    refused(rule, torch_npu.npu_quantize, base, **make(changes))


@pytest.mark.parametrize("single", [True, False])
def test_add_rms_norm_quant(single: bool) -> None:
    a, b, gamma = (torch.randn(*shape).to(HALF) for shape in ((4, 64), (4, 64), (64,)))
    scales = torch.full((64,), 1 / 32, dtype=FULL if single else HALF)
    offsets = torch.full((64,), 11, dtype=torch.int32 if single else HALF)
    found, _, total = torch_npu.npu_add_rms_norm_quant(
        a.npu(), b.npu(), gamma.npu(), scales.npu(), offsets.npu(), epsilon=EPSILON
    )
    summed = (a + b).double()
    normed = summed / (summed.pow(2).mean(-1, keepdim=True) + EPSILON) ** 0.5 * gamma.double()
    assert torch.equal(total.cpu(), a + b)
    off = (found.cpu().int() - codes_of(normed, 32.0, 11).int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    assert [entry.name for entry in trace.launches()] == ["aclnnAddRmsNormQuantV2"]


ADD_NORM_QUANT: Cases = {
    "float": (
        "x1 must be one of",
        {name: (lambda: dev(4, 64, dtype=FULL)) for name in ("x1", "x2")}
        | dict(gamma=lambda: dev(64, dtype=FULL)),
    ),
    "sum": ("x2 must have shape", dict(x2=lambda: dev(1, 64))),
    "one scale": ("scales1 must have shape", dict(scales1=lambda: dev(1, dtype=FULL))),
    "half scales": (
        "zero_points1 torch.int32 does not go with scales1 torch.bfloat16",
        dict(scales1=lambda: dev(64)),
    ),
    "fp16 scales": ("does not go with x1", dict(scales1=lambda: dev(64, dtype=torch.float16))),
    "half offsets": ("does not go with scales1", dict(zero_points1=lambda: dev(64))),
    "offset shape": ("zero_points1 must have shape", dict(zero_points1=lambda: dev(1, **INT32))),
    "multiplied": ("div_mode must be True", dict(div_mode=False)),
    "beta": ("beta is not simulated", dict(beta=lambda: dev(64))),
}


def add_norm_arguments() -> dict[str, Any]:
    return dict(
        x1=dev(4, 64), x2=dev(4, 64), gamma=dev(64), scales1=dev(64, dtype=FULL),
        zero_points1=dev(64, **INT32),
    )  # fmt: skip


@pytest.mark.parametrize("case", ADD_NORM_QUANT)
def test_add_rms_norm_quant_refuses(case: str) -> None:
    rule, changes = ADD_NORM_QUANT[case]
    refused(rule, torch_npu.npu_add_rms_norm_quant, add_norm_arguments(), **make(changes))


def test_older_releases_take_bfloat16_scales_only() -> None:
    half = add_norm_arguments() | dict(scales1=dev(64), zero_points1=dev(64))
    with cann.altered(single_norm_scales=False):
        torch_npu.npu_add_rms_norm_quant(**half)
        with pytest.raises(RuntimeError, match="does not go with x1"):
            torch_npu.npu_add_rms_norm_quant(**add_norm_arguments())
            torch.npu.synchronize()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """int32 [K, N / 8] of codes [K, N], a digit at a time."""
    words = [
        [sum((int(code) & 15) << 4 * place for place, code in enumerate(eight)) for eight in row]
        for row in codes.view(codes.shape[0], -1, 8)
    ]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def bits(scale: torch.Tensor) -> torch.Tensor:
    """int64 with a float32 in its low half."""
    return scale.view(torch.int32).long() & 0xFFFFFFFF


def test_products_of_groups() -> None:
    tokens, inputs, outputs = 3, 512, 16
    x = torch.randint(-128, 128, (tokens, inputs), dtype=torch.int8)
    codes = torch.randint(-8, 8, (inputs, outputs), dtype=torch.int8)
    scale, token = torch.rand(2, outputs).to(HALF).float() / 50, torch.rand(tokens, 1) / 10
    weight = codes.double() * scale.double().repeat_interleave(256, 0)
    found = torch_npu.npu_quant_matmul(
        x.npu(),
        packed(codes).npu(),
        bits(scale).npu(),
        offset=(8 * weight.sum(0)).float().npu(),
        pertoken_scale=token.npu(),
        group_sizes=[0, 0, 256],
        output_dtype=HALF,
    )
    expected = x.double() @ weight * token.double()
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.01, atol=0.01)
    assert [entry.name for entry in trace.launches()] == ["aclnnQuantMatmulV5"]


GROUPS: Cases = {
    "groups": ("group_sizes of int4 weights must be", dict(group_sizes=[0, 0, 128])),
    "no groups": ("group_sizes of int4 weights must be", dict(group_sizes=None)),
    "no offset": ("need an offset", dict(offset=None)),
    "offset shape": ("offset must have shape", dict(offset=lambda: dev(1, dtype=FULL))),
    "offset dtype": ("offset must be one of", dict(offset=lambda: dev(64))),
    "no token scale": ("need pertoken_scale", dict(pertoken_scale=None)),
    "flat token scale": (
        "pertoken_scale must have shape",
        dict(pertoken_scale=lambda: dev(4, dtype=FULL)),
    ),
    "float scale": ("scale must be one of", dict(scale=lambda: dev(2, 64, dtype=FULL))),
    "scale shape": ("scale must have shape", dict(scale=lambda: dev(64, **INT64))),
    "bias": ("take no bias", dict(bias=lambda: dev(64, dtype=FULL))),
    "strides": ("x2 must be contiguous", dict(x2=lambda: dev(8, 512, **INT32).t())),
    "part of a group": (
        "K must be a multiple of 256",
        dict(x1=lambda: dev(4, 520, **INT8), x2=lambda: dev(520, 8, **INT32)),
    ),
    "many inputs": (
        "may be 29576 at most",
        dict(x1=lambda: dev(4, 29696, **INT8), x2=lambda: dev(29696, 8, **INT32)),
    ),
    "inner": ("inner dims differ", dict(x2=lambda: dev(256, 8, **INT32))),
    "output": ("the output must be one of", dict(output_dtype=torch.int32)),
}


def group_arguments() -> dict[str, Any]:
    return dict(
        x1=dev(4, 512, **INT8), x2=dev(512, 8, **INT32), scale=dev(2, 64, **INT64),
        offset=dev(64, dtype=FULL), pertoken_scale=dev(4, 1, dtype=FULL),
        group_sizes=[0, 0, 256], output_dtype=HALF,
    )  # fmt: skip


@pytest.mark.parametrize("case", GROUPS)
def test_products_of_groups_refuse(case: str) -> None:
    rule, changes = GROUPS[case]
    refused(rule, torch_npu.npu_quant_matmul, group_arguments(), **make(changes))


def test_products_of_groups_refuse_fractal_nz() -> None:
    weight = as_nz(dev(512, 8, **INT32))
    assert torch_npu.get_npu_format(weight) == nz.FORMAT
    base = group_arguments()
    refused("must be in format ND, not NZ", torch_npu.npu_quant_matmul, base, x2=weight)
