"""The Hub stand-in, driven by the real client where a client is concerned.

The tests marked ``contract`` hold the client and not our code: they record what huggingface_hub
2.4 does by itself under each fault, as code built on it has to know what is left to do. A new
version of the client may break them and nothing of ours, so they run by `make contract` alone.

* GET of a file: an early end of the connection or a timeout is retried 5 times, 1 s apart, with a
  ``Range`` for whole 10 MiB chunks already received (less than one chunk starts over); 408 and 429
  are retried 5 times, obeying Retry-After (plus 1 s).  Not retried: a TCP reset (``ReadError``),
  5xx (``HfHubHTTPError``).  A short body raises a bare ``OSError``.  Nothing of a failed download
  is kept, so the next call starts at zero.
* HEAD of a file: 408, 429 and 5xx are retried (7 requests), then ``LocalEntryNotFoundError``.
  A connection closed without an answer is not (``RemoteProtocolError``).
* Listing: the tree is retried on 5xx, ``model_info`` is not.
* Content: only the size is checked.  Wrong bytes of the right size are accepted, whatever the
  sha256, and kept under its name; so is another file that a redirect on the same host leads to.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.hub_server import Fault, HubServer, Request

_REPO = "Qwen/Qwen3-Tiny"
_SMALL = 300_000  # less than the 10 MiB that the client reads at a time


@pytest.fixture(autouse=True)
def _this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no request leave: the client asks its default endpoint for small things in passing."""
    resolve = socket.getaddrinfo

    def local(host: str | None, *args: int, **more: int) -> object:
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, f"{host} is not for tests")
        return resolve(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    # The client pools its connections, in a session that may know of a proxy.
    getattr(huggingface_hub, "close_session", lambda: None)()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept between its retries; the server does not use sleep."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of small and large (by name) files, one of them in a subfolder."""
    root = tmp_path / "model"
    (root / "extra").mkdir(parents=True)
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 8}
    (root / "config.json").write_text(json.dumps(config))
    (root / "model.safetensors").write_bytes(random.Random(1).randbytes(_SMALL))
    (root / "extra" / "a note.txt").write_text("hello")
    return root


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_model(_REPO, folder)
        yield server


def _download(
    hub: HubServer,
    cache: Path,
    name: str = "model.safetensors",
    *,
    revision: str | None = None,
    token: str | bool = False,
) -> bytes:
    """The bytes of one file, by the real client."""
    where = cache / "hub"
    path = hf_hub_download(
        _REPO, name, revision=revision, token=token, endpoint=hub.endpoint, cache_dir=where
    )
    return Path(path).read_bytes()


def _snapshot(hub: HubServer, cache: Path) -> Path:
    where = cache / "hub"
    return Path(snapshot_download(_REPO, endpoint=hub.endpoint, cache_dir=where, token=False))


