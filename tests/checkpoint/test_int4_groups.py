"""w4a8: how the words lie, sums of each group, the shift, and cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3_ascend.checkpoint.layout import Cut
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.schemes import W4A8
from qwen3_ascend.checkpoint.schemes.w4a8 import ROWS, shift_of
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stored(weight: Tensor, bias: Tensor | None = None) -> Linear:
    return quantize(W4A8(), weight, bias, ROWS)


def test_words_are_those_of_the_operator() -> None:
    """int32 [K, N / 8]: output 8j + i of an input in bits 4i to 4i + 3 of its word j."""
    linear = stored(random(24, 256))
    words, codes = linear.weight, linear.codes()["weight"]
    assert words.shape == (256, 3)
    for inputs, outputs in ((0, 0), (3, 7), (100, 8), (255, 23), (17, 13)):
        field = (int(words[inputs, outputs // 8]) >> 4 * (outputs % 8)) & 15
        assert (field ^ 8) - 8 == codes[outputs, inputs]
    assert int(codes.max()) == 7 and int(codes.min()) == -7  # scales are positive


def test_what_is_stored_for_each_group() -> None:
    linear = stored(random(16, 768))
    codes = linear.codes()
    groups = codes["weight"].view(16, 3, 256)
    assert torch.equal(codes["code_sums"].t(), groups.sum(-1, dtype=torch.int16))
    weights = random(16, 768).float().view(16, 3, 256)
    assert torch.equal(codes["scale"].t(), (weights.abs().amax(-1) / 7).bfloat16().float())
    assert torch.equal(linear.dequantize(), (groups * codes["scale"].t()[..., None]).flatten(1))
    exact = (8 * codes["scale"].double() * codes["code_sums"].double()).sum(0)
    assert (shift_of(codes).double() - exact).abs().max() <= 2.0**-22 * exact.abs().max()


def test_sums_of_a_group_are_exact() -> None:
    """The contract in whole numbers, and numpy's float16 and float32 from there on."""
    linear, x = stored(random(40, 1024)), random(7, 1024, seed=3).float()
    token_codes, token_scale = quantize_tokens(x)
    codes = linear.codes()
    weight, scales = codes["weight"].numpy().astype(object), codes["scale"].numpy()
    given = token_codes.numpy().astype(object)
    high, low = given // 16, given % 16 - 8
    assert {*high.flat} | {*low.flat} == {*range(-8, 8)}

    def added_up(half: NDArray[np.object_]) -> NDArray[np.float32]:
        total = np.zeros((7, 40), np.float16)
        for group, scale in enumerate(scales):
            part = slice(group * 256, group * 256 + 256)
            sums = half[:, part] @ weight[:, part].T
            assert max(abs(sums).flat) <= 1 << 14
            total = total + (sums.astype(np.float32) * scale).astype(np.float16)
        return total.astype(np.float32)

    summed = np.float32(16) * added_up(high) + added_up(low) + shift_of(codes).numpy()
    expected = torch.from_numpy(summed) * token_scale[:, None]
    assert torch.equal(linear.reference(x), expected)
    plain = (token_codes.double() * token_scale[:, None]) @ linear.dequantize().double().t()
    assert (expected.double() - plain).norm() < 2.0**-10 * plain.norm()


@pytest.mark.parametrize("cut", ["outputs", "inputs"])
def test_a_cut_is_what_the_cut_weight_becomes(cut: Cut) -> None:
    weight, bias = random(128, 1024), random(128, seed=1)
    whole, axis = stored(weight, bias), 0 if cut == "outputs" else 1
    for world in (2, 4):
        for rank in range(world):
            part = shard(whole, cut, (128,), rank, world)
            kept = bias.chunk(world)[rank] if cut == "outputs" else None if rank else bias
            expected = stored(weight.chunk(world, axis)[rank], kept)
            assert part.tensors.keys() == expected.tensors.keys()
            for suffix, tensor in expected.tensors.items():
                assert torch.equal(part.tensors[suffix], tensor), (rank, suffix)


def test_a_cut_within_a_group_is_refused() -> None:
    with pytest.raises(CheckpointError, match="inside a block of 256 of the scale"):
        shard(stored(random(16, 768)), "inputs", (16,), 1, 2)


def test_pieces_are_whole_groups_of_inputs() -> None:
    scheme, shape = W4A8(), (24576, 4096)
    pieces = scheme.pieces(shape, ROWS)
    assert {piece.axis for piece in pieces} == {"inputs"} and len(pieces) == 16
    assert all(piece.start % 256 == 0 for piece in pieces)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((16, 576), "wants a multiple of 256 inputs beside 4-bit weights; give it the scheme w8a8"),
        ((12, 512), "wants a multiple of eight outputs beside 4-bit weights"),
        ((16, 29696), "wants at most 29576 inputs beside 4-bit weights"),
        ((151936, 512), "wants at most 65535 outputs beside 4-bit weights"),
    ],
)
def test_sizes_that_the_kernel_refuses(shape: tuple[int, int], rule: str) -> None:
    refusal = ASCEND_A2_A3.refusal(W4A8(), shape)
    assert refusal is not None and rule in refusal and str([*shape]) in refusal


def test_sizes_that_the_kernel_takes() -> None:
    for shape in ((24576, 4096), (4096, 12288), (8, 256), (5120, 25600)):
        assert ASCEND_A2_A3.refusal(W4A8(), shape) is None
