"""Masks of npu_fused_infer_attention_score for one query token of each sequence (decode)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu

HALF = torch.bfloat16
BLOCK, WIDTH, HEADS, KV_HEADS = 128, 128, 4, 2
LENGTHS = (130, 7, 256)
PAGES = torch.tensor([[2, 0], [4, 1], [3, 5]], dtype=torch.int32)
FORMS = {"B, KV_S": (3, 256), "B, 1, KV_S": (3, 1, 256), "B, 1, 1, KV_S": (3, 1, 1, 256)}


def hidden(lengths: tuple[int, ...] = LENGTHS, width: int = 256) -> torch.Tensor:
    """True behind the end of each context."""
    return torch.arange(width) >= torch.tensor(lengths).unsqueeze(1)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 1, HEADS * WIDTH, generator=generator).to(HALF).npu()
    cache = torch.randn(2, 6, BLOCK, KV_HEADS * WIDTH, generator=generator).to(HALF).npu()
    return query, cache[0], cache[1]


def attend(lengths: tuple[int, ...], mask: torch.Tensor | None, **changes: Any) -> torch.Tensor:
    named: dict[str, Any] = {
        "num_heads": HEADS, "num_key_value_heads": KV_HEADS, "scale": 0.1, "input_layout": "BSH",
        "block_table": PAGES.npu(), "block_size": BLOCK, "actual_seq_lengths_kv": list(lengths),
        "atten_mask": None if mask is None else mask.npu(),
    }  # fmt: skip
    return torch_npu.npu_fused_infer_attention_score(*inputs(), **(named | changes))[0].cpu()


@pytest.mark.opposite_modes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
def test_a_mask_hides_what_lies_behind_each_context(form: str, dtype: torch.dtype) -> None:
    """Each sequence has a row of its own in every documented shape."""
    whole = (256, 256, 256)
    masked = attend(whole, hidden().view(FORMS[form]).to(dtype))
    torch.testing.assert_close(masked, attend(LENGTHS, None), atol=0.01, rtol=0.01)
    assert not torch.allclose(masked, attend(whole, None), atol=0.05)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (hidden()[:2], r"batchSize\[2\] of atten_mask must be equal to batchSize\[3\]"),
        (hidden().view(1, 3, 256), r"batchSize\[1\] of atten_mask"),
        (hidden().unsqueeze(1).expand(3, 2, 256).contiguous(), r"must be \(B, KV_S\)"),
        (hidden(width=255), r"s Size\[255\] of atten_mask must be .* sMax\[256\]"),
        (hidden().half(), "atten_mask"),
    ],
)
def test_other_masks_are_refused(mask: torch.Tensor, rule: str) -> None:
    with pytest.raises(RuntimeError, match=rule):
        attend((256, 256, 256), mask)


def test_the_mask_covers_the_block_table_not_only_the_lengths() -> None:
    with pytest.raises(RuntimeError, match=r"sMax\[256\]"):
        attend((128, 7, 100), hidden(width=128))
    narrow = {"block_table": PAGES[:, :1].contiguous().npu()}
    lengths = (128, 7, 100)
    masked = attend((128, 128, 128), hidden(lengths, 128), **narrow)
    expected = attend(lengths, None, **narrow)
    torch.testing.assert_close(masked, expected, atol=0.01, rtol=0.01)


@pytest.mark.opposite_modes
def test_all_rows_count_their_blocks_masked_or_not() -> None:
    """Three rows of two blocks: a cache of five does not have them."""
    query, keys, values = inputs()
    named = {
        "num_heads": HEADS, "num_key_value_heads": KV_HEADS, "scale": 0.1, "input_layout": "BSH",
        "block_table": PAGES.clamp(max=4).npu(), "block_size": BLOCK,
        "actual_seq_lengths_kv": [256] * 3, "atten_mask": hidden().unsqueeze(1).npu(),
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=r"valid block num\(6\)"):
        torch_npu.npu_fused_infer_attention_score(query, keys[:5], values[:5], **named)
