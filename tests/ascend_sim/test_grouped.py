"""Grouped products: what is computed in every layout that is taken, and each refused demand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from ascend_sim import cann, nz, raw, trace
from ascend_sim.test_device import runtime_library
from ascend_sim.test_refusals import INT8, Cases, as_nz, dev, make, refused

HALF, FULL, WHOLE = torch.bfloat16, torch.float32, torch.int64
COUNTS = [3, 0, 5, 1, 0]
EXPERTS, ROWS, INPUTS, OUTPUTS = len(COUNTS), sum(COUNTS), 64, 96

# ------------------------------------------------------------------------------------------ layouts


def laid_out(weight: torch.Tensor, form: str) -> torch.Tensor:
    """[E, K, N] on the device: "nd" or "nz" as it is, "nd'" or "nz'" stored as [E, N, K]."""
    stored = weight.mT.contiguous() if form.endswith("'") else weight
    device = as_nz(stored.npu()) if form.startswith("nz") else stored.npu()
    return device.transpose(-2, -1) if form.endswith("'") else device


@pytest.mark.parametrize("dtype", [torch.int8, HALF])
def test_tiles_of_experts_are_copied_as_they_are_stored(dtype: torch.dtype) -> None:
    """empty_with_format makes [E, N / C0, K / 16, 16, C0], one expert after the other."""
    weight = torch.randint(-100, 100, (EXPERTS, INPUTS, OUTPUTS)).to(dtype)
    stored = torch.stack([nz.pack(each, nz.strip_columns(dtype)) for each in weight])
    torch_npu.npu.config.allow_internal_format = True
    empty = torch_npu.empty_with_format(
        weight.shape, dtype=dtype, device="npu", acl_format=nz.FORMAT
    )
    assert torch_npu.get_npu_format(empty) == nz.FORMAT
    storage = empty.untyped_storage()
    assert storage.nbytes() == stored.nbytes
    torch.npu.synchronize()
    copied = storage.data_ptr(), stored.nbytes, stored.data_ptr(), stored.nbytes
    assert runtime_library().aclrtMemcpy(*copied, 1) == 0
    assert not trace.launches()
    assert torch.equal(torch_npu.npu_format_cast(empty, 2).cpu(), weight)
    cast = as_nz(weight.npu())
    torch.npu.synchronize()
    assert torch.equal(raw.storage_bytes(cast), stored.flatten().view(torch.uint8))


# ------------------------------------------------------------------------------ npu_grouped_matmul


def counts(values: list[int] = COUNTS) -> torch.Tensor:
    return torch.tensor(values).npu()


def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact for int8: each row with the weight of its expert."""
    experts = [e for e, count in enumerate(COUNTS) for _ in range(count)]
    return torch.stack(
        [row.double() @ weight[e].double() for row, e in zip(x, experts, strict=True)]
    )


def of_rows(values: torch.Tensor) -> torch.Tensor:
    """[E, N] -> [rows, N]."""
    return values.repeat_interleave(torch.tensor(COUNTS), 0)


def grouped(x: torch.Tensor, weight: torch.Tensor, **named: Any) -> torch.Tensor:
    options: dict[str, Any] = dict(
        split_item=2, group_type=0, group_list=counts(), group_list_type=1
    )
    (out,) = torch_npu.npu_grouped_matmul([x.npu()], [weight], **{**options, **named})
    return out.cpu()


@pytest.mark.parametrize("form", ["nd", "nd'", "nz", "nz'"])
def test_grouped_floats(form: str) -> None:
    x = torch.randn(ROWS, INPUTS).to(HALF)
    weight = torch.randn(EXPERTS, INPUTS, OUTPUTS).to(HALF)
    out = grouped(x, laid_out(weight, form))
    assert out.dtype is HALF
    torch.testing.assert_close(out.double(), products(x, weight), rtol=2**-8, atol=2**-8)
    name = "aclnnGroupedMatmulWeightNz" if "nz" in form else "aclnnGroupedMatmulV5"
    assert [entry.name for entry in trace.launches()][-1] == name


