"""What other libraries read from the environment, once, when they are imported.

They offer no other way to say it, so the command line says it here, before it imports any of them.
What the user has set stays.
"""

from __future__ import annotations

import os

SETTINGS = {
    # torch would import torch_npu by itself and fail with a traceback where CANN is not set up;
    # the NPU backend imports it when it is asked for, and says what is missing.
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
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
