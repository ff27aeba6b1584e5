"""`vllm serve` on what it cannot serve: one clear line, and that the last one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.folders import flip_a_byte, reseal

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
    file = folder / "qwen3_ascend.json"
    file.write_text(
        file.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )


def change_nothing(folder: Path) -> None:
    pass


CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "corrupt": (damage_a_tensor, (), "its bytes differ from the manifest"),
    "missing-file": (remove_a_file, (), "ascend-00001-of-00001.safetensors"),
    "missing-tensor": (remove_a_tensor, (), "the header was changed"),
    "model-lacks-tensor": (lack_a_tensor, (), "model.norm.weight"),
    "foreign-target": (aim_at_another_chip, (), "'ascend-310p'"),
    "edited": (edit_the_manifest, (), "the manifest was changed"),
    "ranks": (change_nothing, ("--tensor-parallel-size", "3"), "choose 1, 2 or 4"),
    "quantization": (change_nothing, ("--quantization", "fp8"), "--quantization fp8 is not for"),
    "load-format": (change_nothing, ("--load-format", "dummy"), "--load-format dummy is not for"),
    "adapters": (change_nothing, ("--enable-lora",), "merge the adapter"),
    "sleep": (change_nothing, ("--enable-sleep-mode",), "FRACTAL_NZ cannot be put to sleep"),
    "type": (change_nothing, ("--dtype", "float16"), "float16 is not supported"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(
    engines: Engines, checkpoint: Path, tmp_path: Path, case: str
) -> None:
    change, options, expected = CASES[case]
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    change(model)
    command = engines.serve_command(model, free_port(), *options)
    done = subprocess.run(
        command, env=engines.server_environment(), capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert expected in last, done.stderr[-3000:]
    if case not in ("corrupt",):  # that is found in an engine's process, and vLLM tells of its end
        assert "Traceback" not in done.stderr


def test_another_model_does_not_notice_the_plugin(
    engines: Engines, tiny_source: Path, prompts: list[list[int]]
) -> None:
    report = engines.on_cpu(tiny_source, prompts[:4], 8)
    assert report.data["engine"].get("quantization") is None
    assert all(len(answer.tokens) > 0 for answer in report.answers)
