"""A mixture of experts around its products: what is computed, and each demand that is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from ascend_sim import trace
from ascend_sim.test_faults import run_with
from ascend_sim.test_refusals import INT32, Cases, dev, make, refused

HALF = torch.bfloat16
TOKENS, HIDDEN, CHOSEN, EXPERTS = 5, 32, 3, 8

# ------------------------------------------------------------------------------------------ gating


def gate(x: torch.Tensor, k: int = CHOSEN, **named: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t.cpu() for t in torch_npu.npu_moe_gating_top_k_softmax(x.npu(), k=k, **named))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gating(dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, EXPERTS).to(dtype)
    weights, experts, rows = gate(x)
    expected = x.double().softmax(-1).topk(CHOSEN)
    assert torch.equal(experts.long(), expected.indices)
    assert weights.dtype is dtype and experts.dtype is rows.dtype is torch.int32
    torch.testing.assert_close(weights.double(), expected.values, rtol=2**-8, atol=0)
    assert rows.tolist() == [[t + TOKENS * j for j in range(CHOSEN)] for t in range(TOKENS)]


def test_gating_takes_the_first_of_equal_experts() -> None:
    _, experts, _ = gate(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0, 0.0]]), k=4)
    assert experts.tolist() == [[1, 3, 2, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("renorm", [0, 1])
def test_gating_in_one_launch(dtype: torch.dtype, renorm: int) -> None:
    x = torch.randn(TOKENS, EXPERTS).to(dtype)
    weights, experts, _ = torch_npu.npu_moe_gating_top_k_softmax_v2(
        x.npu(), k=CHOSEN, renorm=renorm
    )
    expected = x.double().softmax(-1).topk(CHOSEN)
    shares = expected.values / (expected.values.sum(-1, keepdim=True) if renorm else 1)
    assert torch.equal(experts.cpu().long(), expected.indices) and weights.dtype is dtype
    torch.testing.assert_close(weights.cpu().double(), shares, rtol=2**-8, atol=0)


GATING: Cases = {
    "finished": ("finished is not simulated", dict(finished=lambda: dev(4, dtype=torch.bool))),
    "k": ("k may be 1024", dict(x=lambda: dev(4, 2048), k=1025)),
}


@pytest.mark.parametrize("case", GATING)
def test_gating_refuses(case: str) -> None:
    rule, changes = GATING[case]
    refused(rule, torch_npu.npu_moe_gating_top_k_softmax, dict(x=dev(4, 8), k=2), **make(changes))


# ----------------------------------------------------------------------------------------- routing


def route(x: torch.Tensor, chosen: torch.Tensor, **named: Any) -> list[torch.Tensor]:
    options: dict[str, Any] = dict(
        active_num=chosen.numel(),
        expert_num=EXPERTS,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, EXPERTS],
        row_idx_type=0,
        quant_mode=-1,
    )
    results = torch_npu.npu_moe_init_routing_v2(x.npu(), chosen.npu(), **{**options, **named})
    return [result.cpu() for result in results]


def some_choice() -> torch.Tensor:
    """Experts 2 and 5 get no row."""
    allowed = torch.tensor([0, 1, 3, 4, 6, 7])
    places = torch.stack([torch.randperm(len(allowed))[:CHOSEN] for _ in range(TOKENS)])
    return allowed[places].int()


def routed(chosen: torch.Tensor, start: int = 0, end: int = EXPERTS) -> list[tuple[int, int]]:
    """(token, rank) of each row, one expert after the other."""
    return [
        (token, rank)
        for expert in range(start, end)
        for token in range(len(chosen))
        for rank in range(chosen.shape[1])
        if chosen[token, rank] == expert
    ]


def counted(chosen: torch.Tensor, start: int = 0, end: int = EXPERTS) -> list[int]:
    return [int((chosen == expert).sum()) for expert in range(start, end)]


def test_routing_of_floats() -> None:
    x, chosen = torch.randn(TOKENS, HIDDEN).to(HALF), some_choice()
    rows, places, counts, _ = route(x, chosen)
    order = routed(chosen)
    assert torch.equal(rows, torch.stack([x[token] for token, _ in order]))
    assert rows.dtype is HALF and places.dtype is torch.int32 and counts.dtype is torch.int64
    assert counts.tolist() == counted(chosen) and counts[2] == counts[5] == 0
    for row, (token, rank) in enumerate(order):
        assert places[token * CHOSEN + rank] == row
    assert [entry.name for entry in trace.launches()] == ["aclnnMoeInitRoutingV3"]


def test_routing_quantizes_each_token() -> None:
    x, chosen = torch.randn(TOKENS, HIDDEN).to(HALF), some_choice()
    x[1] = 0
    rows, _, _, scales = route(x, chosen, quant_mode=1)
    expected = torch.stack([x[token] for token, _ in routed(chosen)]).double()
    assert rows.dtype is torch.int8 and scales.dtype is torch.float32
    torch.testing.assert_close(scales.double(), expected.abs().amax(-1) / 127)
    error = rows.double() * scales.double()[:, None] - expected
    assert (error.abs() <= scales.double()[:, None] * 0.501).all()


def test_routing_rounds_halves_away_from_zero() -> None:
    """Unlike npu_dynamic_quant, which rounds them to even."""
    x = torch.zeros(1, HIDDEN).to(HALF)
    x[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49])
    rows, _, _, _ = route(x, torch.tensor([[3]], dtype=torch.int32), quant_mode=1)
    assert rows[0, :7].tolist() == [127, 1, 2, 3, -1, -3, 0]
    assert torch_npu.npu_dynamic_quant(x.npu())[0][0, :4].tolist() == [127, 0, 2, 2]


def test_routing_passes_on_codes_and_scales() -> None:
    chosen, scales = some_choice(), torch.rand(TOKENS)
    codes = torch.randint(-128, 128, (TOKENS, HIDDEN), dtype=torch.int8)
    rows, _, _, row_scales = route(codes, chosen, scale=scales.npu())
    tokens = [token for token, _ in routed(chosen)]
    assert torch.equal(rows, codes[tokens]) and torch.equal(row_scales, scales[tokens])


@pytest.mark.parametrize("scattered", [False, True])
def test_routing_to_some_of_the_experts(scattered: bool) -> None:
    x, chosen = torch.randn(TOKENS, HIDDEN).to(HALF), some_choice()
    limits = [1, 5]
    rows, places, counts, _ = route(
        x, chosen, active_expert_range=limits, row_idx_type=int(scattered)
    )
    order = routed(chosen, *limits)
    assert torch.equal(rows[: len(order)], torch.stack([x[token] for token, _ in order]))
    assert counts.tolist() == counted(chosen, *limits)
    elements = [token * CHOSEN + rank for token, rank in order]
    if scattered:
        assert places[: len(order)].tolist() == elements
    else:
        expected = [elements.index(e) if e in elements else -1 for e in range(chosen.numel())]
        assert places.tolist() == expected


ROUTING: Cases = {
    "float experts": ("expert_idx must be one of int32", dict(expert_idx=lambda: dev(4, 2))),
    "rows": ("equal rows", dict(expert_idx=lambda: dev(3, 2, **INT32), active_num=6)),
    "active": ("active_num must be 8", dict(active_num=7)),
    "range": ("must lie within the 8 experts", dict(active_expert_range=[4, 9])),
    "many experts": (
        "10240 experts",
        dict(expert_num=10241, active_expert_range=[0, 10241]),
    ),
    "row_idx_type": ("row_idx_type must be 0 or 1", dict(row_idx_type=2)),
    "quant_mode": ("quant_mode must be -1 or 1", dict(quant_mode=0)),
    "codes to be quantized": (
        "to be quantized must be one of",
        dict(x=lambda: dev(4, 32, dtype=torch.int8), quant_mode=1),
    ),
    "smooth": (
        "smooth scales",
        dict(scale=lambda: dev(8, 32, dtype=torch.float32), quant_mode=1),
    ),
    "scale shape": (
        "scale must have shape",
        dict(scale=lambda: dev(8, dtype=torch.float32)),
    ),
    "scale dtype": ("scale must be one of float32", dict(scale=lambda: dev(4))),
    "cumulative": ("only counts", dict(expert_tokens_num_type=0)),
    "no counts": ("only counts", dict(expert_tokens_num_flag=False)),
    "number": ("an expert is none of 8", dict(expert_idx=lambda: dev(4, 2, **INT32) + 8)),
}


@pytest.mark.parametrize("case", ROUTING)
def test_routing_refuses(case: str) -> None:
    rule, changes = ROUTING[case]
    base: dict[str, Any] = dict(
        x=dev(4, 32),
        expert_idx=dev(4, 2, **INT32),
        active_num=8,
        expert_num=8,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, 8],
        quant_mode=-1,
    )
    refused(rule, torch_npu.npu_moe_init_routing_v2, base, **make(changes))


OF_THE_30B = """
x, chosen = torch.ones(2, 2048, dtype=torch.{dtype}).npu(), torch.tensor([[7, 3], [3, 9]])
scale = torch.ones(2).npu() if x.dtype is torch.int8 else None
try:
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x, chosen.int().npu(), scale=scale, active_num=4, expert_num=128, quant_mode=-1,
        expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 128])
    print(places.tolist(), counts.nonzero().flatten().tolist(), counts.sum().item())
