"""The interface: it says what LLM says, in OpenAI's form, and refuses the rest by name."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.http_client import JSON, Reply, connection, get, post
from support.openai_server import NAME, served

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime import LLM
from qwen3_ascend.runtime.answer import Answer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = "What does river mean?"
BEGUN, OTHER = "As a noun, river", "As a noun, oxygen"
ASKED = [{"role": "user", "content": QUESTION}]
FOREVER = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True}


def text(url: str, **parameters: Any) -> Any:
    """The answer to a request for a continuation."""
    return ok(post(url, TEXT, parameters))


def chat(url: str, **parameters: Any) -> Any:
    return ok(post(url, CHAT, {"messages": ASKED, **parameters}))


def ok(reply: Reply) -> Any:
    assert reply.status == 200, reply.body
    return reply.json


def test_a_chat(url: str, expected: LLM) -> None:
    said, whole = chat(url, model=NAME), expected.generate(QUESTION)[0]
    assert said["object"] == "chat.completion" and said["id"].startswith("chatcmpl-")
    assert said["model"] == NAME and abs(said["created"] - time.time()) < 60
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": whole.text}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    read, written = len(whole.prompt_token_ids), len(whole.token_ids)
    assert said["usage"] == {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
    }  # fmt: skip


def test_a_conversation_is_what_the_template_makes_of_it(url: str, expected: LLM) -> None:
    parts = [{"type": "text", "text": "What does"}, {"type": "text", "text": "river mean?"}]
    said = chat(url, messages=[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "user", "content": QUESTION},
    ], max_tokens=4)  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does\nriver mean?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": QUESTION},
    ]
    whole = expected.chat(messages, SamplingParams(max_new_tokens=4))
    assert said["choices"][0]["message"]["content"] == whole.text
    assert said["usage"]["prompt_tokens"] == len(whole.prompt_token_ids)


@pytest.mark.parametrize(
    "parameters", [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}]
)
def test_thinking_is_the_templates_matter(
    parameters: dict[str, Any], url: str, expected: LLM
) -> None:
    whole = expected.chat(ASKED, SamplingParams(max_new_tokens=6), enable_thinking=True)
    said = chat(url, max_completion_tokens=6, **parameters)
    assert said["choices"][0]["message"]["content"] == whole.text
    assert said["usage"]["prompt_tokens"] == len(whole.prompt_token_ids)
    assert len(whole.prompt_token_ids) != len(expected.encode(QUESTION))


def test_tools_reach_the_template(tiny_w8a8: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_w8a8, tmp_path / "with tools")
    template = (
        "{% for one in tools or [] %}{{ one.function.name }} {% endfor %}{{ messages[0].content }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    llm = load(folder, verify=False, block_size=16, kv_cache_tokens=512)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    counts = [len(llm.tokenizer.encode(one)) for one in (f"weather {QUESTION}", QUESTION)]
    with served(llm) as url:
        for choice, count in (("auto", counts[0]), (None, counts[0]), ("none", counts[1])):
            said = chat(url, max_tokens=2, tools=tools, tool_choice=choice)
            assert said["usage"]["prompt_tokens"] == count


def test_a_text_goes_on(url: str, expected: LLM) -> None:
    said = text(url, prompt=BEGUN, max_tokens=12)
    (whole,) = expected.generate(BEGUN, SamplingParams(max_new_tokens=12), raw=True)
    assert len(whole.token_ids) == 12
    assert said["object"] == "text_completion" and said["id"].startswith("cmpl-")
    choice = {"index": 0, "text": whole.text, "logprobs": None, "finish_reason": "length"}
    assert said["choices"] == [choice]


def test_forms_of_a_prompt(url: str, expected: LLM) -> None:
    params = SamplingParams(max_new_tokens=8)
    prompts = [BEGUN, OTHER]
    tokens = [expected.encode(prompt, raw=True) for prompt in prompts]
    texts = [answer.text for answer in expected.generate(prompts, params, raw=True)]
    for prompt, answers in (
        (BEGUN, texts[:1]), ([BEGUN], texts[:1]), (tokens[0], texts[:1]),
        (prompts, texts), (tokens, texts), ([prompts[0], tokens[1]], texts),
    ):  # fmt: skip
        said = text(url, prompt=prompt, max_tokens=8)
        assert [choice["text"] for choice in said["choices"]] == answers
        assert said["usage"]["prompt_tokens"] == sum(map(len, tokens[: len(answers)]))


def test_several_answers_to_several_prompts(url: str, expected: LLM) -> None:
    params = SamplingParams(temperature=2.0, seed=3, max_new_tokens=6, n=3)
    answers = expected.generate([[5, 6], [7, 8]], params)
    said = text(url, prompt=[[5, 6], [7, 8]], temperature=2, seed=3, max_tokens=6, n=3)
    assert [choice["index"] for choice in said["choices"]] == [*range(6)]
    assert [choice["text"] for choice in said["choices"]] == [one.text for one in answers]
    assert said["usage"]["prompt_tokens"] == 4


CHOSEN: list[tuple[dict[str, Any], SamplingParams]] = [
    ({"stop": "of water"}, SamplingParams(stop="of water")),
    ({"stop": ["never", "water", "stream"]}, SamplingParams(stop=("never", "water", "stream"))),
    ({"presence_penalty": 1.5}, SamplingParams(presence_penalty=1.5)),
    ({"frequency_penalty": 1.5}, SamplingParams(frequency_penalty=1.5)),
    ({"repetition_penalty": 1.3}, SamplingParams(repetition_penalty=1.3)),
    ({"temperature": 1.5, "seed": 5}, SamplingParams(temperature=1.5, seed=5)),
    ({"temperature": 1.5, "seed": 5, "top_k": 3}, SamplingParams(temperature=1.5, seed=5, top_k=3)),
    ({"temperature": 1.5, "seed": 5, "top_k": -1}, SamplingParams(temperature=1.5, seed=5)),
    ({"temperature": 2, "seed": 5, "top_p": 0.5}, SamplingParams(2.0, seed=5, top_p=0.5)),
    ({"temperature": 2, "seed": 5, "min_p": 0.2}, SamplingParams(2.0, seed=5, min_p=0.2)),
    ({"ignore_eos": True, "max_tokens": 60}, SamplingParams(ignore_eos=True, max_new_tokens=60)),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "params"), CHOSEN, ids=str)
def test_parameters_mean_what_they_mean_to_the_library(
    parameters: dict[str, Any], params: SamplingParams, url: str, expected: LLM
) -> None:
    (whole,), (plain,) = expected.generate(QUESTION, params), expected.generate(QUESTION)
    assert whole.token_ids != plain.token_ids, "it changes nothing, and shows nothing"
    (choice,) = chat(url, **{"max_tokens": 512, **parameters})["choices"]
    assert choice["message"]["content"] == whole.text
    assert choice["finish_reason"] == whole.finish_reason


def test_what_a_request_leaves_out_comes_from_the_checkpoint(
    tiny_w8a8: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_w8a8, tmp_path / "sampled")
    config = {"do_sample": True, "temperature": 3.0, "top_k": 0, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    llm = load(folder, verify=False, dtype="float32", block_size=16, kv_cache_tokens=512)
    params = SamplingParams(temperature=3.0, seed=1, max_new_tokens=16)
    (drawn,), (greedy,) = (
        llm.generate([5, 6], params),
        llm.generate([5, 6], SamplingParams(max_new_tokens=16)),
    )
    assert drawn.text != greedy.text
    with served(llm) as url:
        assert text(url, prompt=[5, 6], seed=1)["choices"][0]["text"] == drawn.text
        cold = text(url, prompt=[5, 6], temperature=0)
        assert cold["choices"][0]["text"] == greedy.text


def test_a_chat_goes_on_to_the_end_of_the_context(url: str, llm: LLM) -> None:
    said = chat(url, ignore_eos=True)
    assert said["usage"]["total_tokens"] == llm.config.context_length
    assert said["choices"][0]["finish_reason"] == "length"
    assert text(url, prompt="a", ignore_eos=True)["usage"]["completion_tokens"] == 16


def test_probabilities_of_a_chat(url: str, expected: LLM) -> None:
    (whole,) = expected.generate(QUESTION, SamplingParams(max_new_tokens=5, logprobs=3))
    said = chat(url, max_tokens=5, logprobs=True, top_logprobs=3)
    content = said["choices"][0]["logprobs"]["content"]
    assert whole.logprobs is not None and len(content) == 5
    for token, found, one in zip(whole.token_ids, whole.logprobs, content, strict=True):
        assert one["token"] == expected.tokenizer.decode([token])
        assert bytes(one["bytes"]).decode() == one["token"]
        assert one["logprob"] == pytest.approx(found.chosen, abs=1e-4)
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(
            [logprob for _, logprob in found.top], abs=1e-4
        )
    plain = chat(url, max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in plain] == [[], []]


@pytest.mark.parametrize("new", [0, 1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_probabilities(new: int, stream: bool, url: str, expected: LLM) -> None:
    """The prompt's are those of the teacher-forced logits, and its first token has none."""
    prompts = [expected.encode(one, raw=True) for one in (BEGUN, OTHER)]
    parameters = {"prompt": prompts, "echo": True, "logprobs": 2, "max_tokens": new}
    if stream:
        choices = _put_together(post(url, TEXT, parameters | {"stream": True}).events)
    else:
        choices = text(url, **parameters)["choices"]
    params = SamplingParams(max_new_tokens=max(new, 1))
    for prompt, choice in zip(prompts, choices, strict=True):
        generated = expected.generate(prompt, params)[0].token_ids[:new]
        tokens = [*prompt, *generated]
        rows = expected.logits(tokens).log_softmax(-1)
        report = choice["logprobs"]
        assert report["token_logprobs"][0] is None and report["top_logprobs"][0] is None
        chosen = [float(rows[at, token]) for at, token in enumerate(tokens[1:])]
        assert report["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-3)
        for row, top in zip(rows, report["top_logprobs"][1:], strict=False):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3)
            assert 2 <= len(top) <= 3
        assert "".join(report["tokens"]) == choice["text"] == expected.tokenizer.decode(tokens)
        lengths = [len(token) for token in report["tokens"]]
        assert report["text_offset"] == [sum(lengths[:at]) for at in range(len(lengths))]
        assert choice["finish_reason"] == "length"


