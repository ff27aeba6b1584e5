"""Putting weights, backend, cache and scheduler together into an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.runtime.backends.base import Backend, Cache, Forward, Progress, StepBounds
from qwen3_ascend.runtime.engine.blocks import BlockPool
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.engine.scheduler import Scheduler
from qwen3_ascend.runtime.model.loader import WeightSource, load_model
from qwen3_ascend.runtime.model.qwen3 import Qwen3
from qwen3_ascend.runtime.options import EngineOptions

Watch = Callable[[Forward], Forward]


def make_engine(
    source: WeightSource, backend: Backend[Cache], options: EngineOptions, progress: Progress
) -> Engine:
    """Loads the weights, allocates the cache with what memory is left, and captures graphs."""
    return assemble(load_model(source, backend, progress), options, progress)


def assemble(
    model: Qwen3[Cache],
    options: EngineOptions,
    progress: Progress = lambda what, done, total: None,
    watch: Watch = lambda forward: forward,
) -> Engine:
    """An engine around a model that is on its device.

    Args:
        model: with the backend that computes it.
        options: sizes.
        progress: is told of captured graphs.
        watch: is given each step's forward, and gives what is called in its place.
    """
    config, backend, block_size = model.config, model.backend, options.block_size
    tokens = options.kv_cache_tokens or _affordable_tokens(config, backend, options.max_batch)
    pool = BlockPool(-(-tokens // block_size) + 1, block_size, options.prefix_cache)
    bounds = StepBounds(options.max_batch, block_size, pool.num_blocks)
    caches = backend.allocate_cache(bounds)
    forward = functools.partial(model.forward, caches=caches)
    with torch.inference_mode():
        runner = backend.runner(forward, bounds, progress)
    scheduler = Scheduler(pool, options.max_batch, options.step_tokens)
    return Engine(
        config, watch(runner), scheduler, block_size, backend.download,
        most_probable=backend.most_probable, runs_ahead=backend.runs_ahead,
    )  # fmt: skip


def _affordable_tokens(config: Qwen3Config, backend: Backend[Cache], max_batch: int) -> int:
    affordable = backend.memory_for_cache() // backend.cache_bytes_per_token()
    return max(1, min(max_batch * config.context_length, affordable))
