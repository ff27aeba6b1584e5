"""The int8 path: exact integers, the epilogue's rounding, and what it costs a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwen3_ascend import convert_checkpoint, load, native
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.schemes import W4A8, W8A8, InputRange, W8A8Static
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.checkpoint.schemes.w8a8_static import folded_bias, static_input
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime import LLM
from qwen3_ascend.runtime.backends.base import QuantizedActivation, StaticActivation
from qwen3_ascend.runtime.backends.cpu import int8_matmul
from qwen3_ascend.runtime.backends.cpu.int8_matmul import (
    CANDIDATES,
    Candidate,
    Product,
    float64,
    is_exact,
    pick_int8_matmul,
)
from qwen3_ascend.runtime.backends.cpu.linears import (
    Int8Linear,
    StaticInt8Linear,
    UnpackedGroupInt4Linear,
    UnpackedInt8Linear,
    UnpackedStaticInt8Linear,
    load_group_int4,
    load_int8,
    load_static_int8,
)
from qwen3_ascend.runtime.backends.reference import GroupInt4Linear as ReferenceGroupInt4Linear
from qwen3_ascend.runtime.backends.reference import Loader
from qwen3_ascend.runtime.backends.reference import (
    StaticInt8Linear as ReferenceStaticInt8Linear,
)

EXACT = [candidate for candidate in CANDIDATES if is_exact(candidate)]
EPSILON = 2.0**-24
SIZES = [(1, 1), (3, 5), (7, 31), (16, 32), (33, 63), (65, 129), (47, 1001), (5, 4097), (9, 25601)]
"""(outputs, inputs); the last has more inputs than any Qwen3, and sums beyond 2^24."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


def assert_exact(product: Tensor, codes: Tensor, weight: Tensor) -> None:
    """Equal to the int64 product; what comes as float32 is its correct rounding."""
    expected = codes.long() @ weight.long().t()
    assert product.shape == expected.shape
    if product.dtype == torch.float32:
        assert torch.equal(product, expected.float())
    else:
        assert torch.equal(product.long(), expected)


@pytest.mark.parametrize("candidate", EXACT, ids=lambda candidate: candidate.__name__)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_exact(candidate: Candidate, size: tuple[int, int]) -> None:
    weight = draw(*size)
    for offset in (0, 5, -128, 127):
        product = candidate(weight, offset)
        for rows in range(1, 10):
            codes = draw(rows, size[1], seed=rows)
            assert_exact(product(codes), codes.long() - offset, weight)


@pytest.mark.parametrize("candidate", EXACT, ids=lambda candidate: candidate.__name__)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_largest_sums(candidate: Candidate, size: tuple[int, int]) -> None:
    """Every combination of the extreme codes: no 16-bit saturation, no 32-bit overflow."""
    signs = torch.tensor([127, -128, 127], dtype=torch.int8)
    for extreme in (127, -127, -128):
        weight = torch.full(size, extreme, dtype=torch.int8)
        for offset in (0, -128, 127):
            product = candidate(weight, offset)
            for rows in (1, 2, 3):
                codes = signs[:rows, None].expand(rows, size[1]).contiguous()
                assert_exact(product(codes), codes.long() - offset, weight)


def saturating(weight: Tensor, offset: int = 0) -> Product:
    """As vector instructions before VNNI multiply: sums of two products stay within 16 bits."""
    assert not offset

    def product(codes: Tensor) -> Tensor:
        columns = weight.shape[1] // 2 * 2
        pairs = codes.int()[:, None, :columns] * weight.int()[None, :, :columns]
        summed: Tensor = pairs.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767).sum(-1)
        return (summed + codes[:, columns:].int() @ weight[:, columns:].int().t()).float()

    return product


def test_a_saturating_kernel_is_found_out() -> None:
    small, codes = draw(3, 5).sign(), draw(2, 5)
    assert_exact(saturating(small)(codes), codes, small)
    assert not is_exact(saturating)


