"""Hugging Face Hub access through huggingface_hub: token, mirrors (HF_ENDPOINT), cache, offline."""

from __future__ import annotations

import inspect
import io
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented
from tqdm import tqdm

from qwen3_ascend.checkpoint.companions import CARRIED, CONFIG_NAME, TEMPLATE_FOLDER
from qwen3_ascend.convert.exchange import INDEX_SUFFIX
from qwen3_ascend.convert.source.ascendv1 import weight_names
from qwen3_ascend.convert.source.client import RemoteFile, is_wanted
from qwen3_ascend.convert.source.huggingface_errors import explain, judge
from qwen3_ascend.convert.source.provider import LocalFolder
from qwen3_ascend.convert.source.remote import RemoteRepository
from qwen3_ascend.convert.source.transfer import Transfer, reason
from qwen3_ascend.errors import SourceError
from qwen3_ascend.files.hashing import file_sha256
from qwen3_ascend.files.json_file import read_json_object

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class HuggingFace:
    """Client for the Hub: a model pinned to one commit."""

    hub = "the Hub"

    def __init__(self, repo: str, info: ModelInfo) -> None:
        """SourceError if the Hub names no commit to pin the model to."""
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise SourceError(f"the Hub states no commit for {repo}")
        self.repo = repo
        self.revision: str | None = info.sha
        self.files: Mapping[str, RemoteFile] = {
            file.rfilename: _remote_file(file)
            for file in info.siblings or ()
            if is_wanted(file.rfilename)
        }
        self.cache = Path(constants.HF_HUB_CACHE)

    def cached(self, name: str) -> Path | None:
        """See Client."""
        found = try_to_load_from_cache(self.repo, name, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def download(self, file: RemoteFile, folder: Path | None, meter: Callable[[int], None]) -> Path:
        """See Client."""
        options: dict[str, Any] = _metered(hf_hub_download, meter)
        if folder is not None:
            options["local_dir"] = folder
        return Path(hf_hub_download(self.repo, file.name, revision=self.revision, **options))

    def read_range(self, file: RemoteFile, start: int, nbytes: int) -> bytes:
        """See Client."""
        url = hf_hub_url(self.repo, file.name, revision=self.revision)
        headers = build_hf_headers() | {"range": f"bytes={start}-{start + nbytes - 1}"}
        sink = _Sink(nbytes)
        with suppress(_Enough):
            http_get(url, sink, headers=headers, **_metered(http_get, lambda count: None))
        return sink.getvalue()[:nbytes]

    def judge(self, error: Exception) -> float | None:
        """See Client."""
        return judge(error)

    def explain(self, error: Exception, file: str) -> SourceError | None:
        """See Client."""
        return explain(self.repo, self.revision, error, file)


class CachedRepository(LocalFolder):
    """A model of the Hub as an earlier download left it in the local cache."""

    def __init__(self, repo: str, revision: str | None) -> None:
        """SourceError if the cache does not hold the whole model."""
        try:
            patterns = [
                *CARRIED, f"{TEMPLATE_FOLDER}/*.jinja", f"*{INDEX_SUFFIX}",
                "quant_model_*.json", "*.safetensors",
            ]  # fmt: skip
            folder = snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=patterns
            )
        except (OSError, ValueError) as error:
            raise SourceError(f"{repo} is not in the local cache") from error
        super().__init__(Path(folder))
        self.repo, self.revision = repo, Path(folder).name
        self._checked: set[str] = set()
        self._checking = threading.Lock()
        if missing := self._missing():
            raise SourceError(f"{repo} is in the local cache only in part, without {missing}")

    def weight_file(self, name: str) -> Path:
        """See Provider."""
        path = self.folder / name
        with self._checking:
            stated = self.weight_sha256(name)
            if stated is not None and name not in self._checked and file_sha256(path) != stated:
                raise SourceError(f"{path} is damaged; delete it and convert again when online")
            self._checked.add(name)
        return path

    def weight_sha256(self, name: str) -> str | None:
        """See Provider; the cache names a large file by the SHA-256 that the Hub stated for it."""
        stated = (self.folder / name).resolve().name
        return stated if SHA256.fullmatch(stated) else None

    def _missing(self) -> str | None:
        """A file that a download which was broken off did not get to."""
        names = self.names()
        weights = weight_names(names, self.repo)
        if weights.index not in names:
            either = (CONFIG_NAME, weights.single)
            return next((name for name in either if name not in names), None)
        weight_map = read_json_object(self.folder / weights.index).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        needed = (CONFIG_NAME, *(file for file in files if isinstance(file, str)))
        return next((file for file in needed if file not in names), None)


