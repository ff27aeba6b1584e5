"""What peers' checkpoints stand for, as benchmarks/quality.py reads them, against the peers' own
readers or their definitions."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from peers.checkpoints import PeerModel, decode, per_token, static_inputs
from safetensors.torch import load_file
from support.quantized_sources import DATA
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def codes_of_int4(outputs: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)


def test_packed_int4_is_what_compressed_tensors_packs() -> None:
    codes, scales = codes_of_int4(16, 64), torch.rand(16, 2) - 0.5
    packed = {"weight_packed": pack_to_int32(codes, 4), "weight_scale": scales}
    assert torch.equal(decode(packed), codes.float() * scales.repeat_interleave(32, 1))


def test_gptq_words_run_along_inputs_and_its_zero_is_stored_less_one() -> None:
    codes, scales = codes_of_int4(8, 64), torch.rand(8, 2) - 0.5
    words = torch.zeros(8, 8, dtype=torch.int64)
    for place in range(8):
        words |= (codes[:, place::8].long() + 8) << 4 * place
    tensors = {
        "qweight": words.to(torch.int32).t().contiguous(),
        "qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
        "scales": scales.t().contiguous(),
    }
    assert torch.equal(decode(tensors), codes.float() * scales.repeat_interleave(32, 1))


def test_static_inputs_are_rounded_under_one_scale_and_offset() -> None:
    rounded = static_inputs(
        {"input_scale": torch.tensor([0.5]), "input_offset": torch.tensor([3.0])}
    )
    assert rounded is not None
    x = torch.tensor([[0.6, -0.9, 1000.0, -1000.0]])
    assert rounded(x).tolist() == [[0.5, -1.0, (127 - 3) / 2, (-128 - 3) / 2]]


def test_static_weights_are_codes_under_the_scale_that_is_left_of_deq_scale() -> None:
    codes, scales = torch.tensor([[3, -5], [100, 7]], dtype=torch.int8), torch.tensor([0.5, 0.25])
    deq_scale = (scales * 2.0).view(torch.int32).to(torch.int64)
    tensors = {"weight": codes, "deq_scale": deq_scale, "input_scale": torch.tensor([2.0])}
    assert torch.equal(decode(tensors), codes.float() * scales[:, None])


def test_int8_of_llm_compressor_is_what_transformers_reads() -> None:
    folder = DATA / "llm-compressor"
    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    found = PeerModel(folder, dynamic=True).layer(0).output.weight
    expected = theirs.model.layers[0].self_attn.o_proj.weight
    assert torch.allclose(found, expected, rtol=1e-2, atol=0)


def test_int8_of_msmodelslim_is_near_to_its_source(tmp_path: Path) -> None:
    shutil.copytree(DATA / "modelslim", tmp_path / "model")
    model = PeerModel(tmp_path / "model", dynamic=True)
    stored = load_file(next((tmp_path / "model").glob("*.safetensors")))
    name = "model.layers.1.self_attn.o_proj"
    expected = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
    assert torch.equal(model.layer(1).output.weight, expected)


def test_inputs_of_a_token_share_a_scale() -> None:
    x = torch.tensor([[1.27, 0.004, -0.026], [0.0, 0.0, 0.0]])
    assert torch.allclose(per_token(x), torch.tensor([[1.27, 0.0, -0.03], [0.0, 0.0, 0.0]]))
