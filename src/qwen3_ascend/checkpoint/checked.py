"""Weights that are believed only after their hash: a little ahead of whoever copies them.

Threads hash tensors in the order of the model while earlier ones are copied to their device. Both
see the same pages, so a file is read from the disk once: hashing is the read-ahead. Whoever asks
for a tensor waits until it is known to be sound, so no damaged byte is computed with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from qwen3_ascend.checkpoint.architecture import LinearSpec, model_spec
from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.checkpoint.linear import Linear
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.files.threads import available_threads

AHEAD_BYTES = 256 << 20
"""Hashed and not asked for yet, at most, beside the largest tensor, which one thread hashes while
others go on: pages that are still in memory when they are copied, also on a small machine."""


class CheckedWeights:
    """The weights of an open checkpoint, as `CheckpointReader` has them; a context manager.

    Opening the reader has checked everything else; together they notice any changed byte.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        threads: int | None = None,
        checked: Collection[str] | None = None,
    ) -> None:
        """Checks nothing yet.

        Args:
            reader: of an open checkpoint.
            threads: that hash at a time; default one for each processor.
            checked: names of the stored tensors that are checked, default all. The others are
                believed: whoever leaves them out has them checked by somebody else.
        """
        self._reader, self._stored = reader, reader.manifest.stored()
        self._pool = ThreadPoolExecutor(threads or available_threads(), "hashing of weights")
        wanted = frozenset(self._stored if checked is None else checked)
        self._checked = [name for name in in_order_of_use(reader) if name in wanted]
        self._next = deque(self._checked)
        self._hashes: dict[str, Future[str]] = {}
        self._sound = self._stored.keys() - wanted
        self._ahead = 0
        self._most = AHEAD_BYTES + max(tensor.nbytes for tensor in self._stored.values())

    def __enter__(self) -> CheckedWeights:
        self._look_ahead()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Checks what nobody has asked for, unless something else has failed."""
        try:
            for name in self._checked if error is None else ():
                self._require(name)
        finally:
            self._pool.shutdown(cancel_futures=True)

    @property
    def config(self) -> Qwen3Config:
        """Of the model."""
        return self._reader.config

    def tensor(self, name: str) -> Tensor:
        """An unquantized tensor; CheckpointError if its bytes are not the manifest's."""
        self._require(name)
        return self._reader.tensor(name)

    def linear(self, name: str) -> Linear:
        """A stored linear; CheckpointError if bytes of a tensor are not the manifest's."""
        for suffix in self._reader.manifest.linears[name].tensors:
            self._require(f"{name}.{suffix}")
        return self._reader.linear(name)

    def _require(self, name: str) -> None:
        """Waits for a tensor's hash."""
        if name in self._sound:
            return
        while name not in self._hashes:
            self._begin()
        stored = self._stored[name]
        if self._hashes[name].result() != stored.blake3:
            raise difference(self._reader, name)
        self._sound.add(name)
        self._ahead -= stored.nbytes
        self._look_ahead()

    def _look_ahead(self) -> None:
        while self._next and self._ahead < self._most:
            self._begin()

    def _begin(self) -> None:
        name = self._next.popleft()
        stored = self._stored[name]
        self._ahead += stored.nbytes
        self._hashes[name] = self._pool.submit(self._reader.blake3, name, stored.file)


def difference(reader: CheckpointReader, name: str) -> CheckpointError:
    """What to say of a stored tensor whose hash is another."""
    file = reader.manifest.stored()[name].file
    return CheckpointError(
        f"{reader.folder}: tensor {name} in {file}: its bytes differ from the manifest"
    )


def in_order_of_use(reader: CheckpointReader) -> list[str]:
    """Every stored tensor: first the model's, as they lie in the files and are loaded."""
    names: list[str] = []
    manifest = reader.manifest
    for spec in model_spec(manifest.model):
        if isinstance(spec, LinearSpec):
            entry = manifest.linears.get(spec.name)
            names += [f"{spec.name}.{suffix}" for suffix in (entry.tensors if entry else ())]
        else:
            names.append(spec.name)
    stored = manifest.stored()
    return list(dict.fromkeys([*(name for name in names if name in stored), *stored]))
