"""Caches and attention against plain loops, one query row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

import ascend_sim
from ascend_sim import trace

HALF = torch.bfloat16
BLOCK = 128
HEADS, KV_HEADS, WIDTH = 4, 2, 128
SCALE = 1 / math.sqrt(WIDTH)


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> None:
    torch.testing.assert_close(
        actual.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance
    )


def caches(blocks: int, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (blocks, BLOCK, KV_HEADS, width)
    return torch.randn(shape).to(HALF), torch.randn(shape).to(HALF)


def reference_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [heads, D] over keys [n, kv_heads, D]."""
    out = torch.empty(query.shape[0], values.shape[-1], dtype=torch.float64)
    for head in range(query.shape[0]):
        kv = head // (query.shape[0] // keys.shape[1])
        scores = [float(query[head].double() @ key.double()) * scale for key in keys[:, kv]]
        weights = torch.tensor([math.exp(s - max(scores)) for s in scores], dtype=torch.float64)
        out[head] = (weights / weights.sum()) @ values[:, kv].double()
    return out


def rows_of(cache: torch.Tensor, pages: list[int], length: int) -> torch.Tensor:
    return torch.cat([cache[page] for page in pages])[:length]


def table(pages: list[list[int]]) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int32).npu()


def causal_mask() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()


def fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any
) -> torch.Tensor:
    named.setdefault("num_heads", HEADS)
    named.setdefault("num_key_value_heads", KV_HEADS)
    named.setdefault("scale", SCALE)
    return torch_npu.npu_fused_infer_attention_score(query, key, value, **named)[0]


# ------------------------------------------------------------------------------- attention
PAGES, LENGTHS = [[2, 0], [4, 1], [3, 3]], [130, 7, 128]


def test_paged_attention() -> None:
    key, value = caches(5)
    query = torch.randn(3, HEADS, WIDTH).to(HALF)
    out = torch.empty(3, HEADS, WIDTH, dtype=HALF, device="npu")
    torch_npu._npu_paged_attention(
        query=query.npu(),
        key_cache=key.npu(),
        value_cache=value.npu(),
        num_kv_heads=KV_HEADS,
        num_heads=HEADS,
        scale_value=SCALE,
        block_table=table(PAGES),
        context_lens=torch.tensor(LENGTHS, dtype=torch.int32),
        out=out,
    )
    for row, (pages, length) in enumerate(zip(PAGES, LENGTHS, strict=True)):
        near(
            out[row],
            reference_row(
                query[row], rows_of(key, pages, length), rows_of(value, pages, length), SCALE
            ),
        )
    assert ("_npu_paged_attention", "atb") in [(e.name, e.door) for e in trace.launches()]


@pytest.mark.opposite_modes
def test_paged_attention_reads_the_lengths_at_the_call() -> None:
    key, value = (cache.npu() for cache in caches(2))
    query = torch.randn(1, HEADS, WIDTH).to(HALF).npu()
    lengths = torch.tensor([3], dtype=torch.int32)
    out, again = (torch.empty(1, HEADS, WIDTH, dtype=HALF, device="npu") for _ in range(2))
    arguments = (query, key, value, KV_HEADS, HEADS, SCALE, table([[0]]))
    workspace = torch_npu._npu_paged_attention_get_workspace(*arguments, lengths, out)
    assert workspace.dtype is torch.uint8 and workspace.numel() > 0
    torch_npu._npu_paged_attention(*arguments, lengths, out, workspace=workspace)
    lengths[0] = 100
    torch_npu._npu_paged_attention(*arguments, torch.tensor([3], dtype=torch.int32), again)
    assert torch.equal(out.cpu(), again.cpu())


@pytest.mark.parametrize("pages_by_head", [False, True])
def test_fused_attention_prefill_over_pages(pages_by_head: bool) -> None:
    """Chunked prefill: two sequences with different histories, causal from the right corner."""
    key, value = caches(5)
    chunk, history = [5, 3], [130, 3]
    query = torch.randn(sum(chunk), HEADS, WIDTH).to(HALF)

    def form(cache: torch.Tensor) -> torch.Tensor:
        return cache.transpose(1, 2).contiguous() if pages_by_head else cache.flatten(2)

    out = fused(
        query.npu(),
        form(key).npu(),
        form(value).npu(),
        input_layout="TND",
        sparse_mode=3,
        atten_mask=causal_mask(),
        block_table=table(PAGES[:2]),
        block_size=BLOCK,
        actual_seq_lengths=[5, 8],
        actual_seq_lengths_kv=history,
    )
    row = 0
    for sequence, rows in enumerate(chunk):
        for i in range(rows):
            seen = history[sequence] - rows + i + 1
            k, v = (rows_of(cache, PAGES[sequence], seen) for cache in (key, value))
            near(out[row], reference_row(query[row], k, v, SCALE))
            row += 1


