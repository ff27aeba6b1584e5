"""Weights that are used while they are hashed: every changed byte is found, by whoever waits."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny_models
from support.folders import flip

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.background import BackgroundCheck
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.safetensors import read_header


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, of random weights; who damages it mends it."""
    root = tmp_path_factory.mktemp("background")
    source = tiny_models.write(root / "source", tiny_models.config(attention_bias=True))
    convert_checkpoint(source, root / "out", "w8a8", ConvertOptions(max_file_bytes=50_000))
    return root / "out"


class Watched(CheckpointReader):
    """Notes which tensors are hashed, and tells before each."""

    def __init__(self, folder: Path, before: Callable[[str], None] = lambda name: None) -> None:
        super().__init__(folder)
        self.hashed: list[str] = []
        self._before = before

    def blake3(self, name: str, file: str) -> str:
        self._before(name)
        self.hashed.append(name)
        return super().blake3(name, file)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_byte_of_any_tensor_is_found(folder: Path, threads: int) -> None:
    places = [
        (name, path, at)
        for path in sorted(folder.glob("ascend-*.safetensors"))
        for name, slot in read_header(path).slots.items()
        for at in (slot.start, slot.stop - 1)
    ]
    for name, path, at in places:
        flip(path, at, bit=at % 8)
        try:
            check = BackgroundCheck(CheckpointReader(folder), threads)
            for ask in (check.finish, check.finish, check.poll):  # it does not forget
                with pytest.raises(CheckpointError) as error:
                    ask()
                said = f"{folder}: tensor {name} in {path.name}: its bytes differ from the manifest"
                assert str(error.value) == said
        finally:
            flip(path, at, bit=at % 8)


@pytest.mark.parametrize("threads", [1, 4])
def test_each_tensor_is_hashed_once(folder: Path, threads: int) -> None:
    reader = Watched(folder)
    check = BackgroundCheck(reader, threads)
    check.finish()
    check.finish()
    check.poll()
    assert sorted(reader.hashed) == sorted(reader.manifest.stored())


def test_nobody_waits_before_the_end(folder: Path) -> None:
    """While a tensor is hashed, others may be used; the end waits for it."""
    late = threading.Event()
    first = "model.embed_tokens.weight"

    def before(name: str) -> None:
        if name == first:
            assert late.wait(20)

    reader = Watched(folder, before)
    check = BackgroundCheck(reader, 3)
    check.poll()
    assert first not in reader.hashed
    ending = threading.Thread(target=check.finish)
    ending.start()
    ending.join(0.05)
    assert ending.is_alive()
    late.set()
    ending.join(20)
    assert not ending.is_alive()
    assert sorted(reader.hashed) == sorted(reader.manifest.stored())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives threads a priority")
def test_only_whoever_is_waited_for_has_priority(folder: Path) -> None:
    """One thread in the background, which takes what others leave; normal ones for the end."""
    seen: dict[int, int] = {}
    began, waits = threading.Event(), threading.Event()

    def before(name: str) -> None:
        number = threading.get_native_id()
        seen[number] = os.getpriority(os.PRIO_PROCESS, number)
        began.set()
        assert waits.wait(20)

    check = BackgroundCheck(Watched(folder, before), 3)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert began.wait(20) and [*seen.values()] == [19]
    threading.Timer(0.1, waits.set).start()
    check.finish()
    assert {*seen.values()} - {19} <= {own} and own != 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_what_cannot_be_read_is_one_line(folder: Path, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out")
    path = next((tmp_path / "out").glob("ascend-*"))
    reader = CheckpointReader(tmp_path / "out")
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    with pytest.raises(CheckpointError, match="became shorter"):
        BackgroundCheck(reader).finish()
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        BackgroundCheck(reader).finish()


def test_a_defect_of_ours_is_not_taken_for_soundness(folder: Path) -> None:
    def fail(name: str) -> None:
        raise IndexError(name)

    with pytest.raises(IndexError):
        BackgroundCheck(Watched(folder, fail)).finish()


def test_a_check_that_is_dropped_ends(folder: Path) -> None:
    gate = threading.Event()
    reader = Watched(folder, lambda name: assert_true(gate.wait(20)))
    check = BackgroundCheck(reader)
    (thread,) = check._running
    del check
    gc.collect()
    gate.set()
    thread.join(20)
    assert not thread.is_alive() and len(reader.hashed) <= 1


def assert_true(value: bool) -> None:
    assert value


def test_a_process_does_not_wait_for_a_check(folder: Path) -> None:
    """It ends after the tensor that is being hashed, without a word."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from qwen3_ascend.checkpoint.background import BackgroundCheck\n"
        "from qwen3_ascend.checkpoint.reader import CheckpointReader\n"
        "class Slow(CheckpointReader):\n"
        "    def blake3(self, name, file):\n"
        "        time.sleep(0.2)\n"
        "        print(name, flush=True)\n"
        "        return super().blake3(name, file)\n"
        "check = BackgroundCheck(Slow(Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) <= 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 on, rightly
def test_a_child_process_can_wait_too(folder: Path) -> None:
    """A fork has none of its parent's threads, and one of its tensors may be half hashed."""
    gate = threading.Event()
    parent = os.getpid()
    reader = Watched(folder, lambda name: assert_true(os.getpid() != parent or gate.wait(20)))
    check = BackgroundCheck(reader, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # it would not end with the test
        check.finish()
        os._exit(7)
    gate.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    check.finish()