except RuntimeError as error:
    print("before CANN 8.5" in str(error))
"""


@pytest.mark.parametrize(
    ("release", "dtype", "shown"),
    [
        ("8.3", "bfloat16", "[2, 0, 1, 3] [3, 7, 9] 4"),
        ("8.3", "int8", "True"),
        ("8.5", "int8", "[2, 0, 1, 3] [3, 7, 9] 4"),
    ],
)
def test_128_experts_of_2048_inputs(release: str, dtype: str, shown: str) -> None:
    """Before CANN 8.5 the wheel takes another operator for them, which knows no codes."""
    printed = run_with({"ASCEND_SIM_CANN": release}, OF_THE_30B.format(dtype=dtype))
    assert printed.strip().endswith(shown)


# ---------------------------------------------------------------------------------------- and back


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_unpermute_sums_in_order(dtype: torch.dtype) -> None:
    rows = torch.randn(TOKENS * CHOSEN, HIDDEN).to(HALF)
    places, weights = torch.randperm(len(rows)).int(), torch.rand(TOKENS, CHOSEN).to(dtype)
    out = torch_npu.npu_moe_token_unpermute(rows.npu(), places.npu(), weights.npu()).cpu()
    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for rank in range(CHOSEN):
            row = rows[places[token * CHOSEN + rank]].float()
            expected[token] += row * weights[token, rank].float()
    assert torch.equal(out, expected.to(HALF))
    assert [entry.name for entry in trace.launches()] == ["aclnnMoeTokenUnpermute"]


def test_unpermute_without_weights() -> None:
    rows, places = torch.randn(6, HIDDEN).to(HALF), torch.randperm(6).int()
    out = torch_npu.npu_moe_token_unpermute(rows.npu(), places.npu())
    assert torch.equal(out.cpu(), rows[places])


def test_unpermute_leaves_out_rows_of_no_weight() -> None:
    rows = torch.full((2, HIDDEN), float("nan")).to(HALF)
    rows[1] = 3
    weights, places = torch.tensor([[0.0, 0.5]]), torch.tensor([0, 1]).int()
    out = torch_npu.npu_moe_token_unpermute(rows.npu(), places.npu(), weights.npu())
    assert (out.cpu() == 1.5).all()


def indices(*values: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(values, dtype=torch.int32).npu()


UNPERMUTE: Cases = {
    "integers": (
        "permuted_tokens must be one of",
        dict(permuted_tokens=lambda: dev(4, 8, **INT32)),
    ),
    "few indices": ("sorted_indices must have shape", dict(sorted_indices=indices(0, 1, 2, 3, 4))),
    "long indices": ("sorted_indices must be one of int32", dict(sorted_indices=lambda: dev(4))),
    "integer weights": ("probs must be one of", dict(probs=lambda: dev(2, 2, **INT32))),
    "weights": ("must have 2 dims and an element", dict(probs=lambda: dev(3, 2))),
    "padded": ("padded_mode must be False", dict(padded_mode=True)),
    "outside": ("an index lies outside of 4", dict(sorted_indices=indices(0, 1, 2, 4))),
    "twice": ("an index occurs twice", dict(sorted_indices=indices(0, 1, 1, 2))),
    "many": (
        "512 rows",
        dict(
            permuted_tokens=lambda: dev(513, 8),
            sorted_indices=indices(*range(513)),
            probs=lambda: dev(1, 513),
        ),
    ),
}


@pytest.mark.parametrize("case", UNPERMUTE)
def test_unpermute_refuses(case: str) -> None:
    rule, changes = UNPERMUTE[case]
    base = dict(permuted_tokens=dev(4, 8), sorted_indices=indices(3, 0, 2, 1)(), probs=dev(2, 2))
    refused(rule, torch_npu.npu_moe_token_unpermute, base, **make(changes))
