"""Loading is plain copies: no cast, one transfer of each byte, no second copy in memory."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import ascend_sim
import pytest
import torch
import torch_npu
from support.folders import flip_a_byte

from qwen3_ascend import load
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.linear import quantize
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16, W8A8
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.errors import CheckpointError, DeviceError
from qwen3_ascend.runtime.backends.npu import formats, self_check
from qwen3_ascend.runtime.backends.npu.backend import NpuBackend
from qwen3_ascend.runtime.backends.npu.linears import DenseLinear, Int8Linear, WeightOnlyLinear
from qwen3_ascend.runtime.model.loader import load_model
from qwen3_ascend.runtime.model.qwen3 import DecoderLayer, Mlp, Qwen3
from qwen3_ascend.runtime.options import DeviceOptions

pytestmark = pytest.mark.opposite_modes

MODEL = (Qwen3, DecoderLayer, Mlp, DenseLinear, Int8Linear, WeightOnlyLinear)

RECIPES = ("w8a8", "bf16", "w8a16", "w4a16-plain", "w4a16-zero-points")

PADDING = 544
"""torch_npu rounds an allocation up to 512 bytes and adds 32."""


def test_a_kernel_that_is_not_there_is_named(checkpoints: dict[str, Path]) -> None:
    rule = (
        "this torch_npu and CANN do not compute with the scheme w4a8 .*group_sizes.*; convert with "
        "another recipe"
    )
    with (
        ascend_sim.absences.without_argument("npu_quant_matmul", "group_sizes"),
        pytest.raises(DeviceError, match=rule),
    ):
        load(checkpoints["w4a8-plain"], device="npu", kv_cache_tokens=1024, graph=False)


def open_backend(reader: CheckpointReader) -> NpuBackend:
    return NpuBackend(reader.manifest.model, DeviceOptions())


def device_tensors(value: object) -> list[torch.Tensor]:
    """Every weight of a loaded model, each once."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for one in value for tensor in device_tensors(one)]
    inside = vars(value) if isinstance(value, MODEL) else {}
    found = [tensor for name, one in inside.items() for tensor in device_tensors(one)]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in found}.values())


