"""Runs a converted checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.verify import check_reader
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Progress
from qwen3_ascend.runtime.backends.cache import DEFAULT_BLOCK_SIZE
from qwen3_ascend.runtime.backends.options import DeviceOptions
from qwen3_ascend.runtime.engine.assembly import (
    DEFAULT_MAX_BATCH,
    DEFAULT_STEP_TOKENS,
    EngineLimits,
    make_engine,
)
from qwen3_ascend.runtime.generation import default_params, eos_ids
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.tokenizer import load_tokenizer


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    kv_cache_tokens: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    step_tokens: int = DEFAULT_STEP_TOKENS,
    prefix_cache: bool = True,
    attention: str = "auto",
    graph: bool = True,
    buckets: Sequence[int] | None = None,
    prefetch: str | int = "auto",
    verify: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> LLM:
    """Loads a converted checkpoint.

    Args:
        path: a folder that `qwen3-ascend convert` wrote.
        device: "npu", "cpu", or "auto": an NPU if there is one, else the CPU.
        dtype: of activations: "auto" (bfloat16), "bfloat16" or "float32" (CPU only).
        block_size: tokens of a key/value block.
        kv_cache_tokens: tokens that fit into the key/value cache; default: a full context for each
            sequence of a batch, as far as memory goes (on a CPU, a quarter of what is free).
        max_batch: sequences that decode together.
        step_tokens: tokens of prompts and answers computed in one step.
        prefix_cache: whether prompts that begin alike share what is computed of them.
        attention: NPU only: "fused", "paged" (needs ATB) or "auto".
        graph: NPU only: capture decode steps once and replay them.
        buckets: NPU only: batch sizes to capture; default 1, 2, 4, 8 and every 8th.
        prefetch: NPU only: MLP weights fetched ahead into L2: "off", "auto" or bytes ("64M").
        verify: re-hash every tensor first, on all cores (half a second a gigabyte on one core);
            False still checks everything but the tensors' own bytes.
        progress: called with (what, done, total) while tensors are checked, layers load and graphs
            are captured.

    Returns:
        An LLM that generates; from token ids only if the folder has no tokenizer.

    Raises:
        CheckpointError: naming the file or tensor that is missing, damaged or changed.
        ConfigError: naming the key of generation_config.json that is wrong.
        RequestError: for an argument out of range.
        DeviceError: if an NPU is asked for and something is missing; says what.
    """
    limits = EngineLimits(block_size, kv_cache_tokens, max_batch, step_tokens, prefix_cache)
    options = DeviceOptions(attention, graph, None if buckets is None else tuple(buckets), prefetch)
    folder = Path(path).expanduser()
    reader, tokenizer = CheckpointReader(folder), load_tokenizer(folder)
    params, stops = default_params(folder), eos_ids(folder, tokenizer)
    if verify:
        check_reader(reader, _counted("checking tensors", len(reader.manifest.stored()), progress))
    backend = backends.get(device, dtype, reader.manifest.model, options)
    return LLM(make_engine(reader, backend, limits, progress), tokenizer, stops, params)


def _counted(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    """A callback for bytes that reports how many calls there were."""
    calls = itertools.count(1)
    return lambda nbytes: progress(what, next(calls), total)