def test_grouped_floats_are_those_of_one_product() -> None:
    """To the last bit, as a linear of an expert of its own computes them."""
    x = torch.randn(ROWS, INPUTS).to(HALF)
    weight = torch.randn(EXPERTS, OUTPUTS, INPUTS).to(HALF)
    out = grouped(x, laid_out(weight.mT, "nz'"))
    parts = [torch.nn.functional.linear(p, w) for p, w in zip(x.split(COUNTS), weight, strict=True)]
    assert torch.equal(out, torch.cat(parts))


@pytest.mark.parametrize("form", ["nd", "nd'", "nz", "nz'"])
@pytest.mark.parametrize(("scale_type", "out_type"), [(HALF, HALF), (FULL, torch.float16)])
def test_grouped_codes(form: str, scale_type: torch.dtype, out_type: torch.dtype) -> None:
    x = torch.randint(-128, 128, (ROWS, INPUTS), dtype=torch.int8)
    weight = torch.randint(-128, 128, (EXPERTS, INPUTS, OUTPUTS), dtype=torch.int8)
    scale = (torch.rand(EXPERTS, OUTPUTS) / 1e4).to(scale_type)
    token = torch.rand(ROWS)
    out = grouped(
        x,
        laid_out(weight, form),
        scale=[scale.npu()],
        per_token_scale=[token.npu()],
        output_dtype=out_type,
    )
    channel_first = products(x, weight).float() * of_rows(scale).float() * token[:, None]
    assert out.dtype is out_type and torch.equal(out, channel_first.to(out_type))


def test_the_scale_of_the_output_comes_first() -> None:
    """Among enough numbers the other order rounds some differently."""
    x = torch.randint(-128, 128, (600, 32), dtype=torch.int8)
    weight = torch.randint(-128, 128, (2, 32, 512), dtype=torch.int8)
    scale, token = torch.rand(2, 512), torch.rand(600) / 1000
    out = grouped(
        x,
        weight.npu(),
        scale=[scale.npu()],
        per_token_scale=[token.npu()],
        output_dtype=torch.float16,
        group_list=counts([600, 0]),
    )
    total = (x.double() @ weight[0].double()).float()
    assert torch.equal(out, (total * scale[0] * token[:, None]).half())
    assert not torch.equal(out, (total * token[:, None] * scale[0]).half())


def test_cumulative_groups() -> None:
    x, weight = torch.randn(ROWS, INPUTS).to(HALF), torch.randn(EXPERTS, INPUTS, 32).to(HALF)
    sums = torch.tensor(COUNTS).cumsum(0).npu()
    listed = grouped(x, weight.npu(), group_list=sums, group_list_type=0)
    assert torch.equal(listed, grouped(x, weight.npu()))


def strided(*shape: int) -> torch.Tensor:
    """Every second column of a larger tensor."""
    return dev(*shape[:-1], shape[-1] * 2)[..., ::2]


