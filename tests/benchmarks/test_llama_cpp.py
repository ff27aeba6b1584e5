"""What benchmarks give llama.cpp and how they read what it says, without llama.cpp: models by its
own GGUF reader, figures as they were printed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import random_model
import torch
from gguf.quants import dequantize
from peers import gguf_model, llama_cpp
from peers.llama_cpp import Times
from safetensors.torch import load_file

SMALL: dict[str, Any] = {
    **random_model.config("8b", 2), "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip

MIXTURE: dict[str, Any] = {
    **random_model.config("30b-a3b", 2), "hidden_size": 64, "vocab_size": 320, "num_experts": 12,
    "num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip

PRINTED = """\
{"n_kv_max": 4096, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 16, "pl": 8, \
"n_kv": 1152, "t_pp": 0.230355, "speed_pp": 4445.312988, "t_tg": 0.426250, "speed_tg": 300.293243, \
"t": 0.656605, "speed": 1754.479492}
{"n_kv_max": 4096, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 1, "pl": 8, \
"n_kv": 1032, "t_pp": 0.212406, "speed_pp": 4820.956055, "t_tg": 0.026316, "speed_tg": 303.997559, \
"t": 0.238722, "speed": 4323.020020}
{"n_kv_max": 4096, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 16, "pl": 8, \
"n_kv": 256, "t_pp": 0.046285, "speed_pp": 2765.474854, "t_tg": 0.425785, "speed_tg": 300.621216, \
"t": 0.472070, "speed": 542.292419}
"""
"""By llama-batched-bench of build 11434, which lost its last line."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model."""
    return random_model.ensure(tmp_path_factory.mktemp("source"), SMALL)


def test_weights_are_what_the_files_of_a_source_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_model, "SHARD_BYTES", 50_000)
    files = sorted(random_model.ensure(tmp_path, SMALL).glob("*.safetensors"))
    assert len(files) > 2
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    weights = random_model.Weights(SMALL)
    assert weights.shapes.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


@pytest.mark.parametrize("data", [SMALL, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_a_gguf_file_holds_the_weights_of_the_source(
    tmp_path: Path, kind: str, data: dict[str, Any]
) -> None:
    source = random_model.ensure(tmp_path / "source", data)
    path = gguf_model.ensure_gguf(tmp_path / "model.gguf", data, kind)
    weights = load_file(source / "model.safetensors")
    expected = {}
    for theirs, names in gguf_model.gguf_names(data).items():
        tensors = [weights.pop(name).float().numpy() for name in names]
        expected[theirs] = np.stack(tensors) if len(names) > 1 else tensors[0]
    assert not weights
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        stored = found[name]
        is_float = weight.ndim == 1 or "gate_inp" in name
        assert stored.tensor_type.name == ("F32" if is_float else kind)
        values = dequantize(stored.data, stored.tensor_type).reshape(weight.shape)
        largest = np.abs(weight).max() if kind == "Q8_0" and weight.ndim > 1 else 0
        assert np.abs(values - weight).max() <= largest / 127 * 0.51, name


def test_a_gguf_file_describes_the_model(tmp_path: Path) -> None:
    path = gguf_model.ensure_gguf(tmp_path / "model.gguf", SMALL, "BF16")
    fields = gguf.GGUFReader(path).fields
    said = {
        name.removeprefix("qwen3."): field.contents()
        for name, field in fields.items()
        if name.startswith("qwen3.")
    }
    assert said == {
        "context_length": 40960, "embedding_length": 64, "block_count": 2,
        "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "vocab_size": 320,
    }  # fmt: skip
    assert fields["tokenizer.ggml.model"].contents() == "none"


def test_a_gguf_file_describes_mixtures_of_experts(tmp_path: Path) -> None:
    path = gguf_model.ensure_gguf(tmp_path / "model.gguf", MIXTURE, "BF16")
    fields = gguf.GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "qwen3moe"
    said = {name: fields[f"qwen3moe.expert_{name}"].contents() for name in ("count", "used_count")}
    assert said == {"count": 12, "used_count": 2}
    assert fields["qwen3moe.expert_feed_forward_length"].contents() == 96


def test_a_gguf_file_that_was_broken_off_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(random_model.Weights, "__getitem__", lambda weights, name: {}[name])
        with pytest.raises(KeyError):
            gguf_model.ensure_gguf(path, SMALL, "BF16")
    assert not path.exists()
    assert gguf.GGUFReader(gguf_model.ensure_gguf(path, SMALL, "BF16")).tensors


def test_sizes_are_those_of_the_types(tmp_path: Path) -> None:
    sizes = gguf_model.gguf_sizes(gguf_model.ensure_gguf(tmp_path / "q8", SMALL, "Q8_0"))
    assert sizes["output.weight"] == 320 * 64 // 32 * 34
    assert sizes["output_norm.weight"] == 64 * 4
    assert any(name.startswith(gguf_model.EMBEDDING) for name in sizes)
    assert any(name.startswith(gguf_model.HEAD) for name in sizes)


def test_the_better_of_two_readings_of_the_prompts_counts_and_the_steps_after_the_first() -> None:
    assert llama_cpp.times(PRINTED, 8, 128, 16) == Times(0.212406, 0.426250)


@pytest.mark.parametrize(
    ("printed", "batch", "new"),
    [(PRINTED, 8, 48), (PRINTED, 1, 16), (PRINTED.splitlines()[0], 8, 16)],
)
def test_what_was_not_measured_or_lost_is_said(printed: str, batch: int, new: int) -> None:
    with pytest.raises(ValueError, match=f"no figures of {batch} x 128 . {new} tokens"):
        llama_cpp.times(printed, batch, 128, new)


@pytest.mark.parametrize(
    ("batch", "prompt", "new", "context"), [(1, 128, 48, 4096), (8, 2048, 48, 8 * 2304)]
)
def test_every_sequence_has_room_in_whole_units(
    batch: int, prompt: int, new: int, context: int
) -> None:
    words = llama_cpp.command(Path("bench"), Path("m.gguf"), 2, batch, prompt, new)
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert given["-c"] == str(context)
    assert (given["-t"], given["-tb"]) == ("2", "2")
    assert given["-npl"] == str(batch)
    assert given["-npp"].split(",")[0] == str(prompt)
    assert given["-ntg"].split(",")[0] == str(new)


def test_a_program_that_fails_is_reported_with_its_words(tmp_path: Path) -> None:
    program = tmp_path / "bench"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="no such model"):
        llama_cpp.measure(program, Path("m.gguf"), 2, 1, 128, 16)


def test_a_program_on_path_is_taken_and_asked_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / llama_cpp.PROGRAM
    program.write_text("#!/bin/sh\necho version: 4711 >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llama_cpp.program() == program
    assert llama_cpp.version(program) == "version: 4711"
