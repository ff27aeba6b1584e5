"""What a user of the Python interface sees: answers, streams, stops, refusals."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny_models

from qwen3_ascend import SamplingParams, convert_checkpoint, load
from qwen3_ascend.errors import OptionError, RequestError
from qwen3_ascend.runtime import LLM

QUESTIONS = ["What does river mean?", "What does bicycle mean?", "What does oxygen mean?",
             "What does house mean?", "What does create mean?"]  # fmt: skip
SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(tiny_w8a8: Path) -> LLM:
    return load(tiny_w8a8, block_size=16, kv_cache_tokens=4096)


@pytest.fixture
def llm(shared: LLM) -> LLM:
    """The model, with every block free before and after the test."""
    assert everything_is_free(shared)
    return shared


def everything_is_free(llm: LLM) -> bool:
    scheduler = llm._engine.scheduler
    scheduler.pool.check_integrity(scheduler.requests)
    return scheduler.pool.free_blocks == scheduler.pool.num_blocks - 1 and not scheduler.busy


@pytest.fixture(autouse=True)
def nothing_is_left_over(shared: LLM) -> object:
    yield
    assert everything_is_free(shared)


def test_it_knows_what_it_learnt(tiny_bf16: Path, llm: LLM) -> None:
    (answer,) = llm.generate(QUESTIONS[:1])
    assert "stream of water" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] in llm.eos_ids
    assert "<|im_end|>" not in answer.text
    assert list(answer.prompt_token_ids) == llm.encode(QUESTIONS[0])
    (same,) = load(tiny_bf16, kv_cache_tokens=1024).generate(QUESTIONS[:1])
    assert "stream of water" in same.text


def test_forms_of_a_prompt(llm: LLM) -> None:
    (text,) = llm.generate(QUESTIONS[0], SHORT)
    tokens = llm.encode(QUESTIONS[0])
    assert llm.generate(tokens, SHORT) == [text]
    mixed: list[str | list[int]] = [tokens, QUESTIONS[0]]
    assert llm.generate(mixed, SHORT) == [text, text]
    rendered = llm.render([{"role": "user", "content": QUESTIONS[0]}])
    assert llm.generate(rendered, SHORT, raw=True) == [text]
    assert llm.chat([{"role": "user", "content": QUESTIONS[0]}], SHORT) == text
    assert llm.generate([]) == []
    assert llm.generate(QUESTIONS[0], SHORT, raw=True) != [text]
    thinking = llm.generate(QUESTIONS[0], SHORT, enable_thinking=True)[0]
    assert thinking.prompt_token_ids != text.prompt_token_ids
    with pytest.raises(RequestError):
        llm.generate([[1, 2], 3])  # type: ignore[arg-type]


def test_parameters_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    answers = llm.generate(QUESTIONS[:3], params)
    assert [len(answer.token_ids) for answer in answers] == [1, 5, 3]
    assert {answer.finish_reason for answer in answers} == {"length"}
    with pytest.raises(RequestError, match="2 SamplingParams for 3 prompts"):
        llm.generate(QUESTIONS[:3], params[:2])


def test_more_prompts_than_a_batch_holds(tiny_w8a8: Path) -> None:
    """The integers are exact and rows are computed apart, but the rounding of float32 sums may
    depend on their number: in float32 no token is that close."""
    wide = load(tiny_w8a8, dtype="float32", block_size=16, kv_cache_tokens=4096)
    narrow = load(
        tiny_w8a8, dtype="float32", block_size=16, kv_cache_tokens=160, max_batch=2, step_tokens=5
    )
    params = SamplingParams(max_new_tokens=10)
    prompts = QUESTIONS * 2
    alone = [wide.generate(prompt, params)[0] for prompt in QUESTIONS] * 2
    assert wide.generate(prompts, params) == alone
    assert narrow.generate(prompts, params) == alone
    assert everything_is_free(narrow) and everything_is_free(wide)


def test_stream_is_generate(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=20)
    for question in QUESTIONS[:3]:
        stream = llm.stream(question, params)
        pieces = list(stream)
        assert len(pieces) > 5 and all(pieces)
        (whole,) = llm.generate(question, params)
        assert "".join(pieces) == whole.text and stream.completion() == whole


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(QUESTIONS[0])
    assert next(stream)
    assert not everything_is_free(llm)
    stream.close()
    assert everything_is_free(llm)
    assert list(stream) == []
    stream.close()
    unread = llm.stream(QUESTIONS[0])
    unread.close()
    assert everything_is_free(llm)


def test_a_stream_that_is_dropped(llm: LLM) -> None:
    for started in (True, False):
        stream = llm.stream(QUESTIONS[0])
        if started:
            next(stream)
        del stream
        gc.collect()
        assert everything_is_free(llm)


def test_two_streams_in_turn(llm: LLM) -> None:
    """Whoever is asked moves both forward; neither may lose what it did not ask for."""
    expected = [llm.generate(question)[0].text for question in QUESTIONS[:2]]
    streams = [llm.stream(question) for question in QUESTIONS[:2]]
    texts = ["", ""]
    for _ in range(200):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    assert texts == expected


def test_a_batch_while_a_stream_is_open(llm: LLM) -> None:
    expected = [llm.generate(question)[0].text for question in QUESTIONS[:2]]
    stream = llm.stream(QUESTIONS[0])
    start = next(stream)
    assert llm.generate(QUESTIONS[1])[0].text == expected[1]
    assert start + "".join(stream) == expected[0]


def test_logits_while_a_stream_is_open(llm: LLM) -> None:
    expected, whole = llm.logits([1, 2, 3]), llm.generate(QUESTIONS[0])[0].text
    stream = llm.stream(QUESTIONS[0])
    text = next(stream)
    assert torch.allclose(llm.logits([1, 2, 3]), expected, atol=1e-4)
    assert text + "".join(stream) == whole


def test_a_stream_that_nobody_reads_stops_at_its_own_stop_string(llm: LLM) -> None:
    """Somebody else's steps move it forward; it must not run past its end."""
    (whole,) = llm.generate(QUESTIONS[0])
    stream = llm.stream(QUESTIONS[0], SamplingParams(stop="stream"))
    text = next(stream)
    llm.generate(QUESTIONS[1])
    llm.generate(QUESTIONS[1])
    assert everything_is_free(llm), "it still runs"
    assert text + "".join(stream) == whole.text[: whole.text.index("stream")]
    assert stream.completion().finish_reason == "stop"


