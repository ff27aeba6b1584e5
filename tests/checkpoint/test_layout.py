"""FRACTAL_NZ against its definition, element by element."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import tiny_models
from torch import Tensor

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.checkpoint.layout import (
    ND,
    Layout,
    nz_columns,
    nz_pack,
    nz_shape,
    nz_unpack,
)
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.files.json_file import plain, typed

STRIPS = {torch.int8: 32, torch.bfloat16: 16, torch.float16: 16, torch.int32: 8, torch.float32: 8}
SHAPES = [(16, 32), (1, 1), (17, 33), (15, 8), (48, 7), (3, 16, 32), (2, 5, 19), (2, 3, 18, 9)]


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Neighbours differ and no element is zero, so that padding can be told from data."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 113 + 1).reshape(shape).to(dtype)


def by_the_formula(matrix: Tensor, c0: int) -> Tensor:
    """nz[.., j // C0, i // 16, i % 16, j % C0] = nd[.., i, j], in plain loops over zeros."""
    *batch, rows, columns = matrix.shape
    blocks = matrix.new_zeros((*batch, -(-columns // c0), -(-rows // 16), 16, c0))
    for index in itertools.product(*map(range, batch)):
        for i in range(rows):
            for j in range(columns):
                blocks[(*index, j // c0, i // 16, i % 16, j % c0)] = matrix[(*index, i, j)]
    return blocks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", STRIPS, ids=str)
def test_pack_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix, c0 = numbered(shape, dtype), STRIPS[dtype]
    packed = nz_pack(matrix)
    assert packed.is_contiguous() and packed.dtype == dtype
    assert tuple(packed.shape) == nz_shape(shape, c0)
    assert torch.equal(packed, by_the_formula(matrix, c0))
    assert int((packed == 0).sum()) == packed.numel() - matrix.numel()  # padding, and only it
    assert nz_columns(dtype.itemsize) == c0


def test_pack_takes_any_strides() -> None:
    matrix = numbered((40, 37), torch.int8)
    for view in (matrix.t(), matrix[::2, 3:], matrix.t()[1:, ::3]):
        assert torch.equal(nz_pack(view), by_the_formula(view.contiguous(), 32))


@given(
    dtype=st.sampled_from(list(STRIPS)),
    batch=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_unpack_reverses_pack(
    dtype: torch.dtype, batch: list[int], rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (*batch, rows, columns)
    matrix = torch.randint(-128, 128, shape, generator=generator).to(dtype)
    again = nz_unpack(nz_pack(matrix), rows, columns)
    assert again.is_contiguous() and torch.equal(again, matrix)


def test_unpack_refuses_blocks_of_another_matrix() -> None:
    packed = nz_pack(numbered((33, 20), torch.int8))
    with pytest.raises(ValueError, match="do not hold"):
        nz_unpack(packed, 33, 40)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (50, 33), (16, 7)], ids=str)
def test_orientations(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, c0 = numbered(shape, dtype), STRIPS[dtype]
    of_kn, of_nk = Layout("nz", "KN", c0), Layout("nz", "NK", c0)
    assert torch.equal(of_kn.pack(weight), by_the_formula(weight.t().contiguous(), c0))
    assert torch.equal(of_nk.pack(weight), by_the_formula(weight, c0))
    assert torch.equal(ND.pack(weight), weight)
    for layout in (of_kn, of_nk, ND):
        packed = layout.pack(weight)
        assert tuple(packed.shape) == layout.storage_shape(shape)
        assert torch.equal(layout.unpack(packed, shape), weight)
        assert typed(plain(layout), Layout, "layout") == layout


@pytest.mark.parametrize(
    ("per_word", "word"), [(2, torch.int8), (4, torch.int16), (8, torch.int32)], ids=str
)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_packed_codes(per_word: int, word: torch.dtype, batch: tuple[int, ...]) -> None:
    """Code j of a word has the bits from 4 j on; words are tiled like any element."""
    shape = (*batch, 37, 50)
    generator = torch.Generator().manual_seed(per_word)
    weight = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    c0 = 32 // word.itemsize
    for layout in (
        *(Layout("nz", matrix, c0, per_word) for matrix in ("KN", "NK")),
        *(Layout("nd", matrix, per_word=per_word) for matrix in ("KN", "NK")),
    ):
        packed = layout.pack(weight)
        assert packed.dtype == layout.code_type == word
        assert tuple(packed.shape) == layout.storage_shape(shape)
        assert torch.equal(layout.unpack(packed, shape), weight)
        assert typed(plain(layout), Layout, "layout") == layout
    words = Layout("nd", per_word=per_word).pack(weight)
    for column in (0, 1, 17, 49):
        field = words[..., column // per_word].long() >> (column % per_word * 4) & 15
        assert torch.equal(field, weight[..., column].long() & 15)
    of_kn = Layout("nz", "KN", c0, per_word).pack(weight[..., :32, :])
    rows = Layout("nd", "KN", per_word=per_word).pack(weight[..., :32, :])
    assert torch.equal(rows, Layout("nd", per_word=per_word).pack(weight[..., :32, :].mT))
    assert torch.equal(of_kn, by_the_formula(rows, c0))


def test_the_bytes_of_packed_codes_do_not_depend_on_the_length_of_words() -> None:
    weight = torch.randint(-8, 8, (48, 128), dtype=torch.int8)
    packed = [Layout("nz", "KN", 64 // n, n).pack(weight).view(torch.uint8) for n in (2, 4, 8)]
    assert torch.equal(packed[0].flatten(), packed[1].flatten())
    assert torch.equal(packed[0].flatten(), packed[2].flatten())


def test_layouts_that_cannot_be() -> None:
    for arguments in (
        ("nz", "KN", 0), ("nd", "NK", 32), ("nd", "NK", 0, 0), ("nd", "NK", 0, 3)
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Layout(*arguments)
    for data in (
        None,
        {},
        {"format": "zn"},
        {"format": "nz", "nz_of": "MN", "c0": 32},
        {"format": "nz", "nz_of": "KN", "c0": "32"},
        {"format": "nz", "nz_of": "KN", "c0": 0},
    ):
        with pytest.raises(ValueError, match="layout"):
            typed(data, Layout, "layout")
    with pytest.raises(ValueError):
        nz_shape((5,), 16)
    with pytest.raises(ValueError):
        nz_columns(8)


def codes_and_scale(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w8a8 of a weight, computed here in float64 and rounded where the contract rounds."""
    scale = (weight.float().abs().amax(dim=1) / 127).bfloat16().float()
    exact = weight.double() / scale.double()[:, None]
    return exact.float().round().clamp(-128, 127).to(torch.int8), scale


@pytest.mark.parametrize("recipe", ["w8a8-plain", "bf16"])
def test_stored_bytes_of_a_converted_model(recipe: str, tmp_path: Path) -> None:
    data = tiny_models.config(hidden_size=72, intermediate_size=100, num_hidden_layers=1)
    weights = tiny_models.tensors(data)
    source = tiny_models.write(tmp_path / "source", data, weights)
    convert_checkpoint(source, tmp_path / "out", recipe)
    stored = load_file(next((tmp_path / "out").glob("ascend-*.safetensors")))
    prefix = "model.layers.0"
    fused = {
        f"{prefix}.self_attn.qkv_proj": [f"{prefix}.self_attn.{n}_proj.weight" for n in "qkv"],
        f"{prefix}.self_attn.o_proj": [f"{prefix}.self_attn.o_proj.weight"],
        f"{prefix}.mlp.gate_up_proj": [f"{prefix}.mlp.{n}_proj.weight" for n in ("gate", "up")],
        f"{prefix}.mlp.down_proj": [f"{prefix}.mlp.down_proj.weight"],
    }
    for name, sources in fused.items():
        weight = torch.cat([weights[source] for source in sources])
        if recipe == "bf16":
            assert torch.equal(stored[f"{name}.weight"], by_the_formula(weight, 16)), name
            continue
        codes, scale = codes_and_scale(weight)
        assert torch.equal(stored[f"{name}.weight"], by_the_formula(codes.t().contiguous(), 32))
        assert torch.equal(stored[f"{name}.scale"], scale), name
    plain = {n: t for n, t in weights.items() if "norm" in n or "embed" in n or "lm_head" in n}
    for name, tensor in plain.items():
        assert torch.equal(stored[name], tensor), name
    assert set(Manifest.read(tmp_path / "out").stored()) == set(stored)
