"""`--hub modelscope` with the real modelscope-hub client, against a stand-in for the service."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command_line import Run, program, run
from support.folders import finished_weights
from support.modelscope_server import ModelScopeServer

from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.files.hashing import file_sha256

REPO = "Qwen/Qwen3-Tiny"
FIRST = "model-00001-of-00003.safetensors"

installed = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="the extra is not installed"
)


@pytest.fixture
def service(folder: Path) -> Iterator[ModelScopeServer]:
    with ModelScopeServer(REPO, folder) as server:
        yield server


@pytest.fixture
def ask(
    service: ModelScopeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Runs a command in this process, whose client is told of the service and of a cache."""
    from modelscope_hub import config

    for name, value in service.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(config, "_default_config", None)  # it is made of the environment, once
    return run


MODELSCOPE = ("--hub", "modelscope")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    done = run("convert", REPO, tmp_path / "out", "--hub", "modelscope", "--quiet")
    done.one_line_error("pip install 'qwen3-ascend[modelscope]'")


def test_an_unknown_hub(tmp_path: Path) -> None:
    run("convert", REPO, tmp_path / "out", "--hub", "elsewhere").one_line_error("elsewhere")


@installed
@pytest.mark.parametrize("low_disk", [(), ("--low-disk",)], ids=["cache", "low-disk"])
def test_the_same_bytes_as_from_the_folder(
    service: ModelScopeServer, folder: Path, tmp_path: Path, low_disk: tuple[str, ...]
) -> None:
    out, local = tmp_path / "out", tmp_path / "local"
    service.damage, service.refuse = 1, 1
    environment = service.environment(tmp_path / "cache")
    done = program("convert", REPO, out, *MODELSCOPE, *low_disk, environment=environment)
    assert done.code == 0, done.err
    assert "trying again" in done.err and "SHA-256" in done.err
    assert run("convert", folder, local, "--quiet").code == 0
    assert finished_weights(out) == finished_weights(local)
    ours = Manifest.read(out).source
    assert {name: file.sha256 for name, file in ours.files.items()} == {
        path.name: file_sha256(path) for path in folder.glob("*.safetensors")
    }
    assert (ours.revision or "").startswith("master, files ") and ours.hub == "modelscope"
    assert f"from {REPO} @ {ours.revision}" in done.err.splitlines()
    kept = [path.name for path in (tmp_path / "cache").rglob("model-*.safetensors")]
    assert len(kept) == (0 if low_disk else 3)


@installed
def test_against_the_model_on_its_own_hub(
    ask: Callable[..., Run], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert ask("convert", REPO, out, *MODELSCOPE, "--quiet").code == 0
    done = ask("verify", out, "--against", REPO)
    assert done.code == 0, done.err
    added = folder / "added.txt"
    added.write_text("the branch has moved")
    try:
        again = ask("verify", out, "--against", REPO, "--quiet")
    finally:
        added.unlink()
    again.one_line_error(REPO, "has changed")


@installed
def test_errors_are_one_line(service: ModelScopeServer, tmp_path: Path) -> None:
    """As a program: that the client draws no bars is settled before it is imported."""
    service.damage = 99
    environment = service.environment(tmp_path / "cache")
    command = ("convert", REPO, tmp_path / "out", *MODELSCOPE, "--quiet")
    done = program(*command, environment=environment)
    done.one_line_error("came damaged 3 times", "SHA-256")
    service.repo = "Qwen/Other"
    program(*command, environment=environment).one_line_error("ModelScope has no", REPO)
