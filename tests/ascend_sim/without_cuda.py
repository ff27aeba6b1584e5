"""Makes a CUDA build of torch importable without NVIDIA's libraries, which are gigabytes.

    python tests/ascend_sim/without_cuda.py requirements    # what pip has to add, one a line
    python tests/ascend_sim/without_cuda.py libraries       # writes stand-ins into torch/lib

The registry has torch 2.8 to 2.10 for Linux only as CUDA builds. They import without a card, but
not without the libraries that they are linked to. Each stand-in has the names that torch's own
libraries ask of it; every call answers "no device", as the driver does on a machine without a card.
Torch itself stays as it is. Neither command imports torch.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PROJECT = "qwen3-ascend"
NOT_NEEDED = re.compile(r"(torch|triton|nvidia-|cuda-)")
NAMES = re.compile(r"(cu|nccl|nv|__cuda)")
LINKED = re.compile(r"\(NEEDED\).*\[(lib(?:cu|nv|nccl)[^\]]*)\]")
NO_DEVICE = 100
"""cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE of the driver."""


def requirements() -> list[str]:
    """What torch and the project ask for, less torch and what only a card needs."""
    asked = [
        line
        for name in ("torch", PROJECT)
        for line in importlib.metadata.requires(name) or ()
        if "extra ==" not in line and not NOT_NEEDED.match(line)
    ]
    return sorted(set(asked))


def write_libraries(torch: Path) -> None:
    """Writes each library that torch/lib is linked to and that is not there."""
    folder = torch / "lib"
    binaries = sorted((*folder.glob("*.so*"), *torch.glob("_C*.so")))
    linked = {name for binary in binaries for name in LINKED.findall(_readelf(binary))}
    missing = sorted(name for name in linked if not (folder / name).exists())
    asked = _asked(binaries)
    loose = asked.pop("", set())
    for name in missing:
        # Names without a version may come from any library; that of the runtime is always there.
        names = asked.get(_version_of(name), set()) | (loose if "cudart" in name else set())
        _compile(folder / name, _version_of(name), sorted(names))


def _version_of(library: str) -> str:
    """The version of a library's symbols, which is its name with one exception."""
    return "NVSHMEM" if library.startswith("libnvshmem") else library


def _readelf(binary: Path) -> str:
    command = ["readelf", "--dynamic", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _symbols(binary: Path, which: str) -> Iterator[tuple[str, str]]:
    """The names of a binary with their versions, which may be empty."""
    command = ["nm", "-D", which, str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        name, _, version = line.split()[-1].partition("@")
        yield name, version.lstrip("@")


def _asked(binaries: list[Path]) -> dict[str, set[str]]:
    """By version, the names that none of the binaries defines."""
    defined = {name for binary in binaries for name, _ in _symbols(binary, "--defined-only")}
    found: dict[str, set[str]] = defaultdict(set)
    for binary in binaries:
        for name, version in _symbols(binary, "--undefined-only"):
            if name not in defined and NAMES.match(name):
                found[version].add(name)
    return found


def _compile(library: Path, version: str, names: list[str]) -> None:
    answers = [(name, 0 if name.startswith("__") else NO_DEVICE) for name in names]
    lines = [f"long {name}(void) {{ return {answer}; }}" for name, answer in answers]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder) / "stub.c", Path(folder) / "versions"
        source.write_text("\n".join(lines) + "\n")
        script.write_text(f"{version} {{ global: *; }};\n")
        command = ["gcc", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{library.name}"]
        command += [f"-Wl,--version-script={script}", "-o", str(library), str(source)]
        subprocess.run(command, check=True)


def main() -> None:
    """See the module docstring."""
    if sys.argv[1:] == ["requirements"]:
        print("\n".join(requirements()))
    elif sys.argv[1:] == ["libraries"]:
        write_libraries(Path(sysconfig.get_paths()["purelib"]) / "torch")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
