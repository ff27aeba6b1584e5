"""npu_top_k_top_p: logits that are not to be sampled become -inf.

Demands and formula: the page of aclnnApplyTopKTopP (ops-nn). It limits k to 1024. vLLM gives the
size of the vocabulary to a row without top-k, and vllm-ascend, which Ascend maintains, passes that
on: so this one larger value is taken too, and means all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..doors.aclnn import aclnn
from ..limits import require, require_a2_or_a3, require_dtype, require_nd, require_shape
from ..tensors import DeviceTensor, Layout

OPERATOR = "npu_top_k_top_p"
MAX_K = 1024


@cache
def check_layouts(logits: Layout, p: Layout | None, k: Layout | None, out: Layout) -> None:
    require_a2_or_a3(OPERATOR)
    require_dtype(OPERATOR, "logits", logits, (torch.float32, torch.float16, torch.bfloat16))
    require(logits.dims == 2, OPERATOR, "logits must be [rows, vocabulary]")
    require(p is not None or k is not None, OPERATOR, "p and k must not both be left out")
    if p is not None:
        require(p.dtype is logits.dtype, OPERATOR, "p must have the dtype of logits")
        require_shape(OPERATOR, "p", p, logits.size[:1])
    if k is not None:
        require_dtype(OPERATOR, "k", k, (torch.int32,))
        require_shape(OPERATOR, "k", k, logits.size[:1])
    require_shape(OPERATOR, "out", out, logits.size)
    require_nd(OPERATOR, logits=logits, p=p, k=k, out=out)


def check_k(k: torch.Tensor, vocabulary: int) -> None:
    fits = (k >= 1) & ((k <= min(MAX_K, vocabulary)) | (k == vocabulary))
    rule = f"k must be in [1, {min(MAX_K, vocabulary)}] or the vocabulary, {vocabulary}"
    require(bool(fits.all()), OPERATOR, f"{rule}: {k.tolist()}")


def check_p(p: torch.Tensor) -> None:
    fits = (p >= 0) & (p <= 1)
    require(bool(fits.all()), OPERATOR, f"p must be in [0, 1]: {p.tolist()}")


@aclnn("aclnnApplyTopKTopP", "logits:T p:T k:T out:T")
def top_k_top_p(
    logits: DeviceTensor, p: DeviceTensor | None, k: DeviceTensor | None, out: DeviceTensor
) -> Callable[[], None]:
    layouts = [each and each.layout for each in (p, k)]
    check_layouts(logits.layout, layouts[0], layouts[1], out.layout)

    def run() -> None:
        values, order = logits.read().sort(dim=-1, stable=True)
        if k is not None:
            check_k(k.read(), logits.layout.size[1])
            least = values.gather(1, values.shape[1] - k.read().long()[:, None])
            values = values.masked_fill(values < least, -torch.inf)
        if p is not None:
            check_p(p.read())
            rising = values.float().softmax(-1).cumsum(-1)
            dropped = rising <= 1 - p.read().float()[:, None]
            dropped[:, -1] = False
            values = values.masked_fill(dropped, -torch.inf)
        out.write(torch.empty_like(values).scatter_(1, order, values))

    return run
