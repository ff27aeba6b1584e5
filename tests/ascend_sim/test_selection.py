"""topk and indexing: what is computed, and each documented demand that is refused."""

from __future__ import annotations

import pytest
import torch
import torch_npu


def refused(rule: str) -> pytest.RaisesExc[RuntimeError]:
    return pytest.raises(RuntimeError, match=rule)


def test_topk_takes_other_equal_values_than_a_cpu() -> None:
    row = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    values, tokens = row.npu().topk(4)
    assert values.cpu().tolist() == [[3.0, 3.0, 2.0, 2.0]]
    assert tokens.cpu().tolist() == [[3, 1, 5, 4]]
    values, tokens = row.npu().topk(2, largest=False)
    assert (values.cpu().tolist(), tokens.cpu().tolist()) == ([[1.0, 2.0]], [[0, 5]])


def test_topk_of_random_rows() -> None:
    rows = torch.randn(5, 3000)
    for mine, theirs in zip(rows.npu().topk(1024), rows.topk(1024), strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_unsorted_topk_is_refused() -> None:
    with refused("topk: sorted can only be True"):
        torch.ones(3).npu().topk(2, sorted=False)


def test_topk_of_booleans_is_refused() -> None:
    with refused("self must be one of|not support|not implemented"):
        torch.ones(3, dtype=torch.bool).npu().topk(2)


def test_index_put_and_index() -> None:
    x, places = torch.randn(3, 50), (torch.tensor([0, 2]), torch.tensor([7, 49]))
    values = torch.tensor([5.0, 6.0])
    on_device = tuple(place.npu() for place in places)
    changed = x.npu().index_put(on_device, values.npu())
    assert torch.equal(changed.cpu(), x.index_put(places, values))
    assert torch.equal(changed[on_device].cpu(), values)


def test_index_put_of_a_place_twice_is_refused() -> None:
    places = torch.tensor([4, 4]).npu()
    with refused("a place occurs twice"):
        torch.zeros(9).npu().index_put((places,), torch.ones(2).npu())
        torch_npu.npu.synchronize()
    added = torch.zeros(9).npu().index_put((places,), torch.ones(2).npu(), accumulate=True)
    assert added.cpu()[4] == 2


@pytest.mark.parametrize("operator", ["index", "index_put"])
def test_an_index_outside_is_refused(operator: str) -> None:
    x, places = torch.zeros(9).npu(), torch.tensor([3, 9]).npu()
    with refused(f"{operator}: an index lies outside of 9"):
        if operator == "index":
            x[places]
        else:
            x.index_put((places,), torch.ones(2).npu())
        torch_npu.npu.synchronize()


def test_the_exponential_in_place() -> None:
    x = torch.randn(7)
    assert torch.equal(x.npu().exp_().cpu(), x.exp())
