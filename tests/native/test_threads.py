"""Kernels take no more threads than a container's quota of processors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3_ascend.native import threads
from qwen3_ascend.native.threads import kernel_threads, processor_quota


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", None), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1),
     ("0 100000", None), ("5 0", None), ("nonsense", None)],
)  # fmt: skip
def test_quotas_of_version_2(tmp_path: Path, text: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    assert processor_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("350000", 4)])
def test_quotas_of_version_1(tmp_path: Path, quota: str, expected: int | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert processor_quota(tmp_path) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert processor_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 5), (3, 3), (8, 5)])
def test_threads_of_kernels(
    monkeypatch: pytest.MonkeyPatch, quota: int | None, expected: int
) -> None:
    monkeypatch.setattr(threads, "processor_quota", lambda: quota)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert kernel_threads() == expected
    finally:
        torch.set_num_threads(before)
