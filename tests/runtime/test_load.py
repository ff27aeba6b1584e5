"""Loading trusts nothing: a changed byte is named before an answer ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from support.command_line import run
from support.folders import flip_a_byte

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.runtime.engine.engine import Engine
from qwen3_ascend.runtime.tokenizer import NoTokenizer, Tokenizer, quick_tokenizer

NAME = "model.layers.2.mlp.down_proj.weight"


def test_a_flipped_byte_is_named(w8a8_copy: Path) -> None:
    flip_a_byte(w8a8_copy, NAME)
    with pytest.raises(CheckpointError, match=f"tensor {NAME} in ascend-00001.*differ"):
        load(w8a8_copy).generate("x", SamplingParams(max_new_tokens=1))
    done = run("generate", w8a8_copy, "--prompt", "x")
    last = done.err.splitlines()[-1]
    assert done.code == 1 and last.startswith("Error:") and NAME in last


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is hashed before it is set."""
    opened, hash_now = threading.Event(), CheckpointReader.blake3

    def wait(reader: CheckpointReader, name: str, file: str) -> str:
        assert opened.wait(60)
        return hash_now(reader, name, file)

    monkeypatch.setattr(CheckpointReader, "blake3", wait)
    return opened


QUESTION = "What does river mean?"
GREEDY = SamplingParams(max_new_tokens=8)


def test_on_a_cpu_tokens_do_not_wait_but_the_end_does(
    w8a8_copy: Path, gate: threading.Event
) -> None:
    believed = load(w8a8_copy, verify=False).generate(QUESTION, GREEDY)
    llm = load(w8a8_copy)
    stream = llm.stream(QUESTION, GREEDY)
    assert next(stream) and not gate.is_set()
    answers: list[object] = []
    rest = threading.Thread(target=lambda: answers.extend([[*stream], stream.completion()]))
    rest.start()
    rest.join(0.5)
    assert rest.is_alive() and not answers
    gate.set()
    rest.join(60)
    assert answers[1] == believed[0]
    assert llm.generate(QUESTION, GREEDY) == believed


def test_no_answer_ends_that_a_changed_byte_was_used_for(
    w8a8_copy: Path, gate: threading.Event
) -> None:
    flip_a_byte(w8a8_copy, NAME)
    llm = load(w8a8_copy)
    stream = llm.stream(QUESTION, GREEDY)
    next(stream)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(CheckpointError, match=NAME):
        list(stream)
    if stream._answer.finish_reason:
        with pytest.raises(CheckpointError, match=NAME):
            stream.completion()
    for ask in (
        lambda: llm.generate(QUESTION, GREEDY),
        lambda: llm.logits([1, 2, 3]),
        lambda: list(llm.stream(QUESTION, GREEDY)),
    ):
        with pytest.raises(CheckpointError, match=NAME):
            ask()


def test_logits_wait_too(w8a8_copy: Path, gate: threading.Event) -> None:
    flip_a_byte(w8a8_copy, NAME)
    llm = load(w8a8_copy)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(CheckpointError, match=NAME):
        llm.logits([1, 2, 3])


def test_what_a_changed_byte_makes_fail_is_the_changed_byte(
    w8a8_copy: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as logits that are no numbers, which nothing can be drawn from."""

    def fail(engine: Engine) -> NoReturn:
        raise AssertionError("no token")

    sound = load(w8a8_copy, verify=False)
    flip_a_byte(w8a8_copy, NAME)
    llm = load(w8a8_copy)
    monkeypatch.setattr(Engine, "step", fail)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(CheckpointError, match=NAME):
        llm.generate(QUESTION)
    with pytest.raises(AssertionError, match="no token"):
        sound.generate(QUESTION)


def test_checking_can_be_left_out(w8a8_copy: Path) -> None:
    flip_a_byte(w8a8_copy, NAME)
    llm = load(w8a8_copy, verify=False)
    assert llm.generate(["What does river mean?"], SamplingParams(max_new_tokens=3))[0].token_ids


def test_a_tokenizer_that_was_read_already(w8a8_copy: Path) -> None:
    """And one that needs no transformers is read without torch, so that others may import it."""
    asked: list[Path] = []
    found = quick_tokenizer(w8a8_copy)

    def give(folder: Path) -> Tokenizer:
        asked.append(folder)
        assert found is not None
        return found

    assert load(w8a8_copy, read_tokenizer=give).tokenizer is found and asked == [w8a8_copy]
    (w8a8_copy / "tokenizer.json").unlink()
    assert isinstance(quick_tokenizer(w8a8_copy), NoTokenizer)
    script = (
        "import sys; from pathlib import Path\n"
        "from qwen3_ascend.runtime.tokenizer import quick_tokenizer\n"
        "quick_tokenizer(Path(sys.argv[1]))\n"
        "print({'torch', 'numpy', 'transformers', 'jinja2'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1] / "data/tiny-qwen3")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_progress_counts_every_stage_to_its_end(w8a8_copy: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    load(
        w8a8_copy,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert list(seen) == ["loading layers"]
    for steps in seen.values():
        total = steps[0][1]
        assert steps == [(done, total) for done in range(1, total + 1)]
