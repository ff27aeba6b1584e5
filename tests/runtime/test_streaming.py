"""A model read one layer at a time computes what it computes as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import DATA

from qwen3_ascend import load
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.convert.conversion import convert_checkpoint
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.streaming import LayerStream, StoredModel, one_layer

TEXTS = [[3, 5, 8], list(range(40, 340)), [7], list(range(9, 138))]


@pytest.mark.parametrize("recipe", ["w8a8", "bf16"])
@pytest.mark.parametrize("step_tokens", [1, 200, 2048])
def test_logits_of_each_text_are_those_of_the_whole_model(
    recipe: str, step_tokens: int, tmp_path: Path
) -> None:
    convert_checkpoint(DATA, tmp_path / "out", recipe)
    reader = CheckpointReader(tmp_path / "out")
    config = reader.config
    backend = backends.get(one_layer(config), DeviceOptions("cpu", "float32"))
    model = StoredModel(reader, backend)
    stream = LayerStream(backend, config.rms_norm_eps, TEXTS, step_tokens)
    norm, head = model.final_norm(), model.head()
    found = torch.cat(
        [rows for states in stream.read(model) for rows in stream.logits(states, norm, head)]
    )
    llm = load(tmp_path / "out", device="cpu", dtype="float32")
    expected = torch.cat([llm.logits(text) for text in TEXTS])
    difference = (found - expected).abs()
    # Codes of activations that lie between two integers turn with the last bit of a float sum.
    assert difference.max() < 1e-3 if recipe == "bf16" else difference.mean() < 0.01