def _put_together(events: list[Any]) -> list[Any]:
    """Whole choices of the chunks of a stream of texts."""
    choices: dict[int, Any] = {}
    for chunk in (choice for event in events for choice in event["choices"]):
        whole = choices.setdefault(chunk["index"], {"text": "", "logprobs": {}})
        whole["text"] += chunk["text"]
        whole["finish_reason"] = chunk["finish_reason"]
        for name, values in chunk["logprobs"].items():
            whole["logprobs"].setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_begins_before_the_other_prompt_is_read(
    stream: bool, url: str, expected: LLM
) -> None:
    """The logits of a long prompt take some steps, in which the short one's answer goes on."""
    prompts = [expected.encode(BEGUN, raw=True), [7 + at % 900 for at in range(1000)]]
    parameters = {"prompt": prompts, "echo": True, "logprobs": 0, "max_tokens": 6}
    if stream:
        choices = _put_together(post(url, TEXT, parameters | {"stream": True}).events)
    else:
        choices = text(url, **parameters)["choices"]
    answers = expected.generate(prompts, SamplingParams(max_new_tokens=6))
    for prompt, answer, choice in zip(prompts, answers, choices, strict=True):
        assert choice["text"] == expected.tokenizer.decode(prompt) + answer.text
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + len(answer.token_ids)


