"""What the command line does about the libraries that it imports.

Some read settings from the environment, once, when they are imported, and offer no other way to say
it, so it is said here, before any of them is imported. What the user has set stays.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    # torch would import torch_npu by itself and fail with a traceback where CANN is not set up;
    # the NPU backend imports it when it is asked for, and says what is missing.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    # torch's threads would look for more work for milliseconds behind each of its operations, in
    # the way of the threads of our kernels; so they sleep, and are woken.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Their warnings about failed requests would stand between our lines about the same requests.
    "HF_HUB_VERBOSITY": "error",
    "MODELSCOPE_LOG_LEVEL": "ERROR",
    # ModelScope draws bars that no argument of its own turns off; ours say themselves when to show.
    "TQDM_DISABLE": "1",
}


def settle_libraries() -> None:
    """Sets what the user has not set."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def nothing_is_garbage() -> Iterator[None]:
    """For a block that imports and loads what stays until the process ends.

    Python looks for garbage whenever many objects are made, and goes through all of them. An import
    of torch makes half a million: a tenth of its time, and as much again whenever all are looked at
    later, which stops all threads; they are not either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
