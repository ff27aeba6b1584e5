"""JSON files as other people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3_ascend.errors import ConfigError


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; ConfigError naming the file if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: this is not a Hugging Face model folder") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data
