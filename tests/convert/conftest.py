"""A model of several files, what becomes of it, and a hub that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import run
from support.folders import finished_weights
from support.hub_client import REPO, big_model, talk_to
from support.hub_server import HubServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three files; a module may put another in its place. Not to be changed."""
    return big_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def sound(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights that a conversion of `folder` makes without a network."""
    out = tmp_path_factory.mktemp("sound") / "out"
    assert run("convert", folder, out, "--quiet").code == 0
    return finished_weights(out)


@pytest.fixture
def published(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """A hub with `folder` as REPO, to which the client of this process talks."""
    hub.add_model(REPO, folder)
    talk_to(hub, tmp_path / "cache", monkeypatch)
    return hub
