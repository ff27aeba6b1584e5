"""The inputs of one forward pass, and the two ways to build them: prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3_ascend.runtime.sequence import Sequence


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
        is_decode: one token for each sequence.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    context_lens: tuple[int, ...]
    query_starts: tuple[int, ...]
    logit_rows: Tensor | None
    is_decode: bool


def prefill_inputs(
    sequence: Sequence, length: int, block_size: int, all_logits: bool = False
) -> StepInputs:
    """The next `length` prompt tokens of one sequence; logits of the last row, or of all."""
    start, stop = sequence.computed, sequence.computed + length
    return StepInputs(
        tokens=torch.tensor(sequence.tokens[start:stop]),
        positions=torch.arange(start, stop),
        slots=_slots([(sequence, position) for position in range(start, stop)], block_size),
        block_table=_block_table([sequence]),
        context_lens=(stop,),
        query_starts=(0, length),
        logit_rows=None if all_logits else torch.tensor([length - 1]),
        is_decode=False,
    )


def decode_inputs(sequences: SequenceOf[Sequence], block_size: int) -> StepInputs:
    """The newest token of every sequence."""
    positions = [len(sequence.tokens) - 1 for sequence in sequences]
    count = len(sequences)
    return StepInputs(
        tokens=torch.tensor([sequence.tokens[-1] for sequence in sequences]),
        positions=torch.tensor(positions),
        slots=_slots(list(zip(sequences, positions, strict=True)), block_size),
        block_table=_block_table(sequences),
        context_lens=tuple(position + 1 for position in positions),
        query_starts=tuple(range(count + 1)),
        logit_rows=None,
        is_decode=True,
    )


def _slots(places: SequenceOf[tuple[Sequence, int]], block_size: int) -> Tensor:
    numbers = [
        sequence.block_table[position // block_size] * block_size + position % block_size
        for sequence, position in places
    ]
    return torch.tensor(numbers, dtype=torch.int32)


def _block_table(sequences: SequenceOf[Sequence]) -> Tensor:
    width = max(len(sequence.block_table) for sequence in sequences)
    rows = [
        sequence.block_table + [0] * (width - len(sequence.block_table)) for sequence in sequences
    ]
    return torch.tensor(rows, dtype=torch.int32)
