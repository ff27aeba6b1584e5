"""tiny-outlier has outliers, and the tiny model's function bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from support.outliers import write_tiny_outlier
from support.tiny_models import DATA
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

WORDS = 200


def logits(folder: Path) -> Tensor:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (DATA / "heldout.txt").read_text()[: 8 * WORDS]
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


def test_every_logit_keeps_its_bits(tmp_path: Path) -> None:
    assert torch.equal(logits(write_tiny_outlier(tmp_path / "outlier")), logits(DATA))


def test_channels_stand_out(tmp_path: Path) -> None:
    folder = write_tiny_outlier(tmp_path / "outlier")
    planted, plain = (load_file(each / "model.safetensors") for each in (folder, DATA))
    for layer in range(4):
        for name in ("input_layernorm", "post_attention_layernorm"):
            grown = planted[key := f"model.layers.{layer}.{name}.weight"] / plain[key]
            assert set(grown.tolist()) <= {1.0, 8.0, 16.0, 32.0, 64.0} and grown.max() >= 8
        for name in ("self_attn.v_proj", "mlp.up_proj"):
            key = f"model.layers.{layer}.{name}.weight"
            rows = planted[key].abs().amax(1) / plain[key].abs().amax(1)
            assert rows.max() >= 8 and rows.median() == 1
