"""Text to tokens and back: transformers' tokenizers and chat templates."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as TokenizersBackend
from tokenizers.decoders import DecodeStream
from typing_extensions import override

from qwen3_ascend.errors import CheckpointError, ConfigError, RequestError
from qwen3_ascend.files.json_file import read_json_object
from qwen3_ascend.runtime.text_stream import TextStream, WholeTextStream

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}; templates may read further keys (tool_calls, ...)."""

VOCABULARY_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that transformers can make a tokenizer of, the best first."""

JSON_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
TEMPLATE_FILE = "chat_template.jinja"
PROBE = "A text that shows whether a tokenizer works at all."


class Tokenizer(ABC):
    """What the engine's users need of a tokenizer; made by `load_tokenizer`."""

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens spelled out in it are recognised.

        Args:
            text: what to encode; it is never truncated or padded.
            add_special_tokens: also add what the tokenizer itself puts around a text, such as a
                first token; False for text that a chat template rendered, which has them already.

        Raises:
            RequestError: for lone surrogates, which is how Python passes on bytes that are no
                text; and for any text if the checkpoint has no tokenizer.
            CheckpointError: if the tokenizer's files do not fit together for this text.
        """

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens exactly as they spell it, special tokens left out."""

    @abstractmethod
    def spell(self, token: int) -> str:
        """Text of one token by itself, also of a special one; with replacement characters where it
        is a part of a character."""

    @property
    @abstractmethod
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token that the tokenizer's files name."""

    @property
    @abstractmethod
    def has_chat_template(self) -> bool:
        """Whether there is a chat template, be it usable or broken."""

    @abstractmethod
    def render(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, **variables: Any
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: oldest first.
            enable_thinking: Qwen3's switch; None leaves the template's default.
            variables: what transformers' `apply_chat_template` takes (tools, documents,
                continue_final_message, chat_template, ...) and anything else that the template
                reads. Unlike there, the opening of the assistant's turn is added by default.

        Raises:
            RequestError: if there is no template, if it is not valid, or if it refuses the
                messages.
        """

    @abstractmethod
    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one."""


class TransformersTokenizer(Tokenizer):
    """The tokenizer that transformers makes of a checkpoint's files."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder

    @override
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        refuse_broken_text(text)
        with naming_the_file(self._folder):
            encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoded["input_ids"])

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._decode(tokens, skip_special_tokens=True)

    @override
    def spell(self, token: int) -> str:
        return self._decode([token], skip_special_tokens=False)

    @property
    @override
    def eos_token_id(self) -> int | None:
        number = self._tokenizer.eos_token_id
        return number if isinstance(number, int) else None

    @property
    @override
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @override
    def render(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, **variables: Any
    ) -> str:
        if not self.has_chat_template and "chat_template" not in variables:
            raise RequestError(f"{self._folder} has no chat template; use raw prompts")
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        chosen = {"add_generation_prompt": True, **variables, "tokenize": False}
        try:
            text = self._tokenizer.apply_chat_template([dict(m) for m in messages], **chosen)
        except Exception as error:  # a template is a program: it can fail in any way
            raise RequestError(self._template_problem(error)) from error
        assert isinstance(text, str)
        return text

    @override
    def stream(self) -> TextStream:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if isinstance(backend, TokenizersBackend):
            step = partial(DecodeStream(skip_special_tokens=True).step, backend)
            return TextStream(self.decode, step)
        return WholeTextStream(self.decode)

    def _decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        # Cleaning spaces up would change text that has been shown already.
        text = self._tokenizer.decode(
            list(tokens),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        assert isinstance(text, str)
        return text

    def _template_problem(self, error: Exception) -> str:
        from jinja2 import TemplateSyntaxError

        file = next((f for f in (TEMPLATE_FILE,) if (self._folder / f).is_file()), JSON_FILES[0])
        template = f"the chat template of {self._folder / file}"
        if isinstance(error, TemplateSyntaxError):
            where = f"line {error.lineno}: {_one_line(error.message)}"
            return f"{template} is not valid Jinja, {where}; mend it or use raw prompts"
        return f"{template} refuses these messages: {_one_line(error)}"


class NoTokenizer(Tokenizer):
    """Stands in where a checkpoint has no tokenizer: only token ids go in and come out."""

    def __init__(self, folder: Path) -> None:
        self._missing = folder / VOCABULARY_FILES[0][0]

    @override
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise self._refusal()

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        """Nothing."""
        return ""

    @override
    def spell(self, token: int) -> str:
        """Nothing."""
        return ""

    @property
    @override
    def eos_token_id(self) -> int | None:
        return None

    @property
    @override
    def has_chat_template(self) -> bool:
        return False

    @override
    def render(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, **variables: Any
    ) -> str:
        raise self._refusal()

    @override
    def stream(self) -> TextStream:
        return TextStream(self.decode, lambda token: "")

    def _refusal(self) -> RequestError:
        return RequestError(
            f"{self._missing} is missing; copy it from the original model, or give token ids"
        )


def refuse_broken_text(text: str) -> None:
    """RequestError for lone surrogates, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 text: {error.reason}") from error