GROUPED: Cases = {
    "float list": ("group_list must be one of int64", dict(group_list=lambda: dev(3))),
    "short list": ("group_list must have shape", dict(group_list=lambda: counts([4, 3]))),
    "sum": ("group_list tells 8 rows, x has 7", dict(group_list=lambda: counts([4, 3, 1]))),
    "less": ("group_list tells 6 rows, x has 7", dict(group_list=lambda: counts([4, 2, 0]))),
    "negative": ("negative counts", dict(group_list=lambda: counts([8, -1, 0]))),
    "list type": ("group_list_type must be 0 or 1", dict(group_list_type=3)),
    "split": ("split_item is 2 or 3", dict(split_item=4)),
    "group type": ("only grouped rows", dict(group_type=-1)),
    "activation": ("activations are not simulated", dict(act_type=5)),
    "bias": ("bias and antiquantization", dict(bias=lambda: [dev(3, 96, dtype=FULL)])),
    "scale of floats": ("floats take no scale", dict(scale=lambda: [dev(3, 96)])),
    "inner": ("inner dims differ", dict(weight=lambda: [dev(3, 32, 96)])),
    "dtypes": ("dtypes differ", dict(weight=lambda: [dev(3, 64, 96, dtype=torch.float16)])),
    "x strides": ("x must be contiguous", dict(x=lambda: [strided(7, 64)])),
    "weight strides": (
        "contiguous or a transposed view",
        dict(weight=lambda: [strided(3, 64, 96)]),
    ),
    "two weights": (
        "only one tensor as weight",
        dict(weight=lambda: [dev(64, 96) for _ in range(3)]),
    ),
    "wide": (
        "innermost dim may be 65535",
        dict(weight=lambda: [dev(3, 64, 65536)]),
    ),
    "tiles": (
        r"stored as \(64, 88\) must have multiples of \(16, 16\)",
        dict(weight=lambda: [as_nz(dev(3, 64, 88))]),
    ),
    "tiles of a transposed weight": (
        r"stored as \(88, 64\) must have multiples of \(16, 16\)",
        dict(weight=lambda: [as_nz(dev(3, 88, 64)).transpose(-2, -1)]),
    ),
    "one expert": (
        "must not have one element",
        dict(weight=lambda: [dev(1, 64, 96)], group_list=lambda: counts([7])),
    ),
}


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_floats_refuse(case: str) -> None:
    rule, changes = GROUPED[case]
    base = dict(
        x=[dev(7, 64)],
        weight=[dev(3, 64, 96)],
        split_item=2,
        group_type=0,
        group_list=counts([4, 0, 3]),
        group_list_type=1,
    )
    refused(f"{rule}|should only be one of", torch_npu.npu_grouped_matmul, base, **make(changes))


CODES: Cases = {
    "half scale for float16": (
        "scale torch.bfloat16 does not go with output torch.float16",
        dict(output_dtype=torch.float16),
    ),
    "single scale for bfloat16": (
        "scale torch.float32 does not go with output torch.bfloat16",
        dict(scale=lambda: [dev(3, 96, dtype=FULL)]),
    ),
    "scale shape": ("scale must have shape", dict(scale=lambda: [dev(96)])),
    "token dtype": ("per_token_scale must be one of", dict(per_token_scale=lambda: [dev(7)])),
    "token shape": (
        "per_token_scale must have shape",
        dict(per_token_scale=lambda: [dev(7, 1, dtype=FULL)]),
    ),
    "no scale": ("without scale or per_token_scale", dict(scale=None)),
    "float output": ("the output must be one of", dict(output_dtype=FULL)),
    "float weight": ("weight beside int8", dict(weight=lambda: [dev(3, 64, 96)])),
    "tiles": (
        r"stored as \(64, 80\) must have multiples of \(16, 32\)",
        dict(weight=lambda: [as_nz(dev(3, 64, 80, **INT8))], scale=lambda: [dev(3, 80)]),
    ),
}


def seven_rows() -> dict[str, Any]:
    """How seven rows of three experts, one of them without any, are multiplied into bfloat16."""
    groups = dict(group_type=0, group_list=counts([4, 0, 3]), group_list_type=1)
    return dict(split_item=2, output_dtype=HALF, **groups)


@pytest.mark.parametrize("case", CODES)
def test_grouped_codes_refuse(case: str) -> None:
    rule, changes = CODES[case]
    base = dict(
        x=[dev(7, 64, **INT8)],
        weight=[as_nz(dev(3, 64, 96, **INT8))],
        scale=[dev(3, 96)],
        per_token_scale=[dev(7, dtype=FULL)],
        **seven_rows(),
    )
    refused(rule, torch_npu.npu_grouped_matmul, base, **make(changes))


# --------------------------------------------------------------------- npu_grouped_matmul of codes


def words(codes: torch.Tensor) -> torch.Tensor:
    """int4 codes [E, K, N] eight to an int32, the first in the lowest bits."""
    fields = (codes.to(torch.int64) & 15).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    return fields.sum(-1).to(torch.int32)


def int4(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8)


