"""Errors of the user end vLLM's processes with their line; in the user's own they stay errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.vllm.one_line import LAST_WORDS, say_in_one_line

CHILD = """
import multiprocessing, sys
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.vllm.one_line import end_in_one_line, say_in_one_line

def engine(speaks):
    with say_in_one_line(speaks):
        raise CheckpointError("a tensor is damaged")

def healthy():
    with say_in_one_line():
        pass

if __name__ == "__main__":
    end_in_one_line()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=globals()[sys.argv[1]], args=eval(sys.argv[2]))
    child.start()
    child.join()
    if child.exitcode or sys.argv[1] == "healthy":
        raise RuntimeError("Engine core initialization failed")
"""


def run(tmp_path: object, *words: str) -> subprocess.CompletedProcess[str]:
    file = f"{tmp_path}/program.py"
    with open(file, "w") as out:
        out.write(CHILD)
    return subprocess.run([sys.executable, file, *words], capture_output=True, text=True)


def test_an_error_stays_an_error_in_the_process_of_the_user() -> None:
    with pytest.raises(CheckpointError, match="damaged"), say_in_one_line():
        raise CheckpointError("damaged")


def test_an_engine_ends_with_the_line_and_so_does_who_started_it(tmp_path: object) -> None:
    done = run(tmp_path, "engine", "(True,)")
    line = "qwen3-ascend: error: a tensor is damaged"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [line, line]


def test_a_rank_that_does_not_speak_says_nothing(tmp_path: object) -> None:
    done = run(tmp_path, "engine", "(False,)")
    assert done.returncode == 1
    assert "damaged" not in done.stderr


def test_what_is_not_ours_keeps_its_traceback(tmp_path: object) -> None:
    done = run(tmp_path, "healthy", "()")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "RuntimeError: Engine core initialization failed"


def test_the_file_of_last_words_is_removed(tmp_path: object) -> None:
    os.environ.pop(LAST_WORDS, None)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    file = f"{tmp_path}/program.py"
    with open(file, "w") as out:
        out.write(CHILD)
    subprocess.run(
        [sys.executable, file, "engine", "(True,)"], env=environment, capture_output=True
    )
    assert [name for name in os.listdir(str(tmp_path)) if name.startswith("qwen3-ascend-")] == []
