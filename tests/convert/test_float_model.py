"""The float layers of a source compute what transformers computes of the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.quantized_sources import DATA as QUANTIZED
from support.quantized_sources import REAL, source_weights
from torch import Tensor
from transformers import Qwen3ForCausalLM

from qwen3_ascend.convert.float_model import Changed, FloatModel
from qwen3_ascend.convert.source import open_source
from qwen3_ascend.errors import SourceError
from qwen3_ascend.files.json_file import read_json_object
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.streaming import LayerStream, one_layer

TEXTS = [[3, 5, 8], list(range(40, 300)), [7]]


def logits(folder: Path, change: Changed | None = None) -> Tensor:
    """Of all texts, by the layers of a source, float32 [T, vocab]."""
    with open_source(str(folder)) as source:
        backend = backends.get(one_layer(source.config), DeviceOptions("cpu", "float32"))
        model = FloatModel(source, backend, change)
        source.expect(model.reads)
        stream = LayerStream(backend, model.config.rms_norm_eps, TEXTS, 200)
        norm, head = model.final_norm(), model.head()
        hidden = stream.read(model)
        return torch.cat([rows for states in hidden for rows in stream.logits(states, norm, head)])


def of_transformers(folder: Path) -> Tensor:
    """What transformers says of a folder in float32."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([text])).logits[0] for text in TEXTS])


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_the_trained_model() -> None:
    assert_close(logits(tiny_models.DATA), of_transformers(tiny_models.DATA))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_heads_and_biases(tied: bool, biased: bool, tmp_path: Path) -> None:
    data = tiny_models.config(tie_word_embeddings=tied, attention_bias=biased)
    folder = tiny_models.write(tmp_path / "model", data, shards=3)
    assert_close(logits(folder), of_transformers(folder))


def test_a_tied_model_with_a_head_of_its_own_keeps_it(tmp_path: Path) -> None:
    data = tiny_models.config(tie_word_embeddings=True)
    untied = tiny_models.config(tie_word_embeddings=False)
    folder = tiny_models.write(tmp_path / "model", data, tiny_models.tensors(untied))
    other = tiny_models.write(tmp_path / "other", untied, tiny_models.tensors(untied))
    assert torch.equal(logits(folder), logits(other))


@pytest.mark.parametrize("name", REAL)
def test_codes_are_decoded(name: str, tmp_path: Path) -> None:
    weights = source_weights(QUANTIZED / name)
    decoded = {
        tensor: value.float() * weights.get(f"{tensor}_scale", torch.ones(1)).float()
        for tensor, value in weights.items()
        if not tensor.endswith(("_scale", "_offset"))
    }
    data = read_json_object(QUANTIZED / name / "config.json")
    data.pop("quantization_config", None)
    plain = tiny_models.write(tmp_path / "plain", data, decoded)
    assert_close(logits(QUANTIZED / name), of_transformers(plain))


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_goes_through_the_change(tied: bool, tmp_path: Path) -> None:
    data = tiny_models.config(tie_word_embeddings=tied, attention_bias=True)
    folder = tiny_models.write(tmp_path / "model", data)
    seen = set()

    def change(name: str, weight: Tensor) -> Tensor:
        """Scales what `up` makes and takes it back in `down`."""
        seen.add(name)
        assert weight.dtype == torch.float32
        if name.endswith("up_proj.weight"):
            return weight * 8
        return weight / 8 if name.endswith("down_proj.weight") else weight

    changed = logits(folder, change)
    assert torch.equal(changed, logits(folder))
    assert seen == set(tiny_models.shapes(data)) | {"lm_head.weight"}


def test_a_changed_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "model", tiny_models.config(tie_word_embeddings=True))
    doubled = logits(folder, lambda name, w: w * 2 if name == "lm_head.weight" else w)
    assert torch.equal(doubled, logits(folder) * 2)


def test_what_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = tiny_models.write(tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path)
    with (
        open_source(str(folder)) as source,
        pytest.raises(SourceError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    ):
        FloatModel(source, backends.get(one_layer(source.config), DeviceOptions("cpu", "float32")))
