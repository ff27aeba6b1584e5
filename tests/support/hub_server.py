"""A local stand-in for the Hugging Face Hub, for tests that drive the real client.

No model hub can be reached from a test machine, and mocking ``huggingface_hub`` would only test the
mock.  ``HubServer`` therefore answers real HTTP on 127.0.0.1 with as much of the Hub's API as the
download side of the client uses: repository info, trees, refs, paths-info, and ``/resolve/``
with ETags, commits, ranges, and the redirect of large files to a second origin (the "CDN").

    with HubServer() as hub:
        commit = hub.add_model("Qwen/Qwen3-Tiny", folder)
        snapshot_download("Qwen/Qwen3-Tiny", endpoint=hub.endpoint, cache_dir=cache, token=False)

Importing it: ``tests/`` has no ``__init__.py`` and pytest runs with ``--import-mode=importlib``, so
``from hub_server import HubServer`` needs ``pythonpath = ["tests"]`` in pytest's ini options.

Pointing the client at it: ``huggingface_hub`` reads ``HF_ENDPOINT`` (and ``HF_HOME``, ...) once,
when it is first imported, so setting them inside a running test does nothing.  There are two ways:

* in this process: pass ``endpoint=hub.endpoint`` (and ``cache_dir=`` or ``local_dir=``, and
  ``token=False`` unless a token is the point) to each call;
* in a subprocess: ``env={**os.environ, **hub.environment(cache_dir)}``.

Faults: ``hub.inject(Fault("drop", "*/model.safetensors", offset=1000, times=2))``.  Faults are
matched by ``fnmatch`` against the percent-decoded path, in the order of injection, one a request;
``times=None`` never wears out and ``hub.unspent()`` shows what has not fired.  Large files have
two paths: ``/{repo}/resolve/{revision}/{name}`` (302) and ``/cdn/{repo}/{commit}/{name}`` (bytes).
``*/name`` matches both, ``/cdn/*`` only the second.

What huggingface_hub 2.4.0 does about each fault is asserted in ``test_hub_server.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Literal, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

FaultKind = Literal[
    "status",  # answer `status` (with Retry-After when `retry_after` is set) and nothing else
    "redirect",  # answer 302 to `to` (a path on this server, or a whole URL)
    "hangup",  # close the connection without a single byte of answer
    "no-range",  # ignore the Range header: 200 and the whole file
    "replace",  # serve `body`, under the advertised ETag, sha256 and size of the real file
    "truncate",  # end cleanly after `offset` bytes of body, Content-Length agreeing: no HTTP error
    "corrupt",  # flip the byte at `offset` of the file (wherever the range starts)
    "drop",  # close the connection (FIN) after `offset` bytes of a longer Content-Length
    "reset",  # the same with a TCP reset, which clients see as another exception
    "slow",  # drip the body at no more than `rate` bytes a second
    "stall",  # go silent for `seconds` after `offset` bytes, then carry on
]

# These stand in for the whole answer, so they apply to any method; the rest need a body to harm.
_WHOLE_ANSWER: Final = frozenset({"status", "redirect", "hangup"})

# What the Hub's default .gitattributes keeps in LFS; bigger files are in LFS whatever their name.
_LFS_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".gguf", ".h5", ".onnx", ".pt", ".pth"})
_LFS_THRESHOLD: Final = 10 * 1024 * 1024

_CHUNK: Final = 1 << 16
_STAMP: Final = "2025-01-01T00:00:00.000Z"
_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)")
_API_VERBS: Final = frozenset({"revision", "tree", "refs", "paths-info", "auth-check"})


@dataclass(frozen=True)
class Fault:
    """One misbehaviour, for requests whose path matches; see ``FaultKind`` for what each does."""

    kind: FaultKind
    path: str
    times: int | None = 1
    methods: tuple[str, ...] = ()
    offset: int = 0
    status: int = 503
    retry_after: int | None = None
    to: str = ""
    body: bytes = b""
    rate: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a fault that could not do anything, which would let a test pass for nothing."""
        needs = {"redirect": bool(self.to), "slow": self.rate > 0, "stall": self.seconds > 0}
        if not needs.get(self.kind, True):
            raise ValueError(f"a {self.kind!r} fault lacks the field that says how: {self}")
        if self.offset < 0 or (self.times is not None and self.times < 1):
            raise ValueError(f"offset must be >= 0 and times >= 1 or None: {self}")

    def matches(self, ask: _Ask, reply: _Reply) -> bool:
        """Whether this fault is meant for that request and has something to act on."""
        whole = self.kind in _WHOLE_ANSWER
        if ask.method not in (self.methods or (("GET", "HEAD", "POST") if whole else ("GET",))):
            return False
        # A body fault waits for the bytes: it is not used up on the redirect that leads to them.
        return fnmatchcase(ask.path, self.path) and (whole or reply.status in (200, 206))


