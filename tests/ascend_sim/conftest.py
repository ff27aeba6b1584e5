"""Installs the simulator before any test module here imports torch, or ignores them all.

`import torch` loads torch_npu by itself where that is installed, and torch_npu needs the stand-in
libraries then.  A conftest is the first thing pytest imports from a folder, so this is the place.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))  # so that `import ascend_sim` works under any import mode


def simulator_can_run() -> bool:
    installed = importlib.util.find_spec("torch_npu") is not None
    tools = shutil.which("gcc") and shutil.which("nm")
    real_cann = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    refused = os.environ.get("ASCEND_SIM") == "0"
    return bool(installed and tools and not real_cann and not refused)


collect_ignore_glob: list[str] = []
if simulator_can_run():
    import ascend_sim

    if not ascend_sim.installed() and "torch_npu" in sys.modules:
        collect_ignore_glob = ["test_*.py"]  # somebody loaded torch_npu without the simulator
    else:
        ascend_sim.install()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that have nothing to show in this mode of the simulator."""
    eager = os.environ.get("ASCEND_SIM_STREAMS", "eager") == "eager"
    queue = os.environ.get("TASK_QUEUE_ENABLE", "0") != "0"
    absent = {mark for mark, here in (("lazy_streams", eager), ("no_task_queue", queue)) if here}
    pointless = [item for item in items if absent & {mark.name for mark in item.iter_markers()}]
    if pointless:
        config.hook.pytest_deselected(items=pointless)
        items[:] = [item for item in items if item not in pointless]


if not collect_ignore_glob:

    @pytest.fixture(autouse=True)
    def clean_device() -> Iterator[None]:
        """Every test starts with an idle device, an empty trace and default switches."""
        import torch
        import torch_npu

        torch.manual_seed(0)
        torch_npu.npu.config.allow_internal_format = False
        torch.npu.synchronize()
        ascend_sim.reset_trace()
        yield
        ascend_sim.abandon_pending()
        ascend_sim.set_strict(True)
