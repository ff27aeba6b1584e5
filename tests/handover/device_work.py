"""What the simulated device does for an engine, asked of its workers or written by them."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ascend_sim
import torch
from ascend_sim import TraceEntry, trace


def record(folder: str) -> None:
    """From now on every load of a model by vLLM writes `folder`/loading-RANK.json."""
    from vllm.distributed import get_world_group
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    record_with(BaseModelLoader, Path(folder), lambda: int(get_world_group().rank))


def record_with(
    loader_class: Any, folder: Path, rank: Callable[[], int], weights: bool = False
) -> None:
    """The same for an engine whose loaders derive from `loader_class`. With `weights`, what the
    device then holds is written too, as `folder`/weights-RANK.pt."""
    load_model = loader_class.load_model
    if load_model.__module__ == __name__:
        return

    def recorded(loader: Any, *args: Any, **named: Any) -> torch.nn.Module:
        torch.npu.empty_cache()
        ascend_sim.reset_trace()
        ascend_sim.reset_peak()
        torch.npu.reset_peak_memory_stats()
        allocated, started = torch.npu.memory_allocated(), time.perf_counter()
        model: torch.nn.Module = load_model(loader, *args, **named)
        torch.npu.synchronize()
        report = {
            "loader": type(loader).__name__,
            "model": f"{type(model).__module__}.{type(model).__name__}",
            "seconds": round(time.perf_counter() - started, 3),
            "allocated_bytes": torch.npu.memory_allocated() - allocated,
            "peak_allocated_bytes": torch.npu.max_memory_allocated() - allocated,
            "peak_device_bytes": ascend_sim.memory_statistics().peak,
            **work(trace.read()),
            "parameters": parameters(model, trace.copies("host_to_device")),
        }
        (folder / f"loading-{rank()}.json").write_text(json.dumps(report, indent=1))
        if weights:
            stored = {name: tensor.detach().cpu() for name, tensor in _on_device(model)}
            torch.save(stored, folder / f"weights-{rank()}.pt")
        return model

    loader_class.load_model = recorded


def work(entries: list[TraceEntry]) -> dict[str, object]:
    """What the device did: copies, casts, and every kernel by name."""
    uploads = trace.copies("host_to_device", entries)
    return {
        "format_casts": len(trace.format_casts(entries)),
        "host_to_device_copies": len(uploads),
        "host_to_device_bytes": sum(each.bytes for each in uploads),
        "device_to_device_copies": len(trace.copies("device_to_device", entries)),
        "hidden_copies": trace.hidden_copies(entries),
        "launches": dict(Counter(each.name for each in trace.launches(entries))),
        "collectives": dict(Counter(each.name for each in trace.collectives(entries))),
        "replays": len(trace.replays(entries)),
        "fallbacks": [each.name for each in trace.fallbacks(entries)],
    }


def forget(_worker: object) -> None:
    """Empties the trace of the worker that runs it."""
    torch.npu.synchronize()
    ascend_sim.reset_trace()


def report(_worker: object) -> dict[str, object]:
    """What the device of the worker that runs it did since."""
    torch.npu.synchronize()
    return work(trace.read())


def parameters(model: torch.nn.Module, uploads: Iterable[TraceEntry]) -> dict[str, object]:
    """By name: how a parameter is stored, and what was copied from the host straight into it."""
    copied = _by_storage(model, uploads)
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "format": _format(tensor),
            "stored_bytes": tensor.untyped_storage().nbytes(),
            "copied_bytes": sum(each.bytes for each in copied[tensor.data_ptr()]),
            "copies": len(copied[tensor.data_ptr()]),
        }
        for name, tensor in _on_device(model)
    }


def _on_device(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    named = model.named_parameters()
    return ((name, tensor) for name, tensor in named if tensor.device.type == "npu")


def _by_storage(
    model: torch.nn.Module, uploads: Iterable[TraceEntry]
) -> dict[int, list[TraceEntry]]:
    found: dict[int, list[TraceEntry]] = defaultdict(list)
    uploads = list(uploads)
    for _, tensor in _on_device(model):
        storage = tensor.untyped_storage()
        place = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
        found[tensor.data_ptr()] = [each for each in uploads if each.destination in place]
    return found


def _format(tensor: torch.Tensor) -> int:
    import torch_npu

    return int(torch_npu.get_npu_format(tensor)) if tensor.numel() else 2
