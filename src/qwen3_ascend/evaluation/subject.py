"""A model that is evaluated: a converted checkpoint, or a model as its source has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen3_ascend.checkpoint.architecture import EMBEDDING, model_spec
from qwen3_ascend.checkpoint.checked import CheckedWeights
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME, Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.convert.float_model import FloatModel, settled_config
from qwen3_ascend.convert.options import HUBS
from qwen3_ascend.convert.source import Source, open_source
from qwen3_ascend.convert.source.transfer import Transfer
from qwen3_ascend.convert.usable import unpacked
from qwen3_ascend.errors import CheckpointError, os_errors
from qwen3_ascend.evaluation.options import EvaluationOptions
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.runtime import backends
from qwen3_ascend.runtime.backends.base import Backend
from qwen3_ascend.runtime.backends.cache import LayerKV
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.streaming import LayeredModel, StoredModel, one_layer
from qwen3_ascend.runtime.tokenizer import Tokenizer, load_tokenizer

Note = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """An open model.

    Attributes:
        name: as the user gave it.
        recipe: of a converted checkpoint; None for a source.
        weights: how many weights it has; a tied head counts once.
        nbytes: of its tensors.
        model: its layers.
        backend: where they are computed.
        tokenizer: of its files; a NoTokenizer if there are none.
        made_of: the manifest of a checkpoint; None for a source.
    """

    name: str
    recipe: str | None
    weights: int
    nbytes: int
    model: LayeredModel
    backend: Backend[LayerKV]
    tokenizer: Tokenizer
    made_of: Manifest | None

    @property
    def config(self) -> Qwen3Config:
        """Of the model."""
        return self.model.config


def count_weights(manifest: Manifest) -> int:
    """Weights of the model in a checkpoint; a head that is made of the embedding is no more."""
    shapes = [tensor.shape for tensor in manifest.tensors.values()]
    shapes += [e.shape for e in manifest.linears.values() if e.parts[0][0] != EMBEDDING]
    return sum(math.prod(shape) for shape in shapes)


def stored_bytes(manifest: Manifest) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(tensor.nbytes for tensor in manifest.stored().values())


@contextmanager
def open_subject(
    place: str, options: EvaluationOptions, made_of: Manifest | None = None,
    note: Note = lambda line: None,
) -> Iterator[Subject]:  # fmt: skip
    """Opens a checkpoint of ours, or a source as `convert` takes it.

    Args:
        place: a folder, or a hub's id.
        options: device and type.
        made_of: the manifest whose hub and revision an id is looked for at.
        note: is told of downloads.

    Raises:
        UserError: if it is neither, is damaged, or does not fit the device.
    """
    folder = user_path(place)
    if (folder / MANIFEST_NAME).is_file():
        with _open_checkpoint(place, folder, options) as found:
            yield found
    else:
        with _open_source(place, folder, options, made_of, note) as found:
            yield found


@contextmanager
def _open_checkpoint(place: str, folder: Path, options: EvaluationOptions) -> Iterator[Subject]:
    with os_errors(CheckpointError):
        reader, tokenizer = CheckpointReader(folder), load_tokenizer(folder)
    manifest, backend = reader.manifest, open_backend(reader.config, options)
    with CheckedWeights(reader) as weights:
        yield Subject(
            place, manifest.recipe["name"], count_weights(manifest), stored_bytes(manifest),
            StoredModel(weights, backend), backend, tokenizer, manifest,
        )  # fmt: skip


@contextmanager
def _open_source(
    place: str, folder: Path, options: EvaluationOptions, made_of: Manifest | None, note: Note
) -> Iterator[Subject]:
    hub, revision = HUBS[0], None
    if made_of is not None and not folder.is_dir() and made_of.source.repo == place:
        hub, revision = made_of.source.hub or hub, made_of.source.revision
    with open_source(place, revision, hub=hub, transfer=Transfer(note)) as source:
        config = settled_config(source)
        backend = open_backend(config, options)
        model = FloatModel(source, backend)
        source.expect(model.reads)
        nbytes = sum(source.slot(name).nbytes for name in model.reads)
        weights = sum(math.prod(spec.shape) for spec in model_spec(config))
        tokenizer = _source_tokenizer(source)
        yield Subject(place, None, weights, nbytes, model, backend, tokenizer, None)


def _source_tokenizer(source: Source) -> Tokenizer:
    """A tokenizer reads its files once, so they need not stay."""
    with unpacked(source.carried()) as folder:
        return load_tokenizer(folder)


def open_backend(config: Qwen3Config, options: EvaluationOptions) -> Backend[LayerKV]:
    """The backend of one layer at a time; float32 on a CPU unless another type is asked for."""
    asked = DeviceOptions(options.device, options.dtype, graph=False)
    backend = backends.get(one_layer(config), asked)
    if options.dtype == "auto" and backend.name == "cpu":
        return backends.get(one_layer(config), DeviceOptions("cpu", "float32"))
    return backend
