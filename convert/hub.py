"""Hugging Face Hub access through huggingface_hub: token, mirrors (HF_ENDPOINT), cache, offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors

from qwen3_ascend.checkpoint.errors import CheckpointError
from qwen3_ascend.checkpoint.files import file_sha256
from qwen3_ascend.checkpoint.safetensors_file import check_slots, read_header
from qwen3_ascend.convert.source import CARRIED_FILES, INDEX_NAME, LocalFolder, SourceShard

# The base error of the HTTP library, whichever one this huggingface_hub is built on.
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *hub_errors.HfHubHTTPError.__bases__)

TRANSFER_ERRORS = (*NETWORK_ERRORS, hub_errors.SafetensorsParsingError)


class HubRepository:
    """A model on the Hub, pinned to one commit; files are downloaded when first needed."""

    def __init__(self, repo: str, revision: str | None, note: Callable[[str], None]) -> None:
        """Resolves the revision to a commit and lists the files.

        Raises:
            CheckpointError: if the repository, the revision or the permission does not exist.
        """
        self.repo, self._note = repo, note
        with _explained(repo, revision):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        if not info.sha:
            raise CheckpointError(f"the Hub states no commit for {repo}")
        self.revision: str | None = info.sha
        # Sub-folders hold other formats; and a name with a slash could point out of a folder.
        self._files = {
            file.rfilename: file for file in info.siblings or () if _is_plain(file.rfilename)
        }
        self._digests: dict[str, str] = {}

    def names(self) -> set[str]:
        """See Provider."""
        return set(self._files)

    def small_file(self, name: str) -> Path:
        """See Provider."""
        with _explained(self.repo, self.revision):
            return Path(hf_hub_download(self.repo, name, revision=self.revision))

    def shard_header(self, name: str) -> SourceShard:
        """See Provider; asks the Hub for the header alone unless the file is in the cache."""
        cached = try_to_load_from_cache(self.repo, name, revision=self.revision)
        if isinstance(cached, str):
            path = Path(cached)
            return SourceShard(name, path.stat().st_size, read_header(path).slots)
        with _explained(self.repo, self.revision):
            remote = HfApi().parse_safetensors_file_metadata(
                self.repo, name, revision=self.revision
            )
        entries = {
            tensor: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": list(info.data_offsets),
            }
            for tensor, info in remote.tensors.items()
        }
        return SourceShard(name, self._files[name].size or 0, check_slots(entries, 0, name))

    def shard_file(self, name: str) -> Path:
        """See Provider; a fresh download is checked against the SHA-256 that the Hub states."""
        self._note(f"fetching {self.repo}/{name}")
        path = self.small_file(name)
        stated = self._stated_sha256(name)
        if stated and self.shard_sha256(name) != stated:
            raise CheckpointError(
                f"{path} does not have the SHA-256 that the Hub states; delete it and try again"
            )
        return path

    def shard_sha256(self, name: str) -> str:
        """See Provider; of the bytes as they arrived here."""
        if name not in self._digests:
            self._digests[name] = file_sha256(self.small_file(name))
        return self._digests[name]

    def _stated_sha256(self, name: str) -> str | None:
        lfs = self._files[name].lfs
        return lfs.sha256 if lfs else None


class CachedRepository(LocalFolder):
    """A model of the Hub as an earlier download left it in the local cache."""

    def __init__(self, repo: str, revision: str | None) -> None:
        """CheckpointError if the cache does not hold the model."""
        try:
            patterns = [*CARRIED_FILES, INDEX_NAME, "*.safetensors"]
            folder = snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=patterns
            )
        except (OSError, hub_errors.HFValidationError) as error:
            raise CheckpointError(
                f"the Hub is not reachable and {repo} is not in the local cache"
            ) from error
        super().__init__(Path(folder))
        self.repo, self.revision = repo, Path(folder).name


def open_repository(
    repo: str, revision: str | None, note: Callable[[str], None]
) -> HubRepository | CachedRepository:
    """The repository on the Hub or, when offline, in the cache."""
    try:
        return HubRepository(repo, revision, note)
    except CheckpointError as error:
        cause = error.__cause__
        answered = isinstance(cause, hub_errors.HfHubHTTPError)
        if answered or not isinstance(cause, NETWORK_ERRORS):
            raise
        note(f"offline: taking {repo} from the local cache")
        return CachedRepository(repo, revision)


def _is_plain(name: str) -> bool:
    return "/" not in name and "\\" not in name and name not in ("", ".", "..")


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into one line that says what to do."""
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the Hub has no model {repo} (or it is private: set HF_TOKEN)"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except hub_errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is not a valid Hub id: {error}") from error
    except TRANSFER_ERRORS as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot fetch {repo} from the Hub: {reason}") from error
