"""The host's part of loading onto an NPU, against a plain read of the same file.

    PYTHONPATH=tests TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-sim/bin/python benchmarks/loading.py

Weights of one file in FRACTAL_NZ go to the simulated device as `load` sends them: mapped pages into
pinned buffers on two threads, then asynchronous copies. The simulated device is memory of this
machine, so its own copy, one more pass over the bytes, is in the time; on a card the card does it.
A plain read fills one buffer from the same file, with the pages in the cache.

Then a checkpoint in the shapes of Qwen3-0.6B with --layers layers is loaded whole: believed, hashed
as `load` does, a little ahead of the copies, and hashed first as a whole. Best of --repeat runs,
the ways in turn. Real torch_npu on a simulated device: nothing here tells what a card does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ascend_sim

os.environ.setdefault("ASCEND_SIM_POISON", "0")  # its time is no part of ours
ascend_sim.install()

import random_model
import torch
import torch_npu
from safetensors.torch import save_file

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.checkpoint.checked import CheckedWeights
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.checkpoint.verify import changed_tensors, total_bytes
from qwen3_ascend.files.safetensors import MappedFile
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.npu.capabilities import probe
from qwen3_ascend.runtime.backends.npu.device import open_device
from qwen3_ascend.runtime.backends.npu.formats import upload_packed
from qwen3_ascend.runtime.backends.npu.transfers import Transfers
from qwen3_ascend.runtime.model.loader import WeightSource, load_model
from qwen3_ascend.runtime.options import DeviceOptions

SHAPE = (6144, 4096)
COUNT = 16


def fastest(work: Callable[[], None], repeat: int) -> float:
    """Seconds of the best of several runs."""
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Prints every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=14)
    chosen = parser.parse_args()
    open_device()
    print(random_model.processor())
    compare_with_reading(chosen.repeat)
    compare_ways_of_checking(chosen.repeat, chosen.layers)


def compare_with_reading(repeat: int) -> None:
    """Prints the rate of a plain read and of loading, and their ratio."""
    layout = ASCEND_A2_A3.layouts["w8a8"]
    packed = layout.pack(torch.ones(SHAPE, dtype=torch.int8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({str(number): packed.clone() for number in range(COUNT)}, path)
        nbytes, buffer = path.stat().st_size, bytearray(path.stat().st_size)

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                file.readinto(buffer)

        def load() -> None:
            mapped, transfers = MappedFile(path), Transfers()
            loaded = [
                upload_packed(mapped.tensor(str(number)), layout, *SHAPE, transfers.copy)
                for number in range(COUNT)
            ]
            transfers.finish()
            assert len(loaded) == COUNT

        reading, loading = fastest(read, repeat), fastest(load, repeat)
    rate = nbytes / 1e9
    print(f"{rate:.2f} GB in {COUNT} tensors of int8")
    print(f"plain read {reading:.3f} s, {rate / reading:.2f} GB/s")
    print(f"loading    {loading:.3f} s, {rate / loading:.2f} GB/s, {reading / loading:.2f}x")


def compare_ways_of_checking(repeat: int, layers: int) -> None:
    """Prints how long loading takes, by how the weights are checked."""
    with tempfile.TemporaryDirectory() as folder:
        source = random_model.ensure(Path(folder) / "source", random_model.config("0.6b", layers))
        convert_checkpoint(source, Path(folder) / "out")
        reader = CheckpointReader(Path(folder) / "out")

        def put(source: WeightSource) -> None:
            backend = NpuBackend(reader.config, DeviceOptions("npu"), capabilities)
            load_model(source, backend)
            torch_npu.npu.synchronize()

        def ahead() -> None:
            with CheckedWeights(reader) as weights:
                put(weights)

        def first() -> None:
            assert not changed_tensors(reader, lambda nbytes: None, None)
            put(reader)

        capabilities = probe(reader.config)
        ways = {"believed": lambda: put(reader), "hashed ahead": ahead, "hashed first": first}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            for name, way in ways.items():
                seconds[name].append(fastest(way, 1))
        rate = total_bytes(reader.manifest) / 1e9
    print(f"{rate:.2f} GB in a checkpoint of {layers} layers")
    for name, times in seconds.items():
        best, base = min(times), min(seconds["believed"])
        print(f"{name:12} {best:.3f} s, {rate / best:.2f} GB/s, {best / base:.2f}x")


if __name__ == "__main__":
    main()