def test_several_answers_to_one_prompt(llm: LLM) -> None:
    hot = SamplingParams(temperature=2.0, seed=3, max_new_tokens=12, n=3)
    answers = llm.generate(QUESTIONS[:2], hot)
    assert [one.index for one in answers] == [0, 1, 2, 0, 1, 2]
    assert len({one.token_ids for one in answers[:3]}) == 3
    assert llm.generate(QUESTIONS[:2], hot) == answers
    alone = llm.generate(QUESTIONS[0], SamplingParams(temperature=2.0, seed=3, max_new_tokens=12))
    assert alone[0].token_ids == answers[0].token_ids
    with pytest.raises(RequestError, match="n > 1"):
        llm.stream(QUESTIONS[0], hot)


def test_logprobs_are_the_models_own(tiny_bf16: Path) -> None:
    """In float32, where a step of one row and one of many agree to the last digits."""
    llm = load(tiny_bf16, dtype="float32", kv_cache_tokens=1024)
    params = SamplingParams(max_new_tokens=6, logprobs=3, temperature=0.7, seed=1)
    (answer,) = llm.generate(QUESTIONS[0], params)
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    tokens = [*answer.prompt_token_ids, *answer.token_ids]
    expected = llm.logits(tokens).log_softmax(-1)
    for index, (token, said) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        row = expected[len(answer.prompt_token_ids) - 1 + index]
        assert said.chosen == pytest.approx(float(row[token]), abs=1e-3)
        values, best = row.topk(3)
        assert [one for one, _ in said.top] == best.tolist()
        assert [value for _, value in said.top] == pytest.approx(values.tolist(), abs=1e-3)
    assert llm.generate(QUESTIONS[0])[0].logprobs is None


def test_a_bar_over_many_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    short = SamplingParams(max_new_tokens=2)
    llm.generate(QUESTIONS[:2], short)  # standard error is no terminal here
    assert capsys.readouterr().err == ""
    llm.generate(QUESTIONS[:2], short, progress=True)
    assert "answers: 100%" in capsys.readouterr().err


def test_stop_strings(llm: LLM) -> None:
    (whole,) = llm.generate(QUESTIONS[0])
    at = whole.text.index("stream of water")
    # The stop begins and ends in the middle of tokens, so that it is never one token's text.
    for stop in ("ream of wat", "stream", whole.text[at - 1 : at + 9], whole.text[:3], "."):
        params = SamplingParams(stop=stop)
        (answer,) = llm.generate(QUESTIONS[0], params)
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.finish_reason == "stop"
        assert len(answer.token_ids) < len(whole.token_ids)
        stream = llm.stream(QUESTIONS[0], params)
        assert "".join(stream) == answer.text
    (answer,) = llm.generate(
        QUESTIONS[0], SamplingParams(stop=("never said", "of water", "stream"))
    )
    assert answer.text == whole.text[:at]
    (answer,) = llm.generate(QUESTIONS[0], SamplingParams(stop="never said"))
    assert (answer.text, answer.token_ids) == (whole.text, whole.token_ids)


def test_text_withheld_for_a_stop_comes_at_the_end(llm: LLM) -> None:
    (whole,) = llm.generate(QUESTIONS[0])
    params = SamplingParams(stop=whole.text[-4:] + "!")
    stream = llm.stream(QUESTIONS[0], params)
    assert "".join(stream) == whole.text
    assert stream.completion().finish_reason == "stop"  # by its end-of-sequence token


