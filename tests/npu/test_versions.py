"""What to install: the wheel follows from torch and from the CANN that is found."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu import device, versions


@pytest.mark.parametrize(
    ("version", "base"),
    [
        ("2.10.0.post4", "2.10.0"),
        ("2.10.0+git1a2b3c4", "2.10.0"),
        ("2.10.0.dev20260101", "2.10.0"),
        ("2.10.0rc1", "2.10.0"),
        ("2.9.0", "2.9.0"),
    ],
)
def test_the_release_of_a_version(version: str, base: str) -> None:
    assert versions.base_version(version) == base


@pytest.mark.parametrize(
    ("torch_version", "cann", "wheel"),
    [
        ("2.10.0+cpu", "9.1.0", "2.10.0.post4"),
        ("2.10.0", "9.0.1", "2.10.0.post2"),
        ("2.9.0", "9.1.0", "2.9.0.post6"),
        ("2.9.0", "8.5.0", "2.9.0"),
        ("2.8.0", "8.3.RC1", "2.8.0"),
        ("2.7.1", "8.5.0", "2.7.1.post2"),
    ],
)
def test_the_wheel_for_a_torch_and_a_cann(torch_version: str, cann: str, wheel: str) -> None:
    assert versions.advice(torch_version, cann).endswith(f"torch_npu=={wheel}")


def test_advice_where_nothing_was_published() -> None:
    unpaired = versions.advice("2.10.0", "8.3.RC1")
    assert "for torch 2.10.0 is published for CANN 8.3 (2.8.0, 2.7.1, 2.6.0.post3)" in unpaired
    assert "published for any CANN" in versions.advice("2.13.0", None)
    unknown = versions.advice("2.9.0", None)
    assert unknown == (
        "pip install --no-deps torch_npu==2.9.0.post6 for CANN 9.1; or ==2.9.0.post2 for CANN 9.0; "
        "or ==2.9.0 for CANN 8.5"
    )


def test_the_page_and_the_table_say_the_same() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "ascend.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+\.\d) \| ([^|]+) \|", page, re.MULTILINE))
    said = {cann: tuple(re.findall(r"[\d.]+(?:post\d+)?", row)) for cann, row in rows.items()}
    assert said == {
        cann: wheels for cann, wheels in versions.PUBLISHED if cann >= versions.OLDEST_CANN
    }


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("aarch64-linux/ascend_toolkit_install.info",
         "package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001\n", "8.3.RC1"),
        ("version.cfg",
         "# version: 1.0\nruntime_running_version=[7.8.0.0.201:8.5.0]\n", "8.5.0"),
    ],
)  # fmt: skip
def test_the_cann_that_is_set_up(
    file: str, text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in versions.CANN_HOMES:
        monkeypatch.delenv(name, raising=False)
    assert versions.installed_cann() is None
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert versions.installed_cann() == version


@pytest.mark.parametrize("version", ["{}.post9", "{}+git1a2b3c4", "{}.dev1"])
def test_builds_of_the_same_release_fit(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = versions.base_version(torch.__version__)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version.format(base))
    assert device.import_torch_npu()


def test_a_wheel_of_another_torch_is_answered_with_the_one_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.9.0.post2")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    monkeypatch.setattr(device, "installed_cann", lambda: "9.1.0")
    message = (
        "torch_npu 2.9.0.post2 does not fit torch 2.10.0.cpu; for CANN 9.1: "
        "pip install --no-deps torch_npu==2.10.0.post4$"
    )
    with pytest.raises(DeviceError, match=message):
        device.import_torch_npu()
