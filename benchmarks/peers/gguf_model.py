"""The random weights of random_model.py as the GGUF file that llama.cpp runs.

Every matrix is stored in one type, the embedding and the output projection included, as
llama-quantize does it for these types; norms are float32. There is no tokenizer in it, which
llama.cpp's benchmarks do not need.
"""

from __future__ import annotations

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


def gguf_names(data: dict[str, Any]) -> dict[str, str]:
    """The names of tensors in GGUF, by those of the source."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, data["num_hidden_layers"])
    found = {name: names.get_name(name, (".weight",)) for name in random_model.tensors(data)}
    return {name: theirs for name, theirs in found.items() if theirs}


def gguf_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a GGUF file."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def _write(path: Path, data: dict[str, Any], kind: Any) -> None:
    writer = gguf.GGUFWriter(path, "qwen3")
    _describe(writer, data)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    theirs = gguf_names(data)
    for name, shape in random_model.tensors(data).items():
        stored = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        block, nbytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes *= torch.Size(shape).numel() // block
        writer.add_tensor_info(theirs[name], shape, np.dtype("float32"), nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in random_model.weights(data):
        writer.write_tensor_data(_stored(tensor, kind))
    writer.close()


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


def _stored(tensor: Tensor, kind: Any) -> NDArray[Any]:
    """The bytes of a tensor in its type, uint8, or float32 for a vector."""
    if tensor.ndim == 1:
        return tensor.float().numpy()
    if kind is gguf.GGMLQuantizationType.BF16:
        return tensor.view(torch.uint8).numpy()
    step = max(1, BLOCK // tensor.shape[1])
    blocks = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(step)]
    return np.concatenate(blocks)
