"""Makes torchvision importable beside a CPU build of torch.

vllm-ascend imports transformers' image processors, which import torchvision. The wheel of the
registry is built against a CUDA build; beside another torch its library does not load, and then
torchvision's own Python registers kernels for two operators that nobody has defined. Importing this
module defines them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

OPERATORS = ("nms", "qnms")
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def loads() -> bool:
    """Whether torchvision's library fits this torch, or there is no torchvision at all."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        return False
    return True


if not loads():
    for name in OPERATORS:
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
