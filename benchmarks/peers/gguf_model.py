"""The random weights of random_model.py as the GGUF file that llama.cpp runs.

Every matrix is stored in one type, the embedding and the output projection included, as
llama-quantize does it for these types; norms are float32. There is no tokenizer in it, which
llama.cpp's benchmarks do not need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import random_model
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    import gguf
except ModuleNotFoundError as error:
    raise SystemExit("install gguf, which writes llama.cpp's model: pip install gguf") from error

EMBEDDING, HEAD = "token_embd", "output."
"""How the names of the embedding and of an untied output projection begin."""

ROUTER = "ffn_gate_inp"
"""What the name of a router holds."""

EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""The number of an expert in the name of a tensor of the source."""

BLOCK = 1 << 24
"""Weights that are quantized at a time."""


def ensure_gguf(path: Path, data: dict[str, Any], kind: str) -> Path:
    """Writes the GGUF file of random_model's weights unless it is there already.

    Args:
        path: of the file.
        data: config.json of the model.
        kind: "Q8_0" or "BF16", the type of matrices.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    _write(unfinished, data, gguf.GGMLQuantizationType[kind])
    unfinished.rename(path)
    return path


def gguf_names(data: dict[str, Any]) -> dict[str, list[str]]:
    """The tensors of the source that each tensor of GGUF holds, in their order: one, or those of
    all experts."""
    kind = gguf.MODEL_ARCH.QWEN3MOE if has_experts(data) else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(kind, data["num_hidden_layers"])
    found: dict[str, list[str]] = {}
    for name in sorted(random_model.tensors(data), key=_expert_of):
        theirs = names.get_name(EXPERT.sub(".experts.", name), (".weight",))
        if theirs:
            found.setdefault(theirs, []).append(name)
    return found


def has_experts(data: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model with mixtures of experts."""
    return "num_experts" in data


def _expert_of(name: str) -> int:
    found = EXPERT.search(name)
    return int(found[1]) if found else -1


def gguf_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a GGUF file."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def _write(path: Path, data: dict[str, Any], kind: Any) -> None:
    writer = gguf.GGUFWriter(path, "qwen3moe" if has_experts(data) else "qwen3")
    _describe(writer, data)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    weights = random_model.Weights(data)
    for theirs, names in gguf_names(data).items():
        shape = weights.shapes[names[0]]
        shape = (len(names), *shape) if len(names) > 1 else shape
        stored = _kind_of(theirs, shape, kind)
        block, nbytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes *= torch.Size(shape).numel() // block
        writer.add_tensor_info(theirs, shape, np.dtype("float32"), nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, names in gguf_names(data).items():
        stored = _kind_of(theirs, weights.shapes[names[0]], kind)
        parts = [_stored(weights[name], stored) for name in names]
        writer.write_tensor_data(np.concatenate(parts))
    writer.close()


def _kind_of(theirs: str, shape: Sequence[int], kind: Any) -> Any:
    """Vectors and routers are float32, as llama.cpp's own programs store them."""
    is_float = len(shape) == 1 or ROUTER in theirs
    return gguf.GGMLQuantizationType.F32 if is_float else kind


def _describe(writer: Any, data: dict[str, Any]) -> None:
    writer.add_context_length(data["max_position_embeddings"])
    writer.add_embedding_length(data["hidden_size"])
    writer.add_block_count(data["num_hidden_layers"])
    writer.add_feed_forward_length(data["intermediate_size"])
    writer.add_head_count(data["num_attention_heads"])
    writer.add_head_count_kv(data["num_key_value_heads"])
    writer.add_key_length(data["head_dim"])
    writer.add_value_length(data["head_dim"])
    writer.add_rope_freq_base(data["rope_theta"])
    writer.add_layer_norm_rms_eps(data["rms_norm_eps"])
    writer.add_vocab_size(data["vocab_size"])
    writer.add_tokenizer_model("none")
    if has_experts(data):
        writer.add_expert_count(data["num_experts"])
        writer.add_expert_used_count(data["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(data["moe_intermediate_size"])


def _stored(tensor: Tensor, kind: Any) -> NDArray[Any]:
    """The bytes of a tensor in its type, uint8, or float32."""
    if kind is gguf.GGMLQuantizationType.F32:
        return tensor.float().numpy()
    if kind is gguf.GGMLQuantizationType.BF16:
        return tensor.view(torch.uint8).numpy()
    step = max(1, BLOCK // tensor.shape[1])
    blocks = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(step)]
    return np.concatenate(blocks)