@pytest.mark.parametrize("groups", [None, 1, 2, 4])
def test_floats_by_int4(groups: int | None) -> None:
    """Each weight is decoded in float32 and rounded once."""
    x, codes = torch.randn(ROWS, INPUTS).to(HALF), int4(EXPERTS, INPUTS, OUTPUTS)
    shape = (EXPERTS, OUTPUTS) if groups is None else (EXPERTS, groups, OUTPUTS)
    scale, offset = torch.randn(shape).to(HALF), torch.randint(-8, 9, shape).to(HALF)
    out = grouped(
        x,
        words(codes).npu(),
        antiquant_scale=[scale.npu()],
        antiquant_offset=[offset.npu()],
    )

    def spread(values: torch.Tensor) -> torch.Tensor:
        per_group = values.view(EXPERTS, -1, OUTPUTS)
        return per_group.repeat_interleave(INPUTS // per_group.shape[1], 1).float()

    decoded = ((codes.float() + spread(offset)) * spread(scale)).to(HALF)
    assert out.shape == (ROWS, OUTPUTS)
    torch.testing.assert_close(out.double(), products(x, decoded), rtol=2**-8, atol=2**-6)


def by_int8(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, inputs).to(HALF)
    codes = torch.randint(-128, 128, (EXPERTS, inputs, outputs), dtype=torch.int8)
    scale, offset = torch.rand(EXPERTS, outputs).to(HALF), torch.zeros(EXPERTS, outputs).to(HALF)
    out = grouped(x, codes.npu(), antiquant_scale=[scale.npu()], antiquant_offset=[offset.npu()])
    exact = products(x, codes) * of_rows(scale).double()
    return out, exact, products(x, (codes.float() * scale.float().unsqueeze(1)).to(HALF))


def test_floats_by_int8() -> None:
    out, _, rounded = by_int8(INPUTS, OUTPUTS)
    torch.testing.assert_close(out.double(), rounded, rtol=2**-8, atol=2**-4)


def test_floats_by_int8_in_large_shapes() -> None:
    """There the rows are rounded instead, to about 15 bits, and no weight is: the result is nearer
    to the exact one than that of weights in bfloat16."""
    out, exact, rounded = by_int8(128, 1024)
    error = (out.double() - exact).abs().mean()
    assert error < (rounded.to(HALF).double() - exact).abs().mean()
    assert error < 2**-8 * exact.abs().mean()


@pytest.mark.parametrize("form", ["nd", "nz"])
def test_int8_by_int4(form: str) -> None:
    """The definition of this package's w4a8 is held against the same device elsewhere; here it is
    what the products come to, and that the rows are lost."""
    x, codes = torch.randint(-128, 128, (ROWS, 512), dtype=torch.int8), int4(EXPERTS, 512, 64)
    scale = (torch.rand(EXPERTS, 2, 64) / 1000).to(HALF).float()
    decoded = codes * scale.repeat_interleave(256, 1)
    weight = words(codes).npu()
    if form == "nz":  # words are laid out as bytes
        weight = as_nz(words(codes).view(torch.int8).npu()).view(torch.int32)
    token, rows = torch.rand(ROWS), x.npu()
    (out,) = torch_npu.npu_grouped_matmul(
        [rows],
        [weight],
        scale=[scale.view(torch.int32).long().npu()],
        bias=[(8 * decoded.sum(1)).npu()],
        per_token_scale=[token.npu()],
        split_item=2,
        group_type=0,
        group_list=counts(),
        group_list_type=1,
        output_dtype=HALF,
    )
    exact = products(x, decoded) * token.double()[:, None]
    error = (out.cpu().double() - exact).abs()
    assert error.max() < 0.02 * exact.abs().max()
    high, low = x.int() >> 4, (x.int() & 15) - 8
    halves = torch.stack([high, low], 1).reshape(ROWS, -1, 2)
    assert torch.equal(rows.cpu(), (halves[..., 0] & 15 | halves[..., 1] << 4).to(torch.int8))


DECODED: Cases = {
    "nz": (
        "must be in format ND, not NZ",
        dict(weight=lambda: [as_nz(dev(3, 64, 96, **INT8))]),
    ),
    "no offset": ("needs antiquant_scale and antiquant_offset", dict(antiquant_offset=None)),
    "scale dtype": (
        "antiquant_scale must be one of",
        dict(antiquant_scale=lambda: [dev(3, 96, dtype=FULL)]),
    ),
    "offset shape": (
        "antiquant_offset must have the shape",
        dict(antiquant_offset=lambda: [dev(3, 1, 96)]),
    ),
    "groups of int8": (
        "does not belong to the weight",
        dict(
            antiquant_scale=lambda: [dev(3, 2, 96)],
            antiquant_offset=lambda: [dev(3, 2, 96)],
        ),
    ),
    "scale": ("takes no scale", dict(scale=lambda: [dev(3, 96)])),
    "inner": ("inner dims differ", dict(weight=lambda: [dev(3, 32, 96, **INT8)])),
}


@pytest.mark.parametrize("case", DECODED)
def test_floats_by_codes_refuse(case: str) -> None:
    rule, changes = DECODED[case]
    base = dict(
        x=[dev(7, 64)],
        weight=[dev(3, 64, 96, **INT8)],
        antiquant_scale=[dev(3, 96)],
        antiquant_offset=[dev(3, 96)],
        split_item=2,
        group_type=0,
        group_list=counts([4, 0, 3]),
        group_list_type=1,
    )
    refused(rule, torch_npu.npu_grouped_matmul, base, **make(changes))


SPLIT: Cases = {
    "float scale": (
        "scale must be one of",
        dict(scale=lambda: [dev(3, 2, 64, dtype=FULL)]),
    ),
    "scale shape": ("scale must have shape", dict(scale=lambda: [dev(3, 64, dtype=WHOLE)])),
    "no bias": ("needs scale, bias and per_token_scale", dict(bias=None)),
    "bias shape": ("bias must have shape", dict(bias=lambda: [dev(3, 1, 64, dtype=FULL)])),
    "ends": ("read as counts", dict(group_list_type=0)),
    "tiles": (
        "must have multiples of 16 and 64",
        dict(
            weight=lambda: [as_nz(dev(3, 512, 16, **INT8)).view(torch.int32)],
            scale=lambda: [dev(3, 2, 32, dtype=WHOLE)],
            bias=lambda: [dev(3, 32, dtype=FULL)],
        ),
    ),
    "inputs": (
        "K must be a multiple of 256",
        dict(
            x=lambda: [dev(7, 384, **INT8)],
            weight=lambda: [dev(3, 384, 8, dtype=torch.int32)],
        ),
    ),
    "antiquantization": ("take no antiquantization", dict(antiquant_scale=lambda: [dev(3, 64)])),
}


@pytest.mark.parametrize("case", SPLIT)
def test_int8_by_int4_refuses(case: str) -> None:
    rule, changes = SPLIT[case]
    base = dict(
        x=[dev(7, 512, **INT8)],
        weight=[dev(3, 512, 8, dtype=torch.int32)],
        scale=[dev(3, 2, 64, dtype=WHOLE)],
        bias=[dev(3, 64, dtype=FULL)],
        per_token_scale=[dev(7, dtype=FULL)],
        **seven_rows(),
    )
    refused(rule, torch_npu.npu_grouped_matmul, base, **make(changes))


# ------------------------------------------------------------- npu_grouped_matmul_swiglu_quant(_v2)


def gated(scale: torch.Tensor, token: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    values = (sums.float() * token[:, None] * of_rows(scale).float()).double()
    left, right = values.chunk(2, 1)
    return left / (1 + torch.exp(-left)) * right


Gated = Callable[..., tuple[torch.Tensor, ...]]


def newer(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, token: torch.Tensor) -> Any:
    return torch_npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [scale], token, counts(), group_list_type=1
    )


def older(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, token: torch.Tensor) -> Any:
    sums = torch.tensor(COUNTS).cumsum(0).npu()
    return torch_npu.npu_grouped_matmul_swiglu_quant(x, weight, sums, scale, token)


@pytest.mark.parametrize("operator", [newer, older])
@pytest.mark.parametrize("scale_type", [FULL, HALF])
def test_gated_products(operator: Gated, scale_type: torch.dtype) -> None:
    x = torch.randint(-128, 128, (ROWS, INPUTS), dtype=torch.int8)
    x[2] = 0
    weight = torch.randint(-128, 128, (EXPERTS, INPUTS, OUTPUTS), dtype=torch.int8)
    scale, token = (torch.rand(EXPERTS, OUTPUTS) / 1e4).to(scale_type), torch.rand(ROWS)
    codes, scales, *_ = operator(x.npu(), as_nz(weight.npu()), scale.npu(), token.npu())
    assert codes.dtype is torch.int8 and codes.shape == (ROWS, OUTPUTS // 2)
    expected = gated(scale, token, products(x, weight))
    torch.testing.assert_close(
        scales.cpu().double(), expected.abs().amax(1) / 127, rtol=1e-5, atol=0
    )
    error = codes.cpu().double() * scales.cpu().double()[:, None] - expected
    assert (error.abs() <= scales.cpu().double()[:, None] * 0.54).all()
    assert not codes[2].cpu().any() and scales[2] == 0


def test_gated_codes_pass_through_float16() -> None:
    """101.47 becomes 101.5 there, and 102; the nearest is 101."""
    x, scale = torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 64)
    weight = torch.zeros(2, 32, 64, dtype=torch.int8)
    weight[:, :, :32] = 1  # a gate of 32, which leaves values as they are, times 32
    weight[:, :, 32:] = 1
    scale[:, 33] = 101.47 / 127
    token = torch.ones(2)
    codes, _ = torch_npu.npu_grouped_matmul_swiglu_quant_v2(
        x.npu(),
        [as_nz(weight.npu())],
        [scale.npu()],
        token.npu(),
        counts([1, 1]),
        group_list_type=1,
    )
    assert codes[0, :2].cpu().tolist() == [127, 102]


@pytest.mark.no_task_queue  # with it, memory is not NaN in between
def test_rows_of_no_expert_are_not_written() -> None:
    x, weight = dev(6, 32, **INT8), as_nz(dev(2, 32, 64, **INT8))
    scale, token = dev(2, 64, dtype=FULL), dev(6, dtype=FULL)
    _, scales = torch_npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [weight], [scale], token, counts([1, 2]), group_list_type=1
    )
    assert not scales[:3].cpu().any() and scales[3:].cpu().isnan().all()