def stored_tensors(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Every stored tensor, as the loader sees it in the mapped file."""
    found = {name: reader.tensor(name) for name in reader.manifest.tensors}
    for name in reader.manifest.linears:
        for suffix, tensor in reader.linear(name).tensors.items():
            found[f"{name}.{suffix}"] = tensor
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_byte_is_copied_once_and_never_cast(checkpoints: dict[str, Path], recipe: str) -> None:
    reader = CheckpointReader(checkpoints[recipe])
    backend = open_backend(reader)
    for name in reader.manifest.linears:  # what checks the first of a kind is not counted
        backend.linear(reader.linear(name))
    ascend_sim.reset_trace()
    model = load_model(reader, backend)
    torch_npu.npu.synchronize()
    assert ascend_sim.trace.format_casts() == []
    copies = ascend_sim.trace.copies("host_to_device")
    loaded = device_tensors(model)
    assert sum(t.untyped_storage().nbytes() for t in loaded) == sum(
        tensor.nbytes for tensor in stored_tensors(reader).values()
    )
    for tensor in loaded:
        start = tensor.untyped_storage().data_ptr()
        stop = start + tensor.untyped_storage().nbytes()
        inside = sorted((c.destination, c.bytes) for c in copies if start <= c.destination < stop)
        for at, nbytes in inside:  # each begins where the one before it has ended
            assert at == start
            start += nbytes
        assert start == stop
    assert len(model.layers) == 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_peak_memory_is_the_bytes_of_the_weights(checkpoints: dict[str, Path], recipe: str) -> None:
    reader = CheckpointReader(checkpoints[recipe])
    backend = open_backend(reader)
    torch_npu.npu.synchronize()
    before = torch_npu.npu.memory_allocated()
    torch_npu.npu.reset_peak_memory_stats()
    model = load_model(reader, backend)
    stored = reader.manifest.stored().values()
    weights = sum(tensor.nbytes for tensor in stored)
    held = torch_npu.npu.memory_allocated() - before
    peak = torch_npu.npu.max_memory_allocated() - before
    assert weights <= held <= weights + PADDING * len(stored)
    # While the first linear of a kind is checked, its probe and result exist too: a few rows.
    largest = max(linear.shape[0] for linear in reader.manifest.linears.values())
    assert peak <= held + self_check.PROBE_ROWS * largest * 8
    assert model.config.tie_word_embeddings == (recipe != "w8a8")  # whose head is rotated


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_four_self_checks_hold(checkpoints: dict[str, Path], recipe: str) -> None:
    reader = CheckpointReader(checkpoints[recipe])
    backend = open_backend(reader)
    assert self_check.layouts_agree(torch.bfloat16 if recipe == "bf16" else torch.int8)
    for name in reader.manifest.linears:
        linear = reader.linear(name)
        loaded = backend.linear(linear)
        assert self_check.reads_back(linear, loaded)
        assert self_check.kernel_sees_weight(linear, loaded)


def test_a_wrong_orientation_is_caught_by_s3_and_only_there(checkpoints: dict[str, Path]) -> None:
    """NZ bytes of [N, K] where the kernel reads [K, N], for a square weight: every size fits."""
    reader = CheckpointReader(checkpoints["w8a8"])
    open_backend(reader)
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    right = quantize(W8A8(), weight, None, ASCEND_A2_A3.layouts["w8a8"])
    turned = right.layout.pack(right.codes()["weight"].t())
    wrong = dataclasses.replace(right, tensors={**right.tensors, "weight": turned})
    loaded = Int8Linear.load(wrong, formats.upload_packed)
    assert self_check.reads_back(wrong, loaded)  # S2 sees the file's own bytes
    assert not self_check.kernel_sees_weight(right, loaded)  # S3 knows the weight


def test_a_device_with_another_tile_order_falls_back_with_a_warning(
    checkpoints: dict[str, Path],
) -> None:
    reader = CheckpointReader(checkpoints["w8a8"])
    backend = open_backend(reader)
    name = next(iter(reader.manifest.linears))
    linear = reader.linear(name)
    with (
        ascend_sim.faults.transposed_nz_tiles(),
        pytest.warns(UserWarning, match="casting each weight on the device"),
    ):
        loaded = backend.linear(linear)
        assert self_check.layouts_agree(torch.int8) is False
        assert self_check.kernel_sees_weight(linear, loaded)


def test_formats_that_silently_stay_nd_are_noticed(checkpoints: dict[str, Path]) -> None:
    """allow_internal_format off: the wheel's cast quietly returns ND; S1 says so."""
    reader = CheckpointReader(checkpoints["w8a8"])
    backend = open_backend(reader)
    torch_npu.npu.config.allow_internal_format = False
    try:
        assert self_check.layouts_agree(torch.int8) is None
    finally:
        torch_npu.npu.config.allow_internal_format = True
    linear = reader.linear(next(iter(reader.manifest.linears)))
    outputs, inputs = linear.shape
    with ascend_sim.faults.nd_instead_of_nz():
        with pytest.raises(formats.FormatError, match="not FRACTAL_NZ"):
            formats.upload_packed(linear.weight, linear.layout, outputs, inputs)
        with pytest.warns(UserWarning, match="not FRACTAL_NZ"):
            loaded = backend.linear(linear)  # the announced fallback runs in ND
    assert self_check.kernel_sees_weight(linear, loaded)


def test_a_failing_copy_is_one_clear_error(checkpoints: dict[str, Path]) -> None:
    reader = CheckpointReader(checkpoints["w8a8"])
    backend = open_backend(reader)
    linear = reader.linear(next(iter(reader.manifest.linears)))
    with ascend_sim.faults.failing_copies(), pytest.raises(DeviceError, match="aclrtMemcpy"):
        backend.linear(linear)


def test_plain_layouts_and_biases_load_too(checkpoints: dict[str, Path]) -> None:
    backend = open_backend(CheckpointReader(checkpoints["w8a8"]))
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(*shape, generator=generator) for shape in ((64, 96), (64,)))
    x = torch.randn(3, 96, generator=generator).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scheme, layout in ((W8A8(), ND), (W8A8(), ASCEND_A2_A3.layouts["w8a8"]), (BF16(), ND)):
            linear = quantize(scheme, weight, bias, layout)
            loaded, ones = backend.linear(linear), torch.ones(96).bfloat16().to("npu")
            fed, _ = backend.add_norm(x.to("npu"), None, ones, 0.0, loaded)
            y = loaded(fed).cpu()
            normed = x.float() / x.float().square().mean(-1, keepdim=True).sqrt()
            assert torch.allclose(y.float(), linear.reference(normed), rtol=2**-7, atol=0.1), (
                scheme,
                layout,
            )


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"]
)
def test_a_changed_byte_is_refused_before_anything_is_computed(
    checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Of a plain tensor and of a packed one, which are hashed just ahead of their copies."""
    folder = Path(shutil.copytree(checkpoints["w8a8"], tmp_path / "damaged"))
    flip_a_byte(folder, name)
    with pytest.raises(CheckpointError, match=f"tensor {name} in ascend-00001.*differ"):
        load(folder, device="npu", kv_cache_tokens=1024, max_batch=1)
    assert not ascend_sim.trace.replays()
