"""The texts of calibration: what is read, which windows are taken, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import tiny_tokenizers
from support.tiny_models import DATA
from transformers import AutoTokenizer

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.convert.calibration.data import (
    RANDOM,
    SHIPPED,
    choose_windows,
    plan_calibration,
    read_text,
)
from qwen3_ascend.convert.options import CalibrationOptions
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.errors import OptionError
from qwen3_ascend.files.hashing import file_blake3
from qwen3_ascend.files.json_file import read_json_object

FILES = {name: (DATA / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
CHAT = [{"role": "user", "content": "Explain ebb."}, {"role": "assistant", "content": "It falls."}]


PARTS = (
    "def ", "fn ", "SELECT", "All human beings", "Alle Menschen", "Tous les êtres",
    "Todos los seres", "人人生而自由", "すべての人間", "Все люди", "يولد جميع الناس",
)  # fmt: skip
"""Of the shipped texts: three languages of code, and eight of people."""


@pytest.fixture
def config() -> Qwen3Config:
    return read_config(read_json_object(DATA / "config.json"), "config.json", lambda line: None)


def windows_of(
    config: Qwen3Config, file: Path | None, tokens: int, names: Sequence[str] = tuple(FILES)
) -> tuple[tuple[int, ...], ...]:
    options = CalibrationOptions(None if file is None else str(file), tokens)
    planned = plan_calibration(options, config, names)
    found = choose_windows(planned, config, FILES, print)
    assert planned.record.tokens == sum(map(len, found)) and planned.record.windows == len(found)
    return found


def test_the_shipped_texts() -> None:
    """Eight languages, code and conversations; every line is one of the two kinds."""
    text = read_text(None)
    said = [document for document in text.documents if isinstance(document, str)]
    assert text.name == SHIPPED and len(text.documents) - len(said) >= 12
    everything = "".join(said)
    assert len(everything.encode()) > 120_000
    for part in PARTS:
        assert part in everything


def test_windows_are_spread_over_the_whole_text(config: Qwen3Config, tmp_path: Path) -> None:
    """They are what transformers makes of the text, at equal distances, and do not overlap."""
    file = tmp_path / "text.txt"
    file.write_text((DATA / "heldout.txt").read_text()[:60000])
    found = windows_of(config, file, 4096 + 511)
    expected = AutoTokenizer.from_pretrained(DATA)(file.read_text())["input_ids"]
    distance = len(expected) // 8
    assert len(found) == 8 and distance > 2 * 512
    assert [list(window) for window in found] == [
        expected[start : start + 512] for start in range(0, 8 * distance, distance)
    ]


def test_the_record_names_the_file(config: Qwen3Config, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("word " * 9000)
    options = CalibrationOptions(str(file), 2048)
    record = plan_calibration(options, config, tuple(FILES)).record
    assert (record.name, record.blake3, record.device) == ("mine.txt", file_blake3(file), "cpu")
    assert (record.tokens, record.windows) == (2048, 4)


def test_lines_of_texts_and_conversations(config: Qwen3Config, tmp_path: Path) -> None:
    """A conversation goes through the chat template, and ends where its last message ends."""
    folder = tiny_tokenizers.write(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = [json.dumps({"text": "low " * 40}), "", json.dumps({"messages": CHAT * 20})]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(lines))
    options = CalibrationOptions(str(file), 512)
    planned = plan_calibration(options, config, tuple(files))
    (window,) = choose_windows(planned, config, files, print)
    theirs = AutoTokenizer.from_pretrained(folder)
    chat = theirs.apply_chat_template(CHAT * 20, tokenize=False)
    whole = theirs("low " * 40)["input_ids"] + theirs(chat, add_special_tokens=False)["input_ids"]
    assert list(window) == whole[:512]


def test_random_ids_where_there_is_no_tokenizer(config: Qwen3Config) -> None:
    notes: list[str] = []
    planned = plan_calibration(CalibrationOptions(), config, ["config.json"])
    found = choose_windows(planned, config, {}, notes.append)
    assert planned.record.name == RANDOM and planned.record.blake3 is None
    assert len(found) == 32 and all(len(window) == 512 for window in found)
    assert len({token for window in found for token in window}) > 3000
    assert found == choose_windows(planned, config, {}, print)
    assert notes == [f"the model has no tokenizer: it is calibrated with {RANDOM}"]
    with pytest.raises(OptionError, match="has no tokenizer to read README.md with"):
        plan_calibration(CalibrationOptions(str(DATA / "README.md")), config, [])


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "a"}', 'line 1 is neither {"text"'),
        ("a.jsonl", b'{"messages": []}', "line 1 is neither"),
        ("a.jsonl", b'["a"]', "line 1 is neither"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "a.jsonl, text 1: the chat template of chat_template.jinja refuses",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": "\\ud800"}',
            "a.jsonl, text 2: the prompt is not valid",
        ),
        ("a.txt", b"few words", "give more text$"),
        ("a.txt", b"some words " * 400, "give more text, or pass --calibration-tokens 512$"),
    ],
)
def test_refusals(
    config: Qwen3Config, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    template = {"chat_template.jinja": (DATA / "chat_template.jinja").read_bytes()}
    with pytest.raises(OptionError, match=message) as caught:
        planned = plan_calibration(CalibrationOptions(str(file)), config, [*FILES])
        choose_windows(planned, config, FILES | template, print)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="none.txt: No such file"):
        read_text(str(tmp_path / "none.txt"))
