"""Runs a converted checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen3_ascend.checkpoint.errors import ConfigError, RequestError
from qwen3_ascend.checkpoint.files import CheckpointReader
from qwen3_ascend.checkpoint.model import Qwen3Config, read_json_object
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Backend, CacheShape
from qwen3_ascend.runtime.backends.options import DeviceOptions
from qwen3_ascend.runtime.engine import Engine
from qwen3_ascend.runtime.llm import LLM, AnswerStream, Completion
from qwen3_ascend.runtime.loader import load_model
from qwen3_ascend.runtime.paged_kv import (
    DEFAULT_BLOCK_SIZE,
    BlockAllocator,
    PagedKVCache,
    bytes_per_token,
)
from qwen3_ascend.runtime.scheduler import Scheduler
from qwen3_ascend.runtime.sequence import SamplingParams
from qwen3_ascend.runtime.tokenizer import Tokenizer, eos_ids

DEFAULT_MAX_BATCH = 16
DEFAULT_PREFILL_CHUNK = 2048

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

GENERATION_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Keys of generation_config.json that have the same name and meaning in SamplingParams."""


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    kv_cache_tokens: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    attention: str = "auto",
    graph: bool = True,
    buckets: Sequence[int] | None = None,
    prefetch: str | int = "auto",
    progress: Progress = lambda what, done, total: None,
) -> LLM:
    """Loads a converted checkpoint.

    Args:
        path: a folder that `qwen3-ascend convert` wrote.
        device: "npu", "cpu", or "auto": an NPU if there is one, else the CPU.
        dtype: of activations: "auto" (bfloat16), "bfloat16" or "float32" (CPU only).
        block_size: tokens of a key/value block.
        kv_cache_tokens: tokens that fit into the key/value cache; default: a full context for each
            sequence of a batch, as far as a quarter of the free memory goes.
        max_batch: sequences that decode together.
        prefill_chunk: prompt tokens computed in one step.
        attention: NPU only: "fused", "paged" (needs ATB) or "auto".
        graph: NPU only: capture decode steps once and replay them.
        buckets: NPU only: batch sizes to capture; default 1, 2, 4, 8 and every 8th.
        prefetch: NPU only: MLP weights fetched ahead into L2: "off", "auto" or bytes ("64M").
        progress: called with (what, done, total) while layers load and graphs are captured.

    Returns:
        An LLM that generates.

    Raises:
        CheckpointError: naming the file or tensor that is missing or damaged.
        RequestError: for an argument out of range.
        DeviceError: if an NPU is asked for and something is missing; says what.
    """
    for name, value in {
        "block_size": block_size,
        "max_batch": max_batch,
        "prefill_chunk": prefill_chunk,
        "kv_cache_tokens": 1 if kv_cache_tokens is None else kv_cache_tokens,
    }.items():
        if value < 1:
            raise RequestError(f"{name} must be 1 or more, not {value}")
    folder = Path(path).expanduser()
    reader, tokenizer = CheckpointReader(folder), Tokenizer(folder)
    options = DeviceOptions(attention, graph, None if buckets is None else tuple(buckets), prefetch)
    backend = backends.get(device, dtype, reader.manifest.model, options)
    model = load_model(reader, backend, progress)
    tokens = kv_cache_tokens or _default_cache_tokens(model.config, backend, max_batch)
    allocator = BlockAllocator(-(-tokens // block_size) + 1, block_size)
    cache = PagedKVCache.allocate(
        model.config, allocator.num_blocks, block_size, backend.device, backend.dtype
    )
    with torch.inference_mode():
        forward = backend.runner(
            functools.partial(model.forward, cache=cache),
            CacheShape(max_batch, block_size),
            progress,
        )
    scheduler = Scheduler(allocator, max_batch, prefill_chunk)
    engine = Engine(model.config, forward, scheduler, block_size)
    return LLM(engine, tokenizer, eos_ids(folder, tokenizer), default_params(folder))


def default_params(folder: Path) -> SamplingParams:
    """What a checkpoint's generation_config.json asks for; greedy if it does not sample."""
    path = folder / "generation_config.json"
    data: dict[str, Any] = read_json_object(path) if path.is_file() else {}
    if not data.get("do_sample"):
        return SamplingParams()
    asked = {key: data[key] for key in GENERATION_KEYS if data.get(key) is not None}
    try:
        return dataclasses.replace(SamplingParams(), **{"temperature": 1.0, **asked})
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _default_cache_tokens(config: Qwen3Config, backend: Backend, max_batch: int) -> int:
    affordable = backend.memory_for_cache() // bytes_per_token(config, backend.dtype)
    return max(1, min(max_batch * config.context_length, affordable))


__all__ = ["LLM", "AnswerStream", "Completion", "SamplingParams", "load"]
