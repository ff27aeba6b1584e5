"""Runs a converted checkpoint."""

from __future__ import annotations

from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.llm import LLM, AnswerStream, Completion
from qwen3_ascend.runtime.loading import load

__all__ = ["LLM", "AnswerStream", "Completion", "SamplingParams", "load"]
