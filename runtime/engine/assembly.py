"""Putting weights, backend, cache and scheduler together into an engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.backends.base import Backend, Cache, Progress, StepBounds
from qwen3_ascend.runtime.backends.cache import DEFAULT_BLOCK_SIZE
from qwen3_ascend.runtime.engine.blocks import BlockPool
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.engine.scheduler import Scheduler
from qwen3_ascend.runtime.model.loader import WeightSource, load_model

DEFAULT_MAX_BATCH = 16
DEFAULT_STEP_TOKENS = 2048


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of an engine.

    Attributes:
        block_size: tokens of a key/value block.
        kv_cache_tokens: tokens that fit into the key/value cache; None: a full context for each
            sequence of a batch, as far as the backend's memory goes.
        max_batch: sequences that decode together.
        step_tokens: tokens of prompts and answers computed in one step.
        prefix_cache: whether prompts that begin alike share what is computed of them.

    Raises:
        RequestError: on construction, for a value below 1.
    """

    block_size: int = DEFAULT_BLOCK_SIZE
    kv_cache_tokens: int | None = None
    max_batch: int = DEFAULT_MAX_BATCH
    step_tokens: int = DEFAULT_STEP_TOKENS
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value is not False and value < 1:
                raise RequestError(f"{name} must be 1 or more, not {value}")


def make_engine(
    source: WeightSource, backend: Backend[Cache], limits: EngineLimits, progress: Progress
) -> Engine:
    """Loads the weights, allocates the cache with what memory is left, and captures graphs."""
    model = load_model(source, backend, progress)
    config, block_size = model.config, limits.block_size
    tokens = limits.kv_cache_tokens or _affordable_tokens(config, backend, limits.max_batch)
    pool = BlockPool(-(-tokens // block_size) + 1, block_size, limits.prefix_cache)
    caches = backend.allocate_cache(pool.num_blocks, block_size)
    forward = functools.partial(model.forward, caches=caches)
    with torch.inference_mode():
        runner = backend.runner(forward, StepBounds(limits.max_batch, block_size), progress)
    scheduler = Scheduler(pool, limits.max_batch, limits.step_tokens)
    return Engine(config, runner, scheduler, block_size)


def _affordable_tokens(config: Qwen3Config, backend: Backend[Cache], max_batch: int) -> int:
    affordable = backend.memory_for_cache() // backend.cache_bytes_per_token()
    return max(1, min(max_batch * config.context_length, affordable))
