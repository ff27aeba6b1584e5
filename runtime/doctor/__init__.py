"""`qwen3-ascend doctor`: what a stranger with a card runs first.

It says what this machine offers, examines every layout and operator, generates in every mode, and
measures them. It confirms what could only be simulated, so each finding is a Check, and a crash of
one is a finding like others: the rest goes on. Without a card it says what is missing.
"""

from __future__ import annotations

from qwen3_ascend.runtime.doctor.examination import run
from qwen3_ascend.runtime.doctor.report import Check, Report, Speed

__all__ = ["Check", "Report", "Speed", "run"]
