"""From requests to the inputs of one forward pass: prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.request import Request


def prefill_inputs(
    sequence: Request, length: int, block_size: int, all_logits: bool = False
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


def decode_inputs(sequences: Sequence[Request], block_size: int) -> StepInputs:
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


def _slots(places: Sequence[tuple[Request, int]], block_size: int) -> Tensor:
    numbers = [
        sequence.block_table[position // block_size] * block_size + position % block_size
        for sequence, position in places
    ]
    return torch.tensor(numbers, dtype=torch.int32)


def _block_table(sequences: Sequence[Request]) -> Tensor:
    width = max(len(sequence.block_table) for sequence in sequences)
    rows = [
        sequence.block_table + [0] * (width - len(sequence.block_table)) for sequence in sequences
    ]
    return torch.tensor(rows, dtype=torch.int32)
