"""OpenAI's own client is content with what the server says."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime import LLM

QUESTION = "What does river mean?"
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


def test_chat(client: OpenAI, expected: LLM) -> None:
    whole = expected.generate(QUESTION)[0].text
    (model,) = client.models.list()
    said = client.chat.completions.create(model=model.id, messages=ASKED)
    assert said.choices[0].message.content == whole and said.choices[0].finish_reason == "stop"
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model=model.id, messages=ASKED, stream=True, stream_options={"include_usage": True}
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole and usage == said.usage


def test_probabilities(client: OpenAI, expected: LLM) -> None:
    (answer,) = expected.generate(QUESTION, SamplingParams(max_new_tokens=3, logprobs=2))
    assert answer.logprobs is not None
    said = client.chat.completions.create(
        model="tiny", messages=ASKED, max_completion_tokens=3, logprobs=True, top_logprobs=2
    )
    logprobs = said.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    found = [one.logprob for one in logprobs.content]
    assert found == pytest.approx([one.chosen for one in answer.logprobs], abs=1e-4)
    assert [len(one.top_logprobs) for one in logprobs.content] == [2, 2, 2]


def test_completions(client: OpenAI, expected: LLM) -> None:
    tokens = expected.encode("As a noun, river", raw=True)
    said = client.completions.create(
        model="tiny", prompt=[tokens], max_tokens=4, echo=True, logprobs=1, n=2, temperature=0
    )
    (whole,) = expected.generate(tokens, SamplingParams(max_new_tokens=4))
    text = "As a noun, river" + whole.text
    assert [choice.text for choice in said.choices] == [text, text]
    logprobs = said.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(tokens) + 4


def test_a_stream_that_is_closed(client: OpenAI, llm: LLM) -> None:
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()


def test_errors_are_its_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has tiny") as missing:
        client.chat.completions.create(model="gpt-5", messages=ASKED)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        client.chat.completions.create(
            model="tiny", messages=ASKED, response_format={"type": "json_object"}
        )
    with pytest.raises(openai.BadRequestError, match="no parameter wiggle"):
        client.completions.create(model="tiny", prompt="a", extra_body={"wiggle": 1})
    with pytest.raises(openai.APIStatusError, match="larger than") as large:
        client.completions.create(model="tiny", prompt="a" * 70000)
    assert large.value.status_code == 413
