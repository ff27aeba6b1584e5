"""Builds the libraries that stand in for CANN, once, with gcc alone.

    python -m ascend_sim.build        # prints the folder

torch_npu's wheel is linked against libraries that only an Ascend machine has.  This module reads
from the wheel which symbols those are and writes, into a cache folder:

- libascendcl.so: the simulated runtime (csrc/), and for every other C symbol the wheel needs a
  stub: runtime calls fail loudly, logging and profiling calls do nothing;
- libopapi.so: both phases of every aclnn operator the wheel can ask for;
- libatb.so: the class symbols of ATB, enough to load the wheel's ATB library (the operators
  themselves are replaced at the dispatcher, see doors/atb.py);
- the other libraries the wheel names: empty.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
OTHER_LIBRARIES = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libnnopbase.so",
)
# Looked up by name at run time, so nm does not list them.  Their effect does not exist here.
ACCEPTED = (
    "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut",
    "aclrtSetOpWaitTimeout",
    "aclrtSetStreamOverflowSwitch",
    "aclrtSetStreamAttribute",
    "aclSetCompileopt",
    "aclrtCtxSetSysParamOpt",
    "aclrtSetSysParamOpt",
)
# A C signature of integers, pointers and at most eight floating arguments arrives, in order, as
# this many 64-bit integers and eight doubles: the calling convention of x86-64 and aarch64 Linux.
MAX_INTEGERS = 80


def libraries() -> Path:
    """The folder with the built libraries; builds them when they are missing or stale."""
    folder = cache_folder() / build_key()
    if not (folder / "complete").exists():
        build_into(folder)
    return folder


def cache_folder() -> Path:
    if os.environ.get("ASCEND_SIM_CACHE"):
        return Path(os.environ["ASCEND_SIM_CACHE"])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "qwen3-ascend" / "ascend_sim"


def build_key() -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.iterdir(), Path(__file__)]):
        digest.update(source.read_bytes())
    versions = (importlib.metadata.version("torch_npu"), sys.version, platform.machine())
    digest.update(repr(versions).encode())
    return digest.hexdigest()[:16]


def build_into(folder: Path) -> None:
    """Builds beside the final place and renames, so that concurrent builds cannot collide."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="build-"))
    try:
        _build(temporary, Path(sysconfig.get_paths()["purelib"]))
        (temporary / "complete").touch()
        temporary.rename(folder)
    except OSError:
        if not (folder / "complete").exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(out: Path, site: Path) -> None:
    wheel = site / "torch_npu"
    headers = next(path for path in _header_folders(wheel) if (path / "acl/acl.h").exists())
    needed = _needed_symbols(wheel, site / "torch")
    atb_symbols = {name for name in needed if "3atb" in name}
    runtime_sources = sorted(SOURCES.glob("*.c"))

    # Linked twice: the first link shows which symbols the runtime itself defines.
    _compile(runtime_sources, out / "libascendcl.so", headers)
    defined = _symbols(out / "libascendcl.so", "--defined-only")
    stubs = {name for name in needed if not name.startswith(("_", "Py"))} | set(ACCEPTED)
    (out / "stubs.c").write_text(_stub_source(sorted(stubs - defined)))
    _compile([*runtime_sources, out / "stubs.c"], out / "libascendcl.so", headers)

    binary = (wheel / "lib/libtorch_npu.so").read_bytes()
    (out / "opapi.c").write_text(_operator_source(binary))
    # A thousand functions of 88 arguments: optimising them costs ten seconds and gains nothing.
    _compile([out / "opapi.c"], out / "libopapi.so", headers, "-lascendcl", "-O0")
    (out / "atb.c").write_text(_atb_source(sorted(atb_symbols)))
    _compile([out / "atb.c"], out / "libatb.so", headers)
    (out / "empty.c").write_text("")
    for library in OTHER_LIBRARIES:
        _compile([out / "empty.c"], out / library, headers, "-lascendcl")


def _header_folders(wheel: Path) -> tuple[Path, ...]:
    """Where wheels keep the headers of CANN: 2.13, and 2.10 and older."""
    return wheel / "include", wheel / "include/third_party/acl/inc"


