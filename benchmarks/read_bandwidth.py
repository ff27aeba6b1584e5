"""How fast this machine reads memory: the limit of decoding, which reads every weight once a step.

    python benchmarks/read_bandwidth.py --threads 2

Each thread runs a compiled loop over a part of its own of a buffer that is much larger than any
cache. Two buffers are read, one in ordinary pages, as a mapped file has them, and one in huge ones,
where the system grants any; the faster one counts, and of it the best of several runs, because
other work on the machine only ever takes away.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import random_model
import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")

BUFFER = 1 << 30
"""Bytes; the last caches of processors end at a few hundred MiB for all of their cores."""

UNIT = 256
"""Bytes that the loop reads at a time: a part is a multiple of them."""

Read = Callable[[int, int], object]
"""Reads so many words of 64 bits, from an address on."""


class ReadBandwidth:
    """Measures how fast so many threads read memory."""

    def __init__(self, threads: int) -> None:
        """Compiles the loop and fills the buffers, of BUFFER bytes each.

        Args:
            threads: that read at the same time.
        """
        self._read, self._threads = compiled(), threads
        self._pool = ThreadPoolExecutor(threads)
        kinds = (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE)
        self._buffers = [filled_buffer(advice) for advice in kinds]

    def measure(self, repeat: int = 10) -> float:
        """Bytes a second of the best of `repeat` runs over each buffer."""
        return max(self._once(buffer, BUFFER) for _ in range(repeat) for buffer in self._buffers)

    def sample(self) -> float:
        """Bytes a second of reading a quarter of a buffer once: a few milliseconds of one moment.

        Pages do not matter here: in any moment both kinds are read equally fast."""
        return self._once(self._buffers[-1], BUFFER // 4)

    def _once(self, buffer: Tensor, nbytes: int) -> float:
        part = nbytes // self._threads // UNIT * UNIT
        starts = [buffer.data_ptr() + part * thread for thread in range(self._threads)]
        started = time.perf_counter()
        list(self._pool.map(self._read, starts, [part // buffer.itemsize] * self._threads))
        return part * self._threads / (time.perf_counter() - started)


def compiled() -> Read:
    """The loop of read_bandwidth.c, for this processor.

    Raises:
        SystemExit: if there is no C compiler ($CC, or gcc).
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        words = [*shlex.split(os.environ.get("CC", "gcc")), *flags, str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(words, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise SystemExit(f"the loop that reads memory cannot be compiled: {error}") from error
        function = ctypes.CDLL(str(library)).read_words
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    read: Read = function
    return read


def filled_buffer(advice: int) -> Tensor:
    """BUFFER bytes as int64, each page of them in memory, which an untouched page is not."""
    buffer = mmap.mmap(-1, BUFFER)
    buffer.madvise(advice)
    return torch.frombuffer(buffer, dtype=torch.int64).fill_(1)


def main() -> None:
    """Prints the bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=20)
    chosen = parser.parse_args()
    found = ReadBandwidth(chosen.threads).measure(chosen.repeat)
    print(f"{random_model.processor()}, {chosen.threads} threads: {found / 1e9:.1f} GB/s read")


if __name__ == "__main__":
    main()
