"""Qwen3's own tokenizer against transformers, and text that arrives in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.generation import eos_ids
from qwen3_ascend.runtime.text_stream import StopFilter
from qwen3_ascend.runtime.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "What is 12345.678 + 90? It's 12435.678 -- isn't it?\r\n\r\n\tYes.",
    "请用三句话介绍杭州的西湖，并说明最佳的游览季节。",
    "混合 mixed 文本 with numbers 一二三 123 和 emoji 🎉👩‍👩‍👧‍👦🇩🇪 done",
    "def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)  # 递归\n",
    "Ünïcödé, naïve café, e\u0301 (combining), Ω≈ç√∫, العربية, עברית, हिन्दी, ไทย, 한국어",
    "<|im_start|>user\nspecial tokens<|im_end|><|endoftext|><think>\n\n</think><tool_call>",
    "<|im_start |> <|not_special|> </think >",
    "a" * 300 + " " * 50 + "\n" * 20 + "\u200b\ufeff\x00\x7f",
]

QUESTION = {"role": "user", "content": "西湖在哪里？ Where is it? 🗺️"}
SYSTEM = {"role": "system", "content": "You are a guide.\nBe brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Tells the weather <now> & "later" in 城市',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "城市"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "杭州"}}}
    ],
}
RESULT = {"role": "tool", "content": '{"temperature": 21.5}'}
TURNS = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
    QUESTION,
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "turns": TURNS,
    "system and turns": [SYSTEM, *TURNS],
    "tool call": [QUESTION, CALL, RESULT],
    "two tool results": [SYSTEM, QUESTION, CALL, RESULT, RESULT, TURNS[3], QUESTION],
    "reasoning apart": [
        QUESTION,
        {"role": "assistant", "content": "Hangzhou", "reasoning_content": "A lake.\n"},
        QUESTION,
    ],
}


@pytest.fixture(scope="module")
def ours(qwen3_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(qwen3_tokenizer)


@pytest.fixture(scope="module")
def theirs(qwen3_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(qwen3_tokenizer)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_text(text: str, ours: Tokenizer, theirs: Any) -> None:
    tokens = ours.encode(text)
    assert tokens == theirs(text)["input_ids"]
    expected = theirs.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(tokens) == expected


@given(text=st.text(max_size=60))
def test_ids_of_any_text(text: str, ours: Tokenizer, theirs: Any) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(RequestError):
            ours.encode(text)
        return
    assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(
    messages: list[dict[str, Any]], tools: Any, thinking: bool | None, ours: Tokenizer, theirs: Any
) -> None:
    chosen = {} if thinking is None else {"enable_thinking": thinking}
    given_tools = {} if tools is None else {"tools": tools}
    expected = theirs.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **chosen
    )
    text = ours.render(messages, enable_thinking=thinking, **given_tools)
    assert text == expected
    ids = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False, **chosen
    )
    assert ours.encode(text, add_special_tokens=False) == ids


def test_thinking_is_a_switch(ours: Tokenizer) -> None:
    default, on, off = (
        ours.render([QUESTION], enable_thinking=choice) for choice in (None, True, False)
    )
    assert default == on and off == on + "<think>\n\n</think>\n\n"


def test_an_answer_can_be_continued(ours: Tokenizer, theirs: Any) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "In Hang"}]
    text = ours.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text.endswith("In Hang")


def test_end_of_sequence(ours: Tokenizer, qwen3_tokenizer: Path) -> None:
    assert ours.eos_token_id == 151645
    assert ours.encode("<|im_end|>") == [151645]
    assert eos_ids(qwen3_tokenizer, ours) == {151645}


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> str:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in tokenizer.decode(tokens)
    return "".join(pieces) + stream.finish()


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_streamed_text_is_the_text(text: str, ours: Tokenizer) -> None:
    tokens = ours.encode(text)
    assert streamed(ours, tokens) == ours.decode(tokens)


@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_streams(text: str, ours: Tokenizer) -> None:
    tokens = ours.encode(text)
    assert streamed(ours, tokens) == ours.decode(tokens)


@settings(max_examples=500)
@given(tokens=st.lists(st.integers(0, 151935), max_size=30))
def test_any_tokens_stream(tokens: list[int], ours: Tokenizer) -> None:
    """Halves of characters, special tokens, and ids beyond the vocabulary (the model has more)."""
    assert streamed(ours, tokens) == ours.decode(tokens)


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 4095), max_size=30))
def test_any_tokens_of_the_tiny_model_stream(tokens: list[int], tiny_source: Path) -> None:
    tokenizer = TINY.setdefault(tiny_source, load_tokenizer(tiny_source))
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


TINY: dict[Path, Tokenizer] = {}


@settings(max_examples=300)
@given(
    values=st.lists(st.integers(0, 255), max_size=12),
    words=st.lists(st.sampled_from([" ", "e", "t", "é", "中"]), max_size=3),
)
def test_single_bytes_stream(values: list[int], words: list[str], ours: Tokenizer) -> None:
    """The 256 byte tokens come first in the vocabulary: broken UTF-8 of every kind."""
    tokens = values + [token for word in words for token in ours.encode(word)] + values
    assert streamed(ours, tokens) == ours.decode(tokens)


def test_no_half_characters(ours: Tokenizer) -> None:
    tokens = ours.encode("👩‍👩‍👧‍👦")
    stream = ours.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "" in pieces and "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "👩‍👩‍👧‍👦"


LETTERS = st.text("abc", max_size=4)


def filtered(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stop_filter, shown = StopFilter(stops), ""
    for piece in pieces:
        shown += stop_filter.push(piece)
        if stop_filter.stopped:
            return shown, True
    return shown + stop_filter.finish(), False


def first_complete(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is complete first (of two, the longer), by its words."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return None


@settings(max_examples=500)
@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS.filter(bool), max_size=3))
def test_stop_filter(pieces: list[str], stops: list[str]) -> None:
    text, at = "".join(pieces), first_complete("".join(pieces), stops)
    shown, stopped = filtered(pieces, stops)
    assert stopped == (at is not None)
    assert shown == (text if at is None else text[:at])
    assert not any(stop in shown for stop in stops)


@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS.filter(bool), max_size=3))
def test_stop_filter_does_not_see_the_pieces(pieces: list[str], stops: list[str]) -> None:
    assert filtered(pieces, stops) == filtered(["".join(pieces)], stops)
    assert filtered(pieces, stops) == filtered(list("".join(pieces)), stops)


def test_stop_filter_holds_back_no_more_than_it_must() -> None:
    stop_filter = StopFilter(["\n\nUser:"])
    assert [stop_filter.push(piece) for piece in ("Hi", "\n", "there", "\n\nUs", "e", "r!")] == [
        "Hi", "", "\nthere", "", "", "\n\nUser!",
    ]  # fmt: skip