def _compile(sources: Iterable[Path], library: Path, headers: Path, *links: str) -> None:
    command = ["gcc", "-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += ["-Dconstexpr=static const"]  # headers of 2.8 and 2.9 are C++ in this one word
    command += [f"-I{headers}", f"-Wl,-soname,{library.name}", "-o", str(library)]
    command += [str(source) for source in sources]
    command += [f"-L{library.parent}", "-Wl,--no-as-needed", *links, "-lpthread"]
    subprocess.run(command, check=True)


def _symbols(library: Path, which: str) -> set[str]:
    command = ["nm", "-D", which, str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines() if line.strip()}


def _strictly_undefined(library: Path) -> set[str]:
    """Undefined symbols without a version: those with one belong to the C and C++ libraries."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = [line.split() for line in listing.splitlines() if line.strip()]
    return {line[-1] for line in words if line[-2] == "U" and "@" not in line[-1]}


def _needed_symbols(wheel: Path, torch: Path) -> set[str]:
    own = [next(wheel.glob("_C.*.so")), *(wheel / "lib").glob("*.so")]
    needed = set().union(*(_strictly_undefined(library) for library in own))
    for library in [*own, *(torch / "lib").glob("*.so*")]:
        needed -= _symbols(library, "--defined-only")
    process = ctypes.CDLL(None)
    return {name for name in needed if not hasattr(process, name)}


def _stub_source(names: list[str]) -> str:
    """A runtime call that we do not simulate must not pretend to have worked."""
    lines = [
        "#include <stdio.h>",
        '#define API __attribute__((visibility("default")))',
        "#define QUIET(name) API long name(void) { return 0; }",
        "#define REFUSE(name) API long name(void) { \\",
        '    fprintf(stderr, "ascend_sim: %s is not simulated\\n", #name); return 207000; }',
    ]
    for name in names:
        refused = name.startswith(("aclrt", "rt")) and name not in ACCEPTED
        lines.append(f"{'REFUSE' if refused else 'QUIET'}({name})")
    return "\n".join(lines) + "\n"


def _operator_source(binary: bytes) -> str:
    def names(suffix: bytes) -> list[str]:
        # The zero at the end of a name may be the one before the next.
        found = re.findall(rb"\0(aclnn[A-Z][A-Za-z0-9]*)" + suffix + rb"(?=\0)", binary)
        return sorted({name.decode() for name in found})

    integers = ", ".join(f"int64_t i{n}" for n in range(MAX_INTEGERS))
    doubles = ", ".join(f"double d{n}" for n in range(8))
    body = (
        f"int64_t i[] = {{{', '.join(f'i{n}' for n in range(MAX_INTEGERS))}}}; "
        f"double d[] = {{{', '.join(f'd{n}' for n in range(8))}}};"
    )
    operators = names(b"GetWorkspaceSize")
    lines = [
        "#include <stdint.h>",
        '#define API __attribute__((visibility("default")))',
        "extern int sim_plan(int, const char *, int, const int64_t *, const double *);",
        "extern int sim_launch_planned(void *, const char *, void *, void *, uint64_t);",
        "#define PLAN(number, name, phase, only_workspace) \\",
        f"    API int name##phase({integers}, {doubles}) \\",
        f"    {{ {body} return sim_plan(number, #name, only_workspace, i, d); }}",
        "#define LAUNCH(name) API int name(void *w, uint64_t n, void *executor, void *stream) \\",
        "    { return sim_launch_planned(stream, #name, executor, w, n); }",
    ]
    for number, name in enumerate(operators):
        lines += [f"PLAN({number}, {name}, GetWorkspaceSize, 0)", f"LAUNCH({name})"]
    for name in names(b"GetMaxWorkspaceSize"):
        lines.append(f"PLAN({operators.index(name)}, {name}, GetMaxWorkspaceSize, 1)")
    listed = ", ".join(f'"{name}"' for name in operators)
    lines.append(f"API const char *sim_operator_names[] = {{{listed}, 0}};")
    return "\n".join(lines) + "\n"


def _atb_source(symbols: list[str]) -> str:
    lines = ["#include <stdio.h>"]
    for number, symbol in enumerate(symbols):
        lines += [
            f'__attribute__((visibility("default"))) long atb_{number}(void) __asm__("{symbol}");',
            f"long atb_{number}(void)",
            f'{{ fprintf(stderr, "ascend_sim: {symbol} is not simulated\\n"); return 1; }}',
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(libraries())
