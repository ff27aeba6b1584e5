"""LangChain's ChatOpenAI: whole answers, streams, batches, and tools that are left as text."""

from __future__ import annotations

import json

from handover.clients.program import client
from support.openai_server import ServerProgram

from qwen3_ascend.runtime import LLM

SCRIPT = """
import json, sys
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

@tool
def weather(city: str) -> str:
    "The weather in a city."
    return "rain"

chat = ChatOpenAI(
    base_url=sys.argv[1], api_key="none", model="tiny", temperature=0, stream_usage=True,
    max_retries=0,
)
questions = sys.argv[2:]
whole = chat.invoke([("system", "Be brief."), ("user", questions[0])])
chunks = [*chat.stream(questions[0])]
total = chunks[0]
for chunk in chunks[1:]:
    total += chunk
print(json.dumps({
    "system": whole.content,
    "finish": whole.response_metadata["finish_reason"],
    "usage": whole.usage_metadata,
    "stream": total.content,
    "stream usage": total.usage_metadata,
    "pieces": len(chunks),
    "batch": [one.content for one in chat.batch(questions)],
    "tools": chat.bind_tools([weather]).invoke(questions[0]).content,
    "stop": chat.bind(stop=["stream"]).invoke(questions[0]).content,
}))
"""

QUESTIONS = ("What does river mean?", "What does oxygen mean?", "What does house mean?")


def test_langchain(clients: str, server: ServerProgram, expected: LLM) -> None:
    said = json.loads(client(clients, "-c", SCRIPT, server.url, *QUESTIONS))
    texts = [answer.text for answer in expected.generate(QUESTIONS)]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    brief = expected.chat(messages)
    assert said["system"] == brief.text and said["finish"] == "stop"
    assert said["usage"]["input_tokens"] == len(brief.prompt_token_ids)
    assert said["usage"]["output_tokens"] == len(brief.token_ids)
    assert said["stream"] == texts[0] and said["pieces"] > 5
    assert said["stream usage"]["output_tokens"] > 5
    assert said["batch"] == texts
    assert said["tools"] == texts[0]  # this model's template does not read them
    assert said["stop"] == texts[0][: texts[0].index("stream")]
