"""The half of a matrix that is kept, against the whole of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3_ascend.convert import triangle
from qwen3_ascend.convert.triangle import Triangle, triangle_bytes

SIZES = [1, 8, 20]
"""Less than a block, one block, and two with the beginning of a third."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangle, "ROWS", 8)


def inputs(size: int, tokens: int = 5) -> Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(size)).double()


@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_all_inputs(size: int) -> None:
    x, made = inputs(size), Triangle.zeros(size, torch.float64)
    for step in x.split(2):
        made.add_products(step)
    whole = x.t() @ x
    torch.testing.assert_close(made.whole(), whole)
    torch.testing.assert_close(made.diagonal(), whole.diagonal())
    torch.testing.assert_close(made.mean(5).whole(), whole / 5)
    assert len(made) == size


@pytest.mark.parametrize("size", SIZES)
def test_rows_come_in_the_order_in_which_they_are_asked_for(size: int) -> None:
    x = inputs(size)
    whole = x.t() @ x
    whole = whole.tril() + whole.tril(-1).t()  # symmetric to the last bit
    for chosen in (torch.randperm(size), torch.tensor([size - 1, 0, size // 2])):
        assert torch.equal(Triangle.of(whole).rows(chosen), whole[chosen])


@pytest.mark.parametrize("size", SIZES)
def test_what_is_asked_of_it(size: int) -> None:
    x, vectors = inputs(size), inputs(size, tokens=7)
    whole, factors = x.t() @ x, torch.rand(size).double() + 0.5
    made = Triangle.of(whole)
    energy = float(((vectors @ whole) * vectors).sum())
    assert made.energy(vectors) == pytest.approx(energy, rel=1e-12)
    torch.testing.assert_close(made.divided(factors).whole(), whole / factors / factors[:, None])


@pytest.mark.parametrize("size", SIZES)
def test_it_takes_what_is_said(size: int) -> None:
    taken = sum(block.nbytes for block in Triangle.zeros(size).blocks)
    assert taken <= triangle_bytes(size) and (size < 20 or taken < 4 * size * size)
