"""These tests need engines with environments of their own: see `make handover-2.10`."""

from __future__ import annotations

from handover.engine import PYTHON

collect_ignore = [] if PYTHON else ["test_vllm_ascend.py"]
