"""Sizes that kernels and files agree on; they need no torch, so that `--help` can name them."""

from __future__ import annotations

ROW_BLOCK = 16
"""Rows of a FRACTAL_NZ fractal (M0), the same for every type."""

STRIP_BYTES = 32
"""Bytes of one row of a FRACTAL_NZ strip."""

CACHE_BLOCK_TOKENS = 128
"""Tokens of a key/value block. Of the sizes that Ascend's attention kernels take, the one that all
of them take (npu_fused_infer_attention_score: multiples of 128 for prefill, 128 advised for
decode)."""
