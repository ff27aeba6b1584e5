"""What an export will write, decided before a weight is read: every refusal happens here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_ascend.checkpoint.architecture import LinearSpec, Spec, model_spec
from qwen3_ascend.checkpoint.companions import CONFIG_NAME, carried, safe_name
from qwen3_ascend.checkpoint.layout import ND
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.schemes import BF16
from qwen3_ascend.checkpoint.verify import structure_problems
from qwen3_ascend.convert.exchange import QUANTIZATION_CONFIG
from qwen3_ascend.convert.export.card import model_card
from qwen3_ascend.convert.export.formats import Format
from qwen3_ascend.convert.export.item import ExportItem
from qwen3_ascend.convert.output.weight_file import WeightFilePlan, fill_files
from qwen3_ascend.convert.report import MODEL_CARD_NAME
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.json_file import indented

METADATA = {"format": "pt"}
"""What transformers asks of the header of a weight file."""

DENSE, MIXTURE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
"""Whose tensor names the weights have; a source may have called itself a backbone."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Under which config.json states the type of its weights: in transformers 5, and before."""


@dataclass(frozen=True)
class ExportPlan:
    """A whole export.

    Attributes:
        format: that it will have.
        items: in the order of the model.
        weight_files: that hold what they become.
        files: every other file, by name, but for the record of the export.
    """

    format: Format
    items: tuple[ExportItem, ...]
    weight_files: tuple[WeightFilePlan, ...]
    files: Mapping[str, bytes]

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(item.source_bytes for item in self.items)

    @property
    def piece_bytes(self) -> int:
        """Most memory that one piece takes while it is under way."""
        return max(item.piece_bytes for item in self.items)


def plan_export(reader: CheckpointReader, made: Format, max_file_bytes: int) -> ExportPlan:
    """Plans an export from a checkpoint's manifest.

    Args:
        reader: the checkpoint.
        made: the format.
        max_file_bytes: size at which a new weight file begins.

    Raises:
        CheckpointError: a tensor or small file is missing or not what the manifest says.
        OptionError: the format cannot state a scheme that is in use, or no engine would load it.
    """
    for problem in structure_problems(reader):
        raise CheckpointError(f"{reader.folder}: {problem}; convert again")
    items = tuple(_item(reader, spec, made) for spec in model_spec(reader.config))
    weight_files = fill_files(
        [item.forms for item in items], max_file_bytes, made.weight_names.stem, METADATA
    )
    small = _small_files(reader)
    said = made.files(_config(reader, small), items)
    files = {
        **small,
        **said,
        made.weight_names.index: _index(weight_files),
        MODEL_CARD_NAME: model_card(reader.manifest, made),
    }
    return ExportPlan(made, items, weight_files, files)


def _item(reader: CheckpointReader, spec: Spec, made: Format) -> ExportItem:
    manifest = reader.manifest
    if not isinstance(spec, LinearSpec):
        stored = manifest.tensors[spec.name]
        return ExportItem(spec, BF16(), ND, made.expression(spec.name, BF16()), stored.nbytes)
    entry = manifest.linears[spec.name]
    expression = made.expression(
        spec.name, entry.scheme, taken=entry.codes == "taken", experts=spec.experts > 0
    )
    nbytes = sum(tensor.nbytes for tensor in entry.tensors.values())
    return ExportItem(spec, entry.scheme, entry.layout, expression, nbytes)


def _small_files(reader: CheckpointReader) -> dict[str, bytes]:
    """The files that travel along; the reader has held them against the manifest."""
    names = carried(reader.manifest.files)
    return {name: (reader.folder / safe_name(name)).read_bytes() for name in names}


def _config(reader: CheckpointReader, small: Mapping[str, bytes]) -> dict[str, Any]:
    """config.json for the weights that are exported; every other key stays as it is."""
    if CONFIG_NAME not in small:
        raise CheckpointError(f"{reader.folder / CONFIG_NAME} is not in the manifest; put it back")
    config: dict[str, Any] = json.loads(small[CONFIG_NAME])
    config.pop(QUANTIZATION_CONFIG, None)  # of no content, or it would not have been converted
    named = [key for key in DTYPE_KEYS if key in config]
    return {
        **config,
        "architectures": [MIXTURE if reader.config.experts else DENSE],
        # A head that is quantized, or differs from the embedding, is a weight of its own.
        "tie_word_embeddings": reader.config.tie_word_embeddings,
        **dict.fromkeys(named or DTYPE_KEYS[1:], "bfloat16"),
    }


def _index(weight_files: Sequence[WeightFilePlan]) -> bytes:
    """The file that gives the weight file of every tensor."""
    tensors = [
        (name, form, file.file) for file in weight_files for name, form in file.tensors.items()
    ]
    size = sum(form.nbytes for _, form, _ in tensors)
    weight_map = {name: file for name, _, file in tensors}
    return indented({"metadata": {"total_size": size}, "weight_map": weight_map})
