"""Tests of the NPU backend: real torch_npu on a simulated device.

They run in an environment of their own (`make simulated`), where torch_npu is installed. In the
plain environment it is not, and this folder is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import ascend_sim

    ascend_sim.install()  # before anything touches torch_npu

TINY_MODEL = Path(__file__).parent.parent / "data" / "tiny-qwen3"


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """Every test begins with an empty trace and ends with an idle device."""
    import torch_npu

    torch_npu.npu.synchronize()
    ascend_sim.reset_trace()
    yield
    ascend_sim.abandon_pending()


@pytest.fixture(autouse=True, scope="session")
def torch_on_the_cpu() -> Iterator[None]:
    """The CPU that the device is held against computes by torch's operators, in whose order the
    simulated device adds up too (ascend_sim/README.md, "The order of float sums"): so their floats
    are equal, and any other difference is a fault. The compiled operations of a layer are held
    against the same definition in tests/runtime and tests/native."""
    from qwen3_ascend import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "layer_kernels", lambda: None)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model converted with each recipe."""
    from support.int4_recipes import w4a16_recipe
    from support.static_inputs import write_static

    from qwen3_ascend import convert_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    for recipe in ("w8a8", "w8a8-plain", "bf16", "w8a16", "w4a16-plain", "w4a8-plain"):
        convert_checkpoint(TINY_MODEL, root / recipe, recipe)
    zero_points = w4a16_recipe(64, zero_points=True)
    convert_checkpoint(TINY_MODEL, root / "w4a16-zero-points", zero_points)
    write_static(TINY_MODEL, root / "w8a8-static")
    return {folder.name: folder for folder in root.iterdir()}
