"""Random-weight Qwen3 checkpoints in the published shapes, for benchmarks.

Values are normal with the spread of trained weights. They are drawn from one table, so that a
gigabyte takes seconds; no kernel of this project is faster on them than on any others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = (1 << 24) + 4099
STRIDE = 1000003
"""From where one tensor of a file begins in the table to where the next does."""

SHARD_BYTES = 5 * 10**9

DTYPE = torch.bfloat16
"""Of every tensor."""

SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": False},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "tie_word_embeddings": False},
    "30b-a3b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
                "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "235b-a22b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
                  "num_attention_heads": 64, "num_key_value_heads": 4,
                  "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 1536},
}  # fmt: skip

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
"""What config.json says besides of a model with mixtures of experts."""


def config(model: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a published size, or of its first layers."""
    data = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "hidden_act": "silu", "attention_bias": False,
        "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
        "use_sliding_window": False, **SHAPES[model],
    }  # fmt: skip
    if "num_experts" in data:
        data |= MIXTURE
    return data if layers is None else {**data, "num_hidden_layers": layers}


def processor() -> str:
    """The processor's name, as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def tensors(data: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the source, sorted as transformers sorts them."""
    # Here, because a process that times another version of the package reads only `config`.
    from qwen3_ascend.checkpoint.architecture import LinearSpec, model_spec
    from qwen3_ascend.convert.source.config_file import read_config

    found: dict[str, tuple[int, ...]] = {}
    for entry in model_spec(read_config(data)):
        if isinstance(entry, LinearSpec):
            for sources in entry.matrices:
                for source, rows in zip(sources, entry.parts, strict=True):
                    found[f"{source}.weight"] = (rows, entry.inputs)
        else:
            found[entry.name] = entry.shape
    return dict(sorted(found.items()))


def ensure(folder: Path, data: dict[str, Any]) -> Path:
    """Writes the checkpoint unless it is there already."""
    mark = folder / "config.json"
    if mark.exists() and json.loads(mark.read_text()) == data:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensors(data)
    groups, table = files(shapes), _table()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        name = name if len(groups) > 1 else "model.safetensors"
        _write(folder / name, {key: shapes[key] for key in names}, table)
        weight_map |= dict.fromkeys(names, name)
    if len(groups) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    mark.write_text(json.dumps(data))
    return folder


class Weights:
    """The tensors of the source by their names, without its files."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Of a config.json."""
        self.shapes, self._table = tensors(data), _table()
        groups = files(self.shapes)
        self._numbers = {name: n for names in groups for n, name in enumerate(names)}

    def __getitem__(self, name: str) -> Tensor:
        shape = torch.Size(self.shapes[name])
        blocks = _blocks(shape.numel(), self._table, STRIDE * self._numbers[name])
        return torch.cat(list(blocks)).view(shape)


def _table() -> Tensor:
    return torch.randn(TABLE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def nbytes(shape: tuple[int, ...]) -> int:
    """Of a tensor."""
    return torch.Size(shape).numel() * DTYPE.itemsize


def files(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The names of the tensors of each file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if groups[-1] and filled + nbytes(shape) > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes(shape)
    return groups


def _write(path: Path, shapes: dict[str, tuple[int, ...]], table: Tensor) -> None:
    from qwen3_ascend.files.safetensors import Form, build_header

    header = build_header({name: Form(torch.bfloat16, shape) for name, shape in shapes.items()})
    with path.open("wb") as file:
        file.write(header.raw)
        for number, shape in enumerate(shapes.values()):
            for block in _blocks(torch.Size(shape).numel(), table, STRIDE * number):
                file.write(block.view(torch.int16).numpy().data)


def _blocks(count: int, table: Tensor, start: int) -> Iterator[Tensor]:
    while count:
        start %= len(table)
        block = table[start : start + count]
        yield block
        count -= len(block)
        start += len(block)
