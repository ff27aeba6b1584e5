"""Models by their Hub id: the real client against a local Hub.

Programs of their own show that the variables of a user's environment reach the client; they take
seconds each, so the rest is done in this process, where the same settings are put into its client.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support import tiny_models
from support.command_line import Run, program, run
from support.hub_client import talk_to
from support.hub_server import Fault, HubServer
from support.quantized_sources import write_ascendv1

from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.verify import verify

REPO = "Qwen/Qwen3-Tiny"


@dataclass
class Client:
    """Runs `convert` as a user of the local Hub would; as a program, or in this process."""

    hub: HubServer
    folder: Path
    patch: pytest.MonkeyPatch
    token: str = ""
    offline: bool = False
    as_program: bool = False

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def convert(self, *options: str, repo: str = REPO) -> Run:
        cache = self.folder / "cache"
        if self.as_program:
            environment = self.hub.environment(cache, self.token)
            environment["HF_HUB_OFFLINE"] = "1" if self.offline else "0"
            return program(
                "convert", repo, self.out, *options, environment=environment, cwd=self.folder
            )
        talk_to(self.hub, cache, self.patch)
        self.patch.setenv("HF_TOKEN", self.token)
        self.patch.setattr(constants, "HF_HUB_OFFLINE", self.offline)
        return run("convert", repo, self.out, *options)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(hub, tmp_path, monkeypatch)


def model(folder: Path, seed: int = 0, shards: int = 1, **changes: object) -> Path:
    data = tiny_models.config(**changes)
    return tiny_models.write(folder, data, tiny_models.tensors(data, seed), shards=shards)


def big_model(folder: Path, shards: int = 1) -> Path:
    """Weights of some megabytes: a client reads a header with one small range."""
    return model(folder, shards=shards, hidden_size=256, intermediate_size=1024)


def weight_bytes_sent(hub: HubServer) -> int:
    return sum(request.sent for request in hub.seen("*.safetensors", "GET"))


def test_convert_by_id(client: Client, tmp_path: Path) -> None:
    client.as_program = True
    folder = model(tmp_path / "source")
    commit = client.hub.add_model(REPO, folder)
    done = client.convert()
    assert done.code == 0, done.err
    assert verify(client.out).ok
    source = Manifest.read(client.out).source
    assert (source.repo, source.revision) == (REPO, commit)
    raw = (folder / "model.safetensors").read_bytes()
    assert source.files["model.safetensors"].sha256 == hashlib.sha256(raw).hexdigest()
    assert source.files["model.safetensors"].size == len(raw)
    for name in tiny_models.TOKENIZER_FILES:
        assert (client.out / name).read_bytes() == (folder / name).read_bytes()
    assert commit in (client.out / "README.md").read_text()


def test_the_same_bytes_as_from_the_folder(client: Client, tmp_path: Path) -> None:
    folder = model(tmp_path / "source", shards=3)
    client.hub.add_model(REPO, folder)
    assert client.convert("--quiet").err == ""
    local = run("convert", folder, tmp_path / "local")
    assert local.code == 0, local.err
    ours, theirs = Manifest.read(client.out), Manifest.read(tmp_path / "local")
    assert ours.stored() == theirs.stored()
    assert ours.linears == theirs.linears
    assert {name: file.size for name, file in ours.source.files.items()} == {
        name: file.size for name, file in theirs.source.files.items()
    }
    assert {name: file.sha256 for name, file in ours.source.files.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def test_revisions(client: Client, tmp_path: Path) -> None:
    hub, main = client.hub, model(tmp_path / "main")
    first = hub.add_model(REPO, main, revisions={"dev": model(tmp_path / "dev", seed=1)})
    hub.add_revision(REPO, "v1", model(tmp_path / "v1", seed=2), tag=True)
    moved = hub.add_revision(REPO, "main", model(tmp_path / "newer", seed=3))
    expected = {"dev": 1, "v1": 2, first: 0, "main": 3}
    for revision, seed in expected.items():
        done = client.convert("--revision", revision, "--overwrite", "--recipe", "bf16")
        assert done.code == 0, done.err
        weights = tiny_models.tensors(tiny_models.config(), seed)
        stored = CheckpointReader(client.out).tensor("model.embed_tokens.weight")
        assert torch.equal(stored, weights["model.embed_tokens.weight"]), revision
    assert Manifest.read(client.out).source.revision == moved != first


def test_dry_run_reads_headers_only(client: Client, tmp_path: Path) -> None:
    folder = big_model(tmp_path / "source", shards=2)
    client.hub.add_model(REPO, folder)
    done = client.convert("--dry-run", "--json")
    assert done.code == 0, done.err
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert json.loads(done.out)["source_bytes"] > 0.99 * total - 20_000
    requests = client.hub.seen("*.safetensors", "GET")
    assert requests and all(r.range for r in requests if r.sent), "a whole file was asked for"
    assert 0 < weight_bytes_sent(client.hub) < total / 4
    assert not client.out.exists()
    assert not client.hub.seen("*/tokenizer.json", "GET")


def test_convert_downloads_every_weight_once(client: Client, tmp_path: Path) -> None:
    folder = big_model(tmp_path / "source", shards=2)
    client.hub.add_model(REPO, folder)
    assert client.convert().code == 0
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert total <= weight_bytes_sent(client.hub) < 1.25 * total
    client.hub.forget()
    assert client.convert("--overwrite").code == 0
    assert weight_bytes_sent(client.hub) == 0


def test_what_the_hub_does_not_have(client: Client, tmp_path: Path) -> None:
    client.hub.add_model(REPO, model(tmp_path / "source"))
    client.convert(repo="Qwen/Qwen3-Missing").one_line_error("no model Qwen/Qwen3-Missing")
    client.convert("--revision", "nope").one_line_error(REPO, "no revision 'nope'")
    client.convert(repo="Qwen/--x").one_line_error("Qwen/--x")
    assert not client.out.exists()


def test_a_model_without_weights(client: Client, tmp_path: Path) -> None:
    folder = model(tmp_path / "source")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    client.hub.add_model(REPO, folder)
    client.convert().one_line_error(REPO, "pickled")
    (folder / "pytorch_model.bin").unlink()
    client.hub.add_model(REPO, folder)
    client.convert().one_line_error(REPO, "no weights")


def test_gated_and_private(client: Client, tmp_path: Path) -> None:
    folder = model(tmp_path / "source")
    client.hub.add_model(REPO, folder, gated=True)
    client.hub.add_model("me/private", folder, private=True)
    client.convert().one_line_error(REPO, "gated", "HF_TOKEN")
    client.convert(repo="me/private").one_line_error("me/private", "HF_TOKEN")
    assert not client.out.exists()
    client.hub.add_token("hf_good", REPO, "me/private")
    client.token = "hf_good"
    assert client.convert().code == 0
    client.as_program = True
    assert client.convert("--overwrite", repo="me/private").code == 0
    assert Manifest.read(client.out).source.repo == "me/private"


@pytest.mark.parametrize("revision", [(), ("--revision", "v1")], ids=["main", "tag"])
def test_offline_after_a_first_conversion(
    client: Client, tmp_path: Path, revision: Sequence[str]
) -> None:
    hub = client.hub
    commit = hub.add_model(REPO, model(tmp_path / "source", shards=2))
    hub.add_revision(REPO, "v1", tmp_path / "source", tag=True)
    assert client.convert(*revision).code == 0
    first = Manifest.read(client.out)
    hub.forget()
    client.offline, client.as_program = True, not revision
    done = client.convert("--overwrite", *revision)
    assert done.code == 0, done.err
    assert hub.requests == []
    again = Manifest.read(client.out)
    assert again.source == first.source and again.source.revision == commit
    assert again.stored() == first.stored()


def test_server_gone_after_a_first_conversion(client: Client, tmp_path: Path) -> None:
    with HubServer() as hub:
        commit = hub.add_model(REPO, model(tmp_path / "source"))
        client.hub = hub
        assert client.convert().code == 0
    done = client.convert("--overwrite")
    assert done.code == 0, done.err
    assert "cache" in done.err
    assert Manifest.read(client.out).source.revision == commit


def test_offline_without_a_cache(client: Client, tmp_path: Path) -> None:
    client.hub.add_model(REPO, model(tmp_path / "source"))
    client.offline = True
    client.convert("--quiet").one_line_error(REPO, "not in the local cache")
    assert not client.out.exists() and client.hub.requests == []


def test_offline_with_a_quantized_model(client: Client, tmp_path: Path) -> None:
    """Its index and description have names of their own; without one of them it is not whole."""
    source = write_ascendv1(tmp_path / "source")
    client.hub.add_model(REPO, source)
    assert client.convert().code == 0
    client.offline = True
    done = client.convert("--overwrite")
    assert done.code == 0, done.err
    shard = next((tmp_path / "cache").rglob("quant_model_weights-00001-of-00001.safetensors"))
    shard.resolve().unlink()
    shard.unlink()
    client.convert("--quiet", "--overwrite").one_line_error("in part", shard.name)


def test_a_cache_that_lacks_a_shard(client: Client, tmp_path: Path) -> None:
    client.hub.add_model(REPO, model(tmp_path / "source", shards=2))
    assert client.convert().code == 0
    shard = next((tmp_path / "cache").rglob("model-00002-of-00002.safetensors"))
    shard.resolve().unlink()
    shard.unlink()
    client.offline = True
    client.convert("--quiet", "--overwrite").one_line_error("model-00002-of-00002.safetensors")
    assert verify(client.out).ok


def test_a_corrupted_download_is_refused(client: Client, tmp_path: Path) -> None:
    folder = big_model(tmp_path / "source")
    client.hub.add_model(REPO, folder)
    middle = (folder / "model.safetensors").stat().st_size // 2
    client.hub.inject(Fault("corrupt", "/cdn/*/model.safetensors", times=None, offset=middle))
    client.convert("--quiet").one_line_error("model.safetensors", "SHA-256")
    assert not client.out.exists()


def test_a_refused_download(client: Client, tmp_path: Path) -> None:
    client.hub.add_model(REPO, model(tmp_path / "source"))
    client.hub.inject(Fault("status", "*/model.safetensors", times=None, status=403))
    client.convert("--quiet", "--retries", "1").one_line_error(REPO, "cannot fetch")
    assert not client.out.exists()


def test_a_tied_model_may_hold_the_output_projection_twice(client: Client, tmp_path: Path) -> None:
    data = tiny_models.config(tie_word_embeddings=True)
    weights = tiny_models.tensors(data)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    client.hub.add_model(REPO, tiny_models.write(tmp_path / "source", data, weights))
    done = client.convert("--recipe", "w8a8-plain")
    assert done.code == 0, done.err
    manifest = Manifest.read(client.out)
    assert list(manifest.source.ignored) == ["lm_head.weight"]
    assert "lm_head" not in manifest.linears and "lm_head.weight" not in manifest.stored()


def test_names_that_lead_out_of_a_folder(client: Client, tmp_path: Path) -> None:
    extra = {"../evil.json": b"{}", "sub/config.json": b"{}", "a\\b.json": b"{}"}
    client.hub.add_model(REPO, model(tmp_path / "source"), extra=extra)
    assert client.convert().code == 0
    assert not list(tmp_path.rglob("evil.json"))


def test_output_named_like_the_model(client: Client, tmp_path: Path) -> None:
    """`convert Qwen/Qwen3-Tiny Qwen/Qwen3-Tiny` is no conversion of a folder into itself."""
    client.hub.add_model(REPO, model(tmp_path / "source"))
    environment = client.hub.environment(tmp_path / "cache")
    done = program("convert", REPO, REPO, environment=environment, cwd=tmp_path)
    assert done.code == 0, done.err
    assert verify(tmp_path / REPO).ok


def test_an_unsupported_model_costs_no_header(client: Client, tmp_path: Path) -> None:
    folder = model(tmp_path / "source", shards=3)
    plain = json.loads((folder / "config.json").read_text())
    for changes, mention in (
        ({"model_type": "qwen3_next"}, "qwen3_next"),
        ({"is_causal": False}, "is_causal"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "classifier"),
    ):
        (folder / "config.json").write_text(json.dumps({**plain, **changes}))
        client.hub.add_model(REPO, folder)
        client.convert().one_line_error("config.json", mention)
    assert client.hub.seen("*.safetensors") == []


def tied_model(folder: Path, row: int | None) -> Path:
    """A tied model of some megabytes with a head beside the embedding; one row of it differs."""
    data = tiny_models.config(
        tie_word_embeddings=True, vocab_size=8192, hidden_size=256, num_hidden_layers=1
    )
    weights = tiny_models.tensors(data)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if row is not None:
        weights["lm_head.weight"][row] += 1
    return tiny_models.write(folder, data, weights)


@pytest.mark.parametrize("low_disk", [True, False])
def test_a_head_that_is_the_embedding_on_a_hub(
    client: Client, tmp_path: Path, low_disk: bool
) -> None:
    client.hub.add_model(REPO, tied_model(tmp_path / "source", None))
    done = client.convert("--recipe", "w8a8-plain", *(["--low-disk"] if low_disk else []))
    assert done.code == 0, done.err
    assert "lm_head" not in Manifest.read(client.out).linears


def test_a_head_of_its_own_on_a_hub(client: Client, tmp_path: Path) -> None:
    """The last row, where vocabularies are extended, is among the samples."""
    client.hub.add_model(REPO, tied_model(tmp_path / "source", 8191))
    assert client.convert("--dry-run").code == 0
    assert weight_bytes_sent(client.hub) < 3 << 20
    done = client.convert("--recipe", "bf16")
    assert done.code == 0 and "it is kept" in done.err, done.err
    assert "lm_head" in Manifest.read(client.out).linears


def test_a_head_that_differs_between_the_samples(client: Client, tmp_path: Path) -> None:
    client.hub.add_model(REPO, tied_model(tmp_path / "source", 1000))
    done = client.convert("--quiet")
    done.one_line_error("lm_head.weight", "differ", "download the model")
    assert not client.out.exists()


def test_named_templates_of_a_hub(client: Client, tmp_path: Path) -> None:
    folder, name = model(tmp_path / "source"), "additional_chat_templates/tool_use.jinja"
    (folder / name).parent.mkdir()
    (folder / name).write_text("TOOLS")
    client.hub.add_model(REPO, folder)
    assert client.convert().code == 0
    assert (client.out / name).read_text() == "TOOLS" and verify(client.out).ok
    client.offline = True
    assert client.convert("--overwrite").code == 0
    assert (client.out / name).read_text() == "TOOLS"


def test_the_same_conversion_again_from_a_hub(client: Client, tmp_path: Path) -> None:
    client.hub.add_model(REPO, model(tmp_path / "source"))
    assert client.convert().code == 0
    client.hub.forget()
    done = client.convert()
    assert done.code == 0 and "nothing to do" in done.err
    assert weight_bytes_sent(client.hub) == 0
    client.hub.add_model(REPO, model(tmp_path / "source", seed=1))
    client.convert("--quiet").one_line_error("not empty", "revision")


def test_a_token_that_the_hub_does_not_accept(client: Client, tmp_path: Path) -> None:
    """Also for a public model, and without a look into the cache: it is the token's fault."""
    client.hub.add_model(REPO, model(tmp_path / "source"))
    client.token = "hf_expired"
    client.convert("--quiet").one_line_error("token", "expired", "HF_TOKEN")
