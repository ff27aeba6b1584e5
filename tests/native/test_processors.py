"""The same C sources on other processors and compilers give the same digests, and floats as near.

Each row needs a compiler that a machine may lack (Debian: clang, gcc-aarch64-linux-gnu with
libc6-dev-arm64-cross, qemu-user). A missing one is a skip; CI installs them all and accepts none.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qwen3_ascend.native import library

SOURCES = sorted((Path(library.__file__).parent / "csrc").glob("*.c"))
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


def compile_program(name: str, build: str, folder: Path) -> list[str | Path]:
    """What runs a program of this folder, built with the kernels; skips what cannot be."""
    compiler, runner = BUILDS[build]
    for tool in (compiler[0], *runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    source, program = Path(__file__).with_name(f"{name}.c"), folder / name
    include = f"-I{SOURCES[0].parent}"
    subprocess.run([*compiler, *FLAGS, include, source, *SOURCES, "-lm", "-o", program], check=True)
    return [*runner, program]


@pytest.mark.parametrize("build", BUILDS)
def test_digests_are_equal_everywhere(tmp_path: Path, build: str) -> None:
    program = compile_program("digest", build, tmp_path)
    expected = Path(__file__).with_name("digests.txt").read_text()
    for path in library.PATHS.values():
        done = subprocess.run([*program, str(path)], capture_output=True, text=True)
        assert done.returncode in (0, 77), done.stderr
        assert done.stdout == ("" if done.returncode == 77 else expected)


@pytest.mark.parametrize("build", BUILDS)
def test_a_layer_is_as_exact_everywhere(tmp_path: Path, build: str) -> None:
    program = compile_program("layer_check", build, tmp_path)
    ran = 0
    for path in library.PATHS.values():
        done = subprocess.run([*program, str(path)], capture_output=True, text=True)
        assert (done.returncode in (0, 77), done.stdout) == (True, "")
        ran += done.returncode == 0
    assert ran


@pytest.mark.parametrize("build", BUILDS)
def test_products_are_exact_everywhere(tmp_path: Path, build: str) -> None:
    """Of whole numbers, by every set of instructions that there is: dotprod among them, in qemu."""
    program = compile_program("products_check", build, tmp_path)
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    ran = set(done.stdout.splitlines())
    assert {"int8 0", "floats 0"} < ran
    assert "aarch64" not in build or "int8 4" in ran
