"""How benchmarks/startup.py follows a process to its first token, and what it makes of it."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
import startup
import torch
from process_memory import MAPPED, PRIVATE, status
from startup import Start
from transformers import AutoModelForCausalLM

MIB = 2**20

STAGES = """
import sys, time
print("imports", 5, flush=True)
held = b"x" * (64 << 20)
time.sleep(0.05)
print("token", 7, flush=True)
sys.stdin.read()
"""


def test_memory_without_a_file_behind_it_is_private_and_that_of_a_file_is_mapped(
    tmp_path: Path,
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(32 * MIB))
    before = status(os.getpid())
    held = bytearray(os.urandom(1)) * (64 * MIB)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        after = status(os.getpid())
    assert len(held) == 64 * MIB
    assert 60 * MIB < after[PRIVATE] - before[PRIVATE] < 80 * MIB
    assert 30 * MIB < after[MAPPED] - before[MAPPED] < 40 * MIB


def test_a_process_is_followed_through_its_stages() -> None:
    found = startup.start([sys.executable, "-c", STAGES])
    assert list(found.stages) == ["imports", "token"]
    assert found.stages["token"] - found.stages["imports"] >= 0.05
    assert (found.token, found.imported) == (7, 5)
    assert 64 * MIB < found.private < 128 * MIB


def test_a_process_that_ends_before_its_token_is_named() -> None:
    with pytest.raises(SystemExit, match="ended before its first token"):
        startup.start([sys.executable, "-c", "print('imports', 5)"])


def test_our_process_says_each_stage_and_the_token_of_transformers(
    tiny_bf16: Path, tiny_source: Path
) -> None:
    found = startup.start([sys.executable, str(startup.OURS), str(tiny_bf16), "1", "10"])
    model = AutoModelForCausalLM.from_pretrained(tiny_source, dtype=torch.bfloat16)
    expected = model(torch.arange(1000, 1010)[None]).logits[0, -1].argmax()
    assert found.token == expected
    assert list(found.stages) == ["python", "torch", startup.IMPORTED, "load", startup.TOKEN]
    assert 0 < found.imported <= found.private
    assert found.mapped > 0


def test_the_quickest_start_counts_and_the_most_memory() -> None:
    slow = Start({"imports": 1.0, "token": 3.0}, 4, 10, 400, 30)
    fast = Start({"imports": 1.5, "token": 2.0}, 5, 20, 300, 40)
    assert startup.best([slow, fast]) == Start(fast.stages, 5, 20, 400, 40)


def test_the_table_tells_apart_what_imports_take() -> None:
    ours = Start({"torch": 1.0, "imports": 1.5, "token": 2.0}, 71, 100 * MIB, 150 * MIB, 900 * MIB)
    theirs = Start({"token": 0.5}, 72, 0, 20 * MIB, 1000 * MIB)
    stored = {"ours": 1000 * MIB, "llama.cpp": 1000 * MIB}
    _, _, *rows = startup.table({"ours": ours, "llama.cpp": theirs}, stored)
    assert rows == [
        "| ours | 2.00 s | 0.50 s | torch 1.00, imports 0.50, token 0.50 | 150 MiB | 50 MiB "
        "| 5.0 % | 900 MiB | 71 |",
        "| llama.cpp | 0.50 s | 0.50 s | token 0.50 | 20 MiB | 20 MiB | 2.0 % | 1000 MiB | 72 |",
    ]
