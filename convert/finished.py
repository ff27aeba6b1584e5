"""Whether an output that is finished already is what a conversion would make again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen3_ascend.checkpoint.companions import safe_name
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.convert.calibration.factors import FACTORS_NAME
from qwen3_ascend.convert.compare import compare
from qwen3_ascend.convert.output.writer import OutputKind
from qwen3_ascend.convert.plan import STEM, Plan
from qwen3_ascend.convert.report import MODEL_CARD_NAME
from qwen3_ascend.convert.source import Source
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.hashing import bytes_blake3
from qwen3_ascend.files.safetensors import Form
from qwen3_ascend.version import __version__


def checkpoint_files(folder: Path) -> list[str]:
    """The files of the checkpoint that is in a folder.

    Those beside the weight files are known from the manifest, if it can be believed: a chat
    template that the new model does not have would be taken for its own.
    """
    try:
        beside = [safe_name(name) for name in Manifest.read(folder).files]
    except CheckpointError:
        beside = []
    weight_files = [path.name for path in folder.glob(f"{STEM}-*.safetensors")]
    return [MANIFEST_NAME, *weight_files, *beside]


CHECKPOINT = OutputKind("conversion", MANIFEST_NAME, checkpoint_files)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a manifest, which comes last."""
    return (folder / MANIFEST_NAME).is_file()


def finished_manifest(
    folder: Path, plan: Plan, source: Source, carried: Mapping[str, bytes], hash_source: bool
) -> Manifest:
    """The manifest of a finished output that the same conversion has made.

    A hub's model is the same if its commit is. A folder has no name that would say so; there the
    output is held against the weights themselves.

    Raises:
        CheckpointError: if the output is anything else, saying what differs.
    """
    reader = CheckpointReader(folder)
    found, provider = reader.manifest, source.provider
    sizes = {name: weights.size for name, weights in source.weight_files.items()}
    facts: dict[str, tuple[object, object]] = {
        "version of qwen3-ascend": (found.tool_version, __version__),
        "source": (found.source.repo, provider.repo),
        "hub": (found.source.hub, source.hub),
        "revision": (found.source.revision, provider.revision),
        "recipe": (found.recipe, dict(plan.recipe.verbatim)),
        "format of the source": (found.source.format, source.quantization.format),
        "codes": (
            {name: entry.codes for name, entry in found.linears.items()},
            {i.name: i.encoding.codes for i in plan.items if i.name in found.linears},
        ),
        "files of weights": ({n: f.size for n, f in found.source.files.items()}, sizes),
        "configuration": (found.model, plan.config),
        "calibration": (found.calibration, plan.calibration and plan.calibration.record),
        "small files": (_hashes(found), {n: bytes_blake3(data) for n, data in carried.items()}),
        "output files": (_forms(found), _planned_forms(plan)),
        "hashes of the source": (bool(found.source.tensors), hash_source),
    }
    different = [what for what, (was, now) in facts.items() if was != now]
    if not different and provider.revision is None and compare(reader, source):
        different = ["weights"]
    if different:
        raise CheckpointError(
            f"{folder} is not empty: it holds another conversion (differing in: "
            f"{', '.join(different)}); choose another or pass --overwrite"
        )
    return found


MADE = (MODEL_CARD_NAME, FACTORS_NAME)


def _hashes(manifest: Manifest) -> dict[str, str]:
    """Of the files that came from the source."""
    return {n: entry.blake3 for n, entry in manifest.files.items() if n not in MADE}


def _forms(manifest: Manifest) -> dict[str, tuple[str, Form]]:
    return {n: (t.file, Form(t.dtype, t.shape)) for n, t in manifest.stored().items()}


def _planned_forms(plan: Plan) -> dict[str, tuple[str, Form]]:
    return {n: (file.file, form) for file in plan.weight_files for n, form in file.tensors.items()}
