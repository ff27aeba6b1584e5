"""How a checkpoint wants to be sampled, and which tokens end an answer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_ascend.errors import ConfigError, RequestError
from qwen3_ascend.files.json_file import read_json_object
from qwen3_ascend.runtime.engine.request import SamplingParams
from qwen3_ascend.runtime.tokenizer import Tokenizer, quiet_transformers

FILE_NAME = "generation_config.json"

ALWAYS_KEYS = ("repetition_penalty", "max_new_tokens")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p")
"""Keys of generation_config.json that have the same name and meaning in SamplingParams; the latter
count only where it samples."""

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""What transformers samples with where a generation_config.json that samples is silent."""

IGNORED_KEYS = {
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "stop_strings": [],
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Keys that change what transformers generates and are not supported here, with what is off."""


PLAIN_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 1e-5, 1e5),
    "top_p": (float, 1e-5, 1.0),
    "min_p": (float, 0.0, 1.0),
    "repetition_penalty": (float, 1e-5, 1e5),
    "top_k": (int, 1, 1 << 30),
    "max_new_tokens": (int, 1, 1 << 30),
}
"""Types and values that transformers takes without a word. It is asked about others only, because
importing it takes longer than all else that is left to do before the first token."""


def default_params(folder: Path) -> SamplingParams:
    """What a checkpoint's generation_config.json asks for, read as transformers reads it.

    Greedy unless it samples; the penalty and the length count either way. A UserWarning names
    what it asks for and is not supported.

    Raises:
        ConfigError: naming the file and the key that is wrong.
    """
    config = _read(folder)
    if config is None:
        return SamplingParams()
    _warn_of_ignored(config, folder)
    params = SamplingParams()
    for key in (*ALWAYS_KEYS, *SAMPLING_KEYS) if _samples(config, folder) else ALWAYS_KEYS:
        value = config.get(key)
        value = SAMPLING_DEFAULTS.get(key) if value is None else value
        params = params if value is None else _changed(params, key, value, folder)
    return params


def eos_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json (Qwen3 has two), else of
    config.json, else of the tokenizer.

    Raises:
        ConfigError: naming the file if what it states are no token ids.
    """
    for name in (FILE_NAME, "config.json"):
        path = folder / name
        value = read_json_object(path).get("eos_token_id") if path.is_file() else None
        if value is not None and value != []:
            return _token_ids(value, path)
    number = tokenizer.eos_token_id
    return frozenset(() if number is None else (number,))


def _read(folder: Path) -> dict[str, Any] | None:
    """What the file states of what is known here; ConfigError if transformers cannot use it."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    data = read_json_object(path)
    known = ("do_sample", *ALWAYS_KEYS, *SAMPLING_KEYS, *IGNORED_KEYS)
    stated = {key: data[key] for key in known if key in data}
    if not all(_is_plain(key, value) for key, value in stated.items()):
        for key, value in stated.items():
            _ask_transformers({key: value}, path)
        _ask_transformers(stated, path)
    return stated


def _is_plain(key: str, value: Any) -> bool:
    if key == "do_sample":
        return isinstance(value, bool)
    if key in IGNORED_KEYS:
        return bool(value == IGNORED_KEYS[key])
    kind, least, most = PLAIN_RANGES[key]
    is_of_kind = type(value) is kind
    return is_of_kind and bool(least <= value <= most)


def _ask_transformers(stated: dict[str, Any], path: Path) -> None:
    from transformers import GenerationConfig

    try:
        with quiet_transformers():
            GenerationConfig.from_dict(stated)
    except Exception as error:  # whatever a value of the wrong type leads to
        keys, reason = ", ".join(stated), " ".join(str(error).split())
        raise ConfigError(f"{path}: {keys} cannot be used: {reason}") from error


def _warn_of_ignored(config: Mapping[str, Any], folder: Path) -> None:
    for key, off in IGNORED_KEYS.items():
        value = config.get(key)
        if value is not None and value != off:
            line = f"{folder / FILE_NAME}: {key} is {value!r}, which is not supported and ignored"
            warnings.warn(line, stacklevel=4)  # who called load


def _samples(config: Mapping[str, Any], folder: Path) -> bool:
    value: object = config.get("do_sample")
    if not isinstance(value, bool | None):
        raise ConfigError(f"{folder / FILE_NAME}: do_sample is {value!r}, not true or false")
    return bool(value)


def _changed(params: SamplingParams, key: str, value: Any, folder: Path) -> SamplingParams:
    try:
        return dataclasses.replace(params, **{key: value})
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{folder / FILE_NAME}: {key} is {value!r}: {error}") from error


def _token_ids(value: object, path: Path) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in ids):
        raise ConfigError(f"{path}: eos_token_id is {value!r}, not token ids")
    return frozenset(ids)
