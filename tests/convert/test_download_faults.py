"""What a network does to a download, and that none of it reaches the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from support.command_line import PROGRAM, Run, obey_interrupts, run
from support.folders import finished_weights
from support.hub_client import REPO, big_model, downloads, talk_to
from support.hub_server import Fault, HubServer

from qwen3_ascend import Events, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert.plan import Plan

FIRST, SECOND, LAST = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
AFTER_HEADER = 200_000  # the header is asked for with the first 100,000 bytes


def convert(out: Path, *options: str) -> Run:
    return run("convert", REPO, out, *options)


TEMPORARY = [
    Fault("drop", f"*/{SECOND}", times=2, offset=AFTER_HEADER),
    Fault("reset", f"*/{SECOND}", times=2, offset=AFTER_HEADER),
    Fault("truncate", f"*/{SECOND}", times=2, offset=AFTER_HEADER),
    Fault("truncate", f"*/{SECOND}", times=2, offset=1000),
    Fault("corrupt", f"*/{SECOND}", times=2, offset=AFTER_HEADER),
    Fault("corrupt", f"/cdn/*/{SECOND}", offset=20),
    Fault("hangup", f"/cdn/*/{FIRST}", times=2),
    Fault("status", "/cdn/*", times=2, status=503),
    Fault("status", "/cdn/*", status=500),
    Fault("status", "/cdn/*", times=2, status=429, retry_after=1),
    Fault("status", "/api/models/*", times=2, status=502),
    Fault("status", f"/api/models/{REPO}", times=3, status=429, retry_after=1),
    Fault("replace", f"*/{LAST}", times=2, body=b"\x08\0\0\0\0\0\0\0{}      "),
    Fault("redirect", f"/{REPO}/resolve/*/{LAST}", to=f"/{REPO}/resolve/main/config.json"),
    Fault("redirect", "*/tokenizer.json", to=f"/{REPO}/resolve/main/config.json"),
    Fault("corrupt", "*/config.json", offset=30),
    Fault("no-range", "*.safetensors", times=3),
    Fault("slow", f"*/{SECOND}", times=2, rate=4_000_000),
]


@pytest.mark.parametrize("fault", TEMPORARY, ids=lambda f: f"{f.kind}-{f.status}-{f.path}")
def test_what_passes_leaves_no_trace(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes], fault: Fault
) -> None:
    published.inject(fault)
    done = convert(tmp_path / "out")
    assert done.code == 0, done.err
    assert published.unspent() == [], "the fault did not happen"
    assert finished_weights(tmp_path / "out") == sound


LASTING = [
    (Fault("status", "/cdn/*", times=None, status=503), "503"),
    (Fault("status", "/cdn/*", times=None, status=404), "404"),
    (Fault("hangup", "/cdn/*", times=None), "disconnected"),
    (Fault("reset", f"*/{LAST}", times=None, offset=AFTER_HEADER), "reset"),
    (Fault("corrupt", f"*/{LAST}", times=None, offset=AFTER_HEADER), "SHA-256"),
    (Fault("truncate", f"*/{LAST}", times=None, offset=AFTER_HEADER), "size"),
    (Fault("redirect", "*/tokenizer.json", times=None, to="/elsewhere"), "404"),
    (Fault("redirect", "*/config.json", times=None, to=f"/{REPO}/resolve/main/config.json"), ""),
    (Fault("corrupt", "*/tokenizer.json", times=None, offset=9), "tokenizer.json"),
    (Fault("status", "/api/models/*", times=None, status=500), "500"),
]


@pytest.mark.parametrize(("fault", "said"), LASTING, ids=lambda v: getattr(v, "kind", v))
def test_what_lasts_is_one_line_and_mends_later(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes], fault: Fault, said: str
) -> None:
    out = tmp_path / "out"
    published.inject(fault)
    convert(out, "--quiet", "--retries", "1").one_line_error(REPO, said)
    assert not (out / "qwen3_ascend.json").exists()
    published.clear_faults()
    done = convert(out, "--quiet")
    assert done.code == 0 and done.err == "", done.err
    assert finished_weights(out) == sound


def test_retries_are_noted_and_bounded(published: HubServer, tmp_path: Path) -> None:
    published.inject(Fault("status", f"/cdn/*/{FIRST}", times=None, status=503))
    lines = convert(tmp_path / "out", "--retries", "2").err.splitlines()
    notes = [line for line in lines if "trying again" in line]
    assert [note[-8:] for note in notes] == ["(1 of 2)", "(2 of 2)"]
    assert all(FIRST in note and "503" in note for note in notes)
    assert lines[-1].startswith("Error: ") and len(published.seen(f"/cdn/*/{FIRST}")) == 3


def test_a_lasting_damage_is_fetched_a_few_times_only(published: HubServer, tmp_path: Path) -> None:
    published.inject(Fault("corrupt", f"/cdn/*/{FIRST}", times=None, offset=AFTER_HEADER))
    convert(tmp_path / "out", "--quiet").one_line_error(FIRST, "3 times")
    assert downloads(published).count(FIRST) == 3
    assert not list((tmp_path / "cache").rglob(FIRST)), "the damaged file is still in the cache"


def test_a_damaged_cache_is_mended(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    assert convert(tmp_path / "first", "--quiet").code == 0
    cached = next((tmp_path / "cache").rglob(FIRST)).resolve()
    data = bytearray(cached.read_bytes())
    for flipped in (20, len(data) - 1):  # in the header, and in the last tensor
        data[flipped] ^= 0xFF
        cached.write_bytes(data)
        done = convert(tmp_path / f"out{flipped}")
        assert done.code == 0, done.err
        assert finished_weights(tmp_path / f"out{flipped}") == sound


def test_gone_in_the_middle_then_back(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    published.inject(Fault("hangup", f"/cdn/*/{LAST}", times=1))  # one header: retried
    published.inject(Fault("drop", f"/cdn/*/{LAST}", times=None, offset=AFTER_HEADER))
    convert(out, "--quiet", "--retries", "1").one_line_error(LAST)
    whole = set(downloads(published)) - {LAST}
    assert whole
    published.clear_faults()
    published.forget()
    assert convert(out, "--quiet").code == 0
    assert finished_weights(out) == sound
    assert LAST in downloads(published) and not whole & set(downloads(published))


def test_a_branch_that_moves_meanwhile(published: HubServer, tmp_path: Path, folder: Path) -> None:
    commit = published.add_revision(REPO, "main", folder)
    other = big_model(tmp_path / "other", seed=1)

    class Moving(Events):
        def planned(self, plan: Plan) -> None:
            published.add_revision(REPO, "main", other)

    manifest = convert_checkpoint(REPO, tmp_path / "out", events=Moving())
    assert manifest.source.revision == commit
    assert run("convert", folder, tmp_path / "local", "--quiet").code == 0
    assert finished_weights(tmp_path / "out") == finished_weights(tmp_path / "local")


def test_the_origin_is_told(published: HubServer, tmp_path: Path) -> None:
    commit = Manifest.read(_converted(tmp_path / "one")).source.revision
    done = convert(tmp_path / "two")
    assert f"from {REPO} @ {commit}" in done.err.splitlines()
    assert convert(tmp_path / "three", "--quiet").err == ""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_a_download_crawls(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes], ending: signal.Signals
) -> None:
    """Ctrl-C ends the program though its background thread waits for the network, and whatever
    ended it: what had come is not fetched again, nor is half a file taken for a whole."""
    out = tmp_path / "out"
    published.inject(Fault("slow", f"/cdn/*/{LAST}", times=None, rate=100_000))
    command = [*PROGRAM, "convert", REPO, str(out), "--low-disk"]
    environment = {**os.environ, **published.environment(tmp_path / "other cache")}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=obey_interrupts
    ) as process:
        assert process.stderr is not None
        said = ""
        while f"fetching {REPO}/{LAST}" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(ending)
        rest = process.communicate(timeout=60)[1]
    if ending is signal.SIGINT:
        assert process.returncode == 128 + signal.SIGINT, rest
        assert rest.startswith("Error: interrupted") and rest.count("\n") == 1, rest
    published.clear_faults()
    published.forget()
    done = convert(out, "--low-disk")
    assert done.code == 0, done.err
    assert finished_weights(out) == sound
    assert LAST in downloads(published) and FIRST not in downloads(published)


def _converted(out: Path) -> Path:
    assert convert(out, "--quiet").code == 0
    return out


def test_a_mirror_that_states_no_sizes_and_hashes(
    published: HubServer, folder: Path, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    """Some mirrors tell the name of a file only; the manifest holds its hash all the same."""
    commit = published.add_revision(REPO, "main", folder)
    siblings = [{"rfilename": path.name} for path in folder.iterdir()]
    said = json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode()
    published.inject(Fault("replace", f"/api/models/{REPO}", times=None, body=said))
    for option in ("--quiet", "--low-disk"):
        out = tmp_path / f"out{option}"
        done = convert(out, option)
        assert done.code == 0, done.err
        assert finished_weights(out) == sound
        digest = hashlib.sha256((folder / LAST).read_bytes()).hexdigest()
        assert Manifest.read(out).source.files[LAST].sha256 == digest


def test_a_busy_hub_is_asked_again_though_the_cache_is_full(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    """The branch may have moved: a cache that is merely old is no answer to a passing 503."""
    assert convert(tmp_path / "one", "--quiet").code == 0
    published.inject(Fault("status", f"/api/models/{REPO}", status=503))
    done = convert(tmp_path / "two")
    assert done.code == 0 and "trying again" in done.err and "offline" not in done.err
    published.inject(Fault("status", f"/api/models/{REPO}", times=None, status=503))
    done = convert(tmp_path / "three", "--retries", "1")
    assert done.code == 0 and "offline" in done.err
    assert finished_weights(tmp_path / "two") == finished_weights(tmp_path / "three") == sound


def test_a_hub_that_names_no_commit(published: HubServer, tmp_path: Path) -> None:
    for sha in (None, "main", "../../evil"):
        said = json.dumps({"id": REPO, "sha": sha, "siblings": []}).encode()
        published.inject(Fault("replace", f"/api/models/{REPO}", body=said))
        convert(tmp_path / "out", "--quiet").one_line_error("no commit")


def test_a_damaged_cache_without_a_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: dict[str, bytes]
) -> None:
    with HubServer() as gone:
        commit = gone.add_model(REPO, folder)
        talk_to(gone, tmp_path / "cache", monkeypatch)
        assert convert(tmp_path / "one", "--quiet").code == 0
    done = convert(tmp_path / "two")
    assert done.code == 0 and f"offline: taking {REPO} @ {commit}" in done.err, done.err
    assert finished_weights(tmp_path / "two") == sound
    cached = next((tmp_path / "cache").rglob(LAST)).resolve()
    data = bytearray(cached.read_bytes())
    data[-2] ^= 1
    cached.write_bytes(data)
    convert(tmp_path / "three", "--quiet").one_line_error(LAST, "damaged", "delete it")
    cached.unlink()
    convert(tmp_path / "four", "--quiet", "--retries", "0").one_line_error("not reachable", LAST)


def test_a_disk_that_is_full(published: HubServer, tmp_path: Path) -> None:
    """No retries where they cannot help, and one line."""
    limited = f"ulimit -f 1000; exec {shlex.join(PROGRAM)} convert {REPO} out --quiet"
    environment = {**os.environ, **published.environment(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", "-c", limited], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    Run(done.returncode, done.stdout, done.stderr).one_line_error("File too large")
    assert len(set(downloads(published))) == len(downloads(published))
