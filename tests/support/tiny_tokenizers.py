"""Byte tokenizers in the forms in which people save tokenizers, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PLAIN_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
MERGE = ("l", "o")


def nothing(tokenizer: Tokenizer) -> None:
    """Leaves a tokenizer as it is."""


def vocabulary() -> dict[str, int]:
    """A token for each byte, and one that is merged of two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {symbol: number for number, symbol in enumerate([*alphabet, "".join(MERGE)])}


def write(
    folder: Path,
    template: object = PLAIN_TEMPLATE,
    edit: Callable[[Tokenizer], None] = nothing,
    **settings: Any,
) -> Path:
    """Saves tokenizer.json and tokenizer_config.json.

    Args:
        folder: where to; made if it is not there.
        template: the config's chat_template; None leaves it out.
        edit: changes the tokenizer before it is saved.
        settings: more of tokenizer_config.json; None leaves a key out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False) for text in (END_OF_TEXT, END, START)]
    tokenizer.add_special_tokens(special)
    edit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {"eos_token": END, "pad_token": END_OF_TEXT, "chat_template": template, **settings}
    kept = {key: value for key, value in known.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def write_vocabulary_and_merges(folder: Path, **settings: Any) -> Path:
    """Saves the same tokenizer as older transformers do: vocab.json, merges.txt and the config."""
    write(folder, **settings)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{' '.join(MERGE)}\n")
    return folder
