"""The same bytes from any number of threads, processor path, memory limit and cut; pinned once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.command_line import program, run
from support.folders import contents
from support.group_scheme import NZ, GroupInt4
from support.native_cases import runnable_paths

from qwen3_ascend import ConvertOptions, Recipe, convert_checkpoint, native
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.manifest import Manifest, canonical_blake3
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16, SCHEMES, Scheme, pieces
from qwen3_ascend.checkpoint.schemes.pieces import Stack, sqnr_db
from qwen3_ascend.checkpoint.target import ASCEND_A2_A3
from qwen3_ascend.checkpoint.verify import verify
from qwen3_ascend.files.hashing import file_sha256

# If one of these changes, CONVERTER_VERSION in convert/identity.py has to go up as well.
PINNED = {
    "w8a8": (
        "fd1d3a76b2e6df1adb00bfc8c9675091dca51287539038474fdea9ca0c2cea0b",
        "b2294254ea89b06f3e2d25a47106305759ee5e53c81442f88747ba40f329acbd",
    ),
    "w8a8-plain": (
        "9ba509149ddf2b0be59c39a16240b33cecab9e91cf1d6b32a6adcfa7a858fc96",
        "b36ae3323de32d0debc2a0ab457dcf870176cdf3f86033fbd542de8dc785b28a",
    ),
    "bf16": (
        "752513b0281a812c6c83409c14aa1fa4b7bd40d57128b5543f1e0f0ad9f97a14",
        "763f3a34695d9cc058230c319b195f514a96e0c20086be278f9c9242d063ae5d",
    ),
}


@pytest.mark.parametrize("recipe", PINNED)
def test_pinned_bytes(recipe: str, tiny_source: Path, tmp_path: Path) -> None:
    manifest = convert_checkpoint(tiny_source, tmp_path / "out", recipe)
    shard = file_sha256(tmp_path / "out" / "ascend-00001-of-00001.safetensors")
    said = manifest.to_json()
    record = {
        key: said[key]
        for key in ("model", "recipe", "source", "linears", "tensors", "weight_files")
    }
    assert (shard, canonical_blake3(record)) == PINNED[recipe]


# The same for codes that are searched for: 8 bits for each output, and 4 bits for groups.
SEARCHED = Recipe.parse(
    """
    schema: 1
    name: searched
    rules:
      - {match: lm_head, scheme: {name: w4a16, group: 32}, quantizer: mse}
      - {match: "*", scheme: w8a8, quantizer: mse}
    """,
    "test",
)
SEARCHED_BYTES = "83794403764671b4ad5d0bbc002e0d44c855ab9381493c94885b1215ef1d350d"


def test_pinned_bytes_of_a_search(tiny_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_source, tmp_path / "out", SEARCHED)
    assert file_sha256(tmp_path / "out" / "ascend-00001-of-00001.safetensors") == SEARCHED_BYTES


# The same after the transforms that need no data, in a linear of each kind.
TRANSFORMED = Recipe.parse(
    """
    schema: 1
    name: transformed
    transforms: [cle, rotate]
    rules:
      - {match: lm_head, scheme: bf16}
      - {match: "*", scheme: w8a8}
    """,
    "test",
)
TRANSFORMED_BYTES = "fd1d3a76b2e6df1adb00bfc8c9675091dca51287539038474fdea9ca0c2cea0b"


def test_pinned_bytes_of_transforms(tiny_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_source, tmp_path / "out", TRANSFORMED)
    assert file_sha256(tmp_path / "out" / "ascend-00001-of-00001.safetensors") == TRANSFORMED_BYTES


WAYS: dict[str, dict[str, str]] = {
    "torch": {"QWEN3_ASCEND_NATIVE": "0"},
    **{path: {"QWEN3_ASCEND_CPU": path} for path in runnable_paths()},
}


@pytest.mark.parametrize("recipe", ["w8a8-plain", SEARCHED], ids=["nearest", "mse"])
@pytest.mark.parametrize("environment", WAYS.values(), ids=WAYS)
def test_kernels_and_threads(
    environment: dict[str, str],
    recipe: str | Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Odd sizes: parts end within strips, and K is no multiple of anything."""
    data = tiny_models.config(
        hidden_size=70, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1,
        head_dim=10, attention_bias=True,
    )  # fmt: skip
    source = tiny_models.write(tmp_path / "source", data, shards=3)
    convert_checkpoint(source, tmp_path / "first", recipe, ConvertOptions(threads=1))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    monkeypatch.setattr("qwen3_ascend.convert.weights.CHUNK_WEIGHTS", 700)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for threads in (1, 2, 7):
        convert_checkpoint(
            source,
            tmp_path / f"out{threads}",
            recipe,
            ConvertOptions(threads=threads, max_memory=300 << 20),
        )
        assert contents(tmp_path / f"out{threads}") == contents(tmp_path / "first")


