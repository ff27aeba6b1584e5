"""Runs a converted checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_ascend.lazy import lazy_names

if TYPE_CHECKING:
    from qwen3_ascend.runtime.answer import Completion
    from qwen3_ascend.runtime.engine.request import SamplingParams
    from qwen3_ascend.runtime.llm import LLM, AnswerStream
    from qwen3_ascend.runtime.loading import load

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AnswerStream": "qwen3_ascend.runtime.llm",
        "Completion": "qwen3_ascend.runtime.answer",
        "LLM": "qwen3_ascend.runtime.llm",
        "SamplingParams": "qwen3_ascend.runtime.engine.request",
        "load": "qwen3_ascend.runtime.loading",
    },
)

__all__ = ["LLM", "AnswerStream", "Completion", "SamplingParams", "load"]
