"""Norms, quantization, activations, rotation, products: each against a float64 reference that is
written another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import nz, trace

HALF = torch.bfloat16
EPSILON = 1e-6


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.01) -> None:
    torch.testing.assert_close(
        actual.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance
    )


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPSILON) ** 0.5


def codes_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row quantization, one number at a time."""
    rows = x.float().reshape(-1, x.shape[-1])
    scales = torch.stack([row.abs().max() / 127 for row in rows])
    codes = [
        [0 if s == 0 else max(-128, min(127, round((v / s).item()))) for v in row]
        for row, s in zip(rows, scales, strict=True)
    ]
    return torch.tensor(codes, dtype=torch.int8).reshape(x.shape), scales.reshape(x.shape[:-1])


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotation as a product of complex numbers (x[i], x[i + D/2])."""
    half = x.shape[-1] // 2
    value = torch.complex(x[..., :half].double(), x[..., half:].double())
    turn = torch.complex(cos[..., :half].double(), sin[..., :half].double())
    turned = value * turn
    return torch.cat((turned.real, turned.imag), -1)


def angles(tokens: int, width: int, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.outer(torch.arange(tokens), 1.0 / 100 ** (torch.arange(width // 2) / width))
    both = torch.cat((steps, steps), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def test_rms_norm() -> None:
    x, gamma = torch.randn(3, 5, 64).to(HALF), torch.randn(64).to(HALF)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), EPSILON)
    near(y, unit_rows(x) * gamma.double())
    assert rstd.shape == (3, 5, 1) and rstd.dtype is torch.float32
    assert [entry.name for entry in trace.launches()] == ["aclnnRmsNorm"]


def test_add_rms_norm_returns_the_rounded_sum() -> None:
    a, b, gamma = torch.randn(4, 32).to(HALF), torch.randn(4, 32).to(HALF), torch.ones(32).to(HALF)
    y, rstd, total = torch_npu.npu_add_rms_norm(a.npu(), b.npu(), gamma.npu(), EPSILON)
    assert torch.equal(total.cpu(), a + b)
    near(y, unit_rows(a + b))
    of_rounded = (total.cpu().double().pow(2).mean(-1, keepdim=True) + EPSILON) ** -0.5
    near(rstd, of_rounded, 1e-6)  # the sum before rounding differs by more than that


def test_add_rms_norm_dynamic_quant() -> None:
    a, b, gamma = torch.randn(4, 32).to(HALF), torch.randn(4, 32).to(HALF), torch.randn(32).to(HALF)
    y, _, total, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(
        a.npu(), b.npu(), gamma.npu(), epsilon=EPSILON
    )
    expected = unit_rows(a + b) * gamma.double()
    assert torch.equal(total.cpu(), a + b)
    near(y.cpu().double() * scale.cpu().double()[:, None], expected, 0.02)
    near(scale, expected.abs().amax(-1) / 127, 1e-7)
    assert y.dtype is torch.int8 and scale.shape == (4,)


def test_dynamic_quant_is_exact() -> None:
    x = torch.randn(5, 48).to(HALF)
    x[2] = 0
    x[3, :4] = torch.tensor([127.0, 0.5, 1.5, 2.5])
    x[3, 4:] = 0
    codes, scales = torch_npu.npu_dynamic_quant(x.npu())
    expected_codes, expected_scales = codes_of(x)
    assert torch.equal(codes.cpu(), expected_codes)
    assert torch.equal(scales.cpu(), expected_scales)
    assert codes[3, :4].cpu().tolist() == [127, 0, 2, 2]  # halves go to the even neighbour
    assert not codes[2].cpu().any() and scales[2].item() == 0


def test_swiglu() -> None:
    x = torch.randn(3, 64).to(HALF)
    left, right = x.double()[:, :32], x.double()[:, 32:]
    near(torch_npu.npu_swiglu(x.npu()), left / (1 + torch.exp(-left)) * right)


def test_swiglu_quant() -> None:
    x = torch.randn(3, 64).to(HALF)
    codes, scale = torch_npu.npu_swiglu_quant(x.npu(), activate_left=True, quant_mode=1)
    left, right = x.double()[:, :32], x.double()[:, 32:]
    near(
        codes.cpu().double() * scale.cpu().double()[:, None],
        left / (1 + torch.exp(-left)) * right,
        0.03,
    )


@pytest.mark.parametrize("integers", [True, False])
def test_dequant_swiglu_quant(integers: bool) -> None:
    tokens, width = 3, 64
    if integers:
        x = torch.randint(-20000, 20000, (tokens, width), dtype=torch.int32)
        weight_scale, token_scale = torch.rand(1, width) / 100, torch.rand(tokens, 1) / 100
        values = x.double() * weight_scale.double() * token_scale.double()
        scales = dict(weight_scale=weight_scale.npu(), activation_scale=token_scale.npu())
    else:
        x, scales = torch.randn(tokens, width).to(HALF), {}
        values = x.double()
    codes, scale = torch_npu.npu_dequant_swiglu_quant(
        x.npu(), **scales, activate_left=True, quant_mode=1
    )
    left, right = values[:, : width // 2], values[:, width // 2 :]
    expected = left / (1 + torch.exp(-left)) * right
    error = codes.cpu().double() * scale.cpu().double()[:, None] - expected
    assert (error.abs() <= scale.cpu().double()[:, None] * 0.51).all()


def test_rotary_mul() -> None:
    x = torch.randn(1, 6, 4, 64).to(HALF)
    cos, sin = (t.view(1, 6, 1, 64) for t in angles(6, 64))
    near(torch_npu.npu_rotary_mul(x.npu(), cos.npu(), sin.npu()), rotated(x, cos, sin), 0.02)


@pytest.mark.parametrize("layout", ["TND", "BSND"])
def test_apply_rotary_pos_emb_works_in_place(layout: str) -> None:
    leading = (6,) if layout == "TND" else (2, 3)
    query, key = torch.randn(*leading, 4, 128).to(HALF), torch.randn(*leading, 2, 128).to(HALF)
    cos, sin = (t.view(*leading, 1, 128) for t in angles(6, 128))
    q, k = query.npu(), key.npu()
    torch_npu.npu_apply_rotary_pos_emb(q, k, cos.npu(), sin.npu(), layout)
    near(q, rotated(query, cos, sin), 0.03)
    near(k, rotated(key, cos, sin), 0.03)


# --------------------------------------------------------------------------------- products
def nz_tensor(matrix: torch.Tensor) -> torch.Tensor:
    torch_npu.npu.config.allow_internal_format = True
    cast = torch_npu.npu_format_cast(matrix.npu().contiguous(), nz.FORMAT)
    assert int(torch_npu.get_npu_format(cast)) == nz.FORMAT
    return cast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_with_an_nz_weight(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 40).to(dtype), torch.randn(50, 40).to(dtype)
    held = nz_tensor(weight)
    ascend_sim.reset_trace()
    result = torch.nn.functional.linear(x.npu(), held)
    near(result, x.double() @ weight.double().T, 0.05)
    assert [entry.name for entry in trace.launches()] == ["aclnnMatmulWeightNz"]


def test_foreach_copy_copies_each_pair() -> None:
    sources = [torch.arange(6).reshape(2, 3), torch.arange(4).flip(0)]
    targets = [torch.zeros_like(source).npu() for source in sources]
    ascend_sim.reset_trace()
    torch._foreach_copy_(targets, [source.npu() for source in sources])
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target.cpu(), source)
    assert "aclnnForeachCopy" in [entry.name for entry in trace.launches()]


def test_matmul_nd() -> None:
    a, b = torch.randn(2, 3, 8), torch.randn(2, 8, 5)
    near(a.npu() @ b.npu(), torch.einsum("bij,bjk->bik", a.double(), b.double()), 1e-4)
    near(a[0].npu() @ b[0].npu(), a[0].double() @ b[0].double(), 1e-4)


@pytest.mark.parametrize("form", ["nd", "nz", "transposed nd", "transposed nz"])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.int32])
def test_quant_matmul(form: str, out: torch.dtype) -> None:
    tokens, rows, columns = 5, 2112, 96  # long enough to leave the exact range of float32
    x = torch.randint(-128, 128, (tokens, rows), dtype=torch.int8)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    stored = weight.T.contiguous() if "transposed" in form else weight
    held = nz_tensor(stored) if "nz" in form else stored.npu()
    held = held.transpose(0, 1) if "transposed" in form else held
    channel, token = torch.rand(columns) / 1000, torch.rand(tokens) / 10
    total = torch.tensor(
        [[int((a.long() * b.long()).sum()) for b in weight.T] for a in x], dtype=torch.int32
    )
    ascend_sim.reset_trace()
    result = torch_npu.npu_quant_matmul(
        x.npu(),
        held,
        channel.npu(),
        output_dtype=out,
        pertoken_scale=None if out is torch.int32 else token.npu(),
    )
    expected = total if out is torch.int32 else (total.float() * token[:, None] * channel).to(out)
    assert torch.equal(result.cpu(), expected)
    name = "aclnnQuantMatmulWeightNz" if "nz" in form else "aclnnQuantMatmulV5"
    assert [entry.name for entry in trace.launches()] == [name]


def test_quant_matmul_bias() -> None:
    x = torch.randint(-9, 9, (2, 32), dtype=torch.int8)
    weight = torch.randint(-9, 9, (32, 64), dtype=torch.int8)
    scale, token = torch.rand(64).to(HALF), torch.rand(2)
    for bias in (torch.randint(-99, 99, (64,), dtype=torch.int32), torch.randn(64)):
        result = torch_npu.npu_quant_matmul(
            x.npu(),
            weight.npu(),
            scale.npu(),
            pertoken_scale=token.npu(),
            bias=bias.npu(),
            output_dtype=HALF,
        )
        total = x.double() @ weight.double()
        integer = bias.dtype is torch.int32
        scaled = (total + bias.double() * integer) * token.double()[:, None] * scale.double()
        near(result, scaled + bias.double() * (not integer), 0.02)


def int4_tensor(codes: torch.Tensor, form: str) -> torch.Tensor:
    """Codes [K, N] as the wheel itself packs them, on the device."""
    stored = codes.T.contiguous() if "transposed" in form else codes
    plain = stored.int().npu()
    if "viewed" in form:  # NZ of bytes, seen as words
        pairs = stored & 15
        pairs = (pairs[:, 0::2] | pairs[:, 1::2] << 4).to(torch.int8)
        return nz_tensor(pairs).view(torch.int32)
    if "nz" in form:
        plain = torch_npu.npu_format_cast(plain, nz.FORMAT)
    packed = torch_npu.npu_convert_weight_to_int4pack(plain)
    return packed.T if "transposed" in form else packed


INT8_FORMS = ["int8 nd", "int8 nz", "int8 transposed nd"]
INT4_FORMS = ["int4 nd", "int4 nz", "int4 viewed nz", "int4 transposed nd", "int4 channel nd"]


@pytest.mark.parametrize("form", [*INT8_FORMS, *INT4_FORMS])
@pytest.mark.parametrize("precise", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_quant_batchmatmul(form: str, precise: int, dtype: torch.dtype) -> None:
    tokens, rows, columns, group = 5, 256, 192, 64
    torch_npu.npu.config.allow_internal_format = True
    grouped = "int4" in form and "channel" not in form
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scale = torch.randn(rows // group if grouped else 1, columns).to(dtype)  # of both signs
    bias = torch.randn(columns).to(torch.float32 if dtype is HALF else dtype)
    x = torch.randn(tokens, rows).to(dtype)
    if "int4" in form:
        weight = int4_tensor(codes, form)
    else:
        stored = codes.T.contiguous() if "transposed" in form else codes
        weight = nz_tensor(stored) if "nz" in form else stored.npu()
        weight = weight.T if "transposed" in form else weight
    turned = "transposed" in form
    held = scale.T.contiguous().npu().T if turned else scale.npu()
    ascend_sim.reset_trace()
    result = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(),
        weight,
        held,
        bias=bias.npu(),
        antiquant_group_size=group if grouped else 0,
        inner_precise=precise,
    )
    decoded = (codes.float() * scale.float().repeat_interleave(rows // len(scale), 0)).to(dtype)
    near(result, x.double() @ decoded.double() + bias.double(), 0.01)
    assert result.dtype is dtype
    version = "V3" if precise else "V2"
    names = [entry.name for entry in trace.launches()]
    assert names == [f"aclnnWeightQuantBatchMatmul{version}"]


def test_weight_quant_batchmatmul_adds_offsets_to_codes() -> None:
    codes = torch.randint(-8, 8, (64, 32), dtype=torch.int8)
    scale, offset = torch.rand(2, 32).to(HALF), torch.randint(-8, 8, (2, 32)).to(HALF)
    x = torch.eye(64).to(HALF)
    result = torch_npu.npu_weight_quant_batchmatmul(
        x.npu(), int4_tensor(codes, "nd"), scale.npu(), offset.npu(), antiquant_group_size=32
    )
    shifted = codes.double() + offset.double().repeat_interleave(32, 0)
    near(result, shifted * scale.double().repeat_interleave(32, 0))


# --------------------------------------------------------------------- the small operators
SMALL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda x: x + x,
    "add number": lambda x: x + 1,
    "subtract": lambda x: x - 2,
    "multiply": lambda x: x * x,
    "scale": lambda x: x * 0.5,
    "negate": lambda x: -x,
    "cosine": torch.cos,
    "sine": torch.sin,
    "silu": torch.nn.functional.silu,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "sum": lambda x: x.sum(),
    "sum last": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1, True),
    "argmax": lambda x: x.argmax(-1),
    "max": lambda x: x.max(-1).values,
    "amax": lambda x: x.amax(-1),
    "concatenate": lambda x: torch.cat((x, x[:1]), 0),
    "chunk": lambda x: x.chunk(2, -1)[1] + 0,
    "cast": lambda x: x.to(torch.bfloat16),
    "clone": lambda x: x.t().contiguous(),
    "greater": lambda x: x > 0.5,
    "where": lambda x: torch.where(x > 0, x, x * 2),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1, descending=True).indices,
    "topk": lambda x: x.topk(2).values,
    "power": lambda x: x.pow(2),
    "power of a number": lambda x: 2.0**x,
    "scatter": lambda x: x.clone().scatter_(1, torch.tensor([[3], [0]], device=x.device), x * 2),
    "scatter_add": lambda x: x.scatter_add(
        1, torch.tensor([[3, 3], [0, 1]], device=x.device), x * 2
    ),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1), value=0.5),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "divide": lambda x: x / (x * x + 1),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "in place": lambda x: x.clone().add_(1).mul_(2).div_(x.abs() + 1),
    "fill": lambda x: torch.full_like(x, 3.0).zero_() + torch.ones_like(x),
    "stack": lambda x: torch.stack((x, x)),
    "repeat": lambda x: x.repeat(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "reversed": lambda x: 1 - x,
    "index_copy": lambda x: x.clone().index_copy_(0, torch.tensor([2], device=x.device), x[:1] * 2),
    "round": torch.round,
    "exp": torch.exp,
    "triu": lambda x: torch.ones_like(x).triu(1),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_operator(name: str) -> None:
    x = torch.randn(4, 8)
    actual, expected = SMALL[name](x.npu()).cpu(), SMALL[name](x)
    torch.testing.assert_close(actual, expected)


def test_results_whose_size_depends_on_the_data() -> None:
    x = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    assert torch.equal(torch.nonzero(x.npu()).cpu(), torch.nonzero(x))
    assert torch.equal(torch.masked_select(x.npu(), x.npu() > 0).cpu(), torch.tensor([2.0]))
    assert "2." in repr(x.npu())  # printing a device tensor needs both


def test_indexing() -> None:
    table, rows = torch.randn(9, 4), torch.tensor([3, 0, 8])
    for index in (rows, rows.int()):
        on_device = index.npu()
        assert torch.equal(torch.nn.functional.embedding(on_device, table.npu()).cpu(), table[rows])
        assert torch.equal(table.npu().index_select(0, on_device).cpu(), table[rows])
    assert torch.equal(table.npu()[rows.npu()].cpu(), table[rows])
    places = torch.tensor([[1], [0], [2]])
    gathered = table[:3].npu().gather(1, places.npu()).cpu()
    assert torch.equal(gathered, table[:3].gather(1, places))
    assert torch.equal(torch.arange(3, 9, 2, device="npu").cpu(), torch.arange(3, 9, 2))
    changed = table.npu()
    changed[rows.npu()] = torch.zeros(3, 4).npu()
    assert not changed.cpu()[rows].any()


def test_random_numbers_have_the_right_distribution() -> None:
    uniform, normal = torch.rand(4000, device="npu").cpu(), torch.randn(4000, device="npu").cpu()
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.03
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1) < 0.05
    weights = torch.tensor([0.0, 1.0, 0.0]).npu()
    assert torch.multinomial(weights, 1).item() == 1
