"""Downloads that go one ahead of the conversion and, with --low-disk, when they have been used."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from support import tiny_models
from support.command_line import Run, run
from support.folders import contents, finished_weights
from support.hub_client import REPO, big_model, downloads
from support.hub_server import Fault, HubServer

from qwen3_ascend import ConvertOptions, Events, convert_checkpoint

SHARDS = 6
AFTER_HEADER = 120_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_model(tmp_path_factory.mktemp("source") / "model", SHARDS)


def convert(out: Path, *options: str) -> Run:
    return run("convert", REPO, out, "--low-disk", *options)


def test_disk_stays_below_what_was_announced(
    published: HubServer, folder: Path, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    out, held = tmp_path / "out", list[int]()
    announced = json.loads(convert(out, "--dry-run", "--json").out)["disk"]["downloads"]

    class Look(Events):
        def done(self, name: str, nbytes: int) -> None:
            held.append(sum(path.stat().st_size for path in out.rglob("model-*.safetensors")))

    options = ConvertOptions(low_disk=True, threads=1)
    convert_checkpoint(REPO, out, options=options, events=Look())
    assert finished_weights(out) == sound
    # These items are so small that a file more than usual may wait for its last pieces.
    assert 0 < max(held) <= announced + 1.5 * total / SHARDS < total
    fetched = downloads(published)
    assert len(fetched) == len(set(fetched)) == SHARDS
    assert not list((tmp_path / "cache").rglob("model-*.safetensors"))


def test_without_it_the_cache_is_used(
    published: HubServer, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    assert run("convert", REPO, tmp_path / "one", "--quiet").code == 0
    cached = contents(tmp_path / "cache")
    assert len([name for name in cached if "snapshots" in name and "model-" in name]) == SHARDS
    published.forget()
    done = convert(tmp_path / "two", "--quiet")
    assert done.code == 0, done.err
    assert downloads(published) == [] and finished_weights(tmp_path / "two") == sound
    assert contents(tmp_path / "cache") == cached, "files of the user's cache were touched"


def test_a_local_folder_is_never_touched(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    assert run("convert", folder, tmp_path / "out", "--low-disk", "--quiet").code == 0
    assert contents(folder) == before


def test_the_next_file_comes_while_one_is_in_use(published: HubServer, tmp_path: Path) -> None:
    """The second file is held up until an item of the first is done: it comes in the background,
    and a third one is not begun meanwhile."""
    published.add_model("me/few-files", big_model(tmp_path / "few", 3))
    item_done, fetching, meanwhile = threading.Event(), list[str](), list[bool]()

    class Hold(Events):
        def note(self, line: str) -> None:
            if line.startswith("fetching"):
                fetching.append(line)
                if len(fetching) == 2:
                    meanwhile.append(item_done.wait(60) and len(fetching) == 2)

        def done(self, name: str, nbytes: int) -> None:
            item_done.set()

    options = ConvertOptions(threads=1)
    convert_checkpoint("me/few-files", tmp_path / "out", options=options, events=Hold())
    assert meanwhile == [True] and len(fetching) == 3


def test_an_interrupted_conversion_fetches_only_what_it_lacks(
    published: HubServer, folder: Path, tmp_path: Path
) -> None:
    """Without transforms, for which weights that were converted before may be read again."""
    plain = ("--quiet", "--recipe", "w8a8-plain")
    assert run("convert", folder, tmp_path / "sound", *plain).code == 0
    out, last = tmp_path / "out", "model-00006-of-00006.safetensors"
    published.inject(Fault("drop", f"*/{last}", times=None, offset=AFTER_HEADER))
    convert(out, *plain, "--retries", "0").one_line_error(last)
    assert (out / ".partial").is_dir() and not (out / "qwen3_ascend.json").exists()
    published.clear_faults()
    published.forget()
    done = convert(out, *plain)
    assert done.code == 0, done.err
    assert "model-00001-of-00006.safetensors" not in downloads(published)
    assert last in downloads(published) and len(downloads(published)) < SHARDS - 1
    assert finished_weights(out) == finished_weights(tmp_path / "sound")


def test_leftovers_that_nobody_needs_are_removed(
    published: HubServer, folder: Path, tmp_path: Path, sound: dict[str, bytes]
) -> None:
    """A killed conversion may leave files, whole and half; damaged ones are not believed."""
    out, first = tmp_path / "out", "model-00001-of-00006.safetensors"
    area = out / ".partial" / "source"
    (area / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (area / ".cache" / "huggingface" / "download" / "x.incomplete").write_bytes(bytes(99))
    (area / "model-of-another.safetensors").write_bytes(bytes(99))
    (area / first).write_bytes(bytes((folder / first).stat().st_size))
    done = convert(out, "--quiet")
    assert done.code == 0, done.err
    assert finished_weights(out) == sound


def test_damage_on_the_way(published: HubServer, tmp_path: Path, sound: dict[str, bytes]) -> None:
    name = "model-00003-of-00006.safetensors"
    published.inject(Fault("corrupt", f"/cdn/*/{name}", times=2, offset=AFTER_HEADER))
    done = convert(tmp_path / "one")
    assert done.code == 0 and "SHA-256" in done.err and published.unspent() == []
    assert finished_weights(tmp_path / "one") == sound
    published.inject(Fault("corrupt", f"/cdn/*/{name}", times=None, offset=AFTER_HEADER))
    convert(tmp_path / "two", "--quiet").one_line_error(name, "3 times")
    assert not list((tmp_path / "two").rglob(name)), "the damaged file is still there"


def test_dry_run_tells_the_disk(published: HubServer, folder: Path, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    plain = json.loads(run("convert", REPO, tmp_path / "out", "--dry-run", "--json").out)
    assert plain["disk"] == {"checkpoint": plain["output_bytes"], "downloads": total}
    low = json.loads(convert(tmp_path / "out", "--dry-run", "--json").out)
    assert 0 < low["disk"]["downloads"] < total and low["disk"]["checkpoint"] > 0
    text = convert(tmp_path / "out", "--dry-run").out.splitlines()[-1]
    assert text.startswith("needs ") and "downloads" in text
    assert not (tmp_path / "out").exists() and downloads(published) == []
    local = json.loads(run("convert", folder, tmp_path / "out", "--dry-run", "--json").out)
    assert list(local["disk"]) == ["checkpoint"]


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_small_disk_is_refused_before_the_first_byte(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    needs = json.loads(run("convert", REPO, out, "--dry-run", "--json").out)["disk"]
    low = json.loads(convert(out, "--dry-run", "--json").out)["disk"]
    free(monkeypatch, sum(needs.values()) - 1)
    run("convert", REPO, out, "--quiet").one_line_error("not enough disk", "MB", "--low-disk")
    free(monkeypatch, sum(low.values()) - 1)
    line = convert(out, "--quiet").one_line_error("not enough disk", "another output")
    assert "pass" not in line and "--low-disk" not in line
    assert downloads(published) == [] and not out.exists()
    free(monkeypatch, sum(low.values()))
    assert convert(out, "--quiet").code == 0


def test_little_memory_is_refused_before_the_first_byte(
    published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    monkeypatch.setattr("qwen3_ascend.files.memory.MEMINFO", meminfo)
    run("convert", REPO, tmp_path / "out", "-q").one_line_error("memory", "1.0 kB", "--max-memory")
    assert downloads(published) == [] and not (tmp_path / "out").exists()


def test_a_size_that_its_header_denies(published: HubServer, folder: Path, tmp_path: Path) -> None:
    """A mirror that states one file and serves another is found out by the header."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    published.add_model(REPO, copy)
    first = copy / "model-00001-of-00006.safetensors"
    first.write_bytes((folder / "model-00002-of-00006.safetensors").read_bytes())
    assert first.stat().st_size != (folder / first.name).stat().st_size
    run("convert", REPO, tmp_path / "out", "-q", "--retries", "0").one_line_error(
        first.name, "bytes", "header"
    )
    assert downloads(published) == [] and not (tmp_path / "out").exists()


def test_memory_figures_exist_here() -> None:
    from qwen3_ascend.files.memory import available_memory

    free = available_memory()
    assert free is None or free > tiny_models.DATA.stat().st_size
