"""The inputs of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """One step over B sequences with T new tokens in all; everything a forward may know.

    Attributes:
        tokens: [T] int64, token ids.
        positions: [T] int64, position of each token in its sequence.
        slots: [T] int32, where its key and value go: block * block_size + offset.
        block_table: [B, longest] int32, the blocks of each sequence, padded with scratch.
        context_lens: B tokens in the cache after this step. Host integers, because Ascend's
            attention reads them from the host.
        query_starts: B + 1 row numbers; rows query_starts[i] to query_starts[i + 1] are sequence
            i's.
        logit_rows: [R] int64, the rows whose logits are wanted; None for all T.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    context_lens: tuple[int, ...]
    query_starts: tuple[int, ...]
    logit_rows: Tensor | None

    @property
    def is_decode(self) -> bool:
        """Whether there is one token for each sequence."""
        return self.query_starts == tuple(range(len(self.context_lens) + 1))