@dataclass(frozen=True)
class Request:
    """One answered request; ``sent`` counts bytes of body handed to the socket."""

    method: str
    path: str
    range: str | None
    status: int  # 0 when the connection was closed without an answer
    sent: int
    query: str = ""
    authorized: bool = False  # an Authorization header came with it, whatever it said


@dataclass(frozen=True)
class _Blob:
    """One file of a repository, on disk or in memory, and the identity it is advertised under."""

    name: str
    size: int
    sha256: str
    oid: str
    lfs: bool
    path: Path | None = None
    data: bytes = b""

    @property
    def etag(self) -> str:
        """What the Hub uses: the sha256 of an LFS file, the git blob id of any other."""
        return self.sha256 if self.lfs else self.oid

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of [start, stop) in chunks, without holding a large file in memory."""
        if self.path is None:
            yield self.data[start:stop]
            return
        with self.path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(_CHUNK, stop - start))):
                start += len(chunk)
                yield chunk


@dataclass(frozen=True)
class _Commit:
    """An immutable set of files."""

    sha: str
    files: Mapping[str, _Blob]


@dataclass
class _Repo:
    """A model repository: commits, and the names that lead to them."""

    repo_id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, _Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> _Commit:
        """The commit of a branch, a tag or a full commit id."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]


@dataclass(frozen=True)
class _Ask:
    """A parsed request."""

    method: str
    raw_path: str
    query: str = ""
    range: str | None = None
    authorization: str | None = None
    body: bytes = b""

    @property
    def path(self) -> str:
        """The path as people write it, for logs and fault patterns."""
        return unquote(self.raw_path)

    def parameter(self, name: str) -> str:
        """One query parameter, or an empty string."""
        return parse_qs(self.query).get(name, [""])[0]

    def form(self) -> dict[str, Any]:
        """The posted fields: clients before 1.0 send JSON, later ones a form."""
        text = self.body.decode("utf-8")
        if text.startswith("{"):
            return cast(dict[str, Any], json.loads(text))
        return dict(parse_qs(text))


@dataclass(frozen=True)
class _Reply:
    """An answer: the [start, stop) window of a blob, and headers other than Content-Length."""

    status: int
    headers: tuple[tuple[str, str], ...]
    blob: _Blob
    start: int
    stop: int


