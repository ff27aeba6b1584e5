"""generation_config.json means what it means to transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM

from qwen3_ascend import SamplingParams, convert_checkpoint, load
from qwen3_ascend.errors import ConfigError
from qwen3_ascend.runtime import generation
from qwen3_ascend.runtime.generation import (
    PLAIN_RANGES,
    SAMPLING_DEFAULTS,
    default_params,
    eos_ids,
)
from qwen3_ascend.runtime.tokenizer import NoTokenizer, load_tokenizer


def written(folder: Path, **settings: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_absent(tmp_path: Path) -> None:
    assert default_params(tmp_path) == SamplingParams()


CONFIGS: dict[str, tuple[dict[str, Any], SamplingParams]] = {
    "empty": ({}, SamplingParams()),
    "Qwen3's": (
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]},
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    ),
    "greedy": ({"do_sample": False, "temperature": 0.6, "top_k": 20}, SamplingParams()),
    "unsaid is greedy": ({"temperature": 0.6, "top_p": 0.5}, SamplingParams()),
    "null is greedy": ({"do_sample": None, "top_p": 0.5}, SamplingParams()),
    "defaults of sampling": ({"do_sample": True}, SamplingParams(temperature=1.0, top_k=50)),
    "off": ({"do_sample": True, "top_k": 0, "top_p": None}, SamplingParams(temperature=1.0)),
    "penalty when greedy": ({"repetition_penalty": 1.2}, SamplingParams(repetition_penalty=1.2)),
    "penalty when sampling": (
        {"do_sample": True, "top_k": 3, "repetition_penalty": 1.2, "min_p": 0.1},
        SamplingParams(temperature=1.0, top_k=3, repetition_penalty=1.2, min_p=0.1),
    ),
    "length": ({"max_new_tokens": 7}, SamplingParams(max_new_tokens=7)),
    "keys of no concern": (
        {"transformers_version": "4.51.0", "pad_token_id": 1, "cache_implementation": "nothing"},
        SamplingParams(),
    ),
    "what is off": ({"num_beams": 1, "no_repeat_ngram_size": 0}, SamplingParams()),
}


@pytest.mark.parametrize(("settings", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_params(settings: dict[str, Any], expected: SamplingParams, tmp_path: Path) -> None:
    assert default_params(written(tmp_path, **settings)) == expected


def test_defaults_are_those_of_transformers() -> None:
    theirs = GenerationConfig()._get_default_generation_params()
    assert {key: theirs[key] for key in SAMPLING_DEFAULTS} == SAMPLING_DEFAULTS


@pytest.mark.parametrize("key", PLAIN_RANGES)
def test_transformers_takes_what_it_is_not_asked_about(key: str) -> None:
    kind, least, most = PLAIN_RANGES[key]
    for value in (kind(least), kind(most)):
        assert getattr(GenerationConfig.from_dict({key: value, "do_sample": True}), key) == value


PUBLISHED = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
    "pad_token_id": 151643, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
    "transformers_version": "4.51.0",
}  # fmt: skip
"""Of Qwen3-8B."""


def test_it_is_asked_about_others_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(generation, "_ask_transformers", lambda stated, path: asked.append(stated))
    assert default_params(written(tmp_path, **PUBLISHED)).top_k == 20
    assert asked == []
    with pytest.warns(UserWarning, match="min_length"):
        default_params(written(tmp_path, **PUBLISHED, min_length=3))
    assert {"min_length": 3} in asked


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_p", 7), ("top_k", "x"), ("top_k", 2.5), ("temperature", "warm"), ("temperature", []),
        ("temperature", float("nan")), ("min_p", -1), ("repetition_penalty", 0),
        ("repetition_penalty", "x"), ("max_new_tokens", 0), ("max_new_tokens", "x"),
        ("do_sample", "yes"), ("do_sample", 1), ("do_sample", []),
    ],
)  # fmt: skip
def test_values_that_are_none(key: str, value: object, tmp_path: Path) -> None:
    written(tmp_path, **{"do_sample": True, key: value})
    with pytest.raises(ConfigError) as refusal:
        default_params(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path / 'generation_config.json'}: {key}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"), [("num_beams", 4), ("no_repeat_ngram_size", 3), ("suppress_tokens", [1])]
)
def test_settings_that_are_not_supported(key: str, value: object, tmp_path: Path) -> None:
    written(tmp_path, **{key: value})
    with pytest.warns(UserWarning, match=f"{key} is .*not supported"):
        assert default_params(tmp_path) == SamplingParams()


def test_end_tokens_in_order(tmp_path: Path, tiny_source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_source / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id is not None
    assert eos_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id}
    assert eos_ids(tmp_path, NoTokenizer(tmp_path)) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert eos_ids(tmp_path, tokenizer) == {7}
    for said, expected in ([8, 9], {8, 9}), (8, {8}), (None, {7}), ([], {7}):
        written(tmp_path, eos_token_id=said)
        assert eos_ids(tmp_path, tokenizer) == expected
    wrong: tuple[object, ...] = ("x", [1, "x"], True, 1.5, {})
    for value in wrong:
        written(tmp_path, eos_token_id=value)
        with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is "):
            eos_ids(tmp_path, tokenizer)


def test_greedy_tokens_with_a_penalty(tiny_source: Path, tmp_path: Path) -> None:
    """The whole way: transformers generates from the source's folder, we from ours."""
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    settings = {"repetition_penalty": 1.5, "max_new_tokens": 40, "eos_token_id": [0, 2]}
    written(source, **settings)
    convert_checkpoint(source, tmp_path / "out", "bf16")
    llm = load(tmp_path / "out", dtype="float32", kv_cache_tokens=1024)
    prompt = llm.encode("What does river mean?")
    theirs = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
    (answer,) = llm.generate(prompt)
    assert list(answer.token_ids) == expected
    plain = SamplingParams(max_new_tokens=40)
    assert llm.generate(prompt, plain)[0].token_ids != answer.token_ids