def _api(hub: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def _files(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def _ask(
    hub: HubServer, name: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One bare request on a connection of its own; a body that ends early raises."""
    address = urlsplit(hub.endpoint)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=5)
    try:
        connection.request(method, f"/{_REPO}/resolve/main/{name}", headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


# The healthy server.


def test_snapshot_has_every_byte(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    assert _files(_snapshot(hub, tmp_path)) == _files(folder)


def test_single_files_have_every_byte(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    for name, content in _files(folder).items():
        assert _download(hub, tmp_path, name) == content
    blobs = {path.name for path in (tmp_path / "hub").glob("models--*/blobs/*")}
    assert hashlib.sha256(_files(folder)["model.safetensors"]).hexdigest() in blobs


def test_second_download_fetches_nothing(hub: HubServer, tmp_path: Path) -> None:
    _download(hub, tmp_path)
    hub.forget()
    _download(hub, tmp_path)
    assert [request.method for request in hub.seen(f"/{_REPO}/*")] == ["HEAD"]


def test_model_info_describes_the_files(hub: HubServer, folder: Path) -> None:
    info = _api(hub).model_info(_REPO, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert set(siblings) == set(_files(folder))
    lfs = siblings["model.safetensors"].lfs
    assert lfs is not None and lfs.size == _SMALL and 100 < lfs.pointer_size < 200
    assert lfs.sha256 == hashlib.sha256(_files(folder)["model.safetensors"]).hexdigest()
    config = siblings["config.json"]
    data = _files(folder)["config.json"]
    assert config.lfs is None and config.size == len(data)
    assert config.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert info.config == {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def test_plain_info_has_names_only(hub: HubServer) -> None:
    info = _api(hub).model_info(_REPO)
    assert _api(hub).repo_info(_REPO).sha == info.sha
    assert info.siblings and all(sibling.size is None for sibling in info.siblings)


def test_broken_config_is_published_all_the_same(hub: HubServer, folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff{")
    hub.add_model(_REPO, folder)
    assert _api(hub).model_info(_REPO).sha


def test_tree_by_folder_and_in_pages(folder: Path) -> None:
    with HubServer(page_size=1) as hub:
        hub.add_model(_REPO, folder)
        top = [entry.path for entry in _api(hub).list_repo_tree(_REPO)]
        assert top == ["extra", "config.json", "model.safetensors"]
        deep = [entry.path for entry in _api(hub).list_repo_tree(_REPO, recursive=True)]
        assert sorted(deep) == sorted([*_files(folder), "extra"])
        below = [entry.path for entry in _api(hub).list_repo_tree(_REPO, "extra")]
        assert below == ["extra/a note.txt"]
        with pytest.raises(EntryNotFoundError):
            list(_api(hub).list_repo_tree(_REPO, "nowhere"))


def test_paths_info_and_existence(hub: HubServer) -> None:
    api = _api(hub)
    found = api.get_paths_info(_REPO, ["config.json", "missing"])
    assert [entry.path for entry in found] == ["config.json"]
    assert api.file_exists(_REPO, "config.json") and not api.file_exists(_REPO, "missing")
    assert api.repo_exists(_REPO) and not api.repo_exists("Qwen/Other")
    assert not api.revision_exists(_REPO, "other")


def test_large_files_come_from_another_origin(hub: HubServer, tmp_path: Path) -> None:
    hub.add_token("hf_known")
    _download(hub, tmp_path, token="hf_known")
    assert hub.cdn_endpoint != hub.endpoint
    assert [request.authorized for request in hub.seen("*.safetensors", "HEAD")] == [True]
    assert [request.authorized for request in hub.seen("/cdn/*")] == [False]


def test_without_a_cdn_they_come_directly(folder: Path, tmp_path: Path) -> None:
    with HubServer(cdn=False) as hub:
        hub.add_model(_REPO, folder)
        assert _download(hub, tmp_path) == _files(folder)["model.safetensors"]
        assert [request.status for request in hub.seen("*.safetensors")] == [200, 200]


def test_environment_serves_a_subprocess(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = f"import huggingface_hub as h; print(h.snapshot_download({_REPO!r}))"
    variables = {**os.environ, "HF_TOKEN": "hf_mine", **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    root = Path(done.stdout.strip())
    assert root.is_relative_to(tmp_path / "home") and _files(root) == _files(folder)
    assert not any(request.authorized for request in hub.requests)


def test_environment_passes_a_token(hub: HubServer, tmp_path: Path) -> None:
    hub.add_token("hf_known")
    code = "import huggingface_hub as h; print(h.HfApi().whoami()['name'])"
    variables = {**os.environ, **hub.environment(tmp_path, token="hf_known")}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=variables, text=True, timeout=60) == "tester\n"


# Revisions.


def test_revisions_are_pinned(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    old = _api(hub).model_info(_REPO).sha
    assert old is not None and len(old) == 40
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text("{}")
    new = hub.add_revision(_REPO, "main", newer)
    hub.add_revision(_REPO, "v1", folder, tag=True)
    assert old != new and _api(hub).model_info(_REPO).sha == new
    assert _download(hub, tmp_path, "config.json") == b"{}"
    for revision in (old, "v1"):
        content = _download(hub, tmp_path, "config.json", revision=revision)
        assert content == _files(folder)["config.json"]


def test_refs_and_branches_with_slashes(folder: Path) -> None:
    with HubServer() as hub:
        commit = hub.add_model(_REPO, folder, revisions={"refs/pr/1": folder})
        hub.add_revision(_REPO, "v1", folder, tag=True)
        refs = _api(hub).list_repo_refs(_REPO)
        assert {ref.name: ref.target_commit for ref in refs.branches}["main"] == commit
        assert [ref.ref for ref in refs.tags] == ["refs/tags/v1"]
        assert _api(hub).model_info(_REPO, revision="refs/pr/1").sha == commit


def test_equal_folders_are_equal_commits(hub: HubServer, folder: Path) -> None:
    first = hub.add_revision(_REPO, "a", folder)
    assert hub.add_revision(_REPO, "b", folder) == first
    (folder / "config.json").write_text("{ }")
    assert hub.add_revision(_REPO, "c", folder) != first


# Refusals.


def test_missing_things_raise_their_own_errors(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        _api(hub).model_info("Qwen/Other")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("gpt2", "x", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    with pytest.raises(RevisionNotFoundError):
        _download(hub, tmp_path, revision="other")
    with pytest.raises(RevisionNotFoundError):
        _api(hub).model_info(_REPO, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        _download(hub, tmp_path, "missing.json")


def test_gated_files_need_a_token_let_in(folder: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add_model(_REPO, folder, gated=True)
        hub.add_token("hf_in", _REPO)
        hub.add_token("hf_out")
        assert _api(hub).model_info(_REPO).gated == "manual"  # the Hub does not hide these
        with pytest.raises(GatedRepoError) as anonymous:
            _download(hub, tmp_path)
        with pytest.raises(GatedRepoError) as outsider:
            _download(hub, tmp_path, token="hf_out")
        refused = [str(error.value).partition(" ")[0] for error in (anonymous, outsider)]
        assert refused == ["401", "403"]
        assert _download(hub, tmp_path, token="hf_in") == _files(folder)["model.safetensors"]


def test_private_models_look_missing(folder: Path) -> None:
    with HubServer() as hub:
        hub.add_model(_REPO, folder, private=True)
        hub.add_token("hf_in", _REPO)
        hub.add_token("hf_out")
        for token in (False, "hf_out"):
            with pytest.raises(RepositoryNotFoundError):
                _api(hub, token).model_info(_REPO)
        assert _api(hub, "hf_in").model_info(_REPO).private


def test_unknown_token_is_refused_everywhere(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        _api(hub, "hf_unknown").model_info(_REPO)
    assert not isinstance(refused.value, RepositoryNotFoundError)


# Plain HTTP.


def test_ranges(hub: HubServer, folder: Path) -> None:
    data = (folder / "config.json").read_bytes()
    size = len(data)
    wanted = {"bytes=5-9": data[5:10], "bytes=5-": data[5:], "bytes=-4": data[-4:]}
    for header, part in wanted.items():
        status, headers, body = _ask(hub, "config.json", Range=header)
        start = data.index(part)
        assert (status, body) == (206, part)
        assert headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    status, headers, _ = _ask(hub, "config.json", Range=f"bytes={size}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}")
    assert _ask(hub, "config.json", Range="lines=1-2")[::2] == (200, data)


def test_headers_of_small_and_large_files(hub: HubServer, folder: Path) -> None:
    commit = _api(hub).model_info(_REPO).sha
    status, small, body = _ask(hub, "config.json", "HEAD")
    assert (status, body, small["X-Repo-Commit"]) == (200, b"", commit)
    assert int(small["Content-Length"]) == (folder / "config.json").stat().st_size
    assert small["Accept-Ranges"] == "bytes" and "X-Linked-Etag" not in small
    status, large, _ = _ask(hub, "model.safetensors", "HEAD")
    assert (status, large["X-Linked-Size"], large["X-Repo-Commit"]) == (302, str(_SMALL), commit)
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert large["X-Linked-Etag"] == f'"{sha256}"' != large["ETag"]
    assert large["Location"].startswith(f"{hub.cdn_endpoint}/cdn/")


def test_log_says_what_was_sent(hub: HubServer, folder: Path) -> None:
    path = f"/{_REPO}/resolve/main/config.json"
    _ask(hub, "config.json", Range="bytes=2-5", Authorization="Bearer x")
    (refused,) = hub.seen("*/config.json")  # waits for it: the log is in the order of the ends
    _ask(hub, "config.json", Range="bytes=2-5")
    _, served = hub.seen("*/config.json")
    assert (refused.status, refused.authorized) == (401, True)
    assert served == Request("GET", path, "bytes=2-5", 206, 4)
    hub.forget()
    assert hub.requests == []


def test_closing_ends_kept_alive_connections(folder: Path) -> None:
    with HubServer() as hub:
        address = urlsplit(hub.endpoint)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=5)
        connection.request("GET", "/nothing")
        connection.getresponse().read()
    connection.sock.settimeout(5)
    assert connection.sock.recv(1) == b""
    connection.close()


# Faults by themselves.


def test_faults_are_counted_in_order(hub: HubServer) -> None:
    first = Fault("status", "*/config.json", status=429, retry_after=7, times=2)
    hub.inject(first, Fault("status", "*/config.json", status=500))
    answers = [_ask(hub, "config.json") for _ in range(2)]
    assert [headers["Retry-After"] for _, headers, _ in answers] == ["7", "7"]
    assert [fault.status for fault in hub.unspent()] == [500]
    assert [_ask(hub, "config.json")[0] for _ in range(2)] == [500, 200]
    assert hub.unspent() == []


def test_faults_keep_to_path_and_method(hub: HubServer) -> None:
    fault = Fault("status", "*/config.json", methods=("GET",))
    hub.inject(fault, replace(fault, path="*/other", times=None))
    assert _ask(hub, "config.json", "HEAD")[0] == 200
    assert _ask(hub, "extra/a%20note.txt")[0] == 200
    assert hub.unspent() == [fault]
    hub.clear_faults()
    assert _ask(hub, "config.json")[0] == 200


def test_body_faults_wait_for_a_body(hub: HubServer) -> None:
    fault = Fault("drop", "*/model.safetensors")
    hub.inject(fault)
    assert _ask(hub, "model.safetensors")[0] == 302
    assert hub.unspent() == [fault]


@pytest.mark.parametrize(
    "fields",
    [{"kind": "redirect"}, {"kind": "slow"}, {"kind": "stall"}, {"offset": -1}, {"times": 0}],
)
def test_faults_without_effect_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Fault(**{"kind": "drop", "path": "*", **fields})  # type: ignore[arg-type]


def test_drop_and_reset_end_early(hub: HubServer) -> None:
    hub.inject(Fault("drop", "*/config.json", offset=10))
    with pytest.raises(http.client.IncompleteRead) as cut:
        _ask(hub, "config.json")
    assert len(cut.value.partial) == 10
    hub.inject(Fault("reset", "*/config.json", offset=10))
    with pytest.raises(ConnectionResetError):
        _ask(hub, "config.json")
    assert [request.sent for request in hub.requests] == [10, 10]


def test_hangup_says_nothing(hub: HubServer) -> None:
    hub.inject(Fault("hangup", "*"))
    with pytest.raises(http.client.RemoteDisconnected):
        _ask(hub, "config.json")
    assert [request.status for request in hub.requests] == [0]


def test_truncate_looks_complete(hub: HubServer, folder: Path) -> None:
    hub.inject(Fault("truncate", "*/config.json", offset=10))
    status, headers, body = _ask(hub, "config.json")
    assert (status, headers["Content-Length"]) == (200, "10")
    assert body == (folder / "config.json").read_bytes()[:10]


def test_corrupt_hits_one_byte_of_the_file(hub: HubServer, folder: Path) -> None:
    data = bytearray((folder / "config.json").read_bytes())
    data[7] ^= 0xFF
    hub.inject(Fault("corrupt", "*/config.json", offset=7, times=2))
    assert _ask(hub, "config.json")[2] == data
    assert _ask(hub, "config.json", Range="bytes=5-")[2] == data[5:]


def test_replace_keeps_the_identity(hub: HubServer) -> None:
    _, healthy, data = _ask(hub, "config.json")
    hub.inject(Fault("replace", "*/config.json", body=bytes(len(data))))
    _, headers, body = _ask(hub, "config.json")
    assert body == bytes(len(data)) != data
    assert all(headers[name] == healthy[name] for name in ("ETag", "Content-Length"))


def test_no_range_sends_everything(hub: HubServer, folder: Path) -> None:
    hub.inject(Fault("no-range", "*/config.json"))
    answer = _ask(hub, "config.json", Range="bytes=5-")
    assert answer[::2] == (200, (folder / "config.json").read_bytes())


def test_redirect_leads_elsewhere(hub: HubServer) -> None:
    target = f"/{_REPO}/resolve/main/extra/a note.txt"
    hub.inject(Fault("redirect", "*/config.json", to=target))
    status, headers, _ = _ask(hub, "config.json")
    assert (status, headers["Location"]) == (302, target.replace(" ", "%20"))


def test_slow_keeps_to_its_rate(hub: HubServer, folder: Path) -> None:
    data = (folder / "config.json").read_bytes()
    hub.inject(Fault("slow", "*/config.json", rate=len(data) * 4))
    begin = time.monotonic()
    assert _ask(hub, "config.json")[2] == data
    # The client has the last piece before the pause that follows it.
    assert 0.15 < time.monotonic() - begin < 2


def test_stall_pauses_and_goes_on(hub: HubServer, folder: Path) -> None:
    hub.inject(Fault("stall", "*/config.json", offset=5, seconds=0.2))
    begin = time.monotonic()
    assert _ask(hub, "config.json")[2] == (folder / "config.json").read_bytes()
    assert time.monotonic() - begin > 0.15


def test_file_that_shrank_ends_early(hub: HubServer, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(http.client.IncompleteRead):
        _ask(hub, "config.json")


def test_files_changed_on_disk_keep_their_identity(hub: HubServer, folder: Path) -> None:
    before = _ask(hub, "config.json")[1]
    (folder / "config.json").write_bytes(b" " * int(before["Content-Length"]))
    _, headers, body = _ask(hub, "config.json")
    assert not body.strip() and headers["ETag"] == before["ETag"]


# What the real client does about them.


@pytest.mark.contract
def test_client_starts_over_after_a_small_drop(
    hub: HubServer, folder: Path, tmp_path: Path, naps: list[float]
) -> None:
    hub.inject(Fault("drop", "*.safetensors", offset=1000, times=2))
    assert _download(hub, tmp_path) == _files(folder)["model.safetensors"]
    answers = [(request.range, request.sent) for request in hub.seen("/cdn/*")]
    assert answers == [(None, 1000), (None, 1000), (None, _SMALL)]
    assert naps == [1, 1]


@pytest.mark.contract
@pytest.mark.parametrize("honoured", [True, False])
def test_client_resumes_after_a_large_drop(
    hub: HubServer, folder: Path, tmp_path: Path, naps: list[float], honoured: bool
) -> None:
    size, chunk = 12 << 20, 10 << 20
    (folder / "model.safetensors").write_bytes(random.Random(2).randbytes(size))
    hub.add_model(_REPO, folder)
    hub.inject(Fault("drop", "*.safetensors", offset=11 << 20))
    if not honoured:
        hub.inject(Fault("no-range", "*.safetensors"))
    assert _download(hub, tmp_path) == (folder / "model.safetensors").read_bytes()
    last = hub.seen("/cdn/*")[-1]
    rest = (206, size - chunk) if honoured else (200, size)
    assert (last.range, last.status, last.sent) == (f"bytes={chunk}-", *rest)
    assert naps == [1]


@pytest.mark.contract
def test_client_gives_up_on_drops(hub: HubServer, tmp_path: Path, naps: list[float]) -> None:
    hub.inject(Fault("drop", "*.safetensors", times=None))
    with pytest.raises(Exception, match="peer closed connection") as error:
        _download(hub, tmp_path)
    assert type(error.value).__name__ == "RemoteProtocolError"  # httpx's, not an OSError
    assert len(hub.seen("/cdn/*")) == 6 and naps == [1] * 5
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("reset", "*.safetensors", offset=1000), "ReadError"),
        (Fault("hangup", "*.safetensors", methods=("HEAD",)), "RemoteProtocolError"),
        (Fault("status", "/cdn/*", status=503), "HfHubHTTPError"),
        (Fault("status", "/cdn/*", status=500), "HfHubHTTPError"),
        (Fault("truncate", "*.safetensors", offset=1000), "OSError"),
        (Fault("replace", "*.safetensors", body=b"short"), "OSError"),
        (Fault("redirect", "*", times=None, to="/Qwen/Qwen3-Tiny"), "TooManyRedirects"),
    ],
)
def test_client_does_not_retry(
    hub: HubServer, tmp_path: Path, naps: list[float], fault: Fault, error: str
) -> None:
    hub.inject(fault)
    with pytest.raises(Exception) as raised:  # noqa: B017 - the class is compared below
        _download(hub, tmp_path)
    assert type(raised.value).__name__ == error
    assert naps == [] and hub.unspent() == []


@pytest.mark.contract
@pytest.mark.parametrize(
    ("fault", "slept"),
    [
        (Fault("hangup", "/cdn/*"), [1]),
        (Fault("status", "/cdn/*", status=408), [1]),
        (Fault("status", "/cdn/*", status=429, retry_after=2, times=2), [3, 3]),
        (Fault("status", "*.safetensors", methods=("HEAD",)), []),
        (Fault("status", "*.safetensors", methods=("HEAD",), times=3), [1, 2]),
    ],
)
def test_client_retries(
    hub: HubServer,
    folder: Path,
    tmp_path: Path,
    naps: list[float],
    fault: Fault,
    slept: list[float],
) -> None:
    hub.inject(fault)
    assert _download(hub, tmp_path) == _files(folder)["model.safetensors"]
    assert naps == slept and hub.unspent() == []


@pytest.mark.contract
def test_client_gives_up_on_503(hub: HubServer, tmp_path: Path, naps: list[float]) -> None:
    hub.inject(Fault("status", "*.safetensors", times=None))
    with pytest.raises(LocalEntryNotFoundError) as error:
        _download(hub, tmp_path)
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert len(hub.seen("*.safetensors", "HEAD")) == 7 and naps == [1, 2, 4, 8, 8]


@pytest.mark.contract
def test_client_gives_up_on_429(hub: HubServer, tmp_path: Path, naps: list[float]) -> None:
    hub.inject(Fault("status", "/cdn/*", status=429, retry_after=2, times=None))
    with pytest.raises(HfHubHTTPError, match="429"):
        _download(hub, tmp_path)
    assert naps == [3] * 5


@pytest.mark.contract
def test_client_retries_trees_but_not_info(
    hub: HubServer, folder: Path, tmp_path: Path, naps: list[float]
) -> None:
    hub.inject(Fault("status", "*/tree/*"))
    assert _files(_snapshot(hub, tmp_path / "one")) == _files(folder)
    assert naps == [1]
    hub.inject(Fault("status", "/api/models/*", times=2))
    with pytest.raises(HfHubHTTPError, match="503"):
        _api(hub).model_info(_REPO)
    with pytest.raises(LocalEntryNotFoundError, match="503"):
        _snapshot(hub, tmp_path / "two")
    assert naps == [1]


@pytest.mark.contract
def test_client_retries_after_a_timeout(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.inject(Fault("stall", "*.safetensors", offset=1000, seconds=1))
    assert _download(hub, tmp_path) == _files(folder)["model.safetensors"]
    assert naps == [1]


@pytest.mark.contract
def test_client_accepts_wrong_bytes_of_the_right_size(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    data = _files(folder)["model.safetensors"]
    sha256 = hashlib.sha256(data).hexdigest()
    hub.inject(Fault("corrupt", "*.safetensors", offset=_SMALL - 1))
    spoiled = _download(hub, tmp_path / "one")
    assert spoiled[:-1] == data[:-1] and spoiled != data
    hub.inject(Fault("replace", "*.safetensors", body=bytes(_SMALL)))
    assert _download(hub, tmp_path / "two") == bytes(_SMALL)
    blob = next((tmp_path / "two").rglob("blobs/*"))
    assert blob.name == sha256 != hashlib.sha256(blob.read_bytes()).hexdigest()


@pytest.mark.contract
def test_client_follows_a_redirect_to_another_file(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    hub.inject(Fault("redirect", "*/config.json", to=f"/{_REPO}/resolve/main/extra/a note.txt"))
    assert _download(hub, tmp_path, "config.json") == b"hello"


@pytest.mark.parametrize(
    "name", ["../evil", "/absolute/evil", "a/../../evil", "..\\evil", "C:\\evil"]
)
def test_hostile_names_are_listed_and_served(hub: HubServer, folder: Path, name: str) -> None:
    hub.add_model(_REPO, folder, extra={name: b"evil"})
    siblings = _api(hub).model_info(_REPO).siblings or []
    assert name in [sibling.rfilename for sibling in siblings]
    paths = [entry.path for entry in _api(hub).list_repo_tree(_REPO, recursive=True)]
    assert name in paths
    assert _ask(hub, name.replace("\\", "%5C"))[2] == b"evil"


@pytest.mark.contract
@pytest.mark.parametrize(
    "name", ["../evil", "/absolute/evil", "a/../../evil", "..\\evil", "C:\\evil"]
)
def test_client_refuses_hostile_names(
    hub: HubServer, folder: Path, tmp_path: Path, name: str
) -> None:
    hub.add_model(_REPO, folder, extra={name: b"evil"})
    with pytest.raises(ValueError, match="Invalid filename"):
        _snapshot(hub, tmp_path)
    assert not [path for path in tmp_path.rglob("*evil*") if path.is_file()]
