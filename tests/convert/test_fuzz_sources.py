"""Sources with anything changed: refused in one line, or converted to what `load` takes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.command_line import run
from support.quantized_sources import DESCRIPTION, WRITERS

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.checkpoint.verify import verify

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)
INDEX = "model.safetensors.index.json"
JSON_FILES = [
    "config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip
KEYS = st.sampled_from([
    "model_type", "architectures", "rope_parameters", "rope_scaling", "layer_types", "head_dim",
    "tie_word_embeddings", "quantization_config", "is_causal", "use_sliding_window", "vocab_size",
    "weight_map", "metadata", "model", "added_tokens", "pre_tokenizer", "post_processor", "decoder",
    "normalizer", "truncation", "padding", "chat_template", "added_tokens_decoder", "eos_token",
    "tokenizer_class", "model_max_length", "eos_token_id", "do_sample", "temperature", "top_p",
    "repetition_penalty", "max_new_tokens", "bos_token", "extra_special_tokens", "<|im_end|>",
]) | st.text(max_size=8)  # fmt: skip
MANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tiny_models.config(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=4096
    )
    folder = tiny_models.write(tmp_path_factory.mktemp("fuzz") / "source", data, shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}")
    return folder


@contextmanager
def copied(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(whole, Path(place) / "source"))


def converted_or_refused(source: Path, *options: str) -> None:
    """Nothing in between: what is finished verifies, loads and answers."""
    out = source.parent / "out"
    done = run("convert", source, out, *options, "-q", "--threads", "1")
    if done.code != 0:
        done.one_line_error()
        assert not out.exists()
        return
    assert verify(out).ok
    llm = load(out, kv_cache_tokens=128, max_batch=1)
    assert llm.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))


@MANY
@given(
    name=st.sampled_from(JSON_FILES), changes=st.dictionaries(KEYS, JUNK, min_size=1, max_size=3)
)
def test_any_key(name: str, changes: dict[str, Any], whole: Path) -> None:
    with copied(whole) as source:
        data = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**data, **changes}))
        converted_or_refused(source, "--recipe", "bf16")


def change_a_place(document: Any, data: st.DataObject, values: st.SearchStrategy[Any]) -> None:
    """A value anywhere within a JSON document is replaced, or a key of it removed."""
    at = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys[:40]))
        deeper = isinstance(at[key], dict | list) and data.draw(st.booleans())
        if not deeper:
            if isinstance(at, dict) and data.draw(st.booleans()):
                del at[key]
            else:
                at[key] = data.draw(values)
            break
        at = at[key]


@MANY
@given(name=st.sampled_from(JSON_FILES), data=st.data())
def test_any_place(name: str, data: st.DataObject, whole: Path) -> None:
    with copied(whole) as source:
        document = json.loads((source / name).read_text())
        change_a_place(document, data, JUNK)
        (source / name).write_text(json.dumps(document))
        converted_or_refused(source, "--recipe", "bf16")


FILES = [*JSON_FILES, "chat_template.jinja", "model-00001-of-00002.safetensors"]


@MANY
@given(name=st.sampled_from(FILES), data=st.data())
def test_any_bytes(name: str, data: st.DataObject, whole: Path) -> None:
    """A stretch of a file is replaced, cut out or left as the last; of weights, of the header."""
    with copied(whole) as source:
        raw = (source / name).read_bytes()
        limit = 8 + int.from_bytes(raw[:8], "little") if name.endswith("safetensors") else len(raw)
        start = data.draw(st.integers(0, limit))
        stop = data.draw(st.integers(start, min(limit, start + 40)))
        new = data.draw(st.binary(max_size=12))
        rest = b"" if data.draw(st.integers(0, 4)) == 0 else raw[stop:]
        (source / name).write_bytes(raw[:start] + new + rest)
        converted_or_refused(source, "--recipe", "bf16")


@MANY
@given(names=st.lists(st.sampled_from([*FILES, "model-00002-of-00002.safetensors"]), min_size=1))
def test_any_file_missing(names: list[str], whole: Path) -> None:
    with copied(whole) as source:
        for name in names:
            (source / name).unlink(missing_ok=True)
        converted_or_refused(source, "--recipe", "bf16")


# Sources that are quantized already.

WORDS = st.sampled_from([
    "FLOAT", "W8A8_DYNAMIC", "W8A8", "C8", "Linear", "re:.*proj", "re:(", "lm_head", "int", "float",
    "channel", "token", "group", "tensor", "int-quantized", "pack-quantized", "dense", "compressed",
    "model.layers.0.mlp.up_proj", 8, 4, True, False, ["Linear"], ["re:.*"], [],
])  # fmt: skip


@pytest.fixture(scope="module", params=WRITERS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tiny_models.config(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=4096
    )
    folder = tmp_path_factory.mktemp(request.param) / "source"
    return WRITERS[request.param](folder, data, floats=["model.layers.0.mlp.down_proj"])


def told_by(source: Path) -> Path:
    """The file that says which linears are quantized."""
    description = source / DESCRIPTION
    return description if description.exists() else source / "config.json"


@MANY
@given(data=st.data(), count=st.integers(1, 3))
def test_any_place_of_what_says_so(data: st.DataObject, count: int, quantized: Path) -> None:
    with copied(quantized) as source:
        document = json.loads(told_by(source).read_text())
        for _ in range(count):
            change_a_place(document.get("quantization_config", document), data, WORDS | JUNK)
        told_by(source).write_text(json.dumps(document))
        converted_or_refused(source)


@MANY
@given(data=st.data())
def test_any_bytes_of_quantized_weights(data: st.DataObject, quantized: Path) -> None:
    """A stretch of the header, or of what says how to read it."""
    with copied(quantized) as source:
        weights = next(source.glob("*.safetensors"))
        path = data.draw(st.sampled_from([weights, told_by(source)]))
        raw = path.read_bytes()
        limit = 8 + int.from_bytes(raw[:8], "little") if path == weights else len(raw)
        start = data.draw(st.integers(0, limit))
        stop = data.draw(st.integers(start, min(limit, start + 40)))
        path.write_bytes(raw[:start] + data.draw(st.binary(max_size=12)) + raw[stop:])
        converted_or_refused(source)
