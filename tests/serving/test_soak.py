"""Many short requests of all kinds at once, some of whose clients go away: nothing gets lost.

QWEN3_ASCEND_SOAK=10000 .venv/bin/python -m pytest -s tests/serving/test_soak.py
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.openai_server import served

from qwen3_ascend import SamplingParams
from qwen3_ascend.runtime import LLM

REQUESTS = int(os.environ.get("QWEN3_ASCEND_SOAK", "500"))
CLIENTS = 24
PATIENCE = 60
"""Seconds after which a request counts as stuck."""

MOST_GROWTH = 16 << 20
"""Bytes by which the process, its clients included, may grow after a fifth of the requests."""

ENOUGH = 5000
"""Requests after a fifth of which memory allocators have got what they keep."""

WORDS = ("river", "bicycle", "oxygen", "house", "create", "water", "mountain", "teacher")
WAYS = ("whole", "whole", "stream", "stream", "leave", "leave in a stream", "break off")


@dataclass(frozen=True)
class Case:
    """A request, and the texts that it is answered with."""

    path: str
    body: dict[str, Any]
    texts: list[str]


def cases(llm: LLM) -> list[Case]:
    """Chats and texts with parameters of all kinds; what is drawn is drawn with a seed."""
    chance = random.Random(1)
    return [
        make(llm, word, chance) for word in WORDS for make in (_chat, _chat, _text, _text, _text)
    ]


def _chat(llm: LLM, word: str, chance: random.Random) -> Case:
    params = _params(chance)
    question = f"What does {word} mean?"
    answers = llm.generate(question, params)
    body = {"messages": [{"role": "user", "content": question}], **_parameters(params)}
    return Case("/v1/chat/completions", body, [answer.text for answer in answers])


def _text(llm: LLM, word: str, chance: random.Random) -> Case:
    params, echo = _params(chance), chance.random() < 0.4
    prompts = [f"As a {kind}, {word} means" for kind in ("noun", "verb")[: chance.randint(1, 2)]]
    answers = llm.generate(prompts, params, raw=True)
    begun = [prompt for prompt in prompts for _ in range(params.n)] if echo else [""] * len(answers)
    body: dict[str, Any] = {"prompt": prompts, "echo": echo, **_parameters(params)}
    if chance.random() < 0.4:
        body["logprobs"] = chance.randint(0, 3)
    texts = [prompt + answer.text for prompt, answer in zip(begun, answers, strict=True)]
    return Case("/v1/completions", body, texts)


def _params(chance: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=chance.choice((0.0, 0.0, 1.5)),
        seed=chance.randint(0, 99),
        max_new_tokens=chance.randint(1, 24),
        n=chance.choice((1, 1, 1, 2, 3)),
        stop=chance.choice(((), (), ("of",), (" the", "a "))),
        presence_penalty=chance.choice((0.0, 0.0, 0.7)),
        repetition_penalty=chance.choice((1.0, 1.0, 1.2)),
        top_p=chance.choice((1.0, 0.8)),
        ignore_eos=chance.random() < 0.2,
    )


def _parameters(params: SamplingParams) -> dict[str, Any]:
    given = dataclasses.asdict(params)
    del given["logprobs"]
    return {"max_tokens": given.pop("max_new_tokens"), **given}


class Soak:
    """Clients that send cases until enough have been sent."""

    def __init__(self, url: str, chosen: list[Case], count: int) -> None:
        self._host = urlsplit(url).hostname or ""
        self._port = urlsplit(url).port or 0
        self._cases, self._left = chosen, iter(range(count))
        self._chance = random.Random(2)
        self.ended: Counter[str] = Counter()
        self.memory: list[int] = []

    async def run(self) -> None:
        """Sends all of them."""
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))

    async def _client(self) -> None:
        for number in self._left:
            if number % max(REQUESTS // 10, 1) == 0:
                self.memory.append(resident())
            case, way = self._chance.choice(self._cases), self._chance.choice(WAYS)
            await asyncio.wait_for(self._send(case, way), PATIENCE)

    async def _send(self, case: Case, way: str) -> None:
        body = {**case.body, "stream": "stream" in way}
        status, ended = 429, way
        while status == 429:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                await self._post(writer, case.path, json.dumps(body).encode(), way)
                if way == "break off":
                    break
                if way == "leave":
                    await asyncio.sleep(self._chance.random() * 0.05)
                    break
                status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
                if status == 429:
                    self.ended["again"] += 1
                    await asyncio.sleep(0.02)
                elif way == "leave in a stream":
                    await reader.readuntil(b"\n\n")
                else:
                    self._compare(case, await reader.read(), status)
            finally:
                writer.close()
        self.ended[ended] += 1

    async def _post(self, writer: asyncio.StreamWriter, path: str, body: bytes, way: str) -> None:
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        )
        writer.write(body[: len(body) // 2] if way == "break off" else body)
        await writer.drain()

    def _compare(self, case: Case, data: bytes, status: int) -> None:
        assert status == 200, data
        assert _texts(data) == case.texts, case


def _texts(data: bytes) -> list[str]:
    """The texts of a response, whole or streamed."""
    texts: dict[int, str] = {}
    for one in _objects(data):
        assert "error" not in one, one
        for choice in one["choices"]:
            message = choice.get("message") or choice.get("delta") or {}
            text = choice.get("text") or message.get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return [texts[index] for index in sorted(texts)]


def _objects(data: bytes) -> Iterator[Any]:
    """The JSON objects of a body, chunked or not: each stands on a line of its own."""
    lines = [line.removeprefix(b"data: ") for line in data.splitlines()]
    assert b"data: " not in data or b"[DONE]" in lines
    yield from (json.loads(line) for line in lines if line.startswith(b"{"))


def touch_every_block(llm: LLM) -> None:
    """Memory of the cache is the process's own only once it has been written to."""
    capacity, length = llm._engine.scheduler.pool.capacity, llm.longest
    for _ in range(-(-capacity // length)):
        llm.logits([7] * length)


def resident() -> int:
    """Bytes of memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_soak(llm: LLM, expected: LLM, idle: Callable[[], None]) -> None:
    chosen = cases(expected)
    touch_every_block(llm)
    started = time.monotonic()
    with served(llm, max_requests=48) as url:
        soak = Soak(url, chosen, REQUESTS)
        asyncio.run(soak.run())
        idle()
    seconds, memory = time.monotonic() - started, [*soak.memory, resident()]
    sizes = " ".join(f"{size / (1 << 20):.0f}" for size in memory)
    print(f"\n{REQUESTS} requests in {seconds:.0f} s: {dict(soak.ended)}; MiB: {sizes}")
    assert sum(soak.ended.values()) - soak.ended["again"] == REQUESTS
    assert REQUESTS < ENOUGH or memory[-1] - memory[2] < MOST_GROWTH
    assert not llm._engine._sampler._generators and not llm._engine._sampler._penalties._seen
