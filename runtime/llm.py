"""What a user holds: prompts in, text out."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.engine.engine import Engine, TokenEvent
from qwen3_ascend.runtime.engine.request import FinishReason, Request, SamplingParams
from qwen3_ascend.runtime.engine.sampler import Logprobs
from qwen3_ascend.runtime.text_stream import StopFilter
from qwen3_ascend.runtime.tokenizer import Message, NoTokenizer, Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids that are taken as they are."""


@dataclass(frozen=True)
class Completion:
    """One finished answer.

    Attributes:
        text: without special tokens and without the stop string; empty if the checkpoint has no
            tokenizer.
        token_ids: every generated token, the end-of-sequence token included.
        prompt_token_ids: what the model was given.
        finish_reason: "stop" (end of sequence or a stop string) or "length".
        index: which of the answers to its prompt it is, counted from 0.
        logprobs: for each generated token, if SamplingParams asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    index: int = 0
    logprobs: tuple[Logprobs, ...] | None = None


class LLM:
    """A loaded checkpoint; made by `load`. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        default_params: SamplingParams,
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.default_params = default_params
        """What generation_config.json asks for; used where no SamplingParams are given."""
        self._open: dict[int, _Answer] = {}

    @property
    def config(self) -> Qwen3Config:
        """The configuration of the model."""
        return self._engine.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        raw: bool = False,
        enable_thinking: bool | None = None,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Answers a batch of prompts.

        Args:
            prompts: texts or lists of token ids. A text becomes the user's turn of a conversation
                if the checkpoint has a chat template; token ids are taken as they are.
            params: for all prompts or one for each; default `default_params`.
            raw: continue texts as they are, without the chat template; what the tokenizer itself
                puts around a text, such as a first token, is added as transformers does.
            enable_thinking: passed to the chat template; None leaves its default.
            progress: whether to show a bar on standard error; None shows one for several answers
                where that is a terminal.

        Returns:
            The completions of each prompt, in order: one each, or `n` that stand together.

        Raises:
            RequestError: before anything runs, if a prompt does not fit.
        """
        batch = _as_batch(prompts)
        chosen = self._params_for(batch, params)
        tokens = [self.encode(p, raw=raw, enable_thinking=enable_thinking) for p in batch]
        answers = [
            self._answer(ids, one, sample)
            for ids, one in zip(tokens, chosen, strict=True)
            for sample in range(one.n)
        ]
        try:
            with _bar(len(answers), progress) as bar:
                self._start(answers)
                while any(answer.finish_reason is None for answer in answers):
                    self._advance()
                    bar.update(sum(a.finish_reason is not None for a in answers) - bar.n)
        finally:
            self._abandon(answers)
        return [answer.completion() for answer in answers]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        enable_thinking: bool | None = None,
    ) -> AnswerStream:
        """Answers one prompt piece by piece; arguments as for `generate`.

        Returns:
            An iterator of text pieces; its `completion()` is the whole once it is exhausted.

        Raises:
            RequestError: if the prompt does not fit, or several answers are asked for.
        """
        tokens = self.encode(prompt, raw=raw, enable_thinking=enable_thinking)
        chosen = params or self.default_params
        if chosen.n != 1:
            raise RequestError("a stream is one answer; open several, or use generate for n > 1")
        return AnswerStream(self, self._answer(tokens, chosen, 0))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> Completion:
        """Answers a conversation.

        Args:
            messages: oldest first, such as [{"role": "user", "content": "Hello"}].
            params: default `default_params`.
            enable_thinking: passed to the chat template; None leaves its default.
            variables: anything else the template reads, such as tools.

        Raises:
            RequestError: if the checkpoint has no chat template, or it refuses the messages.
        """
        tokens = self.encode_messages(messages, enable_thinking=enable_thinking, **variables)
        return self.generate([tokens], params)[0]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Teacher-forced logits float32 [T, vocab]; row i predicts token i + 1.

        All of them are in memory at once, 0.6 MB a token with Qwen3's vocabulary.

        Raises:
            RequestError: if the tokens are unknown or do not fit.
        """
        return torch.cat([*self._engine.score(token_ids)])

    def render(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, **variables: Any
    ) -> str:
        """The text that the chat template makes of a conversation."""
        return self.tokenizer.render(messages, enable_thinking=enable_thinking, **variables)

    def encode_messages(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, **variables: Any
    ) -> list[int]:
        """The token ids that the model is given for a conversation."""
        text = self.render(messages, enable_thinking=enable_thinking, **variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(
        self, prompt: Prompt, *, raw: bool = False, enable_thinking: bool | None = None
    ) -> list[int]:
        """The token ids that the model is given for a prompt."""
        if not isinstance(prompt, str):
            return list(prompt)
        if raw or not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(prompt)
        message = {"role": "user", "content": prompt}
        return self.encode_messages([message], enable_thinking=enable_thinking)

    def _params_for(
        self, batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * len(batch)
        if len(params) != len(batch):
            raise RequestError(f"{len(params)} SamplingParams for {len(batch)} prompts")
        return list(params)

    def _answer(self, tokens: list[int], params: SamplingParams, sample: int) -> _Answer:
        if params.stop_strings and isinstance(self.tokenizer, NoTokenizer):
            raise RequestError("stop strings need a tokenizer, and this checkpoint has none")
        request = self._engine.request(tokens, params, self.eos_ids, sample)
        return _Answer(request, self.tokenizer)

    def _start(self, answers: Sequence[_Answer]) -> None:
        for answer in answers:
            self._open[answer.request.number] = answer
            self._engine.queue(answer.request)

    def _advance(self) -> None:
        """Computes a step, which moves every open answer, and gives each what it got."""
        for event in self._engine.step():
            answer = self._open.get(event.request.number)
            if answer is not None and isinstance(event, TokenEvent):
                answer.take(event)
                if answer.finish_reason:
                    self._abandon([answer])

    def _abandon(self, answers: Sequence[_Answer]) -> None:
        for answer in answers:
            self._open.pop(answer.request.number, None)
            self._engine.abort(answer.request)


class AnswerStream:
    """An answer as it comes. Iterate for pieces of text; closing it early stops the work."""

    def __init__(self, llm: LLM, answer: _Answer) -> None:
        self._llm, self._answer = llm, answer
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating."""
        self._pieces.close()
        self._llm._abandon([self._answer])

    def completion(self) -> Completion:
        """What was generated so far, or the whole answer once the stream is exhausted."""
        return self._answer.completion()

    def _run(self) -> Generator[str, None, None]:
        answer, shown = self._answer, 0
        try:
            self._llm._start([answer])
            while answer.finish_reason is None or shown < len(answer.text):
                if shown < len(answer.text):
                    piece = answer.text[shown:]
                    shown = len(answer.text)
                    yield piece
                else:
                    self._llm._advance()
        finally:
            self._llm._abandon([answer])


class _Answer:
    """A request and the text it has produced so far, fed by the engine's events."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._stream = tokenizer.stream()
        self._filter = StopFilter(request.params.stop_strings)

    def take(self, event: TokenEvent) -> None:
        """Decodes a token; a stop string that it completes ends the answer."""
        self._tokens.append(event.token)
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)
        self.text += self._filter.push(self._stream.push(event.token))
        if event.finish_reason and not self._filter.stopped:
            self.text += self._filter.push(self._stream.finish())
            self.text += self._filter.finish()
        self.finish_reason = "stop" if self._filter.stopped else event.finish_reason

    def completion(self) -> Completion:
        """The answer so far."""
        request = self.request
        return Completion(
            text=self.text,
            token_ids=tuple(self._tokens),
            prompt_token_ids=tuple(request.tokens[: request.prompt_length]),
            finish_reason=self.finish_reason or "length",
            index=request.sample,
            logprobs=None if request.params.logprobs is None else tuple(self._logprobs),
        )


def _bar(total: int, show: bool | None) -> tqdm[NoReturn]:
    wanted = total > 1 and sys.stderr.isatty() if show is None else show
    return tqdm(total=total, desc="answers", unit="", disable=not wanted, dynamic_ncols=True)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One text, one list of token ids, or a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    numbers = [item for item in items if isinstance(item, int)]
    if numbers and len(numbers) < len(items):
        raise RequestError("a batch is a list of prompts; token ids among them must be in lists")
    return [numbers] if numbers else [item for item in items if not isinstance(item, int)]