class _Refusal(Exception):
    """An error answer in the form the Hub gives it."""

    def __init__(self, status: int, code: str, message: str, commit: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit

    def reply(self) -> _Reply:
        """The client picks its exception class from X-Error-Code, not from the status."""
        headers = [("X-Error-Code", self.code), ("X-Error-Message", self.message)]
        if self.commit:  # lets the client remember which commit lacks the file
            headers.append(("X-Repo-Commit", self.commit))
        return _json({"error": self.message}, self.status, *(pair for pair in headers if pair[1]))


def _blob(name: str, data: bytes = b"", path: Path | None = None) -> _Blob:
    """Describe one file, computing both identities the Hub gives it in one pass."""
    size = len(data) if path is None else path.stat().st_size
    lfs = Path(name).suffix in _LFS_SUFFIXES or size >= _LFS_THRESHOLD
    # sha1 names a git object here; it protects nothing.
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    blob = _Blob(name, size, "", "", lfs, path, data)
    for chunk in blob.read(0, size):
        sha256.update(chunk)
        git.update(chunk)
    blob = replace(blob, sha256=sha256.hexdigest(), oid=git.hexdigest())
    # git itself only holds the pointer of an LFS file, so that is what the blob id names.
    return replace(blob, oid=_blob("", _pointer(blob)).oid) if lfs else blob


def _pointer(blob: _Blob) -> bytes:
    """The LFS pointer file that git stores in place of a large file."""
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{blob.sha256}\nsize {blob.size}\n".encode()


def _commit(repo_id: str, folder: Path, extra: Mapping[str, bytes]) -> _Commit:
    """A commit whose id follows from its content, so that equal folders give equal ids."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    blobs = [_blob(path.relative_to(folder).as_posix(), path=path) for path in paths]
    blobs += [_blob(name, data) for name, data in extra.items()]
    listing = "\n".join([repo_id, *sorted(f"{blob.oid} {blob.name}" for blob in blobs)])
    sha = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
    return _Commit(sha, {blob.name: blob for blob in blobs})


def _json(value: object, status: int = 200, *headers: tuple[str, str]) -> _Reply:
    """An answer that carries JSON."""
    data = json.dumps(value).encode()
    blob = _Blob("", len(data), "", "", False, None, data)
    kind = ("Content-Type", "application/json; charset=utf-8")
    return _Reply(status, (kind, *headers), blob, 0, len(data))


def _plain(status: int, *headers: tuple[str, str]) -> _Reply:
    """An answer that is only a status and headers."""
    return _Reply(status, headers, _Blob("", 0, "", "", False), 0, 0)


def _sibling(blob: _Blob, detailed: bool) -> dict[str, object]:
    """One entry of a model's file list; sizes and hashes only come with ``?blobs=true``."""
    entry: dict[str, object] = {"rfilename": blob.name}
    if detailed:
        entry |= {"size": blob.size, "blobId": blob.oid}
    if detailed and blob.lfs:
        sizes = {"size": blob.size, "pointerSize": len(_pointer(blob))}
        entry["lfs"] = {"sha256": blob.sha256, **sizes}
    return entry


def _tree_file(blob: _Blob) -> dict[str, object]:
    """One file of a tree listing, which calls the sha256 ``oid``, unlike the file list above."""
    entry: dict[str, object] = {"type": "file", "path": blob.name, "size": blob.size}
    entry["oid"] = blob.oid
    if blob.lfs:
        sizes = {"size": blob.size, "pointerSize": len(_pointer(blob))}
        entry["lfs"] = {"oid": blob.sha256, **sizes}
    return entry


def _tree_folder(path: str) -> dict[str, object]:
    """One folder of a tree listing; its id only has to be stable."""
    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def _tree(commit: _Commit, under: str, recursive: bool) -> list[dict[str, object]]:
    """The entries below one folder, folders first as git has them."""
    prefix = f"{under}/" if under else ""
    inside = [blob for name, blob in commit.files.items() if name.startswith(prefix)]
    if under and not inside:
        raise _Refusal(404, "EntryNotFound", f"{under} does not exist", commit.sha)
    folders: dict[str, None] = {}
    for blob in inside:
        # Empty parts come from hostile absolute names, which have no folder to list.
        parts = [part for part in blob.name[len(prefix) :].split("/")[:-1] if part]
        for depth in range(1, (len(parts) if recursive else min(1, len(parts))) + 1):
            folders[prefix + "/".join(parts[:depth])] = None
    files = [blob for blob in inside if recursive or "/" not in blob.name[len(prefix) :].strip("/")]
    return [_tree_folder(path) for path in sorted(folders)] + [_tree_file(blob) for blob in files]


def _window(range_header: str | None, size: int) -> tuple[int, int] | None:
    """The [start, stop) a Range header asks for, or None to send everything."""
    match = _RANGE.fullmatch(range_header.strip()) if range_header else None
    if match is None or match.groups() == ("", ""):
        return None  # RFC 9110: a Range that cannot be understood is ignored
    first, last = match.groups()
    stop = min(int(last) + 1, size) if first and last else size
    start = int(first) if first else max(size - int(last), 0)  # "-n" means the last n bytes
    if start >= stop:
        raise _Refusal(416, "", f"bytes */{size}")
    return start, stop


def _content(blob: _Blob, ask: _Ask, *headers: tuple[str, str]) -> _Reply:
    """The bytes of a file, whole or the range that was asked for."""
    common = (("Accept-Ranges", "bytes"), ("Content-Type", "application/octet-stream"), *headers)
    try:
        window = _window(ask.range, blob.size)
    except _Refusal as refusal:
        return _plain(416, ("Content-Range", refusal.message))
    if window is None:
        return _Reply(200, common, blob, 0, blob.size)
    start, stop = window
    content_range = ("Content-Range", f"bytes {start}-{stop - 1}/{blob.size}")
    return _Reply(206, (*common, content_range), blob, start, stop)


class HubServer:
    """The server; a context manager, whose ``endpoint`` is the Hub's address inside it.

    ``cdn=False`` serves large files straight from ``/resolve/``; the default sends clients to
    another origin (a second port) as the Hub does, which shows whether a client keeps its token to
    itself.
    ``page_size`` is the number of entries in one page of a tree listing.
    """

    def __init__(self, *, cdn: bool = True, page_size: int = 1000) -> None:
        self._cdn_wanted, self._page_size = cdn, page_size
        self._repos: dict[str, _Repo] = {}
        self._tokens: dict[str, frozenset[str]] = {}
        self._faults: list[tuple[Fault, int | None]] = []
        self._log: list[Request] = []
        self._busy = 0
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._servers: list[_Server] = []

    def __enter__(self) -> HubServer:
        for _ in range(2):  # the Hub and its CDN: another port is another origin to a client
            server = _Server(self)
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()  # wakes the slow and the stalled answers
        for server in self._servers:
            server.stop()

    @property
    def endpoint(self) -> str:
        """The address to pass as ``endpoint=`` or in ``HF_ENDPOINT``."""
        return self._servers[0].address

    @property
    def cdn_endpoint(self) -> str:
        """The other origin, which large files are served from."""
        return self._servers[1].address

    def add_model(
        self,
        repo_id: str,
        folder: Path,
        *,
        private: bool = False,
        gated: bool = False,
        extra: Mapping[str, bytes] | None = None,
        revisions: Mapping[str, Path] | None = None,
    ) -> str:
        """Publish a folder as a model and return the commit that ``main`` now names.

        The folder is hashed now and read again at each download: a file changed in between is then
        served under its old identity.  ``extra`` are further files given by any name at all, such
        as ``../evil``: they are advertised and served as they are.  ``revisions``: more branches.
        """
        self._repos[repo_id] = _Repo(repo_id, private=private, gated=gated)
        for name, other in (revisions or {}).items():
            self.add_revision(repo_id, name, other)
        return self.add_revision(repo_id, "main", folder, extra=extra)

    def add_revision(
        self,
        repo_id: str,
        name: str,
        folder: Path,
        *,
        tag: bool = False,
        extra: Mapping[str, bytes] | None = None,
    ) -> str:
        """Create or move a branch (or a tag) and return its commit; older ones stay reachable."""
        repo = self._repos[repo_id]
        commit = _commit(repo_id, folder, extra or {})
        repo.commits[commit.sha] = commit
        (repo.tags if tag else repo.branches)[name] = commit.sha
        return commit.sha

    def add_token(self, token: str, *repo_ids: str) -> None:
        """Make a token valid, with access to these private and gated repositories."""
        self._tokens[token] = frozenset(repo_ids)

    def inject(self, *faults: Fault) -> None:
        """Arrange for faults, after those already arranged."""
        with self._changed:
            self._faults += [(fault, fault.times) for fault in faults]

    def clear_faults(self) -> None:
        """Behave again."""
        with self._changed:
            self._faults.clear()

    def unspent(self) -> list[Fault]:
        """Counted faults that have not fired as often as they were meant to."""
        with self._changed:
            return [replace(fault, times=left) for fault, left in self._faults if left is not None]

    @property
    def requests(self) -> list[Request]:
        """What was asked so far, once no answer is under way (or 5 s have passed)."""
        # A client may return before the thread that served it has noted how much it sent.
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, timeout=5)
            return list(self._log)

    def seen(self, pattern: str, method: str | None = None) -> list[Request]:
        """The requests whose path matches, of one method if given."""
        wanted = [request for request in self.requests if fnmatchcase(request.path, pattern)]
        return [request for request in wanted if method in (None, request.method)]

    def forget(self) -> None:
        """Empty the request log."""
        with self._changed:
            self._log.clear()

    def environment(self, cache_dir: Path, token: str = "") -> dict[str, str]:
        """Variables that point a subprocess here and keep the developer's own set-up out of it.

        Lay them over the real environment: ``{**os.environ, **hub.environment(cache_dir)}``.
        """
        on = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS", "DISABLE_UPDATE_CHECK")
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache_dir),
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(cache_dir / "hub"),
            "HF_TOKEN_PATH": str(cache_dir / "token"),
            "HF_TOKEN": token,  # the empty string hides a real token from the client
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HUGGINGFACE_CO_STAGING": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **{f"HF_HUB_{name}": "1" for name in on},
        }

    # What follows is for the request handler.

    def _pause(self, seconds: float) -> None:
        """Wait, but not past the end of the server; tests that patch time.sleep do not matter."""
        self._closing.wait(seconds)

    def _begin(self) -> None:
        with self._changed:
            self._busy += 1

    def _finish(self, request: Request | None) -> None:
        with self._changed:
            self._busy -= 1
            self._log += [request] if request else []
            self._changed.notify_all()

    def _take_fault(self, ask: _Ask, reply: _Reply) -> Fault | None:
        """The first fault that applies, used up once."""
        with self._changed:
            for index, (fault, left) in enumerate(self._faults):
                if fault.matches(ask, reply):
                    rest = None if left is None else left - 1
                    self._faults[index : index + 1] = [] if rest == 0 else [(fault, rest)]
                    return fault
        return None

    def _answer(self, ask: _Ask) -> _Reply:
        """The answer of a Hub in good health."""
        parts = ask.raw_path.split("/")[1:]
        try:
            if parts[0] == "api":
                return self._api(ask, parts[1:])
            if parts[0] == "cdn":
                return self._cdn(ask, parts[1:])
            if "resolve" in parts[1:3]:
                return self._resolve(ask, parts)
            raise _Refusal(404, "", "Sorry, we can't find the page you are looking for.")
        except _Refusal as refusal:
            return refusal.reply()

    def _api(self, ask: _Ask, parts: Sequence[str]) -> _Reply:
        """Everything under /api/: models, and the little else that clients ask in passing."""
        if parts[0] == "whoami-v2":
            self._identify(ask, required=True)
            return _json({"type": "user", "name": "tester", "fullname": "Tester", "orgs": []})
        if parts[0] == "agent-harnesses":  # asked by 2.x on its first request: know of none
            return _json({"standardEnvVars": [], "harnesses": {}})
        if parts[0] != "models" or len(parts) < 2:
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        # Repository names have one part or two, and the client does not say which it sent.
        cut = 2 if len(parts) == 2 or parts[2] in _API_VERBS else 3
        repo = self._repo(ask, "/".join(map(unquote, parts[1:cut])))
        verb, *arguments = [unquote(part) for part in parts[cut:]] or [""]
        return self._model_api(ask, repo, verb, arguments)

    def _model_api(self, ask: _Ask, repo: _Repo, verb: str, arguments: list[str]) -> _Reply:
        if verb in ("", "revision"):
            return self._info(ask, repo, "/".join(arguments) or "main")
        if verb == "refs":
            return self._refs(repo)
        if verb == "auth-check":
            self._unlock(ask, repo)
            return _json({})
        commit = repo.resolve(arguments[0] if arguments else "main")
        if verb == "tree":
            return self._tree_page(ask, commit, "/".join(arguments[1:]))
        if verb == "paths-info":
            found = [commit.files.get(name) for name in ask.form().get("paths", [])]
            return _json([_tree_file(blob) for blob in found if blob is not None])
        raise _Refusal(404, "", "Not found")

    def _info(self, ask: _Ask, repo: _Repo, revision: str) -> _Reply:
        """What model_info shows; the Hub shows it of gated models too, locking only the files."""
        commit = repo.resolve(revision)
        detailed = ask.parameter("blobs").lower() in ("true", "1")
        return _json(
            {
                "id": repo.repo_id,
                "modelId": repo.repo_id,
                "author": repo.repo_id.rpartition("/")[0] or None,
                "sha": commit.sha,
                "createdAt": _STAMP,
                "lastModified": _STAMP,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "config": _config(commit.files.get("config.json")),
                "siblings": [_sibling(blob, detailed) for blob in commit.files.values()],
            }
        )

    def _refs(self, repo: _Repo) -> _Reply:
        def listed(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
            refs = ((name, f"refs/{kind}/{name}", sha) for name, sha in names.items())
            return [{"name": name, "ref": ref, "targetCommit": sha} for name, ref, sha in refs]

        branches, tags = listed("heads", repo.branches), listed("tags", repo.tags)
        return _json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def _tree_page(self, ask: _Ask, commit: _Commit, under: str) -> _Reply:
        """One page of a tree; the Link header names the next, as the client expects."""
        recursive = ask.parameter("recursive").lower() in ("true", "1")
        entries = _tree(commit, under, recursive)
        start = int(ask.parameter("cursor") or 0)
        stop = start + self._page_size
        if stop >= len(entries):
            return _json(entries[start:])
        url = f"{self.endpoint}{ask.raw_path}?recursive={recursive}&cursor={stop}"
        return _json(entries[start:stop], 200, ("Link", f'<{url}>; rel="next"'))

    def _resolve(self, ask: _Ask, parts: Sequence[str]) -> _Reply:
        """/{repo}/resolve/{revision}/{name}: small files as they are, large ones by the CDN."""
        cut = list(parts).index("resolve")
        repo = self._repo(ask, "/".join(map(unquote, parts[:cut])))
        self._unlock(ask, repo)
        commit = repo.resolve(unquote("".join(parts[cut + 1 : cut + 2])))
        blob = _entry(commit, parts[cut + 2 :])
        headers = [("X-Repo-Commit", commit.sha), ("ETag", f'"{blob.etag}"')]
        if not blob.lfs:
            return _content(blob, ask, *headers)
        headers += [("X-Linked-Etag", f'"{blob.sha256}"'), ("X-Linked-Size", str(blob.size))]
        if not self._cdn_wanted:
            return _content(blob, ask, *headers)
        where = quote(f"/cdn/{repo.repo_id}/{commit.sha}/{blob.name}")
        # The ETag of the redirect itself says nothing of the file: a client must not use it.
        headers[1] = ("ETag", '"the-redirect-not-the-file"')
        return _plain(302, *headers, ("Location", f"{self.cdn_endpoint}{where}"))

    def _cdn(self, ask: _Ask, parts: Sequence[str]) -> _Reply:
        """The bytes of a large file; the real URL is signed, so no token is looked at."""
        for repo in self._repos.values():
            head = repo.repo_id.split("/")
            sha = "".join(parts[len(head) : len(head) + 1])
            if list(map(unquote, parts[: len(head)])) == head and sha in repo.commits:
                blob = _entry(repo.commits[sha], parts[len(head) + 1 :])
                return _content(blob, ask, ("ETag", f'"{blob.sha256}"'))
        raise _Refusal(403, "", "Access denied")

    def _identify(self, ask: _Ask, required: bool = False) -> frozenset[str] | None:
        """The repositories open to the caller, or None for a caller without a token."""
        if ask.authorization is None and not required:
            return None
        token = (ask.authorization or "").removeprefix("Bearer ")
        if token not in self._tokens:
            # This very message is how the client tells a bad token from a hidden repository.
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return self._tokens[token]

    def _repo(self, ask: _Ask, repo_id: str) -> _Repo:
        """A repository the caller may know of: a private one is as good as missing to others."""
        granted = self._identify(ask)
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and repo_id not in (granted or ())):
            status = 401 if repo is not None and granted is None else 404
            raise _Refusal(status, "RepoNotFound", "Repository not found")
        return repo

    def _unlock(self, ask: _Ask, repo: _Repo) -> None:
        """Refuse the files of a gated model to those who were not let in."""
        granted = self._identify(ask)
        if not repo.gated or repo.repo_id in (granted or ()):
            return
        message = f"Access to model {repo.repo_id} is restricted"
        raise _Refusal(401 if granted is None else 403, "GatedRepo", message)


