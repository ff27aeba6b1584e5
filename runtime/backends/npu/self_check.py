"""Self-checks of loaded weights. A wrong FRACTAL_NZ orientation is not rejected by the hardware:
it computes garbage. So before the first token, the real kernels are asked what they see.

S0  every tensor: format, byte count, offset (in formats.upload_packed)
S1  the device's own cast of small matrices equals our layout, byte for byte
S2  a loaded weight, cast back to plain order by the device, equals the file's
S3  a one-hot activation through the real kernel gives exact rows of the weight
S4  where the kernel decodes codes: it gives rows of the decoded weight, under scales of both signs

S3 is the authoritative one (S1 and S2 pass for a wrong orientation) and costs no cast, so `load`
runs S0 and S3; `qwen3-ascend doctor` runs all five.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3_ascend.checkpoint.layout import nz_pack, pack_words
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.runtime.backends.npu import formats
from qwen3_ascend.runtime.backends.npu.experts import NpuExperts
from qwen3_ascend.runtime.backends.npu.linears import NpuLinear

PROBE_ROWS = 16
"""Rows of the weight that S3 reads, spread over the whole input axis."""

DECODED_ERROR = 2.0**-7
"""Relative, of a decoded weight: two units of bfloat16."""

S1_SHAPES = ((64, 128), (15, 33), (2, 32, 64))
"""Aligned, unaligned, and batched."""


def layouts_agree(dtype: torch.dtype) -> bool | None:
    """S1 for one element type; None if the device does not cast to FRACTAL_NZ at all."""
    for shape in S1_SHAPES:
        matrix = torch.arange(torch.Size(shape).numel()).remainder(127).view(shape).to(dtype)
        cast = formats.cast_to_nz(matrix.to("npu"))
        if formats.format_of(cast) != formats.ACL_FORMAT_FRACTAL_NZ:
            return None
        expected = nz_pack(matrix).view(-1).view(torch.uint8)
        if not torch.equal(formats.raw_bytes(cast), expected):
            return False
    return True


def reads_back(linear: Linear, loaded: NpuLinear) -> bool:
    """S2 for one loaded linear."""
    plain, layout = linear.codes()["weight"], linear.layout
    expected, weight = plain.t() if layout.nz_of == "KN" else plain, loaded.weight
    if layout.per_word > 1:  # a cast knows bytes, but no words of int4
        expected = pack_words(expected, layout.per_word).view(torch.int8)
        weight = weight.view(torch.int8)
    return torch.equal(formats.cast_to_nd(weight).cpu(), expected)


def kernel_sees_weight(linear: Linear, loaded: NpuLinear) -> bool:
    """S3 for one loaded linear."""
    rows = _rows(linear)
    return torch.equal(loaded.probe(rows), linear.codes()["weight"][:, rows].t())


def kernel_sees_experts(linear: Linear, loaded: NpuExperts) -> bool:
    """S3 for the loaded linears of all experts."""
    rows = _rows(linear)
    expected = linear.codes()["weight"][..., rows].transpose(-2, -1)
    return torch.equal(loaded.probe(rows), expected)


def kernel_decodes_weight(linear: Linear, loaded: NpuLinear) -> bool:
    """S4 for one loaded linear whose kernel takes floats; to the last bits of bfloat16, of which
    nobody says how often the kernel rounds to it."""
    one_hot = F.one_hot(_rows(linear), linear.shape[-1]).bfloat16()
    expected, found = linear.reference(one_hot), loaded(one_hot.to("npu")).cpu().float()
    return torch.allclose(found, expected, rtol=DECODED_ERROR, atol=0.0)


def _rows(linear: Linear) -> Tensor:
    """Some inputs, from the first to the last."""
    inputs = linear.shape[-1]
    return torch.linspace(0, inputs - 1, min(PROBE_ROWS, inputs)).long()
