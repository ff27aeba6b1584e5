"""Calibration on the device: what was written there is read back and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_ascend import ConvertOptions, convert_checkpoint

def test_x(tmp_path):
    manifest = convert_checkpoint("tests/data/tiny-qwen3", tmp_path/"out", "/tmp/calib/gptq8.yaml", ConvertOptions(calibration_tokens=1024, calibration_device="npu"))
    print(manifest.calibration)