def test_the_first_release_lacks_the_newer_operator() -> None:
    with cann.pretending("8.3"):
        assert not hasattr(torch_npu, "npu_grouped_matmul_swiglu_quant_v2")
        assert hasattr(torch_npu, "npu_grouped_matmul_swiglu_quant")
    assert hasattr(torch_npu, "npu_grouped_matmul_swiglu_quant_v2")


GATED: Cases = {
    "nd": ("must be in format NZ", dict(weight=lambda: [dev(3, 64, 96, **INT8)])),
    "transposed": (
        "must not be transposed",
        dict(weight=lambda: [as_nz(dev(3, 96, 64, **INT8)).transpose(-2, -1)]),
    ),
    "floats": ("x must be one of int8", dict(x=lambda: dev(7, 64))),
    "inner": ("inner dims differ", dict(x=lambda: dev(7, 32, **INT8))),
    "tiles": (
        r"stored as \(64, 80\) must have multiples of \(16, 32\)",
        dict(
            weight=lambda: [as_nz(dev(3, 64, 80, **INT8))],
            weight_scale=lambda: [dev(3, 80, dtype=FULL)],
        ),
    ),
    "wide": (
        "N may be 10240",
        dict(
            weight=lambda: [as_nz(dev(3, 64, 10272, **INT8))],
            weight_scale=lambda: [dev(3, 10272, dtype=FULL)],
        ),
    ),
    "long": (
        "K may be 65535",
        dict(x=lambda: dev(7, 65536, **INT8), weight=lambda: [as_nz(dev(3, 65536, 96, **INT8))]),
    ),
    "scale shape": ("weight_scale must have shape", dict(weight_scale=lambda: [dev(3, 64)])),
    "token dtype": ("x_scale must be one of", dict(x_scale=lambda: dev(7))),
    "token shape": ("x_scale must have shape", dict(x_scale=lambda: dev(6, dtype=FULL))),
    "smooth": ("take no bias, smooth", dict(smooth_scale=lambda: dev(3, 48, dtype=FULL))),
    "mode": ("dequant_mode and quant_mode must be 0", dict(dequant_mode=1)),
    "sum": ("group_list tells 8 rows", dict(group_list=lambda: counts([4, 0, 4]))),
    "list": ("group_list must have shape", dict(group_list=lambda: counts([4, 0]))),
}