def open_repository(
    repo: str, revision: str | None, area: Path | None, transfer: Transfer
) -> RemoteRepository | CachedRepository:
    """The repository on the Hub or, when the Hub cannot be reached, in the cache."""
    ask = partial(HfApi().model_info, repo, revision=revision, files_metadata=True)
    try:
        info = transfer.persist(f"model {repo}", ask, partial(_judge_info, repo, revision))
    except Exception as error:
        if judge(error) is None and not isinstance(error, hub_errors.OfflineModeIsEnabled):
            raise explain(repo, revision, error) or error from error
        return _from_cache(repo, revision, error, transfer)
    client = HuggingFace(repo, info)
    if CONFIG_NAME in client.files and revision != client.revision:
        _remember(client, revision, transfer)
    return RemoteRepository(client, transfer, area)


def _judge_info(repo: str, revision: str | None, error: Exception) -> float | None:
    """As judge; but nobody is kept waiting for a Hub that is away while its model is in the cache.

    A Hub that answers is only busy, and may know of a newer commit than the cache.
    """
    asked = judge(error)
    if asked is not None and not isinstance(error, hub_errors.HfHubHTTPError):
        with suppress(SourceError):
            CachedRepository(repo, revision)
            return None
    return asked


def _from_cache(
    repo: str, revision: str | None, error: Exception, transfer: Transfer
) -> CachedRepository:
    try:
        cached = CachedRepository(repo, revision)
    except SourceError as lack:
        raise SourceError(f"the Hub is not reachable ({reason(error)}) and {lack}") from error
    transfer.note(f"offline: taking {repo} @ {cached.revision} from the local cache")
    return cached


def _remember(client: HuggingFace, revision: str | None, transfer: Transfer) -> None:
    """Has the library note in its cache which commit the revision is, for when it is offline.

    Everything else is fetched by the commit, and tells the cache nothing about names.
    """
    options = _metered(hf_hub_download, lambda nbytes: None)
    fetch = partial(hf_hub_download, client.repo, CONFIG_NAME, revision=revision, **options)
    try:
        transfer.persist(CONFIG_NAME, fetch, judge)
    except Exception as error:
        raise client.explain(error, CONFIG_NAME) or error from error


def _remote_file(file: RepoSibling) -> RemoteFile:
    sha256 = file.lfs.sha256 if file.lfs else None
    # A file that is not in LFS is a git object, and named so.
    return RemoteFile(file.rfilename, file.size, sha256, None if file.lfs else file.blob_id)


def _metered(function: Callable[..., object], meter: Callable[[int], None]) -> dict[str, Any]:
    """The option that reports progress, where this version of huggingface_hub has it."""
    if "tqdm_class" not in inspect.signature(function).parameters:
        return {}

    class Bar(tqdm):  # type: ignore[type-arg]  # it is generic in its stubs only
        """Draws nothing; passes on what arrives."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            """See tqdm."""
            meter(int(n or 0))
            return None

    return {"tqdm_class": Bar}


class _Enough(Exception):
    """All the bytes that were wanted are here."""


class _Sink(io.BytesIO):
    """Takes the first bytes of a file and no more, also from a server that sends the whole."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self._wanted = nbytes

    def write(self, data: Any) -> int:
        """See io.BytesIO."""
        count = super().write(data)
        if self.tell() >= self._wanted:
            raise _Enough
        return count