def has_vocabulary(names: Collection[str]) -> bool:
    """Whether a tokenizer can be made of files of these names."""
    return any(all(name in names for name in needed) for needed in VOCABULARY_FILES)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, as transformers reads it; a `NoTokenizer` if it has
    none.

    Nothing is downloaded, and no code of the folder is run.

    Raises:
        CheckpointError: naming the file that is not readable.
    """
    return quick_tokenizer(folder) or transformers_tokenizer(folder)


def quick_tokenizer(folder: Path) -> Tokenizer | None:
    """What `load_tokenizer` gives, unless that needs transformers: then None. Imports no torch
    either, and reads while other threads go on."""
    names = [name for names in VOCABULARY_FILES for name in names if (folder / name).is_file()]
    if not has_vocabulary(names):
        return NoTokenizer(folder)
    from qwen3_ascend.runtime.qwen_tokenizer import qwen_tokenizer

    return qwen_tokenizer(folder, partial(transformers_tokenizer, folder))


def transformers_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that transformers makes of a folder's files; see `load_tokenizer`."""
    from transformers import AutoTokenizer

    config = _config(folder)
    with naming_the_file(folder), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
        tokenizer.decode(tokenizer(PROBE)["input_ids"])
    return TransformersTokenizer(tokenizer, folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' notes to its own users (advice, deprecations) off the terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def naming_the_file(folder: Path) -> Iterator[None]:
    """Turns what transformers and tokenizers raise into a CheckpointError that names the file."""
    try:
        yield
    except BaseException as error:
        # They raise bare and many other Exceptions; a panic in Rust is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(_unreadable(folder, error)) from error


def _config(folder: Path) -> PretrainedConfig:
    """What transformers chooses a tokenizer class by.

    Made here instead of by transformers from config.json, which has been checked already:
    what transformers has against a key that no tokenizer reads must not cost the tokenizer.
    """
    from transformers import Qwen3Config

    path = folder / "config.json"
    named = read_json_object(path).get("tokenizer_class") if path.is_file() else None
    return Qwen3Config.from_dict({"tokenizer_class": named})


def _unreadable(folder: Path, error: BaseException) -> str:
    """Which file keeps transformers from making a tokenizer, why, and what to do."""
    for name in JSON_FILES:
        if problem := _json_problem(folder / name):
            return problem
    template = folder / TEMPLATE_FILE
    if isinstance(error, UnicodeDecodeError) and template.is_file():
        return f"{template} or a template beside it is not UTF-8 text: {error}"
    names = next(names for names in VOCABULARY_FILES if (folder / names[0]).is_file())
    others = [name for name in (*names[1:], JSON_FILES[0]) if (folder / name).is_file()]
    files = " with ".join([str(folder / names[0]), *others])
    return f"{files} is not readable: {_one_line(error)}; copy it from the original model"


def _json_problem(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        read_json_object(path)
    except ConfigError as error:
        return f"{error}; copy it from the original model"
    return None


def _one_line(error: object) -> str:
    """An error's message, or its kind if it has none, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
