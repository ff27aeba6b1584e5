"""What a user holds: prompts in, text out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from qwen3_ascend.checkpoint.background import BackgroundCheck
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import RequestError
from qwen3_ascend.runtime.answer import Answer, Completion, Score, Work
from qwen3_ascend.runtime.engine.engine import Engine, Event
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.tokenizer import Message, NoTokenizer, Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids that are taken as they are."""


class LLM:
    """A loaded checkpoint; made by `load`. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        default_params: SamplingParams,
        check: BackgroundCheck | None = None,
    ) -> None:
        """See `load`; `check` is of weights that are used already, None if nothing is checked."""
        self._engine, self._check = engine, check
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.default_params = default_params
        """What generation_config.json asks for; used where no SamplingParams are given."""
        self._open: dict[int, Work] = {}

    @property
    def config(self) -> Qwen3Config:
        """The configuration of the model."""
        return self._engine.config

    @property
    def longest(self) -> int:
        """How many tokens a prompt and its answer may have together: what the model's context and
        the key/value cache hold."""
        return min(self.config.context_length, self._engine.scheduler.pool.capacity)

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
            self.answer(ids, one, sample)
            for ids, one in zip(tokens, chosen, strict=True)
            for sample in range(one.n)
        ]
        try:
            with _bar(len(answers), progress) as bar:
                self.submit(answers)
                while any(answer.finish_reason is None for answer in answers):
                    self.step()
                    bar.update(sum(a.finish_reason is not None for a in answers) - bar.n)
        finally:
            self.abort(answers)
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
        return AnswerStream(self, self.answer(tokens, chosen))

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
        rows: list[Tensor] = []
        score = self.score(token_ids, rows.append)
        try:
            self.submit([score])
            while score.finish_reason is None:
                self.step()
        finally:
            self.abort([score])
        return torch.cat(rows)

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

    def answer(self, tokens: Sequence[int], params: SamplingParams, sample: int = 0) -> Answer:
        """An answer that nothing has been computed of; `submit` lets it run.

        This, `score`, `submit`, `step` and `abort` are what `generate` and `stream` are made of,
        for callers that have a loop of their own. One answer is made, whatever `params.n` says.
        Alone of them, this and `score` may be called while another thread computes.

        Args:
            tokens: of the prompt.
            params: how to continue it.
            sample: which of the `params.n` answers it is to be, counted from 0.

        Raises:
            RequestError: if the prompt does not fit.
        """
        if params.stop_strings and isinstance(self.tokenizer, NoTokenizer):
            raise RequestError("stop strings need a tokenizer, and this checkpoint has none")
        request = self._engine.request(tokens, params, self.eos_ids, sample)
        return Answer(request, self.tokenizer)

    def score(self, tokens: Sequence[int], use: Callable[[Tensor], None]) -> Score:
        """A teacher-forced pass that nothing has been computed of; `submit` lets it run.

        Args:
            tokens: whose logits are wanted.
            use: is given them as float32 [R, vocab], a few hundred rows at a time and in order.

        Raises:
            RequestError: if the tokens are unknown or do not fit.
        """
        return Score(self._engine.scoring(tokens), use)

    @property
    def open(self) -> list[Work]:
        """What has been submitted and has not ended."""
        return [*self._open.values()]

    @property
    def busy(self) -> bool:
        """Whether anything that was submitted has not ended."""
        return bool(self._open)

    def submit(self, work: Sequence[Work]) -> None:
        """Lets answers and scores run beside what runs already, as soon as there is room."""
        for one in work:
            self._open[one.request.number] = one
            self._engine.queue(one.request)

    def step(self) -> list[Work]:
        """Computes a step, which moves all that runs; only while `busy`.

        Returns:
            What has moved. What has ended has a finish_reason, and holds no block any more.

        Raises:
            CheckpointError: if a weight is found to be damaged; before anything ends that was
                computed from it.
        """
        moved: list[Work] = []
        for event in self._events():
            one = self._open.get(event.request.number)
            if one is not None:
                one.take(event)
                moved.append(one)
                if one.finish_reason:
                    self.abort([one])
                    self.require_sound_weights()
        return moved

    def require_sound_weights(self) -> None:
        """Waits until every weight that `load` was to verify is hashed.

        Raises:
            CheckpointError: naming the tensor whose bytes are not the manifest's.
        """
        if self._check is not None:
            self._check.finish()
            self._check = None

    def _events(self) -> list[Event]:
        """Those of a step; what damaged weights make it fail with is that they are damaged."""
        if self._check is not None:
            self._check.poll()
        try:
            return self._engine.step()
        except Exception:
            self.require_sound_weights()
            raise

    def abort(self, work: Sequence[Work]) -> None:
        """Ends answers and scores, finished or not, and frees what they hold."""
        for one in work:
            self._open.pop(one.request.number, None)
            self._engine.abort(one.request)

    def _params_for(
        self, batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * len(batch)
        if len(params) != len(batch):
            raise RequestError(f"{len(params)} SamplingParams for {len(batch)} prompts")
        return list(params)


class AnswerStream:
    """An answer as it comes. Iterate for pieces of text; closing it early stops the work."""

    def __init__(self, llm: LLM, answer: Answer) -> None:
        self._llm, self._answer = llm, answer
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stops generating."""
        self._pieces.close()
        self._llm.abort([self._answer])

    def completion(self) -> Completion:
        """What was generated so far, or the whole answer once the stream is exhausted.

        Raises:
            CheckpointError: for a whole answer if a weight is damaged.
        """
        if self._answer.finish_reason:
            self._llm.require_sound_weights()
        return self._answer.completion()

    def _run(self) -> Generator[str, None, None]:
        try:
            self._llm.submit([self._answer])
            while True:
                piece = self._answer.news()
                if piece.text:
                    yield piece.text
                elif piece.finish_reason:
                    return
                else:
                    self._llm.step()
        finally:
            self._llm.abort([self._answer])


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