def test_an_echo_alone(url: str) -> None:
    for prompt in ("a river", ["a river", "a lake"]):
        said = text(url, prompt=prompt, echo=True, max_tokens=0)
        assert [one["text"] for one in said["choices"]] == (
            [prompt] if isinstance(prompt, str) else prompt
        )
        assert said["usage"]["completion_tokens"] == 0


def test_a_token_without_text_has_a_number(url: str, expected: LLM) -> None:
    """Half a character, whose bytes are nobody's text; a special token is spelled out."""
    half = expected.tokenizer.encode("\N{GRINNING FACE}")[0]
    said = text(url, prompt=[5, half, 2], echo=True, logprobs=0, max_tokens=0)
    tokens = said["choices"][0]["logprobs"]["tokens"]
    assert tokens[1:] == [f"token_id:{half}", "<|im_end|>"]


def test_a_stream_is_the_whole_in_pieces(url: str) -> None:
    parameters = {"messages": ASKED, "logprobs": True, "n": 2, "temperature": 1, "seed": 4}
    reply = post(url, CHAT, parameters | {"stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    whole = chat(url, **parameters)
    first, *events = reply.events
    assert first["object"] == "chat.completion.chunk" and "usage" not in first
    deltas: dict[int, list[Any]] = {0: [first["choices"][0]], 1: []}
    for event in events:
        (choice,) = event["choices"]
        deltas[choice["index"]].append(choice)
        assert event["id"] == first["id"]
    for choice, chunks in zip(whole["choices"], deltas.values(), strict=True):
        assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
        pieces = [chunk["delta"].get("content", "") for chunk in chunks]
        assert "".join(pieces) == choice["message"]["content"] and len(pieces) > 5
        reasons = [chunk["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + [choice["finish_reason"]]
        logprobs = [one for chunk in chunks[1:] for one in chunk["logprobs"]["content"]]
        assert [one["token"] for one in logprobs] == [
            one["token"] for one in choice["logprobs"]["content"]
        ]


def test_usage_at_the_end_of_a_stream(url: str) -> None:
    parameters = {"messages": ASKED, "max_tokens": 5, "stream": True}
    *events, last = post(url, CHAT, parameters | {"stream_options": {"include_usage": True}}).events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    assert all(event["usage"] is None for event in events)
    every = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = post(url, CHAT, parameters | {"stream_options": every}).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 5


def test_the_first_words_come_before_the_last_are_computed(
    url: str, llm: LLM, idle: Callable[[], None]
) -> None:
    with connection(url) as opened:
        opened.request("POST", TEXT, json.dumps({**FOREVER, "stream": True}), JSON)
        reply = opened.getresponse()
        assert reply.readline().startswith(b"data: ") and llm.open
    idle()


def test_what_clients_send_by_habit_is_taken(url: str) -> None:
    habits = {
        "user": "me", "metadata": {}, "store": False, "service_tier": "auto", "logit_bias": {},
        "frequency_penalty": 0, "response_format": {"type": "text"}, "parallel_tool_calls": True,
        "top_p": None, "stop": None, "stream": False, "seed": None, "n": 1, "tools": None,
        "tool_choice": "auto", "functions": None, "logprobs": False, "top_logprobs": None,
        "stream_options": None, "modalities": ["text"],
    }  # fmt: skip
    assert chat(url, max_tokens=2, **habits)["usage"]["completion_tokens"] == 2
    assert text(url, prompt="a", best_of=1, suffix=None, echo=False, logprobs=None)


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"maxtokens": 3}, 400, "maxtokens", "no parameter maxtokens; did you mean max_tokens?"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", 'only {"type": "text"}'),
    ({"tool_choice": "required"}, 400, "tool_choice", "not supported"),
    ({"tool_choice": {"type": "function"}}, 400, "tool_choice", "not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ({"prediction": {"type": "content"}}, 400, "prediction", "prediction is not supported"),
    ({"temperature": "warm"}, 400, "temperature", "temperature: Expected `float"),
    ({"temperature": -1}, 400, "temperature", "0 or more"),
    ({"top_p": 0}, 400, "top_p", "above 0"),
    ({"frequency_penalty": "much"}, 400, "frequency_penalty", "Expected `float"),
    ({"top_k": -2}, 400, "top_k", "0 (off) or more"),
    ({"seed": 1 << 64}, 400, "seed", "64 bits"),
    ({"n": 0}, 400, "n", "1 or more"),
    ({"n": 33}, 400, "n", "at most 32"),
    ({"n": 10**12}, 400, "n", "at most 32"),
    ({"stop": [""]}, 400, "stop", "must not be empty"),
    ({"stop": ["a"] * 65}, 400, "stop", "more than 64"),
    ({"stop": [1]}, 400, "stop", "stop[0]"),
    ({"max_tokens": 0}, 400, "max_tokens", "1 or more"),
    ({"max_tokens": -1}, 400, "max_tokens", "1 or more"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "1 or more"),
    ({"max_tokens": 5000}, 400, "max_tokens", "there is room for 1024 together"),
    ({"top_logprobs": 1}, 400, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "between 0 and 20"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
    ({"stream_options": {"more": 1}, "stream": True}, 400, "stream_options", "more"),
    ({"model": "gpt-5"}, 404, "model", "no model gpt-5; this server has tiny"),
    ({"messages": []}, 400, "messages", "empty"),
    ({"messages": "hello"}, 400, "messages", "Expected `array`"),
    ({"messages": ["hello"]}, 400, "messages", "messages[0]"),
    ({"messages": [{"content": "x"}]}, 400, "messages", "messages[0] must have a role"),
    ({"messages": [{"role": "user", "content": 1}]}, 400, "messages", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, "messages", "type text"),
    ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, None, "context is 1024"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, 400, "chat_template_kwargs", "no variable"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "status", "param", "message"), REFUSED, ids=str)
def test_refusals_of_a_chat(
    parameters: dict[str, Any], status: int, param: str | None, message: str, url: str
) -> None:
    refused(post(url, CHAT, {"messages": ASKED, **parameters}), status, param, message)


def refused(reply: Reply, status: int, param: str | None, message: str) -> None:
    assert reply.status == status, reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and message in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": []}, "prompt", "a list of either"),
        ({"prompt": [1, "a"]}, "prompt", "a list of either"),
        ({"prompt": [[1], 2]}, "prompt", "a list of either"),
        ({"prompt": [1.5]}, "prompt", "prompt[0]"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": ["fine", ""]}, None, "the prompt is empty"),
        ({"prompt": [[]]}, None, "the prompt is empty"),
        ({"prompt": [4096]}, None, "token 4096 is not in the vocabulary"),
        ({"prompt": [-1], "echo": True, "max_tokens": 0}, None, "token -1"),
        ({"prompt": [7] * 1024}, None, "context is 1024"),
        ({"prompt": [7] * 1025, "echo": True, "max_tokens": 0}, None, "exceed the context"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "1 or more"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "Expected `int"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "messages": []}, "messages", "no parameter messages"),
        ({"prompt": ["a"] * 33}, "n", "33 answers"),
    ],
    ids=str,
)
def test_refusals_of_a_text(
    parameters: dict[str, Any], param: str | None, message: str, url: str
) -> None:
    refused(post(url, TEXT, parameters), 400, param, message)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"prompt": "a", "seed": NaN}', b"\xff", b"[" * 60000]
)
def test_what_is_no_object(body: bytes, url: str) -> None:
    refused(post(url, TEXT, body), 400, None, "the body")