def _config(blob: _Blob | None) -> dict[str, object]:
    """The part of config.json that the Hub repeats; a broken file, which tests publish, is {}."""
    try:
        config = json.loads(b"".join(blob.read(0, blob.size))) if blob else {}
        return {key: config[key] for key in ("architectures", "model_type") if key in config}
    except (ValueError, TypeError):
        return {}


def _entry(commit: _Commit, parts: Sequence[str]) -> _Blob:
    """A file by its URL parts: a lookup among known names, so no name leads out of the folder."""
    name = "/".join(map(unquote, parts))
    if name not in commit.files:
        raise _Refusal(404, "EntryNotFound", "Entry not found", commit.sha)
    return commit.files[name]


class _Server(ThreadingHTTPServer):
    """One origin; it knows its open connections so that none outlives the test."""

    daemon_threads = True

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        with self._open_lock:
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up, the point of many tests; print our own bugs."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """Stop listening and end kept-alive connections, or their threads would go on answering."""
        self.shutdown()
        self.server_close()
        with self._open_lock:
            connections = list(self._open)
        for connection in connections:
            _end(connection)


def _end(connection: socket.socket) -> None:
    """Close both directions; the peer may have done so already."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN, which is what a zero linger time asks the kernel for."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # http.server would send a FIN first; taking the descriptor from it prevents that.
    socket.socket(fileno=connection.detach()).close()


