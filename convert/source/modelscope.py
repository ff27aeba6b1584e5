"""ModelScope access through modelscope-hub, the part of the modelscope package that talks to it.

Token, endpoint and cache are that library's own: `modelscope login` or MODELSCOPE_API_TOKEN,
MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE. Its downloads are resumed where they were broken off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_ascend.convert.source.client import RemoteFile, is_wanted
from qwen3_ascend.convert.source.remote import RemoteRepository
from qwen3_ascend.convert.source.transfer import Transfer, reason
from qwen3_ascend.errors import SourceError

if TYPE_CHECKING:
    from modelscope_hub import HubApi

BRANCH = "master"
PINNED = ", files "
"""Between a branch and a hash of its files, in the revision that a manifest records."""

DIGITS = 16
BLOCK = 1 << 16
MODEL = "model"


class ModelScope:
    """Client for ModelScope: a model as its branch or tag was listed at one moment."""

    hub = "ModelScope"

    def __init__(self, api: HubApi, cache: Path, repo: str, branch: str, listed: list[Any]) -> None:
        """A client for an opened interface.

        Args:
            api: of the library.
            cache: that the library keeps.
            repo: the model.
            branch: branch, tag or commit.
            listed: its files, as the library lists them.
        """
        self._api, self._branch = api, branch
        self.repo, self.cache = repo, cache
        self.files: Mapping[str, RemoteFile] = {
            file.path: RemoteFile(file.path, file.size, file.sha256)
            for file in listed
            if not file.is_dir and is_wanted(file.path)
        }
        # The listing names no commit of the whole; what it says of every file pins as much.
        said = "\n".join(f"{f.path} {f.size} {f.sha256}" for f in sorted(listed, key=_path))
        digest = hashlib.sha256(said.encode()).hexdigest()[:DIGITS]
        self.revision: str | None = f"{branch}{PINNED}{digest}"

    def cached(self, name: str) -> Path | None:
        """See Client."""
        from modelscope_hub.errors import CacheNotFound

        try:
            path = self._get(name, None, local_files_only=True)
        except (CacheNotFound, ValueError, OSError):
            return None
        # The cache is kept by branch, so it may hold an older file of the name.
        return path if path.stat().st_size == self.files[name].size else None

    def download(self, file: RemoteFile, folder: Path | None, meter: Callable[[int], None]) -> Path:
        """See Client."""

        class Progress:
            """The library's callback: made once for each file."""

            def __init__(self, name: str, size: int) -> None:
                pass

            def update(self, nbytes: int) -> None:
                meter(nbytes)

            def end(self) -> None:
                pass

        return self._get(file.name, folder, file_size=file.size, progress_callbacks=[Progress])

    def _get(self, name: str, folder: Path | None, **options: Any) -> Path:
        path = self._api.downloader.download_file(
            self.repo, MODEL, name, revision=self._branch, local_dir=folder, **options
        )
        return Path(path)

    def read_range(self, file: RemoteFile, start: int, nbytes: int) -> bytes:
        """See Client."""
        headers = {"Range": f"bytes={start}-{start + nbytes - 1}"}
        found = b""
        with self._api.legacy.download_stream(
            self.repo, MODEL, file.name, self._branch, headers
        ) as response:
            for block in response.iter_content(BLOCK):
                found += block
                if len(found) >= nbytes:
                    break
        return found[:nbytes]

    def judge(self, error: Exception) -> float | None:
        """See Client."""
        return judge(error)

    def explain(self, error: Exception, file: str) -> SourceError | None:
        """See Client."""
        return explain(f"{self.repo}/{file}", error)


def open_repository(
    repo: str, revision: str | None, area: Path | None, transfer: Transfer
) -> RemoteRepository:
    """The repository on ModelScope."""
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.config import get_default_config
    except ImportError as error:
        raise SourceError(
            "--hub modelscope needs the modelscope package: pip install 'qwen3-ascend[modelscope]'"
        ) from error
    api, branch = HubApi(), (revision or BRANCH).partition(PINNED)[0]
    what = f"model {repo}"
    try:
        endpoint = transfer.persist(what, partial(api.resolve_endpoint_for_read, repo), judge)
        api = HubApi(endpoint=endpoint)
        ask = partial(api.list_repo_files, repo, MODEL, revision=branch)
        listed = transfer.persist(what, ask, judge)
    except Exception as error:
        raise explain(repo, error) or error from error
    client = ModelScope(api, get_default_config().cache_dir, repo, branch, listed)
    if revision is not None and PINNED in revision and client.revision != revision:
        raise SourceError(f"{repo} on ModelScope has changed: it is {client.revision} now")
    return RemoteRepository(client, transfer, area)


def judge(error: Exception) -> float | None:
    """Seconds to wait before trying again, or None if that would not help."""
    from modelscope_hub.errors import HubError
    from requests import RequestException

    if isinstance(error, HubError):
        asked = getattr(error, "retry_after", None)
        return float(asked or 0) if error.retryable else None
    return 0.0 if isinstance(error, RequestException) else None


def explain(what: str, error: Exception) -> SourceError | None:
    """One line that says what to do about an error of the library; None if it is not one."""
    from modelscope_hub import errors
    from requests import RequestException

    if isinstance(error, errors.NotExistError):
        return SourceError(f"ModelScope has no {what}, or not in this revision")
    if isinstance(error, (errors.AuthenticationError, errors.PermissionDeniedError)):
        return SourceError(f"ModelScope does not show {what}: set MODELSCOPE_API_TOKEN")
    if isinstance(error, (errors.HubError, RequestException)):
        return SourceError(f"cannot fetch {what} from ModelScope: {reason(error)}")
    return None


def _path(file: Any) -> str:
    return str(file.path)
