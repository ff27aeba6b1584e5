"""The host's part of loading onto an NPU, against a plain read of the same file.

    PYTHONPATH=tests TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-sim/bin/python benchmarks/loading.py

Weights of one file in FRACTAL_NZ go to the simulated device as `load` sends them: mapped pages into
pinned buffers on two threads, then asynchronous copies. The simulated device is memory of this
machine, so its own copy, one more pass over the bytes, is in the time; on a card the card does it.
A plain read fills one buffer from the same file, with the pages in the cache. Best of --repeat
runs. Real torch_npu on a simulated device: nothing here tells what a card does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ascend_sim

ascend_sim.install()

import random_model
import torch
from safetensors.torch import save_file

from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.files.safetensors import MappedFile
from qwen3_ascend.runtime.backends.npu.device import open_device
from qwen3_ascend.runtime.backends.npu.formats import upload_packed
from qwen3_ascend.runtime.backends.npu.transfers import Transfers

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
    """Measures both and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    open_device()
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
    print(f"{random_model.processor()}: {rate:.2f} GB in {COUNT} tensors of int8")
    print(f"plain read {reading:.3f} s, {rate / reading:.2f} GB/s")
    print(f"loading    {loading:.3f} s, {rate / loading:.2f} GB/s, {reading / loading:.2f}x")


if __name__ == "__main__":
    main()
