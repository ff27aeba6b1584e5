"""The compiled kernels; everything else about the package is in pyproject.toml.

The library is plain C that ctypes loads, so it carries no Python version: the file is called
_kernels.so and one wheel per platform serves every Python 3. It is optional: where no compiler
runs, the build warns and the package falls back to torch.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/qwen3_ascend/native/csrc")
# -O3 vectorizes the loops; contraction would let one processor round where another does not.
COMPILE = [
    "-std=c11", "-O3", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-fno-fast-math"
]  # fmt: skip


class BuildKernels(build_ext):
    """Name the file without Python's ABI tag, and export what the C sources export."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "qwen3_ascend.native._kernels",
            sources=sorted(map(str, SOURCES.glob("*.c"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            extra_compile_args=COMPILE,
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