def test_fused_attention_decode_over_pages() -> None:
    key, value = caches(5)
    query = torch.randn(3, HEADS, WIDTH).to(HALF)
    out = fused(
        query.npu(),
        key.flatten(2).npu(),
        value.flatten(2).npu(),
        input_layout="TND",
        block_table=table(PAGES),
        block_size=BLOCK,
        actual_seq_lengths=[1, 2, 3],
        actual_seq_lengths_kv=LENGTHS,
    )
    for row, (pages, length) in enumerate(zip(PAGES, LENGTHS, strict=True)):
        near(
            out[row],
            reference_row(
                query[row], rows_of(key, pages, length), rows_of(value, pages, length), SCALE
            ),
        )


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("width", [64, 128])
def test_fused_attention_decode_by_batch(layout: str, width: int) -> None:
    key, value = caches(5, width)
    query = torch.randn(3, 1, HEADS, width).to(HALF)
    given = {"BSH": query.flatten(2), "BSND": query, "BNSD": query.transpose(1, 2).contiguous()}
    out = fused(
        given[layout].npu(),
        key.flatten(2).npu(),
        value.flatten(2).npu(),
        input_layout=layout,
        block_table=table(PAGES),
        block_size=BLOCK,
        actual_seq_lengths_kv=LENGTHS,
        scale=0.1,
    )
    for row, (pages, length) in enumerate(zip(PAGES, LENGTHS, strict=True)):
        expected = reference_row(
            query[row, 0], rows_of(key, pages, length), rows_of(value, pages, length), 0.1
        )
        near(out[row].reshape(HEADS, width), expected)


@pytest.mark.parametrize("layout", ["TND", "BSND", "BNSD"])
def test_fused_attention_without_pages(layout: str) -> None:
    query = torch.randn(2, 6, HEADS, WIDTH).to(HALF)
    key, value = (torch.randn(2, 6, KV_HEADS, WIDTH).to(HALF) for _ in range(2))
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "TND": lambda x: x.flatten(0, 1),
        "BSND": lambda x: x,
        "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    }
    form = forms[layout]
    lengths: dict[str, Any] = {}
    if layout == "TND":
        lengths = dict(actual_seq_lengths=[6, 12], actual_seq_lengths_kv=[6, 12])
    out = fused(
        *(form(t).npu() for t in (query, key, value)),
        input_layout=layout,
        sparse_mode=3,
        atten_mask=causal_mask(),
        **lengths,
    ).cpu()
    rows = {
        "TND": out.view(2, 6, HEADS, WIDTH) if layout == "TND" else out,
        "BSND": out,
        "BNSD": out.transpose(1, 2),
    }[layout]
    for batch in range(2):
        for i in range(6):
            near(
                rows[batch, i],
                reference_row(query[batch, i], key[batch, : i + 1], value[batch, : i + 1], SCALE),
            )


def test_fused_attention_out_form_and_workspace() -> None:
    key, value = (cache.flatten(2).npu() for cache in caches(5))
    query = torch.randn(3, HEADS, WIDTH).to(HALF).npu()
    named = dict(
        input_layout="TND",
        block_table=table(PAGES),
        block_size=BLOCK,
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        scale=SCALE,
        actual_seq_lengths=[1, 2, 3],
        actual_seq_lengths_kv=LENGTHS,
    )
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(
        query, key, value, **named
    )
    out = torch.empty_like(query)
    lse = torch.empty(1, device="npu")
    torch_npu.npu_fused_infer_attention_score.out(
        query, key, value, **named, workspace=workspace, out=[out, lse]
    )
    assert torch.equal(out.cpu(), fused(query, key, value, **named).cpu())


def test_fused_attention_log_sum_exp() -> None:
    query = torch.randn(4, HEADS, WIDTH).to(HALF)
    key, value = (torch.randn(4, KV_HEADS, WIDTH).to(HALF) for _ in range(2))
    _, lse = torch_npu.npu_fused_infer_attention_score(
        query.npu(),
        key.npu(),
        value.npu(),
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        scale=SCALE,
        input_layout="TND",
        actual_seq_lengths=[4],
        actual_seq_lengths_kv=[4],
        softmax_lse_flag=True,
    )
    scores = (
        torch.einsum("qhd,khd->qhk", query.double(), key.double().repeat_interleave(2, 1)) * SCALE
    )
    near(lse, scores.exp().sum(-1, keepdim=True).log())


# ---------------------------------------------------------------------------------- caches
SLOTS = [5, 255, 0, 130]


