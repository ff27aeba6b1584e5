"""Runs a converted checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from typing_extensions import Unpack

from qwen3_ascend.checkpoint.background import BackgroundCheck
from qwen3_ascend.checkpoint.checked import CheckedWeights
from qwen3_ascend.checkpoint.companions import CONFIG_NAME
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError, os_errors
from qwen3_ascend.files.hashing import file_blake3
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.options import share
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Progress
from qwen3_ascend.runtime.engine.assembly import make_engine
from qwen3_ascend.runtime.generation import default_params, eos_ids
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions, LoadOptions
from qwen3_ascend.runtime.tokenizer import Tokenizer, load_tokenizer


def load(
    path: str | Path,
    device: str = DeviceOptions.device,
    dtype: str = DeviceOptions.dtype,
    *,
    verify: bool = True,
    progress: Progress = lambda what, done, total: None,
    read_tokenizer: Callable[[Path], Tokenizer] = load_tokenizer,
    **options: Unpack[LoadOptions],
) -> LLM:
    """Loads a converted checkpoint.

    Args:
        path: a folder that `qwen3-ascend convert` wrote.
        device: "npu", "cpu", or "auto": an NPU if there is one, else the CPU.
        dtype: type of activations: "auto" (bfloat16), "bfloat16" or "float32" (CPU only).
        verify: hash every small file first, and every tensor. On an NPU a tensor is hashed just
            before it is copied, on all cores. On a CPU, which uses tensors where they lie, they are
            hashed beside the work: `load` and the first tokens do not wait for it, but no answer
            ends before all are hashed. False takes small files that were edited or added as they
            are, and believes the tensors.
        progress: called with (what, done, total) while layers load and graphs are captured.
        read_tokenizer: gives the tokenizer of the folder, for whoever has one already.
        options: the fields of EngineOptions and DeviceOptions (runtime/options.py), which say what
            each is for: block_size, kv_cache_tokens, max_batch, step_tokens, prefix_cache;
            kv_cache_dtype, attention, graph, buckets, prefetch.

    Returns:
        An LLM that generates; from token ids only if the folder has no tokenizer.

    Raises:
        OptionError: for an option that does not exist or whose value is not taken; before anything
            is read.
        CheckpointError: naming the file or tensor that is missing, damaged or changed. On a CPU a
            changed tensor may be named later, by whatever the LLM is asked to do.
        ConfigError: naming the key of generation_config.json that is wrong.
        DeviceError: if an NPU is asked for and something is missing; says what.
    """
    for_engine, for_device = share(options, EngineOptions, DeviceOptions)
    engine_options = EngineOptions(**for_engine)
    device_options = DeviceOptions(device, dtype, **for_device)
    folder = user_path(path)
    with os_errors(CheckpointError):
        reader = CheckpointReader(folder, check_files=verify)
    if not verify:
        _warn_of_config(reader)
    backend = backends.get(reader.manifest.model, device_options)
    check = BackgroundCheck(reader) if verify and backend.in_place else None
    with os_errors(CheckpointError):
        tokenizer = read_tokenizer(folder)
        params, stops = default_params(folder), eos_ids(folder, tokenizer)
        with _weights(reader, verify and check is None) as weights:
            engine = make_engine(weights, backend, engine_options, progress)
    if check is not None:
        check.poll()
    return LLM(engine, tokenizer, stops, params, check)


def _weights(
    reader: CheckpointReader, first: bool
) -> AbstractContextManager[CheckedWeights] | AbstractContextManager[CheckpointReader]:
    """What the weights are taken from: those that are checked first, or the files as they are."""
    return CheckedWeights(reader) if first else nullcontext(reader)


def _warn_of_config(reader: CheckpointReader) -> None:
    """An edited config.json has no effect before it is accepted: the manifest's model counts."""
    entry, path = reader.manifest.files.get(CONFIG_NAME), reader.folder / CONFIG_NAME
    if entry is not None and path.is_file() and file_blake3(path) != entry.blake3:
        line = f"{path} was edited, which has no effect on the model; {reader.way_out}"
        warnings.warn(line, stacklevel=3)  # who called load
