"""From parameters to work: encoding prompts, choosing defaults, checking what fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.answer import Answer, Score
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.engine.sampler import Logprobs, logprobs_of
from qwen3_ascend.runtime.llm import LLM
from qwen3_ascend.runtime.serving.parameters import ChatParameters, Parameters, TextParameters
from qwen3_ascend.runtime.serving.refusal import Refusal
from qwen3_ascend.runtime.serving.replies import ChatReply, Echo, Reply, Spelling, TextReply

MOST_STOPS = 64
"""Each costs a search in every new piece of text."""

MOST_LOGPROBS = 20
"""The most alternatives to each token that may be asked for; as with OpenAI and vLLM."""

DEFAULT_TEXT_TOKENS = 16
"""How long a continuation is that does not say it: what OpenAI documents for max_tokens of
/v1/completions. A chat goes on to the end of its turn."""

TEMPLATE_MACHINERY = frozenset({
    "chat_template", "conversation", "messages", "tokenize", "tokenizer_kwargs", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
})  # fmt: skip
"""Arguments of transformers' apply_chat_template that are no variables of a template."""

SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos",
)  # fmt: skip
"""Parameters that SamplingParams has by the same name."""


class PromptLogprobs:
    """Takes the logits of a prompt, and keeps the logarithms of its own tokens' probabilities."""

    def __init__(self, tokens: Sequence[int], count: int) -> None:
        self._tokens, self._count = tokens, count
        self.found: list[Logprobs] = []

    def __call__(self, rows: Tensor) -> None:
        """Takes rows float32 [R, vocab], each of which predicts the token after its own."""
        for row in rows:
            following = len(self.found) + 1
            if following < len(self._tokens):
                self.found.append(logprobs_of(row, self._tokens[following], self._count))


@dataclass(frozen=True)
class Prepared:
    """A client's request that fits; nothing of it has been computed.

    Attributes:
        answers: `n` to each prompt, those to the same one together.
        scores: of the prompts, where something is to be known of their tokens.
        replies: the writer of each answer; to be asked once the scores have ended.
        prompt_tokens: of all prompts.
    """

    answers: list[Answer]
    scores: list[Score]
    replies: Sequence[Reply]
    prompt_tokens: int


def prepare_chat(parameters: ChatParameters, llm: LLM, most: int) -> Prepared:
    """What a conversation comes to.

    Args:
        parameters: of the client.
        llm: that is to answer.
        most: answers that a request may ask for.

    Raises:
        Refusal, RequestError: if a parameter is out of range, or the conversation does not fit.
    """
    if parameters.top_logprobs is not None and not parameters.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")
    top = _checked_top("top_logprobs", parameters.top_logprobs or 0)
    params = _sampling(parameters, llm, top if parameters.logprobs else None)
    _check_count(params.n, most)
    tokens = _encode_messages(parameters, llm)
    limit = parameters.max_completion_tokens
    name = "max_tokens" if limit is None else "max_completion_tokens"
    limit = parameters.max_tokens if limit is None else limit
    answers = _answers(llm, tokens, params, name, limit)
    spelling, wants = Spelling(llm.tokenizer), bool(parameters.logprobs)
    replies = [ChatReply(index, spelling, wants) for index in range(params.n)]
    return Prepared(answers, [], replies, len(tokens))


def prepare_text(parameters: TextParameters, llm: LLM, most: int) -> Prepared:
    """What prompts that are to be continued come to; see `prepare_chat`."""
    top = None if parameters.logprobs is None else _checked_top("logprobs", parameters.logprobs)
    params = _sampling(parameters, llm, top)
    prompts = _prompts(parameters.prompt)
    _check_count(params.n * len(prompts), most)
    parts = [_continued(prompt, parameters, params, llm) for prompt in prompts]
    spelling = Spelling(llm.tokenizer)
    echoes = [part.echo for part in parts for _ in range(params.n)]
    return Prepared(
        [answer for part in parts for answer in part.answers],
        [score for part in parts for score in part.scores],
        [TextReply(at, spelling, top is not None, echo) for at, echo in enumerate(echoes)],
        sum(part.prompt_tokens for part in parts),
    )


@dataclass(frozen=True)
class _Continued:
    """What one prompt comes to; see Prepared."""

    answers: list[Answer]
    scores: list[Score]
    echo: Echo | None
    prompt_tokens: int


