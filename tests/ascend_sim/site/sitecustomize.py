"""Installs the simulator as soon as Python starts, when ASCEND_SIM_EVERYWHERE=1.

Python imports this module by itself when its folder is on PYTHONPATH. Engines inspect models and
run workers in processes of their own, which inherit the environment and nothing else.
ASCEND_SIM_THEN names a module to import next.
"""

import importlib
import os

if os.environ.get("ASCEND_SIM_EVERYWHERE") == "1":
    import ascend_sim

    ascend_sim.install()
    if os.environ.get("ASCEND_SIM_THEN"):
        importlib.import_module(os.environ["ASCEND_SIM_THEN"])
