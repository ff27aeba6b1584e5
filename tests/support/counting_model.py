"""A model of whole numbers for tests of the engine: the next token is a hash of all tokens so far.

It reads them from a paged cache that it writes itself, slot by slot, as attention does. So a wrong
block, slot, position or length changes what it says, and so does a block that was given away too
early.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3_ascend.checkpoint.config import Qwen3Config, RopeConfig
from qwen3_ascend.runtime.backends.step import StepInputs
from qwen3_ascend.runtime.engine.blocks import BlockPool
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.engine.scheduler import Scheduler

VOCABULARY = 37

CONFIG = Qwen3Config(
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=VOCABULARY,
    max_position=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_bias=False,
    rope=RopeConfig("default", 1e4),
)


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after these tokens."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCABULARY


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the model says after a prompt, computed without any engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class CountingModel:
    """The forward pass, which counts the rows that it has computed."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._cache: dict[int, tuple[int, int]] = {}
        self.rows = 0

    def __call__(self, step: StepInputs) -> Tensor:
        """Logits [R, vocab]: 1 at the next token, 0 elsewhere."""
        self.rows += len(step.tokens)
        step.fill_in(step.tokens)
        for slot, token, position in zip(
            step.slots.tolist(), step.tokens.tolist(), step.positions.tolist(), strict=True
        ):
            self._cache[slot] = (position, token)
        rows = []
        for index, length in enumerate(step.context_lens):
            first, last = step.query_starts[index], step.query_starts[index + 1]
            seen = self._context(step.block_table[index].tolist(), length)
            for row in range(first, last):
                rows.append(next_token(seen[: length - (last - 1 - row)]))
        if step.logit_rows is not None:
            rows = [rows[row] for row in step.logit_rows.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(rows), VOCABULARY).float()

    def _context(self, table: list[int], length: int) -> list[int]:
        found = []
        for position in range(length):
            slot = table[position // self._block_size] * self._block_size
            at, token = self._cache[slot + position % self._block_size]
            assert at == position, "the slot holds another position"
            found.append(token)
        return found


def counting_engine(
    blocks: int,
    block_size: int,
    *,
    max_batch: int = 16,
    step_tokens: int = 64,
    prefix_cache: bool = True,
    runs_ahead: bool = False,
) -> tuple[Engine, CountingModel]:
    """An engine over `blocks` usable blocks, and its model."""
    model = CountingModel(block_size)
    pool = BlockPool(blocks + 1, block_size, prefix_cache)
    scheduler = Scheduler(pool, max_batch, step_tokens)
    return Engine(CONFIG, model, scheduler, block_size, runs_ahead=runs_ahead), model