@pytest.mark.parametrize("operator", ["npu_scatter_pa_kv_cache", "_npu_reshape_and_cache"])
def test_rows_are_written_to_an_nd_cache(operator: str) -> None:
    key, value = caches(2)
    k, v = torch.randn(2, 4, KV_HEADS, WIDTH).to(HALF).unbind()
    key_cache, value_cache = key.npu(), value.npu()
    slots = torch.tensor(SLOTS, dtype=torch.int32).npu()
    mode = dict(cache_mode="Norm") if operator.startswith("npu") else {}
    getattr(torch_npu, operator)(k.npu(), v.npu(), key_cache, value_cache, slots, **mode)
    for row, slot in enumerate(SLOTS):
        key[slot // BLOCK, slot % BLOCK] = k[row]
        value[slot // BLOCK, slot % BLOCK] = v[row]
    assert torch.equal(key_cache.cpu(), key) and torch.equal(value_cache.cpu(), value)


def nz_cache(blocks: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    strip = 32 // dtype.itemsize
    return torch.zeros(blocks, KV_HEADS * WIDTH // strip, BLOCK, strip, dtype=dtype)


def stored_row(cache: torch.Tensor, slot: int) -> torch.Tensor:
    """The row [heads, D] of a PA_NZ cache, number by number."""
    width = cache.shape[-1]
    row = torch.empty(KV_HEADS, WIDTH, dtype=cache.dtype)
    for head in range(KV_HEADS):
        for d in range(WIDTH):
            strip = (head * WIDTH + d) // width
            row[head, d] = cache[slot // BLOCK, strip, slot % BLOCK, d % width]
    return row


def test_pa_nz_is_the_default_and_writes_strips() -> None:
    key_cache, value_cache = nz_cache(2).npu(), nz_cache(2).npu()
    k, v = torch.randn(2, 4, KV_HEADS, WIDTH).to(HALF).unbind()
    slots = torch.tensor(SLOTS).npu()
    torch_npu.npu_scatter_pa_kv_cache(k.npu(), v.npu(), key_cache, value_cache, slots)
    for row, slot in enumerate(SLOTS):
        assert torch.equal(stored_row(key_cache.cpu(), slot), k[row])
        assert torch.equal(stored_row(value_cache.cpu(), slot), v[row])


def fused_cache_write(quantized: bool = False, **changes: object) -> dict[str, Any]:
    tokens = 4
    dtype = torch.int8 if quantized else HALF
    strip_cache = nz_cache(2, dtype)
    call = dict(
        qkv=torch.randn(tokens, (HEADS + 2 * KV_HEADS) * WIDTH).to(HALF).npu(),
        q_gamma=torch.rand(WIDTH).to(HALF).npu(),
        k_gamma=torch.rand(WIDTH).to(HALF).npu(),
        cos=torch.rand(tokens, WIDTH).to(HALF).npu(),
        sin=torch.rand(tokens, WIDTH).to(HALF).npu(),
        index=torch.tensor([5, 255, -1, 130]).npu(),
        q_out=torch.empty(tokens, HEADS * WIDTH, dtype=HALF, device="npu"),
        k_cache=strip_cache.npu(),
        v_cache=strip_cache.npu(),
        qkv_size=[1, tokens, HEADS + 2 * KV_HEADS, WIDTH],
        head_nums=[HEADS, KV_HEADS, KV_HEADS],
    )
    if quantized:
        call["k_scale"], call["v_scale"] = torch.rand(2, KV_HEADS, WIDTH).add(0.1).npu().unbind()
    return {**call, **changes}


@pytest.mark.parametrize("quantized", [False, True])
def test_qkv_rms_norm_rope_cache(quantized: bool) -> None:
    call = fused_cache_write(quantized)
    torch_npu.npu_qkv_rms_norm_rope_cache(**call)
    rows = call["qkv"].cpu().double().view(4, -1, WIDTH)
    cos, sin = (call[name].cpu().double()[:, None] for name in ("cos", "sin"))

    def turned(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gamma.cpu().double()
        return x * cos + torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1) * sin

    near(call["q_out"].view(4, HEADS, WIDTH), turned(rows[:, :HEADS], call["q_gamma"]), 0.05)
    keys = turned(rows[:, HEADS : HEADS + KV_HEADS], call["k_gamma"])
    values = rows[:, HEADS + KV_HEADS :]
    for name, expected in (("k", keys), ("v", values)):
        held = call[f"{name}_cache"].cpu()
        for row, slot in ((0, 5), (1, 255), (3, 130)):
            got = stored_row(held, slot).double()
            if quantized:
                scaled = expected[row] / call[f"{name}_scale"].cpu().double()
                assert ((got - scaled.clamp(-128, 127)).abs() <= 0.51).all()
            else:
                near(got, expected[row], 0.05)
        strips = KV_HEADS * WIDTH // held.shape[-1]
        written = held.ne(0).any(-1).any(1).sum().item()
        assert strips and written == 3  # the token with index -1 left no trace
    assert [e.name for e in ascend_sim.trace.launches()][-1] == "aclnnQkvRmsNormRopeCache"