def test_ends(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = llm.generate(QUESTIONS[0])
    for count in (1, 3, len(whole.token_ids) - 1):
        (cut,) = llm.generate(QUESTIONS[0], SamplingParams(max_new_tokens=count))
        assert cut.token_ids == whole.token_ids[:count] and cut.finish_reason == "length"
    exactly = SamplingParams(max_new_tokens=len(whole.token_ids))
    assert llm.generate(QUESTIONS[0], exactly)[0].finish_reason == "stop"
    # A second end-of-sequence token ends as the first does.
    early = whole.token_ids[5]
    monkeypatch.setattr(llm, "eos_ids", llm.eos_ids | {early})
    (ended,) = llm.generate(QUESTIONS[0])
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(early) + 1]
    assert ended.finish_reason == "stop"
    onward = SamplingParams(ignore_eos=True, max_new_tokens=len(whole.token_ids) + 5)
    (ignoring,) = llm.generate(QUESTIONS[0], onward)
    assert len(ignoring.token_ids) == len(whole.token_ids) + 5


def test_two_end_tokens_come_from_generation_config(llm: LLM) -> None:
    assert llm.eos_ids == {0, 2}


def test_the_end_of_the_context(llm: LLM) -> None:
    context = llm.config.context_length
    prompt = [5 + number % 900 for number in range(context - 3)]
    (answer,) = llm.generate(prompt, SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert len(answer.token_ids) == 3 and answer.finish_reason == "length"
    for length in (context, context + 1):
        with pytest.raises(RequestError, match=f"{length} tokens.*context is {context}"):
            llm.generate([7] * length)
    assert llm.logits([7] * context).shape == (context, llm.config.vocab_size)
    with pytest.raises(RequestError, match="exceed the context"):
        llm.logits([7] * (context + 1))


REFUSED: dict[str, Callable[[LLM], object]] = {
    "empty": lambda llm: llm.generate([[]]),
    "empty text": lambda llm: llm.generate("", raw=True),
    "token beyond the vocabulary": lambda llm: llm.generate([1, 4096]),
    "negative token": lambda llm: llm.generate([-1]),
    "one of several": lambda llm: llm.generate(["fine", "also fine", ""], raw=True),
    "empty stream": lambda llm: llm.stream("", raw=True),
    "empty logits": lambda llm: llm.logits([]),
    "surrogate": lambda llm: llm.generate("caf\udce9"),
    "messages": lambda llm: llm.chat([{"role": "user"}]),
}


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_refusals_come_before_the_work(ask: Callable[[LLM], object], llm: LLM) -> None:
    with pytest.raises(RequestError):
        ask(llm)
    assert everything_is_free(llm)
    assert "stream of water" in llm.generate(QUESTIONS[0])[0].text


def test_a_cache_that_is_too_small(tiny_w8a8: Path) -> None:
    llm = load(tiny_w8a8, block_size=16, kv_cache_tokens=40)
    with pytest.raises(RequestError, match="room for 60 tokens.*holds 48.*kv_cache_tokens"):
        llm.generate([7] * 20, SamplingParams(max_new_tokens=40))
    with pytest.raises(RequestError, match="cache holds 48"):
        llm.logits([7] * 49)
    (answer,) = llm.generate([7] * 20, SamplingParams(max_new_tokens=28, ignore_eos=True))
    assert len(answer.token_ids) == 28
    assert llm.logits([7] * 48).shape[0] == 48
    assert everything_is_free(llm)


@pytest.mark.parametrize("name", ["block_size", "max_batch", "step_tokens", "kv_cache_tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_out_of_range(name: str, value: int, tiny_w8a8: Path) -> None:
    with pytest.raises(OptionError, match=name):
        load(tiny_w8a8, **{name: value})  # type: ignore[arg-type]


def test_unknown_device_and_dtype(tiny_w8a8: Path) -> None:
    with pytest.raises(OptionError, match="'tpu'.*cpu"):
        load(tiny_w8a8, device="tpu")
    with pytest.raises(OptionError, match="'int4'.*bfloat16"):
        load(tiny_w8a8, dtype="int4")


def test_sampling_repeats_by_its_seed(llm: LLM) -> None:
    hot = SamplingParams(temperature=2.0, seed=1, max_new_tokens=20)
    first = llm.generate(QUESTIONS[0], hot)
    assert llm.generate(QUESTIONS[0], hot) == first
    assert llm.generate([QUESTIONS[0]] * 3, hot) == first * 3
    other = SamplingParams(temperature=2.0, seed=2, max_new_tokens=20)
    assert llm.generate(QUESTIONS[0], other) != first


def test_sampling_defaults_of_the_checkpoint(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    path = source / "generation_config.json"
    convert_checkpoint(source, tmp_path / "without")
    llm = load(tmp_path / "without", kv_cache_tokens=64)
    assert llm.default_params == SamplingParams() and llm.eos_ids == {2}
    path.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95}')
    convert_checkpoint(source, tmp_path / "with")
    llm = load(tmp_path / "with", kv_cache_tokens=64)
    assert llm.default_params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
