"""The server's engine loop computes on the thread that has loaded the model, fed from another."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime import LLM
from qwen3_ascend.runtime.serving.engine_loop import EngineLoop, Job

pytestmark = pytest.mark.opposite_modes

PROMPTS = [f"What does {word} mean?" for word in ("river", "bicycle", "house", "oxygen")]
SHORT = SamplingParams(max_new_tokens=20)


async def ask(llm: LLM, engine: EngineLoop, prompt: str) -> list[int]:
    job = Job([llm.answer(llm.encode(prompt), SHORT)], [])
    engine.submit(job)
    return [token async for _, piece in job.pieces() for token in piece.token_ids]


async def ask_all(llm: LLM, engine: EngineLoop) -> list[list[int]]:
    given_up = Job([llm.answer(llm.encode(PROMPTS[0]), SHORT)], [])
    engine.submit(given_up)
    answers = await asyncio.gather(*(ask(llm, engine, prompt) for prompt in PROMPTS))
    engine.abort(given_up)
    return answers


@pytest.mark.parametrize("graph", [False, True])
def test_answers_are_those_of_the_cpu(checkpoints: dict[str, Path], graph: bool) -> None:
    llm = load(checkpoints["w8a8"], device="npu", kv_cache_tokens=4096, max_batch=4, graph=graph)
    cpu = load(checkpoints["w8a8"], device="cpu", kv_cache_tokens=4096, max_batch=4)
    engine, said = EngineLoop(llm), list[list[int]]()

    def clients() -> None:
        try:
            said.extend(asyncio.run(ask_all(llm, engine)))
        finally:
            engine.close("all is said")

    thread = threading.Thread(target=clients)
    thread.start()
    engine.run()
    thread.join()
    expected = cpu.generate(PROMPTS, SHORT)
    assert said == [list(answer.token_ids) for answer in expected]
    pool = llm._engine.scheduler.pool
    assert pool.free_blocks == pool.num_blocks - 1 and not llm.open
