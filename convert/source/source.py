"""Where the weights come from: a local folder or a hub."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

from torch import Tensor
from typing_extensions import Self

from qwen3_ascend.checkpoint.architecture import LM_HEAD
from qwen3_ascend.checkpoint.companions import CONFIG_NAME, carried
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.manifest import SourceFile
from qwen3_ascend.convert.options import HUBS, ConvertOptions
from qwen3_ascend.convert.source.client import is_plain
from qwen3_ascend.convert.source.config_file import read_config
from qwen3_ascend.convert.source.foreign import (
    model_below,
    no_model,
    refuse_adapters,
    unused_weights,
)
from qwen3_ascend.convert.source.formats import SourceFormat, recognise
from qwen3_ascend.convert.source.names import HEAD, canonical, divided
from qwen3_ascend.convert.source.provider import LocalFolder, Provider, SourceWeights
from qwen3_ascend.convert.source.quantization import Quantization, linear_names
from qwen3_ascend.convert.source.transfer import Prefetch, Transfer
from qwen3_ascend.errors import CheckpointError, OptionError, SourceError, os_errors
from qwen3_ascend.files.json_file import read_json_object
from qwen3_ascend.files.paths import user_path
from qwen3_ascend.files.safetensors import MappedFile, TensorSlot

HEADERS_AT_ONCE = 8
"""Requests for headers under way together: a large model has more than a hundred files."""


class Source:
    """A model's configuration and its tensors by name, wherever they lie.

    Weight files are fetched when first needed. Who reads says first, by `expect`, what will be read
    and in which order, and afterwards, by `release`, which file is not needed any more. Between the
    two a weight file is fetched while the one before it is in use, and a temporary provider removes
    it when it is released. `read` may be called from several threads.

    Attributes:
        config: of the model.
        quantization: which linears are quantized already, and how.
        notes: what was decided where the source is not clear, for people.
        stored: where each tensor lies, by the name that transformers gives it.
    """

    def __init__(self, provider: Provider, hub: str | None = None) -> None:
        """Reads the configuration, then the index and every header.

        Args:
            provider: of the files.
            hub: that they come from; None for a folder.

        Raises:
            SourceError: if there are no weights, the index names a file or tensor that does
                not exist, or a header is damaged; or it is quantized in a way that cannot be taken.
            ConfigError: if it is no model that can be converted; before any header is read.
        """
        self.provider, self.hub = provider, hub
        self.names = provider.names()
        self.notes: list[str] = []
        self.format, self.config = self._config()
        indexed = self._index()
        names = sorted(set(indexed.values())) if indexed else [self.format.weights.single]
        self.weight_files = self._headers(names)
        self._check_index(indexed)
        files = {t: weights.name for weights in self.weight_files.values() for t in weights.slots}
        self._check_layers(len(files))
        self._take_names(files | indexed)
        self.quantization = self._quantization()
        self.notes += self.quantization.notes
        if left := unused_weights(self.names, names):
            self.notes.append(left)
        self._open: dict[str, MappedFile] = {}
        self._opening = threading.Lock()
        self._files = Prefetch(provider.weight_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.provider.close()
        self._files.close()

    @property
    def place(self) -> str:
        """The folder, or the model's name on its hub."""
        provider = self.provider
        return str(provider.folder) if isinstance(provider, LocalFolder) else provider.repo

    def _headers(self, names: Sequence[str]) -> dict[str, SourceWeights]:
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            try:
                return dict(zip(names, pool.map(self.provider.weight_header, names), strict=True))
            except BaseException:
                self.provider.close()  # the other threads need not go on trying
                raise

    def _config(self) -> tuple[SourceFormat, Qwen3Config]:
        repo = self.place
        if CONFIG_NAME not in self.names:
            raise no_model(
                repo, self.names, f"has no {CONFIG_NAME}: this is not a Hugging Face model folder"
            )
        refuse_adapters(repo, self.names)
        path = self.provider.small_file(CONFIG_NAME)
        data, where = read_json_object(path), str(path)
        found = recognise(self.provider, self.names, data, where, repo)
        return found, read_config(found.plain_config(data), where, self.notes.append)

    def _index(self) -> dict[str, str]:
        """Where the index says each tensor is; nothing if a single file holds them all.

        Where both are there, transformers reads the single file.
        """
        single, index = self.format.weights.single, self.format.weights.index
        if index not in self.names and single not in self.names:
            others = [name for name in sorted(self.names) if name.endswith(".safetensors")]
            lacking = f"holds neither {single} nor {index}: no weights to read"
            named = f" (it holds {', '.join(others[:3])})" if others else ""
            raise no_model(self.place, self.names, lacking + named)
        if index not in self.names:
            return {}
        path = self.provider.small_file(index)
        weight_map = read_json_object(path).get("weight_map")
        if single in self.names:
            self._compare_index(weight_map)
            return {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{path} has no weight_map")
        for tensor, file in weight_map.items():
            weights = isinstance(file, str) and file.endswith(".safetensors") and is_plain(file)
            if not weights:
                raise SourceError(f"{path}: tensor {tensor} is in {file!r}, no weight file")
            if file not in self.names:
                raise SourceError(f"{path}: tensor {tensor} is in {file}, which is missing")
        return weight_map

    def _compare_index(self, weight_map: object) -> None:
        """Holds an index against the single file beside it."""
        single, index = self.format.weights.single, self.format.weights.index
        indexed = weight_map if isinstance(weight_map, dict) else {}
        if all(file == single for file in indexed.values()):
            return
        there = self.provider.weight_header(single).slots
        missing = [tensor for tensor in indexed if tensor not in there]
        if missing:
            raise SourceError(
                f"{self.place} holds {single} and an {index} of other files, and "
                f"only the index names {len(missing)} of the tensors (such as {missing[0]}): "
                f"remove the one of the two that is left over"
            )
        self.notes.append(f"{single} is read, and {index} beside it is not, as in transformers")

    def _take_names(self, files: Mapping[str, str]) -> None:
        """Tensors by the names of transformers; a backbone takes its embedding for the head."""
        names = canonical(files, self.config.tie_word_embeddings)
        self.notes += names.notes
        experts, self.is_backbone = self.config.experts, names.is_backbone
        self.stored = divided(names.original, experts.count if experts else 0)
        self.location = {name: files[stored.name] for name, stored in self.stored.items()}
        self._check_fused()
        if names.is_backbone and not self.config.tie_word_embeddings:
            self.config = replace(self.config, tie_word_embeddings=True)
            self.notes.append(
                "a backbone has no output projection: its embedding takes the place, and what it "
                "generates means nothing"
            )

    def _check_fused(self) -> None:
        """Holds tensors of the weights of all experts against their number."""
        for name, stored in self.stored.items():
            if stored.expert is None:
                continue
            shape = self.weight_files[self.location[name]].slots[stored.name].shape
            experts = self.config.experts
            assert experts is not None
            if len(shape) != 3 or shape[0] != experts.count or shape[1] % stored.parts:
                raise SourceError(
                    f"tensor {stored.name} is {list(shape)}, but config.json asks for the weights "
                    f"of {experts.count} experts"
                )

    def _quantization(self) -> Quantization:
        found = self.format.read(linear_names(self.config), self.slots)
        if HEAD not in self.location:  # tied: what is said of it is of no tensor
            return found.without(LM_HEAD)
        return found

    def _check_layers(self, tensors: int) -> None:
        """Before any list of layers is made: config.json may say any number."""
        layers = self.config.num_layers
        if layers > tensors:
            raise SourceError(
                f"{self.place}: {CONFIG_NAME} asks for {layers} layers, but there are only "
                f"{tensors} tensors"
            )

    def _check_index(self, indexed: Mapping[str, str]) -> None:
        for tensor, file in indexed.items():
            if tensor not in self.weight_files[file].slots:
                index = self.format.weights.index
                raise SourceError(f"{index} says tensor {tensor} is in {file}, but it is not there")

    def slot(self, tensor: str) -> TensorSlot:
        """Type and shape of a tensor, from its header."""
        stored = self.stored[tensor]
        return stored.slot(self.weight_files[self.location[tensor]].slots[stored.name])

    @cached_property
    def slots(self) -> dict[str, TensorSlot]:
        """Type and shape of every tensor."""
        return {name: self.slot(name) for name in self.location}

    def file_order(self, tensors: Iterable[str]) -> list[str]:
        """The weight files that these tensors lie in, in the order of their first use."""
        return list(dict.fromkeys(self.location[tensor] for tensor in tensors))

    def expect(self, tensors: Iterable[str]) -> None:
        """Says which tensors will be read, in order: all, or what a resumed conversion lacks.

        Nothing is fetched yet, and a weight file without such a tensor never is. What else an
        interrupted conversion had downloaded for itself is removed, so the caller must hold the
        lock of the output.
        """
        order = self.file_order(tensors)
        self.provider.keep_only(order)
        self._files = Prefetch(self.provider.weight_file, order)

    def read(self, tensor: str) -> Tensor:
        """A tensor as a view of its mapped file, which is waited for."""
        name = self.location[tensor]
        file = self._open.get(name)
        if file is None:
            path = self._files.get(name)
            with self._opening:
                file = self._open.get(name) or self._map(name, path)
        stored = self.stored[tensor]
        return stored.of(file.tensor(stored.name))

    def _map(self, name: str, path: Path) -> MappedFile:
        try:
            file = self._open[name] = MappedFile(path)
        except CheckpointError as error:
            raise SourceError(str(error)) from error
        if file.header.slots != self.weight_files[name].slots:
            raise SourceError(f"{path} has changed since its header was read; start again")
        return file

    def release(self, file: str) -> None:
        """Closes a weight file of which nothing more will be read.

        A temporary one is removed as well; views of it stay readable until they are dropped.
        """
        with self._opening:
            self._open.pop(file, None)
        self._files.forget(file)
        self.provider.discard(file)

    def drop_pages(self) -> None:
        """Gives the memory of what was read back to the system; views stay valid."""
        for file in list(self._open.values()):
            file.drop_pages()

    def file_entries(self) -> dict[str, SourceFile]:
        """Size and SHA-256 of every weight file, as far as anybody states it.

        A file of which its hub states none has to be here, so this is best asked when everything
        has been read.
        """
        return {
            name: SourceFile(weights.size, self.provider.weight_sha256(name))
            for name, weights in self.weight_files.items()
        }

    def carried(self) -> dict[str, bytes]:
        """Config, tokenizer and the like, to be carried over: unchanged, but for what config.json
        says of a quantization that is no longer there."""
        files = {n: self.provider.small_file(n).read_bytes() for n in carried(self.names)}
        return {**files, CONFIG_NAME: self.format.carried_config(files[CONFIG_NAME])}


@os_errors(SourceError)
def open_source(
    model: str,
    revision: str | None = None,
    *,
    hub: str = ConvertOptions.hub,
    area: Path | None = None,
    transfer: Transfer | None = None,
) -> Source:
    """Opens a local folder, or a repository on a hub if there is no such folder.

    Args:
        model: a path, or a hub's id such as "Qwen/Qwen3-8B".
        revision: branch, tag or commit; hubs only.
        hub: one of convert.options.HUBS.
        area: folder for downloaded weights that are removed as soon as they have been used;
            without it they stay in the hub's cache.
        transfer: notes, retries and cancellation of the downloads.

    Raises:
        SourceError: if it is neither, or its files are damaged.
        OptionError: for a revision of a local folder, or an unknown hub.
    """
    path = user_path(model)
    if path.is_file():
        raise SourceError(f"{model} is a file; give the folder that holds it: {path.parent}")
    if path.is_dir():
        if revision:
            raise OptionError(f"{model} is a local folder; --revision is for Hub models")
        return _open_folder(path)
    looks_local = model.startswith((".", "/", "~")) or path.exists()
    if looks_local or not re.fullmatch(r"[\w.\-]+/[\w.\-]+", model, re.ASCII):
        raise SourceError(
            f"{model} is neither an existing folder nor a Hub id such as Qwen/Qwen3-8B"
        )
    return Source(_open_hub(hub, model, revision, area, transfer or Transfer()), hub)


def _open_folder(path: Path) -> Source:
    if not (path / CONFIG_NAME).exists() and (below := model_below(path)):
        raise SourceError(f"{path} has no {CONFIG_NAME}, but there is a model in {below}")
    return Source(LocalFolder(path), None)


def _open_hub(
    hub: str, repo: str, revision: str | None, area: Path | None, transfer: Transfer
) -> Provider:
    """The client libraries are imported only where they are asked for."""
    if hub == "huggingface":
        from qwen3_ascend.convert.source import huggingface as huggingface

        return huggingface.open_repository(repo, revision, area, transfer)
    if hub == "modelscope":
        from qwen3_ascend.convert.source import modelscope

        return modelscope.open_repository(repo, revision, area, transfer)
    raise OptionError(f"there is no hub {hub!r}; known: {', '.join(HUBS)}")
