"""`--hash-source` notes what every source tensor was, and `verify --against` knows it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.command_line import run
from support.folders import contents
from torch import Tensor

from qwen3_ascend import ConvertOptions, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import pieces
from qwen3_ascend.convert.compare import compare
from qwen3_ascend.convert.source import open_source

ODD = tiny_models.config(
    hidden_size=72, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1,
    head_dim=20, attention_bias=True,
)  # fmt: skip


def hashed(tensor: Tensor) -> str:
    return blake3(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


@pytest.mark.parametrize("recipe", ["w8a8", "bf16", "w8a8-attention-bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_tensor_that_is_read(
    recipe: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns, biases, parts that end within a piece, and many pieces."""
    weights = {name: tensor.to(dtype) for name, tensor in tiny_models.tensors(ODD).items()}
    source = tiny_models.write(tmp_path / "source", ODD, weights, shards=2)
    expected = {name: hashed(tensor) for name, tensor in weights.items()}
    for piece_bytes in (pieces.PIECE_BYTES, 1500):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        output = tmp_path / f"out{piece_bytes}"
        manifest = convert_checkpoint(
            source, output, recipe, options=ConvertOptions(hash_source=True)
        )
        assert manifest.source.tensors == expected
        assert Manifest.read(output) == manifest


def test_only_on_request_and_nothing_else_changes(tiny_source: Path, tmp_path: Path) -> None:
    plain = convert_checkpoint(tiny_source, tmp_path / "plain")
    assert plain.source.tensors == {}
    assert all(file.sha256 is None for file in plain.source.files.values())
    assert run("convert", tiny_source, tmp_path / "hashed", "--hash-source", "-q").code == 0
    hashed = contents(tmp_path / "hashed")
    different = {
        name for name, data in contents(tmp_path / "plain").items() if hashed[name] != data
    }
    assert different == {"qwen3_ascend.json"}


def test_another_source_is_noticed_by_one_bit(tiny_source: Path, tmp_path: Path) -> None:
    """A change that no error figure shows: within the rounding of one weight to its code."""
    output = tmp_path / "out"
    convert_checkpoint(tiny_source, output, options=ConvertOptions(hash_source=True))
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(tiny_source / "model.safetensors")
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in tiny_source.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    weights[name].view(torch.int16)[5, 5] ^= 1
    save_file(weights, changed / "model.safetensors")
    with open_source(str(tiny_source)) as same:
        assert compare(CheckpointReader(output), same) == []
    with open_source(str(changed)) as source:
        problems = compare(CheckpointReader(output), source)
    assert problems[-1] == (
        f"source tensor {name} is not the one that was converted: its hash differs"
    )
