"""Qwen's tokenizer by the tokenizers library alone: importing transformers takes longer than all
else that is left to do before the first token.

Only for files in the form in which Qwen publishes them, which leaves transformers nothing to decide
but to hand on to the same library. Files that say anything else are left to transformers, and so is
every conversation that is more than roles and texts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TokenizersBackend
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from typing_extensions import override

from qwen3_ascend.errors import UserError
from qwen3_ascend.files.json_file import read_json_object
from qwen3_ascend.runtime.chat_template import render_plain
from qwen3_ascend.runtime.text_stream import TextStream
from qwen3_ascend.runtime.tokenizer import (
    PROBE,
    TEMPLATE_FILE,
    Message,
    Tokenizer,
    naming_the_file,
    refuse_broken_text,
)

CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast")
"""What tokenizer_config.json calls it: transformers makes the same of each, given Qwen's form."""

OTHER_FILES = (
    "added_tokens.json",
    "special_tokens_map.json",
    "additional_chat_templates",
    "chat_template.json",
)
"""Files that may say something else, or say it otherwise."""

END_OF_TEXT = "<|endoftext|>"
"""Stands in for special tokens that the files do not name."""

ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

SPECIAL_TOKENS = ("eos_token", "pad_token", "unk_token", "bos_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")

OFF = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "is_local")
"""Keys that Qwen's form has at false, or not at all."""

WITHOUT_EFFECT = (
    "added_tokens_decoder",  # is held against the tokens themselves
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",  # nobody asks for it
    "errors",
    "model_max_length",  # nothing is cut
    "tokenizer_class",
)

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen divides a text; source: tokenizer.json of Qwen3, and tokenization_qwen2.py of
transformers, which puts it in the place of whatever the file says."""

PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}


@dataclass(frozen=True)
class _Files:
    """What the files beside tokenizer.json say: the end-of-sequence token, and the template."""

    eos_token: str
    template: str | None


class QwenTokenizer(Tokenizer):
    """See the module; made by `qwen_tokenizer`."""

    def __init__(
        self,
        backend: TokenizersBackend,
        files: _Files,
        folder: Path,
        by_transformers: Callable[[], Tokenizer],
    ) -> None:
        self._backend, self._files, self._folder = backend, files, folder
        self._make_whole = by_transformers

    @functools.cached_property
    def _whole(self) -> Tokenizer:
        """The same tokenizer with all that transformers does around it."""
        return self._make_whole()

    @override
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        refuse_broken_text(text)
        with naming_the_file(self._folder):
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    @override
    def spell(self, token: int) -> str:
        return self._backend.decode([token], skip_special_tokens=False)

    @property
    @override
    def eos_token_id(self) -> int | None:
        return self._backend.token_to_id(self._files.eos_token)

    @property
    @override
    def has_chat_template(self) -> bool:
        return bool(self._files.template)

    @override
    def render(
        self, messages: Sequence[Message], *, enable_thinking: bool | None = None, **variables: Any
    ) -> str:
        text = None
        if self._files.template and not variables:
            text = render_plain(self._files.template, messages, enable_thinking)
        if text is None:
            return self._whole.render(messages, enable_thinking=enable_thinking, **variables)
        return text

    @override
    def stream(self) -> TextStream:
        return TextStream(
            self.decode, partial(DecodeStream(skip_special_tokens=True).step, self._backend)
        )


def qwen_tokenizer(folder: Path, by_transformers: Callable[[], Tokenizer]) -> QwenTokenizer | None:
    """The tokenizer of a checkpoint folder; None if its files are not in Qwen's form.

    Args:
        folder: with a tokenizer.json.
        by_transformers: makes the whole one, where somebody needs more of it.
    """
    try:
        config = read_json_object(folder / "tokenizer_config.json")
        template = _template(folder, config)
        backend = TokenizersBackend.from_file(str(folder / "tokenizer.json"))
        if not (_says_nothing_else(folder, config) and _has_qwens_form(backend, config)):
            return None
        backend.no_truncation()
        backend.no_padding()
        backend.decode(backend.encode(PROBE).ids)
    except (UserError, Exception):
        return None  # transformers is asked next, and says what is wrong
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        return None
    files = _Files(config["eos_token"], template)
    return QwenTokenizer(backend, files, folder, by_transformers)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template; ValueError if there may be several."""
    file = folder / TEMPLATE_FILE
    found = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(found, str | None):
        raise ValueError("no template, or several")
    return found


def _says_nothing_else(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the files beside tokenizer.json only name tokens that it has."""
    known = {*WITHOUT_EFFECT, *OFF, *SPECIAL_TOKENS, *SPECIAL_LISTS}
    return (
        config.get("tokenizer_class") in CLASSES
        and isinstance(config.get("eos_token"), str)
        and known.issuperset(config)
        and not any(config.get(key) for key in OFF)
        and not any((folder / name).exists() for name in OTHER_FILES)
    )


def _has_qwens_form(backend: TokenizersBackend, config: Mapping[str, Any]) -> bool:
    """Whether a tokenizer divides texts as Qwen's does, and its added tokens are all of them."""
    model, added = backend.model, backend.get_added_tokens_decoder()
    around = _state(backend.post_processor)
    return (
        isinstance(model, BPE)
        and not (model.dropout or model.unk_token or model.fuse_unk or model.byte_fallback)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and not model.ignore_merges
        and _state(backend.normalizer) == {"type": "NFC"}
        and _state(backend.pre_tokenizer) == PRE_TOKENIZER
        and _state(backend.decoder)["type"] == "ByteLevel"
        and (around["type"] == "ByteLevel" or around.get("special_tokens") == {})
        and not any(getattr(token, flag) for token in added.values() for flag in ADDED_FLAGS)
        and _names_added_tokens(config, {t.content: t.special for t in added.values()})
        and _states_added_tokens(config, {str(number): t for number, t in added.items()})
    )


def _names_added_tokens(config: Mapping[str, Any], special: Mapping[str, bool]) -> bool:
    """Whether every special token that the config names is one, by its text."""
    named = [config[key] for key in SPECIAL_TOKENS if config.get(key) is not None]
    for key in SPECIAL_LISTS:
        named += [*(config.get(key) or ())]
    return all(isinstance(name, str) and special.get(name) for name in (*named, END_OF_TEXT))


def _states_added_tokens(config: Mapping[str, Any], added: Mapping[str, Any]) -> bool:
    """Whether the config states the added tokens as they are, if it does."""
    stated = config.get("added_tokens_decoder")
    flags = ("content", *ADDED_FLAGS, "special")
    return stated is None or stated == {
        number: {flag: getattr(token, flag) for flag in flags} for number, token in added.items()
    }


def _state(part: Any) -> dict[str, Any]:
    """What a part of a tokenizer does, without what only says where tokens begin."""

    def without_offsets(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key != "trim_offsets"}

    state: dict[str, Any] = {"type": None}
    if part is not None:
        state = json.loads(part.__getstate__(), object_pairs_hook=without_offsets)
    return state