def test_a_process_of_its_own(tiny_source: Path, tiny_w8a8: Path, tmp_path: Path) -> None:
    """With another locale, time zone, hash seed and number of OpenMP threads."""
    environment = {"OMP_NUM_THREADS": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    done = program("convert", tiny_source, tmp_path / "out", "-q", environment=environment)
    assert done.code == 0, done.err
    assert contents(tmp_path / "out") == contents(tiny_w8a8)


def put_together(scheme: Scheme, source: Stack, layout: Layout, kernels: native.Kernels) -> Linear:
    """A linear put together from its pieces, in reverse; its errors measured once more."""
    shape = source.shape
    stored = {
        suffix: torch.full(form.shape, 77).to(form.dtype)
        for suffix, form in scheme.forms(shape, layout).items()
    }
    linear = Linear(scheme, shape, layout, stored)
    for piece in reversed(scheme.pieces(shape, layout)):
        found = scheme.pack_piece(source, piece, layout, kernels)
        part = linear.piece(piece)
        for suffix, data in found.tensors.items():
            part.tensors[suffix].copy_(data)
        again = scheme.errors(part, source, piece, kernels)
        assert (again is None) == (found.sums is None)
        if again is not None and found.sums is not None:
            assert sqnr_db([again]) == sqnr_db([found.sums])
    return linear


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(1, 90),
    st.sampled_from([*sorted(SCHEMES), GroupInt4.name]), st.booleans(), st.integers(1, 9000),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
def test_any_cut_of_any_stack(
    parts: list[int], inputs: int, scheme: str, plain: bool, piece_bytes: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(len(parts) * inputs)
    values = [torch.randn((rows, inputs), generator=generator).to(dtype) for rows in parts]
    chosen = GroupInt4(32) if scheme == GroupInt4.name else SCHEMES[scheme]()
    layouts = {**ASCEND_A2_A3.layouts, GroupInt4.name: NZ}
    layout = ND if plain and scheme != GroupInt4.name else layouts[scheme]
    whole = quantize(chosen, torch.cat(values), None, layout).tensors
    for kernels in (native.best(), native.TorchKernels()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
            found = put_together(chosen, Stack(tuple(values)), layout, kernels).tensors
        assert all(torch.equal(found[suffix], whole[suffix]) for suffix in whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    """bf16 is lossy for them; the figure is that of the stored bytes, and verify finds it again."""
    weights = {n: t.to(dtype) * 1.001 for n, t in tiny_models.tensors(tiny_models.config()).items()}
    source = tiny_models.write(tmp_path / "source", weights=weights)
    manifest = convert_checkpoint(source, tmp_path / "out", "bf16")
    reader = CheckpointReader(tmp_path / "out")
    for name, entry in manifest.linears.items():
        exact = torch.cat([weights[f"{part}.weight"] for part, _ in entry.parts]).double()
        linear = reader.linear(name)
        assert linear.scheme == BF16()
        assert torch.equal(linear.codes()["weight"], exact.to(dtype).bfloat16())
        noise = (exact - linear.dequantize().double()).square().sum()
        figure = 10 * torch.log10(exact.square().sum() / noise)
        assert entry.sqnr_db == pytest.approx(float(figure), abs=0.0051)
    assert run("verify", tmp_path / "out", "--against", source).code == 0


def test_against(tiny_source: Path, tiny_w8a8: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    for made in (tiny_w8a8, tiny_bf16):
        done = run("verify", made, "--against", tiny_source)
        assert (done.code, done.err) == (0, "") and f"as {tiny_source} says" in done.out
    source = tiny_models.write(tmp_path / "source")
    convert_checkpoint(source, tmp_path / "out", "w8a8-plain")
    weights = tiny_models.tensors(tiny_models.config())
    weights["model.norm.weight"][3] += 1
    weights["model.layers.1.self_attn.v_proj.weight"][5, 5] += 3
    weights["lm_head.weight"][9, 9] += 1
    other = tiny_models.write(tmp_path / "other", weights=weights)
    assert verify(tmp_path / "out").ok
    said = run("verify", tmp_path / "out", "--against", other)
    lines = said.err.splitlines()
    assert said.code == 1 and len(lines) == 3
    assert lines[0] == "Error: tensor model.norm.weight differs from the source's"
    assert "model.layers.1.self_attn.qkv_proj" in lines[1] and "but the manifest says" in lines[1]
    assert "linear lm_head" in lines[2] and "manifest says exact" in lines[2]
    run("verify", tmp_path / "out", "--against", tiny_source).one_line_error("another model")
    run("verify", tmp_path / "out", "--against", tmp_path / "gone").one_line_error("gone")


def test_nothing_of_this_machine_is_in_the_manifest(tiny_w8a8: Path, tmp_path: Path) -> None:
    text = (tiny_w8a8 / "qwen3_ascend.json").read_text()
    assert str(tiny_w8a8.parent) not in text and str(tmp_path.parent) not in text
    assert Manifest.read(tiny_w8a8).source.repo == "tiny-qwen3"