def _continued(
    prompt: str | list[int], parameters: TextParameters, params: SamplingParams, llm: LLM
) -> _Continued:
    tokens, echoes = llm.encode(prompt, raw=True), bool(parameters.echo)
    limit = DEFAULT_TEXT_TOKENS if parameters.max_tokens is None else parameters.max_tokens
    if not echoes:
        return _Continued(_answers(llm, tokens, params, "max_tokens", limit), [], None, len(tokens))
    logprobs = PromptLogprobs(tokens, params.logprobs or 0)
    is_wanted = params.logprobs is not None or limit == 0  # something has to check the tokens
    scores = [llm.score(tokens, logprobs)] if is_wanted else []
    answers = _answers(llm, tokens, params, "max_tokens", limit) if limit else []
    text = prompt if isinstance(prompt, str) else llm.tokenizer.decode(tokens)
    return _Continued(answers, scores, Echo(text, tokens, logprobs.found), len(tokens))


def _answers(
    llm: LLM, tokens: list[int], params: SamplingParams, name: str, limit: int | None
) -> list[Answer]:
    """The `n` answers to a prompt, of `limit` tokens at most, which the client calls `name`."""
    bounded = dataclasses.replace(params, max_new_tokens=_new_tokens(llm, tokens, name, limit))
    return [llm.answer(tokens, bounded, sample) for sample in range(params.n)]


def _sampling(parameters: Parameters, llm: LLM, logprobs: int | None) -> SamplingParams:
    """How tokens are chosen: as the client says, else as the checkpoint does."""
    given = {name: getattr(parameters, name) for name in SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("top_k") == -1:  # vLLM's way to say that all are kept
        given["top_k"] = 0
    stop = parameters.stop or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MOST_STOPS:
        raise Refusal(400, f"{len(stops)} stop strings are more than {MOST_STOPS}", "stop")
    try:
        return dataclasses.replace(llm.default_params, **given, stop=stops, logprobs=logprobs)
    except RequestError as error:
        name = str(error).partition(" ")[0]
        raise Refusal(400, str(error), name, "out_of_range") from None


def _check_count(answers: int, most: int) -> None:
    if answers > most:
        raise Refusal(
            400,
            f"{answers} answers are asked for, and the server takes at most {most} at a time",
            "n",
        )


def _checked_top(name: str, count: int) -> int:
    if not 0 <= count <= MOST_LOGPROBS:
        raise Refusal(400, f"{name} must be between 0 and {MOST_LOGPROBS}", name)
    return count


def _new_tokens(llm: LLM, tokens: Sequence[int], name: str, limit: int | None) -> int:
    """Bound on the tokens to generate: what was asked for if it fits, else what is left."""
    room = llm.longest - len(tokens)
    if limit is None:
        return max(room, 1)
    if limit < 1:
        raise Refusal(400, f"{name} must be 1 or more", name)
    if 0 < room < limit:
        raise Refusal(
            400,
            f"the prompt has {len(tokens)} tokens and {name} is {limit}, but there is room for "
            f"{llm.longest} together: shorten the prompt, or ask for at most {room}",
            name,
            "context_length_exceeded",
        )
    return limit


def _prompts(given: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list of prompts."""
    if isinstance(given, str):
        return [given]
    numbers = [one for one in given if isinstance(one, int)]
    if numbers and len(numbers) == len(given):
        return [numbers]
    if numbers or not given:
        raise Refusal(400, "prompt must be text, token ids, or a list of either", "prompt")
    return [one for one in given if not isinstance(one, int)]


def _encode_messages(parameters: ChatParameters, llm: LLM) -> list[int]:
    variables = dict(parameters.chat_template_kwargs or {})
    for name in variables:
        if name in TEMPLATE_MACHINERY:
            raise Refusal(400, f"{name} is no variable of a template", "chat_template_kwargs")
    if parameters.tools and parameters.tool_choice != "none":
        variables["tools"] = parameters.tools
    if parameters.enable_thinking is not None:
        variables["enable_thinking"] = parameters.enable_thinking
    messages = [_message(one, f"messages[{at}]") for at, one in enumerate(parameters.messages)]
    if not messages:
        raise Refusal(400, "messages is empty", "messages")
    return llm.encode_messages(messages, **variables)


def _message(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message as templates know it: its content is one text, and what OpenAI calls a developer is
    the system."""
    role = given.get("role")
    if not isinstance(role, str):
        raise Refusal(400, f"{place} must have a role", "messages")
    role = "system" if role == "developer" else role
    return {**given, "role": role, "content": _text(given.get("content"), f"{place}.content")}


def _text(content: object, place: str) -> str:
    if content is None:  # of an assistant that has called tools
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text, content)):
        return "\n".join(part["text"] for part in content)
    raise Refusal(400, f"{place} must be text, or a list of parts of type text", "messages")


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )
