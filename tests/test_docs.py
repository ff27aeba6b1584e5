"""The documents say what is true: examples are computed, links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from jsonschema import Draft202012Validator
from support.manifest_schema import manifest_schema, schema_text
from support.recipe_notes import WORDS, recipe_notes

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.layout import ND, Layout
from qwen3_ascend.checkpoint.linear import Linear, quantize
from qwen3_ascend.checkpoint.manifest import canonical_blake3
from qwen3_ascend.checkpoint.schemes import (
    BF16,
    SCHEMES,
    W4A8,
    W4A16,
    W8A8,
    W8A8Static,
    w4a8,
    w4a16,
)
from qwen3_ascend.checkpoint.sharding import shard
from qwen3_ascend.checkpoint.target import TARGETS
from qwen3_ascend.convert.export.record import ExportRecord
from qwen3_ascend.convert.options import EXPORT_FORMATS, ConvertOptions, WritingOptions
from qwen3_ascend.files.json_file import plain
from qwen3_ascend.options import described
from qwen3_ascend.runtime.options import DeviceOptions, EngineOptions

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").glob("*.md")])
FORMAT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_machine(page: Path) -> None:
    assert not re.search(r"(^|[^\w.}-])/(tmp|root|work|home)/", page.read_text(encoding="utf-8"))


def test_the_readme_is_short() -> None:
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= 800


def rows_of(packed: torch.Tensor) -> list[list[int]]:
    """The runs of 32 bytes that hold anything, without trailing zeros."""
    rows = [row.tolist() for row in packed.view(-1, 32)]
    trimmed = [row[: max((i + 1 for i, code in enumerate(row) if code), default=0)] for row in rows]
    return [row for row in trimmed if row]


def test_the_matrix_by_hand() -> None:
    weight = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    of_kn = Layout("nz", "KN", 32).pack(weight)
    assert tuple(of_kn.shape) == (1, 1, 16, 32) and of_kn.nbytes == 512
    blocks = re.findall(r"offset +(\d+): +([\d ]+?) 0 \.\.\. 0", FORMAT)
    said = [(int(offset), [int(code) for code in row.split()]) for offset, row in blocks]
    assert [row for _, row in said[:3]] == rows_of(of_kn)
    assert [row for _, row in said[3:]] == rows_of(Layout("nz", "NK", 32).pack(weight))
    assert [offset for offset, _ in said] == [0, 32, 64, 0, 32]


def test_the_matrix_by_hand_in_bfloat16() -> None:
    weight = torch.tensor([[1, 2, 3], [4, 5, 6]]).bfloat16()
    packed = TARGETS["ascend-a2-a3"].layouts["bf16"].pack(weight)
    assert tuple(packed.shape) == (1, 1, 16, 16) and packed.nbytes == 512
    said = re.findall(r"byte +(\d+): +((?:[0-9a-f]{2} )+)00 \.\.\. 00", FORMAT)
    expected = torch.zeros(512, dtype=torch.uint8)
    for start, text in said:
        row = torch.tensor([*bytes.fromhex(text)], dtype=torch.uint8)
        expected[int(start) : int(start) + len(row)] = row
    assert len(said) == 2
    assert torch.equal(packed.flatten().view(torch.uint8), expected)


def test_the_element_of_a_larger_matrix() -> None:
    weight = torch.zeros(64, 64, dtype=torch.int8)
    weight[40, 17] = 1
    layouts = TARGETS["ascend-a2-a3"].layouts
    at = int(layouts["w8a8"].pack(weight).flatten().argmax())
    assert f"= {at}` bytes" in FORMAT
    at = int(layouts["bf16"].pack(weight.bfloat16()).flatten().argmax())
    assert f"= {at}` elements, {2 * at} bytes" in FORMAT


def test_the_word_of_int4_codes_by_hand() -> None:
    codes = torch.tensor([[1], [-2], [3], [-4], [5], [-6], [7], [-8]], dtype=torch.int8)
    word = w4a16.ROWS.pack(codes)
    assert word.dtype == torch.int32 and tuple(word.shape) == (1, 1)
    assert (
        f"`{int(word) & 0xFFFFFFFF:#x}`, the bytes `{bytes(word.view(torch.uint8)[0]).hex(' ')}`"
        in FORMAT
    )
    for layout in (w4a16.NZ, w4a16.ROWS):
        said = json.dumps(plain(layout))
        assert f"`{said}`" in FORMAT


def test_every_scheme_and_target_is_described() -> None:
    for name in (*SCHEMES, *TARGETS):
        assert f"`{name}`" in FORMAT or f'`"{name}"`' in FORMAT


def table_of_cuts() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| (.+?) \| (axis.+?|kept.+?) \| (axis.+?|kept.+?) \|$", FORMAT, re.M)
    return {tensor: (outputs, inputs) for tensor, outputs, inputs in rows}


def place(linear: Linear, suffix: str, cut: str, symbol: str | None) -> str:
    found = {**linear.places()[suffix]}.get(cut)  # type: ignore[call-overload]
    if found is None:
        return "kept"
    return f"axis {found.axis}, in units of {symbol or found.unit}"


def test_the_rules_of_cutting() -> None:
    said, weight = table_of_cuts(), torch.zeros(64, 64)
    words = "C0 * per_word"
    cases = {
        "`weight`, nz of KN": (quantize(W8A8(), weight, None, Layout("nz", "KN", 32)), words, None),
        "`weight`, nz of NK": (quantize(BF16(), weight, None, Layout("nz", "NK", 16)), None, words),
        "`weight`, nd of NK": (quantize(BF16(), weight, None, ND), None, "per_word"),
        "`weight`, nd of KN": (quantize(W4A16(32), weight, None, w4a16.ROWS), "per_word", None),
    }
    for row, (linear, of_outputs, of_inputs) in cases.items():
        assert said[row] == (
            place(linear, "weight", "outputs", of_outputs),
            place(linear, "weight", "inputs", of_inputs),
        )
    w8a8 = cases["`weight`, nz of KN"][0]
    of_outputs, of_inputs = said["`scale` of w8a8 and w8a16"]
    assert of_outputs == place(w8a8, "scale", "outputs", None)
    assert of_inputs.startswith(place(w8a8, "scale", "inputs", None))
    int4 = cases["`weight`, nd of KN"][0]
    offsets = quantize(W4A16(32, zero_points=True), weight, None, w4a16.ROWS)
    for linear, suffix in ((int4, "scale"), (offsets, "scale"), (offsets, "offset")):
        assert said["`scale` and `offset` of w4a16"] == (
            place(linear, suffix, "outputs", None),
            place(linear, suffix, "inputs", "group"),
        )
    static = quantize(W8A8Static(), weight, None, Layout("nz", "KN", 32))
    for suffix in ("deq_scale", "quant_bias"):
        of_outputs, of_inputs = said[f"`{suffix}` of w8a8-static"]
        assert of_outputs == place(static, suffix, "outputs", None)
        assert of_inputs.startswith(place(static, suffix, "inputs", None))
    for suffix in ("input_scale", "input_offset"):
        assert not static.places()[suffix]
    assert set(said["`input_scale` and `input_offset` of w8a8-static"]) == {"kept whole"}
    groups = quantize(W4A8(), weight, None, w4a8.ROWS)
    for suffix in ("scale", "code_sums"):
        assert said["`scale` and `code_sums` of w4a8"] == (
            place(groups, suffix, "outputs", None),
            place(groups, suffix, "inputs", None),
        )
    assert said["`bias`"][0] == place(w8a8, "bias", "outputs", None)


def linear_of_06b(outputs: int, inputs: int) -> Linear:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    return quantize(W8A8(), weight, None, TARGETS["ascend-a2-a3"].layouts["w8a8"])


def test_the_example_of_cutting() -> None:
    gate_up, down = linear_of_06b(6144, 1024), linear_of_06b(1024, 3072)
    share = shard(gate_up, "outputs", (3072, 3072), 1, 2)
    strips = torch.cat([gate_up.weight[48:96], gate_up.weight[144:192]])
    scale = gate_up.tensors["scale"]
    assert torch.equal(share.weight, strips)
    assert torch.equal(share.tensors["scale"], torch.cat([scale[1536:3072], scale[4608:6144]]))
    assert "strips 48 to 95 and 144 to 191" in FORMAT
    assert "outputs 1536 to 3071 and 4608 to 6143" in FORMAT
    part = shard(down, "inputs", (1024,), 1, 2)
    assert torch.equal(part.weight, down.weight[:, 96:192])
    assert torch.equal(part.tensors["scale"], down.tensors["scale"])
    assert "row blocks 96 to 191 of each strip" in FORMAT
    for tensor in (gate_up.weight, share.weight, down.weight, part.weight):
        assert f"`{list(tensor.shape)}`" in FORMAT


def test_the_example_of_canonical_json() -> None:
    value, count, text, digest = re.findall(
        r"`(\{.+\})` becomes the (\d+) bytes\n\n +(.+)\n\nwith the hash\n\n +(.+)\n", FORMAT
    )[0]
    assert len(text.encode()) == int(count)
    assert blake3(text.encode()).hexdigest() == digest == canonical_blake3(json.loads(value))


def test_every_format_of_an_export_is_described() -> None:
    text = (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")
    for name in EXPORT_FORMATS:
        assert f"| `{name}` |" in text
    for key in ExportRecord.__dataclass_fields__:
        assert f"`{key}`" in text


def test_every_recipe_is_described_as_it_describes_itself() -> None:
    """One row for each, of the words that its file begins with."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = text.partition("| recipe | purpose | bits | measured | needs |\n")[2]
    rows, expected = table.partition("\n\n")[0].splitlines()[1:], []
    for name in recipes.names():
        said = recipe_notes(name)
        assert tuple(said) == WORDS, name
        expected.append(f"| `{name}` | {' | '.join(said.values())} |")
    assert sorted(rows) == sorted(expected)


