"""What a card refuses: one call that works, then one broken rule a case, named in the message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from ascend_sim import nz

HALF, FULL = torch.bfloat16, torch.float32


def dev(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).npu()


def strided(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    """The wanted shape, but every second row of a larger tensor."""
    return dev(shape[0] * 2, *shape[1:], dtype=dtype)[::2]


def as_nz(tensor: torch.Tensor) -> torch.Tensor:
    torch_npu.npu.config.allow_internal_format = True
    return torch_npu.npu_format_cast(tensor, nz.FORMAT)


def refused(
    rule: str, call: Callable[..., object], base: dict[str, Any], **changes: object
) -> None:
    call(**base)
    torch.npu.synchronize()
    with pytest.raises(RuntimeError, match=rule):
        call(**{**base, **changes})
        torch.npu.synchronize()


INT8, INT32, INT64 = (dict(dtype=t) for t in (torch.int8, torch.int32, torch.int64))
FP32 = dict(dtype=FULL)

Cases = dict[str, tuple[str, dict[str, Any]]]
"""Name of a case -> the rule that the refusal states, and the arguments that break it."""

NORMS: Cases = {
    "gamma": ("last dims of x", dict(gamma=lambda: dev(60))),
    "gamma dtype": ("gamma must have the dtype", dict(gamma=lambda: dev(64, dtype=torch.float16))),
    "one dim": ("2 to 8 dims", dict(input=lambda: dev(64))),
    "integers": ("must be one of", dict(input=lambda: dev(4, 64, **INT32))),
}


def make(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value() if callable(value) else value for name, value in changes.items()}


@pytest.mark.parametrize("case", NORMS)
def test_rms_norm(case: str) -> None:
    rule, changes = NORMS[case]
    base = dict(input=dev(4, 64), gamma=dev(64))
    refused(rule, torch_npu.npu_rms_norm, base, **make(changes))


ADD_NORMS: Cases = {
    "shapes": ("x2 must have shape", dict(x2=lambda: dev(1, 64))),
    "dtypes": ("one dtype", dict(gamma=lambda: dev(64, **FP32))),
}


@pytest.mark.parametrize("case", ADD_NORMS)
def test_add_rms_norm(case: str) -> None:
    rule, changes = ADD_NORMS[case]
    base = dict(x1=dev(4, 64), x2=dev(4, 64), gamma=dev(64))
    refused(rule, torch_npu.npu_add_rms_norm, base, **make(changes))


ADD_QUANT: Cases = {
    "float": (
        "x1 must be one of",
        dict(
            x1=lambda: dev(4, 64, **FP32),
            x2=lambda: dev(4, 64, **FP32),
            gamma=lambda: dev(64, **FP32),
        ),
    ),
    "smooth": ("smooth_scale and beta", dict(smooth_scale1=lambda: dev(32))),
    "mask": (
        "needs its output_mask",
        dict(smooth_scale1=lambda: dev(64), output_mask=[False, True]),
    ),
}


@pytest.mark.parametrize("case", ADD_QUANT)
def test_add_rms_norm_dynamic_quant(case: str) -> None:
    rule, changes = ADD_QUANT[case]
    base = dict(x1=dev(4, 64), x2=dev(4, 64), gamma=dev(64))
    refused(rule, torch_npu.npu_add_rms_norm_dynamic_quant, base, **make(changes))


QUANT: Cases = {
    "float": ("x must be one of", dict(input=lambda: dev(4, 64, **FP32))),
    "one dim": ("greater than 1", dict(input=lambda: dev(64))),
    "smooth": ("smooth_scales must have shape", dict(smooth_scales=lambda: dev(32))),
}


@pytest.mark.parametrize("case", QUANT)
def test_dynamic_quant(case: str) -> None:
    rule, changes = QUANT[case]
    refused(rule, torch_npu.npu_dynamic_quant, dict(input=dev(4, 64)), **make(changes))


MATMUL: Cases = {
    "long n": (
        "last dim of x2 may be 65535",
        dict(x2=lambda: dev(64, 65536, **INT8), scale=lambda: dev(65536, **FP32)),
    ),
    "long k": (
        "last dim of x1 may be 65535",
        dict(x1=lambda: dev(4, 65536, **INT8), x2=lambda: dev(65536, 96, **INT8)),
    ),
    "inner": ("inner dims differ", dict(x2=lambda: dev(32, 96, **INT8))),
    "x1 strides": ("x1 must be contiguous", dict(x1=lambda: strided(4, 64, **INT8))),
    "x2 strides": (
        "x2 must be contiguous or a transposed view",
        dict(x2=lambda: strided(64, 96, **INT8)),
    ),
    "scale shape": ("scale must have shape", dict(scale=lambda: dev(64, **FP32))),
    "scale for fp16": (
        "does not go with output",
        dict(scale=lambda: dev(96), output_dtype=torch.float16),
    ),
    "half scale": ("does not go with output", dict(scale=lambda: dev(96, dtype=torch.float16))),
    "token dtype": ("pertoken_scale must be one of", dict(pertoken_scale=lambda: dev(4))),
    "token shape": ("pertoken_scale must have shape", dict(pertoken_scale=lambda: dev(5, **FP32))),
    "token for int32": ("takes no pertoken_scale", dict(output_dtype=torch.int32)),
    "bias": ("bias must be one of", dict(bias=lambda: dev(96, dtype=torch.float16))),
    "float weight": ("x2 must be one of", dict(x2=lambda: dev(64, 96))),
}


@pytest.mark.parametrize("case", MATMUL)
def test_quant_matmul(case: str) -> None:
    rule, changes = MATMUL[case]
    base = dict(
        x1=dev(4, 64, **INT8),
        x2=dev(64, 96, **INT8),
        scale=dev(96, **FP32),
        pertoken_scale=dev(4, **FP32),
        output_dtype=HALF,
    )
    refused(rule, torch_npu.npu_quant_matmul, base, **make(changes))


def int4(rows: int, columns: int, form: str = "nd") -> torch.Tensor:
    """Zeros as the wheel packs them: [K, N / 8] words."""
    plain = dev(rows, columns, **INT32)
    return torch_npu.npu_convert_weight_to_int4pack(as_nz(plain) if form == "nz" else plain)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1)


WEIGHT_QUANT: Cases = {
    "float x": ("x must be one of", dict(x=lambda: dev(4, 256, **FP32))),
    "float weight": ("weight must be one of", dict(weight=lambda: dev(256, 128))),
    "x strides": ("x must be contiguous or", dict(x=lambda: strided(4, 256))),
    "weight strides": (
        "weight must be contiguous or",
        dict(weight=lambda: strided(256, 16, **INT32)),
    ),
    "group of a row": ("multiple of 32 within the range", dict(antiquant_group_size=256)),
    "group of 48": ("multiple of 32 within the range", dict(antiquant_group_size=48)),
    "long k": (
        "K and N may be 65535",
        dict(
            x=lambda: dev(1, 65536),
            weight=lambda: int4(65536, 8),
            antiquant_scale=lambda: dev(512, 8),
        ),
    ),
    "long n": (
        "K and N may be 65535",
        dict(weight=lambda: int4(256, 65536), antiquant_scale=lambda: dev(2, 65536)),
    ),
    "scale shape": ("antiquant_scale must have one of", dict(antiquant_scale=lambda: dev(128, 2))),
    "scale dtype": ("must have the dtype of x", dict(antiquant_scale=lambda: dev(2, 128, **FP32))),
    "scale strides": (
        "antiquant_scale must be contiguous",
        dict(antiquant_scale=lambda: strided(2, 128)),
    ),
    "offset": ("antiquant_offset must have", dict(antiquant_offset=lambda: dev(1, 128))),
    "offset dtype": (
        "antiquant_offset must have",
        dict(antiquant_offset=lambda: dev(2, 128, **FP32)),
    ),
    "bias dtype": ("bias must be one of float32", dict(bias=lambda: dev(128))),
    "bias shape": ("bias must have shape", dict(bias=lambda: dev(64, **FP32))),
    "scales of a transposed weight": (
        "must be a transposed view",
        dict(weight=lambda: turned(int4(128, 256))),
    ),
    "quantized output": ("int8 output", dict(quant_scale=lambda: dev(128, **INT64))),
}
"""Of a weight in ND, [256, 128] in groups of 128."""

WEIGHT_QUANT_NZ: Cases = {
    "group of 32": (
        "groups of an int4 NZ weight are 64 or 128, not 32",
        dict(antiquant_scale=lambda: dev(8, 128), antiquant_group_size=32),
    ),
    "k": (
        "K of an int4 NZ weight must be a multiple of the group 128, not 192",
        dict(x=lambda: dev(4, 192), weight=lambda: int4(192, 128, "nz")),
    ),
    "n": (
        "N of an int4 NZ weight in groups must be a multiple of 64, not 96",
        dict(weight=lambda: int4(256, 96, "nz"), antiquant_scale=lambda: dev(2, 96)),
    ),
    "transposed x": ("must not be transposed", dict(x=lambda: turned(dev(256, 4)))),
    "transposed weight": (
        "must not be transposed",
        dict(
            weight=lambda: turned(int4(128, 256, "nz")),
            antiquant_scale=lambda: turned(dev(128, 2)),
        ),
    ),
    "upright with a scale for each output": (
        "must be a transposed view",
        dict(antiquant_scale=lambda: dev(128), antiquant_group_size=0),
    ),
    "one scale": (
        "no scale for all of it",
        dict(
            weight=lambda: turned(int4(128, 256, "nz")),
            antiquant_scale=lambda: dev(1),
            antiquant_group_size=0,
        ),
    ),
    "int8 in groups": (
        "an int8 NZ weight has a scale for each output",
        dict(weight=lambda: as_nz(dev(256, 128, **INT8))),
    ),
    "strips of 64 bytes": (
        "does not belong to the weight",
        dict(weight=lambda: as_nz(dev(256, 8, **INT32)), antiquant_scale=lambda: dev(2, 64)),
    ),
}
"""Of the same in FRACTAL_NZ."""


@pytest.mark.parametrize("case", WEIGHT_QUANT)
def test_weight_quant_batchmatmul(case: str) -> None:
    rule, changes = WEIGHT_QUANT[case]
    base = dict(
        x=dev(4, 256), weight=int4(256, 128), antiquant_scale=dev(2, 128), antiquant_group_size=128
    )
    refused(rule, torch_npu.npu_weight_quant_batchmatmul, base, **make(changes))


@pytest.mark.parametrize("case", WEIGHT_QUANT_NZ)
def test_weight_quant_batchmatmul_in_nz(case: str) -> None:
    rule, changes = WEIGHT_QUANT_NZ[case]
    base = dict(
        x=dev(4, 256),
        weight=int4(256, 128, "nz"),
        antiquant_scale=dev(2, 128),
        antiquant_group_size=128,
    )
    refused(rule, torch_npu.npu_weight_quant_batchmatmul, base, **make(changes))


@pytest.mark.opposite_modes
def test_matmul() -> None:
    base = dict(input=dev(4, 64), mat2=dev(64, 32))
    refused("dtypes differ|same dtype|dtype", torch.mm, base, mat2=dev(64, 32, **FP32))
    refused("inner dims differ|shapes cannot|size mismatch", torch.mm, base, mat2=dev(32, 64))
    with pytest.raises(RuntimeError, match="GatherV2"):  # no aclnn embedding for an NZ table
        torch.nn.functional.embedding(torch.tensor([0]).npu(), as_nz(dev(64, 32)))
        torch.npu.synchronize()


def test_swiglu() -> None:
    refused(
        "must be contiguous", torch_npu.npu_swiglu, dict(input=dev(4, 64)), input=dev(64, 4).t()
    )
    refused(
        "even|must be divisible", torch_npu.npu_swiglu, dict(input=dev(4, 64)), input=dev(4, 63)
    )
    base = dict(x=dev(4, 64), activate_left=True, quant_mode=1)
    refused("8192", torch_npu.npu_swiglu_quant, base, x=dev(2, 8194))


DEQUANT: Cases = {
    "no activation scale": ("needs activation_scale", dict(activation_scale=None)),
    "no weight scale": ("needs weight_scale", dict(weight_scale=None)),
    "flat activation scale": (
        "activation_scale must have shape",
        dict(activation_scale=lambda: dev(4, **FP32)),
    ),
    "flat weight scale": (
        "weight_scale must have shape",
        dict(weight_scale=lambda: dev(64, **FP32)),
    ),
    "half scale": ("weight_scale must be one of", dict(weight_scale=lambda: dev(1, 64))),
    "half input": ("activation_scale must be None", dict(x=lambda: dev(4, 64))),
    "three dims": ("two-dimensional", dict(x=lambda: dev(2, 2, 64, **INT32))),
}


@pytest.mark.parametrize("case", DEQUANT)
def test_dequant_swiglu_quant(case: str) -> None:
    rule, changes = DEQUANT[case]
    base = dict(
        x=dev(4, 64, **INT32),
        weight_scale=dev(1, 64, **FP32),
        activation_scale=dev(4, 1, **FP32),
        activate_left=True,
        quant_mode=1,
    )
    refused(rule, torch_npu.npu_dequant_swiglu_quant, base, **make(changes))


ROTARY: Cases = {
    "head size": (
        "head size must be one of .64, 128., not 32",
        dict(
            query=lambda: dev(4, 8, 32),
            key=lambda: dev(4, 2, 32),
            cos=lambda: dev(4, 1, 32),
            sin=lambda: dev(4, 1, 32),
        ),
    ),
    "cos shape": ("cos must have shape", dict(cos=lambda: dev(4, 8, 128))),
    "dtype": ("one dtype", dict(cos=lambda: dev(4, 1, 128, **FP32))),
    "layout": ("layout BNSD is not BSND or TND", dict(layout="BNSD")),
    "dims": ("3 dims for TND", dict(query=lambda: dev(1, 4, 8, 128))),
    "mode": ("rotary_mode interleave is not half", dict(rotary_mode="interleave")),
    "tokens": ("leading dims", dict(key=lambda: dev(5, 2, 128))),
}


@pytest.mark.parametrize("case", ROTARY)
def test_apply_rotary_pos_emb(case: str) -> None:
    rule, changes = ROTARY[case]
    base = dict(
        query=dev(4, 8, 128),
        key=dev(4, 2, 128),
        cos=dev(4, 1, 128),
        sin=dev(4, 1, 128),
        layout="TND",
    )
    refused(rule, torch_npu.npu_apply_rotary_pos_emb, base, **make(changes))


def test_rotary_mul() -> None:
    base = dict(input=dev(1, 4, 8, 64), r1=dev(1, 4, 1, 64), r2=dev(1, 4, 1, 64))
    refused(
        "does not broadcast",
        torch_npu.npu_rotary_mul,
        base,
        r1=dev(1, 3, 1, 64),
        r2=dev(1, 3, 1, 64),
    )
    refused(
        "last dim of the input",
        torch_npu.npu_rotary_mul,
        base,
        r1=dev(1, 4, 1, 32),
        r2=dev(1, 4, 1, 32),
    )
