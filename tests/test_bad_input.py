"""What a user can get wrong: one line that says what and where, and nothing written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.command_line import PROGRAM, Run, program, run

from qwen3_ascend.checkpoint.verify import verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "source")


def refuse(source: Path | str, *mentions: str, options: tuple[str, ...] = ()) -> Run:
    """A conversion, and a dry run, that fail with one line and leave no output folder."""
    out = Path(source).parent / "out"
    done = run("convert", source, out, *options)
    done.one_line_error(*mentions)
    assert not out.exists()
    return done


def reconfigure(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "qwen3"]),
        ({"model_type": "qwen3_next"}, ["'qwen3_next'", "linear attention", "dense"]),
        ({"model_type": "qwen2"}, ["'qwen2'"]),
        ({"model_type": None}, ["model_type"]),
        (
            {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
            ["sliding window", "layer 1"],
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding window"]),
        ({"layer_types": 3}, ["layer_types"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ["'longrope'", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["'linear'"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, ["'dynamic'"]),
        ({"rope_parameters": [1]}, ["rope"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, ["factor", "'4'"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
            ["original_max_position_embeddings"],
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, ["weight_block_size"]),
        ({"quantization_config": "awq"}, ["already quantized", "awq"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
        ({"vocab_size": True}, ["vocab_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"head_dim": 31}, ["head_dim"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings"]),
        ({"max_position_embeddings": 2**40}, ["context"]),
        ({"num_hidden_layers": 3}, ["model.layers.2."]),
        ({"num_hidden_layers": 1 << 40}, ["1099511627776 layers", "tensors"]),
        ({"num_hidden_layers": 1}, ["model.layers.1."]),
        ({"attention_bias": True}, ["q_proj.bias"]),
        ({"tie_word_embeddings": False, "vocab_size": 321}, ["model.embed_tokens.weight", "321"]),
    ],
    ids=str,
)  # fmt: skip
def test_not_a_qwen3(changes: dict[str, Any], mentions: list[str], source: Path) -> None:
    reconfigure(source, **changes)
    refuse(source, *mentions)
    refuse(source, *mentions, options=("--dry-run",))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"a": 1', "\x00"], ids=repr)
def test_a_config_that_is_none(text: str, source: Path) -> None:
    (source / "config.json").write_text(text)
    refuse(source, "config.json")


def test_places_without_a_model(tmp_path: Path, source: Path) -> None:
    refuse(tmp_path / "nothing", "nothing")
    for name in ("gpt2", "a/b/c", "./here", "~/no-such-folder-anywhere"):
        run("convert", name, tmp_path / "out").one_line_error(name, "Hub id")
    refuse(source / "config.json", "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, "config.json")
    refuse(source, "--revision", options=("--revision", "main"))
    (source / "model.safetensors").unlink()
    refuse(source, "no weights")
    (source / "pytorch_model.bin").touch()
    refuse(source, "pickled")
    assert not (tmp_path / "out").exists()


def test_an_already_converted_folder(tiny_w8a8: Path, tmp_path: Path) -> None:
    run("convert", tiny_w8a8, tmp_path / "out").one_line_error("converted checkpoint")


def replace_tensors(source: Path, **options: Any) -> dict[str, torch.Tensor]:
    path = source / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, value in options.get("add", {}).items():
        tensors[name] = value
    for name in options.get("drop", ()):
        del tensors[name]
    save_file(tensors, path)
    return tensors


def test_tensors_that_are_not_those_of_the_model(source: Path) -> None:
    good = (source / "model.safetensors").read_bytes()
    down = "model.layers.1.mlp.down_proj.weight"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"drop": [down]}, [down, "no tensor"]),
        ({"drop": ["model.norm.weight"]}, ["model.norm.weight"]),
        ({"add": {down: torch.zeros(64, 95).bfloat16()}}, [down, "[64, 95]", "[64, 96]"]),
        ({"add": {"model.norm.weight": torch.zeros(64, 1).bfloat16()}}, ["model.norm.weight"]),
        ({"add": {down: torch.zeros(64, 96).to(torch.float8_e4m3fn)}}, [down, "F8_E4M3"]),
        ({"add": {down: torch.zeros(64, 96, dtype=torch.int8)}}, [down, "I8"]),
        ({"add": {f"{down}_scale_inv": torch.ones(1)}}, [f"{down}_scale_inv", "already quantized"]),
        ({"add": {"model.layers.0.mlp.gate.weight": torch.ones(2, 64)}}, ["mlp.gate.weight"]),
    ]
    for options, mentions in cases:
        replace_tensors(source, **options)
        refuse(source, *mentions)
        refuse(source, *mentions, options=("--dry-run",))
        (source / "model.safetensors").write_bytes(good)


def test_damaged_weight_files(source: Path) -> None:
    path = source / "model.safetensors"
    good = path.read_bytes()
    for broken in (good[:-1], good[: len(good) // 2], good[:100], b"", good + b"\0"):
        path.write_bytes(broken)
        refuse(source, "model.safetensors", "download it again")
    lies = {
        "huge length": (1 << 60).to_bytes(8, "little") + good[8:],
        "negative": good.replace(b'"data_offsets":[0,', b'"data_offsets":[-1'),
        "not a safetensors file": b"<html>404</html>" * 10,
    }
    for broken in lies.values():
        path.write_bytes(broken)
        refuse(source, "model.safetensors")
    path.unlink()
    path.mkdir()
    refuse(source, "no weights")


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize("lie", ["overlap", "out of range", "duplicate", "negative", "shape"])
def test_lying_headers(lie: str, source: Path) -> None:
    path = source / "model.safetensors"
    header, data = header_of(path.read_bytes())
    name = "model.layers.1.mlp.down_proj.weight"
    start, stop = header[name]["data_offsets"]
    if lie == "overlap":
        header[name]["data_offsets"] = [start - 64, stop - 64]
    elif lie == "out of range":
        header[name]["data_offsets"] = [start + (1 << 40), stop + (1 << 40)]
    elif lie == "negative":
        header[name]["data_offsets"] = [start - stop, 0]
    elif lie == "shape":
        header[name]["shape"] = [64, 1 << 40]
    text = json.dumps(header)
    if lie == "duplicate":
        text = text[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    refuse(source, "model.safetensors", *([] if lie in ("overlap", "out of range") else [name]))


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", shards=2)
    path = source / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    norm = "model.norm.weight"
    elsewhere = {first: second, second: first}[good["weight_map"][norm]]
    wrong: list[tuple[dict[str, object], list[str]]] = [
        ({norm: "model-00003-of-00002.safetensors"}, [norm, "model-00003-of-00002", "missing"]),
        ({norm: elsewhere}, [norm, elsewhere, "not there"]),
        ({"model.ghost": first}, ["model.ghost", first]),
        ({norm: "../source/" + first}, [norm, "../source/", "no weight file"]),
        ({norm: 7}, [norm]),
    ]
    for change, mentions in wrong:
        path.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))
        refuse(source, *mentions)
    for text in ("{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{"):
        path.write_text(text)
        refuse(source, "index.json")
    path.write_text(json.dumps(good))
    (source / second).unlink()
    refuse(source, second, "missing")


def test_a_truncated_shard(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", shards=3)
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refuse(source, shard.name, "truncated")


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for it: the same calls fail."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    assert run("convert", source, tmp_path / "old", "--quiet").code == 0
    out = tmp_path / "out"
    for folder, options in ((out, ()), (tmp_path / "old", ("--overwrite",))):
        done = subprocess.run(
            [*PROGRAM, "convert", source, folder, *options], capture_output=True, text=True,
            timeout=300, preexec_fn=limit,
        )  # fmt: skip
        Run(done.returncode, done.stdout, done.stderr).one_line_error("File too large")
    # What was finished may be kept aside for another try, but nothing that looks like a result.
    assert not out.exists() or all(path.name.startswith(".") for path in out.iterdir())
    run("verify", out).one_line_error(out.name)
    assert verify(tmp_path / "old").ok
    assert run("convert", source, out, "--quiet").code == 0
    assert verify(out).ok


GENERATE = [
    (["--temperature", "-1"], ["temperature"]),
    (["--temperature", "nan"], ["temperature"]),
    (["--temperature", "inf"], ["temperature"]),
    (["--temperature", "warm"], ["--temperature", "warm"]),
    (["--top-k", "-1"], ["top_k"]),
    (["--top-p", "0"], ["top_p"]),
    (["--top-p", "1.1"], ["top_p"]),
    (["--top-p", "nan"], ["top_p"]),
    (["--min-p", "2"], ["min_p"]),
    (["--repetition-penalty", "0"], ["repetition_penalty"]),
    (["--repetition-penalty", "inf"], ["repetition_penalty"]),
    (["--presence-penalty", "nan"], ["presence_penalty"]),
    (["--max-new-tokens", "0"], ["max_new_tokens"]),
    (["--max-new-tokens", "1.5"], ["--max-new-tokens"]),
    (["--stop", ""], ["stop"]),
    (["--seed", "1" * 30], ["seed"]),
    (["--device", "tpu"], ["device", "'tpu'", "cpu"]),
    (["--dtype", "float8"], ["dtype", "'float8'", "bfloat16", "float32"]),
    (["--prompt-file", "x"], ["--prompt", "--prompt-file"]),
    (["--bogus"], ["--bogus"]),
    (["--raw", "--system", "x"], ["--system"]),
    (["--raw", "--thinking"], ["template"]),
]


@pytest.mark.parametrize(("options", "mentions"), GENERATE, ids=str)
def test_generate_options(options: list[str], mentions: list[str], tiny_w8a8: Path) -> None:
    done = run("generate", tiny_w8a8, "--prompt", "x", *options)
    done.one_line_error(*mentions)
    assert done.out == ""


def test_prompts(tiny_w8a8: Path, tmp_path: Path) -> None:
    run("generate", tiny_w8a8).one_line_error("--prompt", "--prompt-file")
    run("generate", tiny_w8a8, "--raw", "-p", "").one_line_error("the prompt is empty")
    run("generate", tiny_w8a8, "--raw", "-p", "x", "-p", "").one_line_error("prompt is empty")
    long = "word " * 2000
    done = run("generate", tiny_w8a8, "-p", long)
    done.one_line_error("context is 1024", "shorten")
    run("generate", tiny_w8a8, "--prompt-file", tmp_path / "gone").one_line_error("gone")
    run("generate", tiny_w8a8, "--prompt-file", tmp_path).one_line_error(str(tmp_path))
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    run("generate", tiny_w8a8, "--prompt-file", tmp_path / "latin").one_line_error("UTF-8")
    (tmp_path / "empty").touch()
    run("generate", tiny_w8a8, "--raw", "--prompt-file", tmp_path / "empty").one_line_error("empty")


def test_a_prompt_that_is_not_text(tiny_w8a8: Path) -> None:
    done = program("generate", tiny_w8a8, "--quiet", "--prompt", b"caf\xe9")
    done.one_line_error("prompt", "UTF-8")


@pytest.mark.parametrize(
    ("name", "text", "mentions"),
    [
        ("tokenizer.json", None, ["tokenizer.json", "missing"]),
        ("tokenizer.json", "{}", ["tokenizer.json", "not readable"]),
        ("tokenizer_config.json", "[", ["tokenizer_config.json"]),
        ("chat_template.jinja", "{% if %}", ["chat template"]),
        ("chat_template.jinja", "{{ messages[9].content.x }}", ["chat template"]),
        ("generation_config.json", "[]", ["generation_config.json"]),
        ("generation_config.json", '{"do_sample": true, "top_p": 7}', ["top_p"]),
        ("generation_config.json", '{"do_sample": true, "top_k": "x"}', ["generation_config"]),
        ("generation_config.json", '{"do_sample": true, "top_k": 2.5}', ["top_k"]),
        ("generation_config.json", '{"eos_token_id": "x"}', ["eos_token_id"]),
    ],
    ids=str,
)
def test_files_that_came_damaged(
    name: str, text: str | None, mentions: list[str], source: Path, tmp_path: Path
) -> None:
    """Conversion carries them as they are, or refuses them; generation says what is wrong."""
    (source / name).unlink(missing_ok=True)
    if text is not None:
        (source / name).write_text(text)
    done = run("convert", source, tmp_path / "out", "--quiet")
    if done.code == 0:
        done = run("generate", tmp_path / "out", "--prompt", "x")
    done.one_line_error(*mentions)


def test_folders_that_are_no_checkpoint(tmp_path: Path, source: Path) -> None:
    for folder in (tmp_path / "nothing", source, source / "config.json"):
        run("generate", folder, "-p", "x").one_line_error(folder.name)
        run("verify", folder).one_line_error(folder.name)
        run("inspect", folder).one_line_error(folder.name)
    run("generate", source, "-p", "x").one_line_error("qwen3-ascend convert")


def test_commands(tmp_path: Path) -> None:
    run("explode").one_line_error("explode")
    run("convert", tmp_path).one_line_error("OUTPUT")
    run("convert", tmp_path, "a", "b").one_line_error("b")


def test_the_output_is_only_replaced_when_that_was_asked(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run("convert", source, tmp_path / "out").one_line_error("--overwrite")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
