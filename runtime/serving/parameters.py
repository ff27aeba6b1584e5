"""The parameters of a request: which there are, of which type, and which have no effect here.

Source of names and meanings: OpenAI's API reference; those that it does not have (top_k, min_p,
repetition_penalty, ignore_eos, chat_template_kwargs) are named as vLLM names them.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, TypeVar

import msgspec

from qwen3_ascend.runtime.serving.refusal import Refusal

P = TypeVar("P", bound="Parameters")

WITHOUT_EFFECT = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
"""Notes for OpenAI's own accounts and caches: they change nothing about an answer."""

ONLY: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters that are known and not supported, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a stream: whether the number of tokens is told at its end, and in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding of OpenAI's; we send none


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of completion have in common. None means: not given."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TextParameters(Parameters, frozen=True, kw_only=True):
    """Of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class ChatParameters(Parameters, frozen=True, kw_only=True):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def parse(body: bytes, kind: type[P]) -> P:
    """The parameters in the body of a request.

    Raises:
        Refusal: naming the parameter that is unknown, not supported, missing, or of a wrong type.
    """
    try:
        data = msgspec.json.decode(body)
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(data).__name__}")
    names = kind.__struct_fields__
    known: dict[str, Any] = {}
    for name, value in data.items():
        if name in names:
            known[name] = value
        elif value is not None:
            _check_has_no_effect(name, value, names)
    return _converted(known, kind)


def _check_has_no_effect(name: str, value: object, names: tuple[str, ...]) -> None:
    if name in WITHOUT_EFFECT:
        return
    if name not in ONLY:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise Refusal(400, f"there is no parameter {name}{meant}", name, "unknown_parameter")
    if value not in ONLY[name]:
        taken = " or ".join(json.dumps(one) for one in ONLY[name])
        only = f"; only {taken} is taken" if taken else ""
        raise Refusal(400, f"{name} is not supported{only}", name, "unsupported_parameter")


def _converted(data: dict[str, Any], kind: type[P]) -> P:
    if "tool_choice" in data:
        _check_has_no_effect("tool_choice", data["tool_choice"] or "auto", ())
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        said, _, path = str(error).partition(" - at ")
        place = path.strip("`").removeprefix("$.")
        if not place:  # of the whole: something is missing
            name = said.rpartition("field ")[2].strip("`")
            raise Refusal(400, f"{name} is missing", name, "missing_parameter") from None
        param = place.partition(".")[0].partition("[")[0]
        raise Refusal(400, f"{place}: {said}", param, "invalid_type") from None