def test_every_option_is_described() -> None:
    pages: dict[str, list[type]] = {
        "converting.md": [ConvertOptions],
        "exporting.md": [WritingOptions],
        "running.md": [EngineOptions, DeviceOptions],
    }
    for page, kinds in pages.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in (name for kind in kinds for name in described(kind)):
            assert re.search(rf"^\|.*`{name}` \|", text, re.M), f"{page}: {name}"


def test_the_schema_is_that_of_the_types_and_of_a_real_manifest(
    tiny_w8a8: Path, tiny_bf16: Path
) -> None:
    assert (ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8") == schema_text()
    validator = Draft202012Validator(manifest_schema())
    for folder in (tiny_w8a8, tiny_bf16):
        manifest = json.loads((folder / "qwen3_ascend.json").read_text(encoding="utf-8"))
        assert [*validator.iter_errors(manifest)] == []
        wrongs: list[dict[str, object]] = [
            {"target": "x"},
            {"more": 1},
            {"format_version": 2},
            {"files": {"a": {}}},
        ]
        for wrong in wrongs:
            assert [*validator.iter_errors(manifest | wrong)], wrong


def test_a_reader_made_from_the_specification(tiny_w8a8: Path) -> None:
    """A few lines that know the document and nothing of the package."""
    manifest = json.loads((tiny_w8a8 / "qwen3_ascend.json").read_text(encoding="utf-8"))
    own = manifest.pop("manifest_blake3")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert blake3(text.encode()).hexdigest() == own
    for key in manifest:
        assert f"| `{key}` |" in FORMAT, f"{key} is not described"
    name = "model.layers.1.mlp.down_proj"
    linear = manifest["linears"][name]
    stored = linear["tensors"]["weight"]
    tables = "\n".join(re.findall(r"^\|.+$", FORMAT, re.M))
    entries: tuple[dict[str, object], ...] = (
        linear, linear["layout"], stored, manifest["model"], manifest["model"]["rope"],
        manifest["source"],
    )  # fmt: skip
    for key in (key for entry in entries for key in entry):
        assert f"`{key}`" in tables, f"{key} is not described"
    raw = (tiny_w8a8 / stored["file"]).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start, stop = header[f"{name}.weight"]["data_offsets"]
    base = 8 + int.from_bytes(raw[:8], "little")
    data = raw[base + start : base + stop]
    assert blake3(data).hexdigest() == stored["blake3"]
    assert blake3(raw[:base]).hexdigest() == manifest["weight_files"][stored["file"]]["blake3"]
    outputs, inputs = linear["shape"]
    row_blocks, width = -(-inputs // 16), linear["layout"]["c0"]
    assert stored["shape"] == [-(-outputs // width), row_blocks, 16, width]
    n, k = outputs - 3, inputs - 5
    offset = ((n // width * row_blocks + k // 16) * 16 + k % 16) * width + n % width
    from qwen3_ascend.checkpoint.reader import CheckpointReader

    code = CheckpointReader(tiny_w8a8).linear(name).codes()["weight"][n, k]
    assert int.from_bytes(data[offset : offset + 1], "little", signed=True) == int(code)