@pytest.mark.parametrize("case", GATED)
def test_gated_products_refuse(case: str) -> None:
    rule, changes = GATED[case]
    base = dict(
        x=dev(7, 64, **INT8),
        weight=[as_nz(dev(3, 64, 96, **INT8))],
        weight_scale=[dev(3, 96, dtype=FULL)],
        x_scale=dev(7, dtype=FULL),
        group_list=counts([4, 0, 3]),
        group_list_type=1,
    )
    refused(rule, torch_npu.npu_grouped_matmul_swiglu_quant_v2, base, **make(changes))


# ----------------------------------------------------------------------------- a mixture as a whole


def test_a_mixture_in_a_graph() -> None:
    """Six launches, bit for bit as one expert after the other; a replay routes anew."""
    tokens, hidden, inner, experts, chosen = 6, 64, 32, 8, 2
    x = torch.randn(tokens, hidden).to(HALF)
    logits = torch.randn(tokens, experts)
    first = torch.randn(experts, 2 * inner, hidden).to(HALF)
    last = torch.randn(experts, hidden, inner).to(HALF)
    first_nz, last_nz = laid_out(first.mT, "nz'"), laid_out(last.mT, "nz'")
    x_in, logits_in = x.npu(), logits.npu()
    groups: dict[str, Any] = dict(split_item=2, group_type=0, group_list_type=1)

    def mixture() -> torch.Tensor:
        weights, numbers, _ = torch_npu.npu_moe_gating_top_k_softmax(logits_in, None, chosen)
        rows, places, told, _ = torch_npu.npu_moe_init_routing_v2(
            x_in,
            numbers,
            active_num=tokens * chosen,
            expert_num=experts,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            active_expert_range=[0, experts],
        )
        (both,) = torch_npu.npu_grouped_matmul([rows], [first_nz], group_list=told, **groups)
        fed = torch_npu.npu_swiglu(both)
        (out,) = torch_npu.npu_grouped_matmul([fed], [last_nz], group_list=told, **groups)
        result: torch.Tensor = torch_npu.npu_moe_token_unpermute(out, places, weights)
        return result

    def one_by_one(token: int) -> torch.Tensor:
        total = torch.zeros(hidden)
        weights, numbers = logits[token].softmax(-1).topk(chosen)
        for weight, expert in zip(weights, numbers, strict=True):
            both = torch.nn.functional.linear(x[token : token + 1], first[expert]).float()
            left, right = both.chunk(2, 1)
            fed = (torch.nn.functional.silu(left) * right).to(HALF)
            total += torch.nn.functional.linear(fed, last[expert])[0].float() * weight
        return total.to(HALF)

    expected = torch.stack([one_by_one(token) for token in range(tokens)])
    torch.npu.synchronize()
    trace.reset()
    assert torch.equal(mixture().cpu(), expected)
    assert len(trace.launches()) == 6 and not trace.format_casts()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        captured = mixture()
    x_in.copy_(x.flip(0))
    logits_in.copy_(logits.flip(0))
    graph.replay()
    torch.npu.synchronize()
    assert torch.equal(captured.cpu(), expected.flip(0))