def test_a_kernel_that_is_wrong_with_offsets_only_is_found_out() -> None:
    assert is_exact(float64)
    assert not is_exact(lambda weight, offset: float64(weight, offset // 2))


def test_the_first_exact_one_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    def also_exact(weight: Tensor, offset: int) -> Product:
        return float64(weight, offset)

    monkeypatch.setattr(int8_matmul, "CANDIDATES", (saturating, float64, also_exact))
    assert pick_int8_matmul.__wrapped__() is float64
    monkeypatch.setattr(int8_matmul, "CANDIDATES", (saturating,))
    with pytest.raises(AssertionError):
        pick_int8_matmul.__wrapped__()


@pytest.mark.parametrize("load_linear", [load_int8, UnpackedInt8Linear])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [(33, 65), (64, 128), (100, 1024)], ids=str)
def test_a_linear_is_its_reference(size: tuple[int, int], bias: bool, load_linear: Loader) -> None:
    """Both sides multiply the same integer sum by the same two scales in float32.

    The sum is rounded to float32 once, each of the two products once, and the bias is added once:
    against exact arithmetic that is at most 3 EPSILON of the product and one more of the total.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).bfloat16()
    offset = torch.randn(size[0], generator=generator).bfloat16() if bias else None
    linear = quantize(W8A8(), weight, offset, ASCEND_A2_A3.layouts["w8a8"])
    ours = load_linear(linear, torch.float32)
    for rows in range(1, 10):
        x = torch.randn(rows, size[1], generator=generator) * 3
        codes, scale = quantize_tokens(x)
        fed = QuantizedActivation(codes, scale)
        y = ours(fed)
        total = (codes.double() @ linear.codes()["weight"].double().t()) * scale.double()[:, None]
        exact = total * linear.tensors["scale"].double()
        shifted = exact + (offset.double() if offset is not None else 0)
        bound = 3.01 * EPSILON * exact.abs() + 1.01 * EPSILON * shifted.abs()
        assert bool(((y.double() - shifted).abs() <= bound).all())
        assert bool(((linear.reference(x).double() - shifted).abs() <= bound).all())
        half = load_linear(linear, torch.bfloat16)(fed)
        assert torch.equal(half, linear.reference(x).bfloat16())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("layout", ["w8a8-static", "nd"])
def test_a_static_linear_is_its_reference(bias: bool, layout: str) -> None:
    """Bit by bit, in sums beyond what float32 holds: against whole numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 2081, generator=generator).bfloat16()
    weight[:8] = 2.0
    offset = torch.randn(100, generator=generator).bfloat16() * 500 if bias else None
    stored = ASCEND_A2_A3.layouts[layout] if layout != "nd" else ND
    linear = quantize(W8A8Static(), weight, offset, stored).for_inputs(InputRange(-0.3, 2.2))
    x = torch.rand(6, 2081, generator=generator) * 3
    fed = StaticActivation(static_input(linear.tensors).quantize(x))
    sums = (fed.codes.long() @ linear.codes()["weight"].long().t()) + folded_bias(linear).long()
    assert int(sums.abs().max()) > 1 << 24
    expected = sums.float() * linear.tensors["deq_scale"]
    for kind in (load_static_int8, UnpackedStaticInt8Linear, ReferenceStaticInt8Linear):
        ours = kind(linear, torch.float32)
        for rows in (1, 2, 6):
            assert torch.equal(ours(StaticActivation(fed.codes[:rows])), expected[:rows])
    if not bias:
        assert torch.equal(linear.reference(x), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_linear_of_groups_is_its_reference(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 1024, generator=generator).bfloat16()
    offset = torch.randn(48, generator=generator).bfloat16() if bias else None
    linear = quantize(W4A8(), weight, offset, ASCEND_A2_A3.layouts["w4a8"])
    x = torch.randn(6, 1024, generator=generator)
    codes, scale = quantize_tokens(x)
    for kind in (load_group_int4, UnpackedGroupInt4Linear, ReferenceGroupInt4Linear):
        ours = kind(linear, torch.float32)
        for rows in (1, 6):
            fed = QuantizedActivation(codes[:rows], scale[:rows])
            assert torch.equal(ours(fed), linear.reference(x[:rows]))


@pytest.mark.parametrize("layout", ["w8a8", "nd"])
def test_a_token_of_zeros(layout: str) -> None:
    stored = ND if layout == "nd" else ASCEND_A2_A3.layouts[layout]
    linear = quantize(W8A8(), torch.randn(8, 16).bfloat16(), None, stored)
    fed = QuantizedActivation(*quantize_tokens(torch.zeros(2, 16)))
    assert torch.equal(load_int8(linear, torch.float32)(fed), torch.zeros(2, 8))


@pytest.mark.skipif(native.products() is None, reason="not compiled")
def test_strips_are_read_as_they_lie() -> None:
    weight = torch.randn(64, 96).bfloat16()
    for scheme, load_linear, kind in (
        (W8A8(), load_int8, Int8Linear),
        (W8A8Static(), load_static_int8, StaticInt8Linear),
    ):
        linear = quantize(scheme, weight, None, ASCEND_A2_A3.layouts["w8a8"])
        linear = linear.for_inputs(InputRange(-1.0, 1.0))
        loaded = load_linear(linear, torch.float32)
        assert isinstance(loaded, kind)
        assert loaded.weight.data_ptr() == linear.weight.data_ptr()


def test_without_kernels_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", "0")
    linear = quantize(W8A8(), torch.randn(64, 96).bfloat16(), None, ASCEND_A2_A3.layouts["w8a8"])
    assert isinstance(load_int8(linear, torch.float32), UnpackedInt8Linear)


WINDOW, WINDOWS = 768, 8


def windows(llm: LLM, text: str) -> list[list[int]]:
    tokens = llm.tokenizer.encode(text[:40_000])
    assert len(tokens) >= WINDOW * WINDOWS
    return [tokens[start : start + WINDOW] for start in range(0, WINDOW * WINDOWS, WINDOW)]


def perplexity(logits: list[Tensor], tokens: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    total = sum(
        float(torch.nn.functional.cross_entropy(rows[:-1].double(), torch.tensor(window[1:])))
        for rows, window in zip(logits, tokens, strict=True)
    )
    return math.exp(total / len(tokens))


def test_perplexity_of_a_trained_model(
    tiny_source: Path,
    tiny_bf16: Path,
    tiny_w8a8: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    plain, quantized = load(tiny_bf16), load(tiny_w8a8)
    held_out = windows(plain, (tiny_source / "heldout.txt").read_text(encoding="utf-8"))
    theirs = Qwen3ForCausalLM.from_pretrained(tiny_source, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        reference = [theirs(torch.tensor([window])).logits[0] for window in held_out]
    expected = perplexity(reference, held_out)
    bf16 = perplexity([plain.logits(window) for window in held_out], held_out)
    w8a8 = perplexity([quantized.logits(window) for window in held_out], held_out)
    convert_checkpoint(tiny_source, tmp_path / "out", "w8a8-head")
    whole = load(tmp_path / "out")
    head = perplexity([whole.logits(window) for window in held_out], held_out)
    figures = {"transformers": expected, "bf16": bf16, "w8a8": w8a8, "w8a8-head": head}
    for name, figure in figures.items():
        record_property(name, figure)
    print("perplexity:", ", ".join(f"{name} {figure:.4f}" for name, figure in figures.items()))
    assert 4 < expected < 20, "this is not a trained model"
    assert abs(bf16 / expected - 1) < 0.003
    assert abs(w8a8 / bf16 - 1) < 0.01
    assert abs(head / w8a8 - 1) < 0.003
    assert len({bf16, w8a8, head}) == 3
