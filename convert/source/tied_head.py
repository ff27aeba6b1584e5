"""A source whose config.json ties the output projection to the embedding, and which holds both.

transformers 5 compares the two and keeps a projection that differs (`tie_weights`); what peft
merges leave behind is such a model.
"""

from __future__ import annotations

from typing import Literal

import torch

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.convert.encodings import FLOAT
from qwen3_ascend.convert.source.names import EMBEDDING, HEAD
from qwen3_ascend.convert.source.source import Source
from qwen3_ascend.files.safetensors import TensorSlot

Finding = Literal["alone", "equal", "alike", "different"]
"""Whether a tied head has a tensor of its own; "alike" is what samples show where the weights are
not here yet, and has to be checked once they are."""

SAMPLES, SAMPLE_BYTES = 4, 1 << 18
ROWS_AT_A_TIME = 1024


def compare_head(source: Source) -> Finding:
    """Holds the head that config.json ties against the embedding."""
    if not {EMBEDDING, HEAD} <= source.location.keys():
        return "alone"
    embedding, head = source.slot(EMBEDDING), source.slot(HEAD)
    if embedding.shape != head.shape or source.quantization.encoding(LM_HEAD) != FLOAT:
        return "different"
    same_type = embedding.dtype == head.dtype
    if same_type and not all(_same_sample(source, embedding, head, i) for i in range(SAMPLES)):
        return "different"
    if source.provider.store is not None:
        return "alike"
    return "equal" if _same(source) else "different"


def _same_sample(source: Source, embedding: TensorSlot, head: TensorSlot, index: int) -> bool:
    """Whether a stretch of both is equal; the last one ends with the last row."""
    length = min(SAMPLE_BYTES, head.nbytes)
    at = (head.nbytes - length) * index // (SAMPLES - 1)
    found = [
        source.provider.read_range(source.location[name], slot.start + at, length)
        for name, slot in ((EMBEDDING, embedding), (HEAD, head))
    ]
    return found[0] == found[1]


def _same(source: Source) -> bool:
    first, second = source.read(EMBEDDING), source.read(HEAD)
    for start in range(0, first.shape[0], ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        if not torch.equal(first[rows].float(), second[rows].float()):
            return False
    return True
