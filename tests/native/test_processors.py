"""The same C sources on other processors and compilers give the same digests, and floats as near.

Each row needs a compiler that a machine may lack (Debian: clang, gcc-aarch64-linux-gnu with
libc6-dev-arm64-cross, qemu-user). A missing one is a skip; CI installs them all and accepts none.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen3_ascend.native import library

FOLDER = Path(library.__file__).parent / "csrc"
SOURCES = sorted(FOLDER.glob("*.c"))
FLAGS = ["-std=c11", "-ffp-contract=off"]
QEMU = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
BUILDS = {
    "gcc -O0": (["gcc", "-O0"], []),
    "gcc -O3": (["gcc", "-O3"], []),
    "clang -O3": (["clang", "-O3"], []),
    "aarch64 -O0": (["aarch64-linux-gnu-gcc", "-O0"], QEMU),
    "aarch64 -O3": (["aarch64-linux-gnu-gcc", "-O3"], QEMU),
}

pytestmark = pytest.mark.skipif(not SOURCES, reason="installed without the C sources")


@dataclass(frozen=True)
class Build:
    """The kernels by one compiler.

    Attributes:
        compiler: its command, with optimization.
        runner: what runs programs for another processor.
        objects: of the kernels.
    """

    compiler: list[str]
    runner: list[str]
    objects: list[Path]

    def program(self, name: str, folder: Path) -> list[str]:
        """What runs a program of this folder, built with the kernels."""
        source, program = Path(__file__).with_name(f"{name}.c"), str(folder / name)
        files = [str(source), *map(str, self.objects), "-lm", "-o", program]
        subprocess.run([*self.compiler, *FLAGS, f"-I{FOLDER}", *files], check=True)
        return [*self.runner, program]


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The kernels are compiled once for all programs; skips what cannot be."""
    compiler, runner = BUILDS[request.param]
    for tool in (compiler[0], *runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    folder = tmp_path_factory.mktemp("objects")
    subprocess.run([*compiler, *FLAGS, "-c", *SOURCES], cwd=folder, check=True)
    return Build(compiler, runner, sorted(folder.glob("*.o")))


def test_digests_are_equal_everywhere(tmp_path: Path, build: Build) -> None:
    program = build.program("digest", tmp_path)
    expected = Path(__file__).with_name("digests.txt").read_text()
    for path in library.PATHS.values():
        done = subprocess.run([*program, str(path)], capture_output=True, text=True)
        assert done.returncode in (0, 77), done.stderr
        assert done.stdout == ("" if done.returncode == 77 else expected)


def test_a_layer_is_as_exact_everywhere(tmp_path: Path, build: Build) -> None:
    program = build.program("layer_check", tmp_path)
    ran = 0
    for path in library.PATHS.values():
        done = subprocess.run([*program, str(path)], capture_output=True, text=True)
        assert (done.returncode in (0, 77), done.stdout) == (True, "")
        ran += done.returncode == 0
    assert ran


def test_products_are_exact_everywhere(tmp_path: Path, build: Build) -> None:
    """Of whole numbers, by every set of instructions that there is: dotprod among them, in qemu."""
    program = build.program("products_check", tmp_path)
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    ran = set(done.stdout.splitlines())
    assert {"int8 0", "floats 0"} < ran
    assert not build.runner or "int8 4" in ran
