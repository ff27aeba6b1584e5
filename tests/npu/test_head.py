"""A quantized output projection on the NPU: in parts where the kernel does not take it as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ascend_sim
import pytest
import torch
import torch_npu
from support import tiny_models

from qwen3_ascend import SamplingParams, convert_checkpoint, load
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import W8A8
from qwen3_ascend.checkpoint.schemes.w8a8 import quantize_tokens
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.runtime.backends.base import QuantizedActivation
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.npu.linears import DividedLinear, Int8Linear
from qwen3_ascend.runtime.backends.reference import Int8Linear as ReferenceLinear
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

pytestmark = pytest.mark.opposite_modes

VOCABULARY = 151936
"""Of every published Qwen3."""

WORDS = ("river", "bicycle", "house", "oxygen", "create")
PROMPTS = [f"What does {word} mean?" for word in WORDS]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, tied, with the whole vocabulary."""
    root = tmp_path_factory.mktemp("wide")
    data = tiny_models.config(
        vocab_size=VOCABULARY, hidden_size=128, head_dim=128, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    source = tiny_models.write(root / "source", data, tokenizer=False)
    convert_checkpoint(source, root / "out", "w8a8-head")
    return root / "out"


def tokens_of(
    folder: Path, device: str, prompts: Sequence[str | list[int]], params: SamplingParams,
    graph: bool = True,
) -> list[tuple[int, ...]]:  # fmt: skip
    llm = load(folder, device, kv_cache_tokens=4096, max_batch=5, graph=graph, buckets=(1, 5))
    return [answer.token_ids for answer in llm.generate(prompts, params)]


@pytest.mark.parametrize("graph", [False, True])
def test_the_whole_vocabulary(wide: Path, graph: bool) -> None:
    """The tokens of the CPU, which takes the head as one."""
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [70000, 3], [150000, 151935, 9, 4]]
    expected = tokens_of(wide, "cpu", prompts, params)
    assert tokens_of(wide, "npu", prompts, params, graph) == expected
    parts = {min(token // 50640, 2) for tokens in expected for token in tokens}
    assert parts == {0, 1, 2}  # tokens of each part are chosen


def test_the_head_lies_in_parts_and_each_byte_once(wide: Path) -> None:
    reader = CheckpointReader(wide)
    backend = NpuBackend(reader.config, DeviceOptions("npu"))
    before = torch_npu.npu.memory_allocated()
    loaded = backend.linear(reader.linear("lm_head"))
    assert isinstance(loaded, DividedLinear)
    assert [part.weight.shape[1] for part in loaded.parts] == [50624, 50656, 50656]
    nbytes = sum(tensor.nbytes for tensor in reader.linear("lm_head").tensors.values())
    held = torch_npu.npu.memory_allocated() - before
    assert nbytes <= held <= nbytes + 544 * 6  # what torch_npu rounds up
    assert ascend_sim.trace.format_casts() == []


def head(outputs: int, inputs: int) -> Linear:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, inputs, generator=generator)
    return quantize(W8A8(), weight, None, ASCEND_A2_A3.layouts["w8a8"])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("outputs", [65535, 65536, VOCABULARY, VOCABULARY + 1])
def test_the_integers_are_exact(outputs: int, rows: int) -> None:
    """Every logit is the reference's, bit by bit; 65535 outputs are one part."""
    stored = head(outputs, 64)
    loaded = NpuBackend(SMALL_CONFIG, DeviceOptions("npu")).linear(stored)
    assert isinstance(loaded, Int8Linear if outputs <= 65535 else DividedLinear)
    codes, scale = quantize_tokens(torch.randn(rows, 64))
    expected = ReferenceLinear(stored, torch.bfloat16)(QuantizedActivation(codes, scale))
    ascend_sim.reset_trace()
    found = loaded(QuantizedActivation(codes.to("npu"), scale.to("npu")))
    torch_npu.npu.synchronize()
    assert torch.equal(found.cpu(), expected)
    products = -(-outputs // 65504) if outputs > 65535 else 1
    names = [entry.name for entry in ascend_sim.trace.launches()]
    assert len(names) == products + (products > 1)
    assert ascend_sim.trace.hidden_copies() == 0 and ascend_sim.trace.format_casts() == []


def test_a_wrong_part_is_seen_by_the_check_of_weights() -> None:
    stored = head(70000, 64)
    backend = NpuBackend(SMALL_CONFIG, DeviceOptions("npu"))
    loaded = backend.linear(stored)
    assert isinstance(loaded, DividedLinear)
    rows = torch.arange(64)
    expected = stored.codes()["weight"][:, rows].t()
    assert torch.equal(loaded.probe(rows), expected)
    assert not torch.equal(DividedLinear(loaded.parts[::-1]).probe(rows), expected)


@pytest.mark.parametrize("graph", [False, True])
def test_the_trained_model(graph: bool, tmp_path: Path) -> None:
    convert_checkpoint(tiny_models.DATA, tmp_path / "out", "w8a8-head")
    assert not CheckpointReader(tmp_path / "out").config.tie_word_embeddings
    params = SamplingParams(max_new_tokens=30)
    expected = tokens_of(tmp_path / "out", "cpu", PROMPTS, params)
    assert tokens_of(tmp_path / "out", "npu", PROMPTS, params, graph) == expected
