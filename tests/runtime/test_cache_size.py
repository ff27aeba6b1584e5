"""The cache's default size on a CPU comes from what can really be taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3_ascend.files import memory
from qwen3_ascend.runtime.backends.reference import UNKNOWN_MEMORY, ReferenceBackend
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """32 GiB of which 2 are untouched and 24 can be had, because 22 are page cache."""
    meminfo = {"MemTotal": 32, "MemFree": 2, "MemAvailable": 24, "Cached": 22}
    lines = [f"{name}: {gib * GIB // 1024} kB" for name, gib in meminfo.items()]
    (tmp_path / "meminfo").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def contain(folder: Path, limit: int | str, used: int, page_cache: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile {page_cache}\n")


def share() -> int:
    return ReferenceBackend(SMALL_CONFIG, torch.float32).memory_for_cache()


def test_page_cache_can_be_taken(machine: Path) -> None:
    assert share() == 6 * GIB


def test_a_container_has_less(machine: Path) -> None:
    contain(machine, limit=8 * GIB, used=7 * GIB, page_cache=3 * GIB)
    assert share() == 1 * GIB
    contain(machine, limit="max", used=7 * GIB, page_cache=3 * GIB)
    assert share() == 6 * GIB


def test_a_machine_that_does_not_say(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert share() == UNKNOWN_MEMORY // 4


def test_a_full_container_leaves_room_for_a_token(machine: Path, tiny_w8a8: Path) -> None:
    from qwen3_ascend import load

    contain(machine, limit=GIB, used=GIB, page_cache=0)
    assert share() == 0
    assert load(tiny_w8a8, device="cpu").config.num_layers == 4