def _harm(reply: _Reply, ask: _Ask, fault: Fault | None, hub: HubServer) -> _Reply:
    """The answer as the fault would have it, for faults that change what is said."""
    if fault is None:
        return reply
    if fault.kind == "status":
        wait = fault.retry_after
        return _plain(fault.status, *([("Retry-After", str(wait))] if wait is not None else []))
    if fault.kind == "redirect":
        return _plain(302, ("Location", quote(fault.to, safe="/:?=&%")))
    if fault.kind == "no-range":
        return hub._answer(replace(ask, range=None))
    if fault.kind == "replace":
        other = replace(reply.blob, size=len(fault.body), path=None, data=fault.body)
        headers = tuple(pair for pair in reply.headers if pair[0] in ("ETag", "X-Repo-Commit"))
        linked = tuple(pair for pair in reply.headers if pair[0].startswith("X-Linked"))
        return _content(other, ask, *headers, *linked)
    if fault.kind == "truncate":
        return replace(reply, stop=min(reply.stop, reply.start + fault.offset))
    return reply


class _Handler(BaseHTTPRequestHandler):
    """One connection: parse, ask the hub, harm the answer, send it, log it."""

    protocol_version = "HTTP/1.1"  # keep-alive, as clients pool their connections
    disable_nagle_algorithm = True  # headers and body are two writes: Nagle would cost 40 ms each

    def do_GET(self) -> None:
        hub = self._hub
        hub._begin()
        self._sent, self._status = 0, 0
        ask: _Ask | None = None
        try:
            ask = self._parse()
            self._serve(hub, ask)
        except OSError:
            self.close_connection = True  # the client left, which is its right
        finally:
            hub._finish(self._record(ask) if ask else None)

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: the request log is the record."""

    @property
    def _hub(self) -> HubServer:
        return cast(_Server, self.server).hub

    def _parse(self) -> _Ask:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        get = self.headers.get
        return _Ask(self.command, url.path, url.query, get("Range"), get("Authorization"), body)

    def _record(self, ask: _Ask) -> Request:
        authorized = ask.authorization is not None
        name, sent = ask.path, self._sent
        return Request(ask.method, name, ask.range, self._status, sent, ask.query, authorized)

    def _serve(self, hub: HubServer, ask: _Ask) -> None:
        reply = hub._answer(ask)
        fault = hub._take_fault(ask, reply)
        if fault is not None and fault.kind == "hangup":
            self._leave(fault)
            return
        reply = _harm(reply, ask, fault, hub)
        self._status = reply.status
        self.send_response(reply.status)
        for name, value in reply.headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.stop - reply.start))
        self.end_headers()
        if ask.method != "HEAD":
            self._send_body(hub, reply, fault)
            if self._sent < reply.stop - reply.start:  # also when a file shrank since it was added
                self.close_connection = True

    def _send_body(self, hub: HubServer, reply: _Reply, fault: Fault | None) -> None:
        """Send the body in pieces cut where the fault wants to act."""
        kind = "" if fault is None else fault.kind
        # Until `offset` a dropped or stalled answer is sound; the other faults need no cut.
        cut = reply.stop
        if fault is not None and kind in ("drop", "reset", "stall"):
            cut = min(cut, reply.start + fault.offset)
        self._send_span(hub, reply, cut, fault)
        if fault is not None and kind in ("drop", "reset"):
            self._leave(fault)
        elif fault is not None and kind == "stall":
            hub._pause(fault.seconds)
            self._send_span(hub, replace(reply, start=cut), reply.stop, fault)

    def _send_span(self, hub: HubServer, reply: _Reply, stop: int, fault: Fault | None) -> None:
        at = reply.start
        for chunk in reply.blob.read(reply.start, stop):
            if fault is not None and fault.kind == "corrupt":
                chunk = _flip(chunk, fault.offset - at)
            if fault is not None and fault.kind == "slow":
                self._drip(hub, chunk, fault.rate)
            else:
                self._write(chunk)
            at += len(chunk)

    def _drip(self, hub: HubServer, data: bytes, rate: int) -> None:
        """At most twenty pieces a second, so that even a small rate is steady."""
        step = max(1, rate // 20)
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            self._write(piece)
            hub._pause(len(piece) / rate)

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self._sent += len(data)

    def _leave(self, fault: Fault) -> None:
        """End the connection in the middle of things."""
        self.close_connection = True
        if fault.kind == "reset":
            _reset(self.connection)
        else:
            _end(self.connection)


def _flip(data: bytes, index: int) -> bytes:
    """Turn over every bit of one byte, if it is among these."""
    if not 0 <= index < len(data):
        return data
    return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]
