"""How the shared library is found, refused, and told which processor path to take."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_ascend import native
from qwen3_ascend.native import library

needs_library = pytest.mark.skipif(not library.LIBRARY.exists(), reason="not compiled")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller's environment forces, these tests start from the defaults."""
    monkeypatch.delenv("QWEN3_ASCEND_CPU", raising=False)
    monkeypatch.delenv("QWEN3_ASCEND_NATIVE", raising=False)


@needs_library
def test_best_path_is_taken_and_one_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    best = library.open_library().path_name
    assert best == [name for name in library.PATHS if native.load(name)][-1]
    monkeypatch.setenv("QWEN3_ASCEND_CPU", "baseline")
    assert native.describe() == "native kernels, baseline path"
    assert library.open_library(best).path_name == best  # the argument wins


def test_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_ASCEND_NATIVE", "0")
    assert native.load() is None
    assert native.describe() == "torch kernels (switched off by QWEN3_ASCEND_NATIVE=0)"


def test_unknown_path_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_ASCEND_CPU", "mmx")
    with pytest.raises(ValueError, match="unknown processor path 'mmx'"):
        native.load()


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_missing_or_broken_library_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "_kernels.so"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(library, "LIBRARY", file)
    assert native.load() is None
    reason = "not compiled" if content is None else "does not load"
    assert reason in native.describe()


@needs_library
def test_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI", -1)
    assert "build it again" in native.describe()
