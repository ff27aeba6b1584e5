"""Folders as people have them: converted, or refused in one line that says what they are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.command_line import Run, run
from support.folders import contents
from torch import Tensor
from transformers import AutoModelForCausalLM

from qwen3_ascend import ConvertOptions, Events, SamplingParams, convert_checkpoint, load
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.verify import verify

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 9\n"


class Notes(Events):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def converted(source: Path, recipe: str | None = "bf16") -> tuple[Path, str]:
    """The output of a conversion, which verifies and loads, and its notes."""
    out, notes = source.parent / f"{source.name}-out", Notes()
    convert_checkpoint(source, out, recipe, events=notes)
    assert verify(out).ok
    return out, "\n".join(notes.lines)


def refused(source: Path, *mentions: str) -> Run:
    out = source.parent / "refused"
    done = run("convert", source, out, "--recipe", "bf16")
    done.one_line_error(*mentions)
    assert not out.exists()
    return done


def logits_of_both(source: Path, out: Path) -> tuple[Tensor, Tensor]:
    """Those of transformers for the source, and ours for what was made of it."""
    tokens = [5, 17, 3, 250, 90, 41]
    theirs = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    return expected, load(out, dtype="float32", kv_cache_tokens=256).logits(tokens)


def assert_same_logits(source: Path, out: Path) -> None:
    expected, found = logits_of_both(source, out)
    assert float((expected - found).abs().max()) < 1e-3


# Two statements about one thing.


def tied(tmp_path: Path, head: Callable[[Tensor], Tensor] | None, drop: bool = False) -> Path:
    data = tiny_models.config(tie_word_embeddings=True)
    weights = tiny_models.tensors(data)
    embedding = weights["model.embed_tokens.weight"]
    if head is not None:
        weights["lm_head.weight"] = head(embedding)
    if drop:
        del weights["model.embed_tokens.weight"]
    return tiny_models.write(tmp_path / "source", data, weights)


@pytest.mark.parametrize(
    "head",
    [
        lambda embedding: -embedding,
        lambda embedding: torch.cat([embedding[:-1], embedding[-1:] + 1]),
        lambda embedding: torch.cat([embedding[:97], embedding[97:98] + 1, embedding[98:]]),
    ],
    ids=["all of it", "the last row", "one row"],
)
def test_a_head_of_its_own_is_kept(head: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    source = tied(tmp_path, head)
    out, notes = converted(source)
    assert "lm_head" in Manifest.read(out).linears and "it is kept" in notes
    assert_same_logits(source, out)


def test_a_head_that_is_the_embedding_is_stored_once(tmp_path: Path) -> None:
    source = tied(tmp_path, torch.clone)
    out, notes = converted(source)
    assert "lm_head" not in Manifest.read(out).linears and notes == ""
    assert_same_logits(source, out)


def test_a_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    source = tied(tmp_path, torch.clone, drop=True)
    out, notes = converted(source)
    assert "stored as lm_head.weight" in notes
    assert_same_logits(source, out)
    assert run("verify", out, "--against", source).code == 0


def test_an_untied_model_without_its_head(tmp_path: Path) -> None:
    data = tiny_models.config()
    weights = tiny_models.tensors(data)
    del weights["lm_head.weight"]
    refused(tiny_models.write(tmp_path / "s", data, weights), "lm_head.weight", "does not tie")


def beside_an_index(
    tmp_path: Path, *, shards: bool, lacking: str = ""
) -> tuple[Path, dict[str, Tensor]]:
    data = tiny_models.config()
    new, old = tiny_models.tensors(data, seed=1), tiny_models.tensors(data, seed=2)
    source = tiny_models.write(tmp_path / "source", data, old, shards=2)
    if not shards:
        for path in source.glob("model-*"):
            path.unlink()
    save_file({k: v for k, v in new.items() if k != lacking}, source / "model.safetensors")
    return source, new


@pytest.mark.parametrize("shards", [True, False])
def test_a_single_file_counts_over_an_index(shards: bool, tmp_path: Path) -> None:
    source, new = beside_an_index(tmp_path, shards=shards)
    out, notes = converted(source)
    stored = load_file(out / "ascend-00001-of-00001.safetensors")
    assert torch.equal(stored["model.norm.weight"], new["model.norm.weight"])
    assert "model.safetensors is read" in notes
    assert ("model-00001-of-00002.safetensors" in notes) is shards  # weights that are not read
    assert_same_logits(source, out)


def test_a_single_file_that_lacks_what_the_index_names(tmp_path: Path) -> None:
    source, _ = beside_an_index(tmp_path, shards=True, lacking="model.norm.weight")
    refused(source, "model.safetensors", "index.json", "model.norm.weight", "left over")


def test_an_index_of_the_single_file(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    names = load_file(source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert converted(source)[1] == ""


# Names.


def renamed(tmp_path: Path, rename: Callable[[str], str], **changes: Any) -> Path:
    data = tiny_models.config(**changes)
    weights = {rename(name): tensor for name, tensor in tiny_models.tensors(data).items()}
    return tiny_models.write(tmp_path / "source", data, weights)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
    ],
    ids=["compile", "parallel", "peft", "both", "both the other way", "compiled layers"],
)
def test_prefixes_of_wrappers_are_taken_off(rename: Callable[[str], str], tmp_path: Path) -> None:
    plain = tiny_models.write(tmp_path / "plain")
    source = renamed(tmp_path, rename)
    out, notes = converted(source)
    expected, _ = converted(plain)
    weights = "ascend-00001-of-00001.safetensors"
    assert (out / weights).read_bytes() == (expected / weights).read_bytes()
    assert "begins with" in notes or "_orig_mod" in notes
    assert run("verify", out, "--against", source).code == 0


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "llm.model."])
def test_parts_of_larger_models_are_refused(prefix: str, tmp_path: Path) -> None:
    source = renamed(tmp_path, lambda name: name.replace("model.", prefix, 1))
    refused(source, "larger model", prefix.split(".")[0])


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    weights = tiny_models.tensors(tiny_models.config(tie_word_embeddings=True))
    weights["embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    data = tiny_models.config(tie_word_embeddings=True)
    source = tiny_models.write(tmp_path / "source", data, weights)
    refused(source, "embed_tokens.weight", "two names")


@pytest.mark.parametrize("is_tied", [True, False])
def test_backbones_of_embedding_models(is_tied: bool, tmp_path: Path) -> None:
    """Qwen3-Embedding has names without `model.`, and its larger ones are not tied."""
    data = tiny_models.config(tie_word_embeddings=is_tied, architectures=["Qwen3Model"])
    weights = tiny_models.tensors(data)
    weights.pop("lm_head.weight", None)
    flat = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    source = tiny_models.write(tmp_path / "source", data, flat)
    out, notes = converted(source, None)
    assert "backbone" in notes and ("means nothing" in notes) is not is_tied
    manifest = Manifest.read(out)
    assert manifest.model.tie_word_embeddings and manifest.recipe["name"] == "w8a8-plain"
    assert run("verify", out, "--against", source).code == 0
    done = run("convert", source, tmp_path / "turned", "--recipe", "w8a8")
    done.one_line_error("hidden states", "rotate", "such as w8a8-plain")


# What is there and would be left out, and what is no model at all.


def adapter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")


def test_adapters(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    refused(tmp_path / "adapter", "LoRA adapter", "merge")
    source = tiny_models.write(tmp_path / "both")
    adapter(source)
    refused(source, "adapter", "beside the model", "merge")


def test_weights_that_are_not_read_are_named(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "optimizer.pt"):
        (source / name).write_bytes(b"x")
    (source / "training_args.bin").write_bytes(b"x")
    notes = converted(source)[1]
    assert "consolidated.safetensors, model.fp16.safetensors" in notes
    assert "optimizer" not in notes and "training_args" not in notes


FOREIGN: dict[str, tuple[list[str], list[str]]] = {
    "GGUF": (["qwen3-8b-q4_k_m.gguf"], ["GGUF", "original"]),
    "ModelSlim": (["quant_model_description.json"], ["ModelSlim", "quantized"]),
    "TensorRT": (["rank0.engine", "notes.txt"], ["TensorRT"]),
    "ONNX": (["model.onnx", "model.onnx_data"], ["ONNX"]),
    "OpenVINO": (["openvino_model.xml", "openvino_model.bin"], ["OpenVINO"]),
    "pickled": (["pytorch_model.bin"], ["pickled", "safetensors"]),
    "Flax": (["flax_model.msgpack"], ["Flax"]),
    "diffusers": (["model_index.json"], ["diffusers"]),
}


@pytest.mark.parametrize(("names", "mentions"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("with_config", [True, False])
def test_what_a_folder_is(
    names: list[str], mentions: list[str], with_config: bool, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if with_config:
        tiny_models.write(source)
        (source / "model.safetensors").unlink()
    source.mkdir(exist_ok=True)
    for name in names:
        (source / name).write_bytes(b"x")
    refused(source, *mentions)


def test_a_file_or_a_folder_above_the_model(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "above" / "snapshots" / "abc")
    done = run("convert", source / "model.safetensors", tmp_path / "out")
    done.one_line_error("is a file", "folder that holds it", str(source))
    refused(tmp_path / "above", "there is a model in", str(source))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json",
                                  "tokenizer_config.json", "generation_config.json"])  # fmt: skip
def test_pointers_of_git_lfs(name: str, tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    (source / name).write_text(POINTER)
    refused(source, name, "Git LFS pointer", "git lfs pull")


STRANGERS = {
    "LoRA": ("model.layers.0.self_attn.q_proj.lora_A.default.weight", ["LoRA", "merge"]),
    "classifier": ("score.weight", ["classifier"]),
    "value head": ("v_head.summary.weight", ["value head"]),
    "vision": ("model.visual.blocks.0.weight", ["vision-language"]),
    "experts": ("model.layers.0.mlp.experts.0.up_proj.weight", ["mixture of experts"]),
    "GPTQ": ("model.layers.0.mlp.up_proj.qweight", ["already quantized"]),
}


@pytest.mark.parametrize(("name", "mentions"), STRANGERS.values(), ids=STRANGERS)
def test_what_tensors_tell(name: str, mentions: list[str], tmp_path: Path) -> None:
    """Also where what such a model lacks would be the first symptom."""
    data = tiny_models.config()
    weights = tiny_models.tensors(data)
    del weights["model.layers.0.self_attn.q_proj.weight"]
    weights[name] = torch.zeros(2, 2)
    refused(tiny_models.write(tmp_path / "source", data, weights), name, *mentions)


def test_values_and_types_that_bfloat16_does_not_hold(tmp_path: Path) -> None:
    data, name = tiny_models.config(), "model.layers.0.mlp.up_proj.weight"
    weights = tiny_models.tensors(data)
    weights[name] = weights[name].float()
    weights[name][3, 5] = torch.finfo(torch.float32).max
    refused(tiny_models.write(tmp_path / "large", data, weights), name, "[3, 5]", "beyond bfloat16")
    weights[name] = weights[name].double()
    refused(tiny_models.write(tmp_path / "double", data, weights), name, "F64", "bfloat16 first")


# What makes the result unusable.


def edited(source: Path, name: str, **changes: Any) -> None:
    path = source / name
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


def test_unusable_files_are_refused_before_the_work(tmp_path: Path) -> None:
    for number, (name, text, mentions) in enumerate([
        ("tokenizer.json", "{}", ["tokenizer.json", "not readable"]),
        ("tokenizer.json", "{", ["tokenizer.json", "JSON"]),
        ("generation_config.json", '{"do_sample": true, "top_p": 7}', ["top_p"]),
        ("generation_config.json", '{"eos_token_id": "x"}', ["eos_token_id"]),
        ("generation_config.json", "[]", ["generation_config.json"]),
    ]):  # fmt: skip
        source = tiny_models.write(tmp_path / str(number))
        (source / name).write_text(text)
        refused(source, str(source), *mentions)


def test_a_broken_template_is_a_note(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{% for m in messages %}")
    out, notes = converted(source)
    assert "chat template" in notes and "raw prompts will work" in notes
    llm = load(out, kv_cache_tokens=256)
    assert llm.generate("a", SamplingParams(max_new_tokens=2), raw=True)


def test_no_tokenizer_is_a_note(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source", tokenizer=False)
    assert "no tokenizer" in converted(source)[1]


def test_named_templates_travel(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    folder = source / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("TOOLS {{ messages[0].content }}")
    out, _ = converted(source)
    name = "additional_chat_templates/tool_use.jinja"
    assert name in Manifest.read(out).files
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    llm = load(out, kv_cache_tokens=256)
    assert llm.render([{"role": "user", "content": "q"}], tools=tools) == "TOOLS q"
    assert "TOOLS" not in llm.render([{"role": "user", "content": "q"}])
    (out / name).write_text("other")
    run("verify", out).one_line_error(name, "differ")
    shutil.rmtree(out / "additional_chat_templates")
    run("verify", out).one_line_error(name, "missing")


# A second run.


def test_the_same_conversion_again(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    out, _ = converted(source, "w8a8")
    before = contents(out)
    done = run("convert", source, out)
    assert done.code == 0 and "nothing to do" in done.err and contents(out) == before
    assert run("convert", source, out, "--quiet") == Run(0, "", "")
    run("convert", source, out, "--recipe", "bf16").one_line_error("not empty", "recipe")
    run("convert", source, out, "--hash-source").one_line_error("not empty", "hashes")
    run("convert", source, out, "--max-file-bytes", "50kB").one_line_error("output files")
    other = tiny_models.tensors(tiny_models.config(), seed=9)
    save_file(other, source / "model.safetensors")
    run("convert", source, out).one_line_error("not empty", "weights")
    edited(source, "config.json", rope_theta=5e5)
    run("convert", source, out).one_line_error("not empty", "configuration")
    assert contents(out) == before


def test_a_second_run_over_a_damaged_output(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "source")
    out, _ = converted(source)
    (out / "tokenizer.json").unlink()
    run("convert", source, out).one_line_error("tokenizer.json is missing")
    assert run("convert", source, out, "--overwrite", "-q").code == 0


# Edits of a finished checkpoint.


def test_files_that_load_would_read_and_nobody_recorded(tmp_path: Path) -> None:
    out, _ = converted(tiny_models.write(tmp_path / "source"))
    (out / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    run("verify", out).one_line_error("generation_config.json is not in the manifest")
    run("generate", out, "-p", "a").one_line_error("generation_config.json", "--accept")
    llm = load(out, kv_cache_tokens=256, verify=False)
    assert llm.default_params.repetition_penalty == 1.5
    done = run("verify", out, "--accept")
    assert done.code == 0 and "accepted: generation_config.json: added" in done.out
    assert load(out, kv_cache_tokens=256).default_params.repetition_penalty == 1.5


def test_an_edited_template_is_accepted(tmp_path: Path) -> None:
    out, _ = converted(tiny_models.write(tmp_path / "source"))
    (out / "chat_template.jinja").write_text("X{{ messages[0].content }}")
    run("generate", out, "-p", "a").one_line_error("chat_template.jinja", "--accept", "original")
    assert load(out, kv_cache_tokens=256, verify=False).render([{"content": "q"}]) == "Xq"
    assert run("verify", out, "--accept").code == 0 and verify(out).ok
    assert "accepted" not in run("verify", out, "--accept").out
    (out / "chat_template.jinja").unlink()
    done = run("verify", out, "--accept")
    assert "chat_template.jinja: removed" in done.out and verify(out).ok


def test_yarn_is_accepted_and_other_shapes_are_not(tmp_path: Path) -> None:
    out, _ = converted(tiny_models.write(tmp_path / "source"))
    before = contents(out)
    edited(out, "config.json", hidden_size=128)
    run("verify", out, "--accept").one_line_error("config.json", "shapes", "convert again")
    edited(out, "config.json", hidden_size=64, num_hidden_layers=1)
    run("verify", out, "--accept").one_line_error("config.json", "convert again")
    assert contents(out)["qwen3_ascend.json"] == before["qwen3_ascend.json"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    edited(out, "config.json", num_hidden_layers=2, rope_scaling=yarn)
    with pytest.warns(UserWarning, match=r"config\.json was edited, which has no effect"):
        assert load(out, kv_cache_tokens=256, verify=False).config.context_length == 512
    assert run("verify", out, "--accept").code == 0
    assert load(out, kv_cache_tokens=256).config.context_length == 2048


def test_what_cannot_be_loaded_is_not_accepted(tmp_path: Path) -> None:
    out, _ = converted(tiny_models.write(tmp_path / "source"))
    (out / "tokenizer.json").write_text("{}")
    run("verify", out, "--accept").one_line_error("tokenizer.json", "not readable")
    run("verify", out).one_line_error("tokenizer.json", "differ")


def test_a_template_from_a_file(tiny_w8a8: Path, tmp_path: Path) -> None:
    template, out = tmp_path / "mine.jinja", tiny_w8a8
    template.write_text("{{ messages[0].content }}")
    options = ("--chat-template", template, "--max-new-tokens", "1")
    done = run("generate", out, "-p", "abcdef", *options)
    tokens = len(load(out, kv_cache_tokens=256).encode("abcdef", raw=True))
    assert done.code == 0 and f"{tokens} prompt tokens" in done.err
    template.write_text("{% if %}")
    run("generate", out, "-p", "a", "--chat-template", template).one_line_error("not valid Jinja")
    run("generate", out, "-p", "a", "--chat-template", tmp_path / "no").one_line_error("no")
    run("generate", out, "-p", "a", "--raw", "--chat-template", template).one_line_error("--raw")


def test_threads_and_low_memory_keep_a_head_of_its_own(tmp_path: Path) -> None:
    source = tied(tmp_path, lambda embedding: -embedding)
    first, _ = converted(source)
    convert_checkpoint(source, tmp_path / "again", "bf16", ConvertOptions(threads=3))
    assert contents(first) == contents(tmp_path / "again")
