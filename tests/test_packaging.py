"""What is installed is whole, and importing it costs nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qwen3_ascend
from qwen3_ascend import recipes

ROOT = Path(__file__).parent.parent
LINKED = ("convert", "runtime", "recipes")


def python(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints, run outside the repository."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd="/",
        timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", LINKED)
def test_links_are_folders(name: str) -> None:
    """A checkout without symbolic links has text files here, and builds a wheel without them."""
    facade = ROOT / "src" / "qwen3_ascend" / name
    assert facade.is_dir() and facade.resolve() == (ROOT / name).resolve()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves its traces beside the sources."""
    copy = tmp_path_factory.mktemp("checkout") / "tree"
    copy.mkdir()
    for path in sorted(ROOT.iterdir()):
        if path.is_file():
            shutil.copy(path, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*.o")
    for name in ("src", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    out = copy.parent / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--wheel-dir", out, copy], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("qwen3_ascend-*.whl")
    return found


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {"qwen3_ascend/py.typed"}
    for folder, place in [(ROOT / name, name) for name in LINKED] + [
        (ROOT / "src" / "qwen3_ascend" / "checkpoint", "checkpoint")
    ]:
        for path in [*folder.rglob("*.py"), *folder.rglob("*.yaml")]:
            expected.add(f"qwen3_ascend/{place}/{path.relative_to(folder).as_posix()}")
    assert expected <= held
    assert {f"qwen3_ascend/recipes/{name}.yaml" for name in recipes.names()} <= held
    assert not [name for name in held if name.startswith(("tests/", "convert/", "runtime/"))]


def test_the_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Unpacked at the front of the path, it hides the checkout that is installed."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "import sys, qwen3_ascend; from qwen3_ascend import recipes, Recipe\n"
        "assert qwen3_ascend.__file__.startswith(sys.argv[1]), qwen3_ascend.__file__\n"
        "print(*(Recipe.load(name).name for name in recipes.names()))"
    )
    out = python(script, str(tmp_path), PYTHONPATH=str(tmp_path))
    assert out.split() == recipes.names()


def test_importing_it_does_not_load_torch() -> None:
    heavy = "{'torch', 'numpy', 'huggingface_hub', 'tokenizers', 'transformers', 'click', 'yaml'}"
    assert python(f"import sys, qwen3_ascend; print({heavy} & set(sys.modules))") == "set()\n"


def test_public_names() -> None:
    names = {"load", "convert_checkpoint", "Recipe", "SamplingParams", "__version__"}
    names |= {"ConvertOptions", "Events", "UserError", "OptionError", "ConfigError", "SourceError"}
    names |= {"DamagedSourceError", "CheckpointError", "RecipeError", "RequestError", "DeviceError"}
    assert set(qwen3_ascend.__all__) == names == set(dir(qwen3_ascend))
    for name in names:
        assert getattr(qwen3_ascend, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qwen3_ascend.nothing
    for part in ("convert", "runtime", "recipes"):
        assert importlib.import_module(f"qwen3_ascend.{part}").__name__ == f"qwen3_ascend.{part}"


def test_the_console_script_is_declared(wheel: Path) -> None:
    (entry,) = [
        name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")
    ]
    text = zipfile.ZipFile(wheel).read(entry).decode()
    assert "qwen3-ascend = qwen3_ascend.cli:main" in text


def test_the_first_lines_of_the_readme(tiny_w8a8: Path) -> None:
    script = (
        "import sys; out = sys.argv[1]\n"
        "from qwen3_ascend import load\n"
        'print(load(out).generate(["What does river mean?"])[0].text)'
    )
    assert "stream of water" in python(script, str(tiny_w8a8))
