"""Where there is no vLLM, or one that is made otherwise, the plugin does no harm."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from qwen3_ascend.vllm import register


def test_it_is_found_by_its_entry_point() -> None:
    found = entry_points(group="vllm.general_plugins")
    assert [point.load() for point in found if point.name == "qwen3_ascend"] == [register]


def test_a_vllm_that_does_not_take_it_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.qwen3_ascend"):
        register()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not take the plugin" in caplog.text
    assert "No module named 'vllm'" in caplog.text


def test_finding_it_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, qwen3_ascend.vllm; "
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