def test_other_refusals(url: str) -> None:
    refused(post(url, TEXT, b"x" * 70000), 413, None, "larger than 65536 bytes")
    refused(post(url, TEXT, b"{}", {}), 415, None, "application/json")
    refused(post(url, "/v1/embeddings", {}), 404, None, "Not Found")
    refused(get(url, TEXT), 405, None, "Method Not Allowed")
    refused(get(url, "/v1/models/gpt-5"), 404, "model", "this server has tiny")


def test_the_model_and_its_health(url: str) -> None:
    (model,) = ok(get(url, "/v1/models"))["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (NAME, "model", 1024)
    assert ok(get(url, f"/v1/models/{NAME}")) == model
    assert get(url, "/health").status == get(url, "/ping").status == 200


def test_more_than_is_taken_in(llm: LLM, idle: Callable[[], None]) -> None:
    with served(llm, max_requests=2) as url, connection(url) as opened:
        opened.request("POST", TEXT, json.dumps({**FOREVER, "n": 2, "stream": True}), JSON)
        assert opened.getresponse().readline()
        reply = post(url, TEXT, {"prompt": "a"})
        refused(reply, 429, None, "at most 2 answers at a time; try again later")
        assert reply.headers["retry-after"] == "1"
        opened.close()
        idle()
        assert text(url, prompt="a")
    idle()


@pytest.mark.parametrize("stream", [False, True])
def test_who_has_gone_is_forgotten(
    stream: bool, url: str, llm: LLM, idle: Callable[[], None]
) -> None:
    idle()
    with connection(url) as opened:
        body = {**FOREVER, "prompt": ["a", "b"], "echo": True, "logprobs": 1, "stream": stream}
        opened.request("POST", TEXT, json.dumps(body), JSON)
        while not (work := llm.open):
            time.sleep(0.001)
    idle()
    assert not any(one.finish_reason for one in work if isinstance(one, Answer)), "all was computed"


def test_an_engine_that_fails_leaves_nobody_waiting(
    tiny_w8a8: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = load(tiny_w8a8, block_size=16, kv_cache_tokens=2048)
    step, fails = llm.step, threading.Event()

    def failing() -> Any:
        if fails.is_set():
            raise RuntimeError("the device is gone")
        return step()

    monkeypatch.setattr(llm, "step", failing)
    replies: list[Reply] = []
    with served(llm) as url:
        threads = [
            threading.Thread(
                target=lambda more=more: replies.append(post(url, TEXT, {**FOREVER, **more}))
            )
            for more in ({}, {}, {"stream": True})
        ]
        for thread in threads:
            thread.start()
        while len(llm.open) < 3:
            time.sleep(0.001)
        fails.set()
        for thread in threads:
            thread.join(30)
        assert sorted(reply.status for reply in replies) == [200, 503, 503]
        for reply in replies:
            said = reply.events[-1] if reply.status == 200 else reply.json
            assert "the engine has failed, restart the server: the device is gone" in str(said)
        refused(get(url, "/health"), 503, None, "the device is gone")
        refused(post(url, TEXT, {"prompt": "a"}), 503, None, "the device is gone")
        assert get(url, "/v1/models").status == 200
    assert "RuntimeError: the device is gone" in capfd.readouterr().err
