"""README.md of an export: what it is, how it was made, and what loads it."""

from __future__ import annotations

from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.convert.export.formats import Format
from qwen3_ascend.convert.export.record import RECORD_NAME
from qwen3_ascend.version import __version__

TEXT = """---
base_model: {repo}
tags: [qwen3, {format}, {recipe}]
---

# {repo}, {recipe}, {title}

Written by qwen3-ascend {version} from `{repo}`{revision}, quantized with the recipe `{recipe}`:

    qwen3-ascend convert {repo} OUT --recipe {recipe}
    qwen3-ascend export OUT . --format {format}

{usage}
`{record}` holds a BLAKE3 hash of every byte; `qwen3-ascend verify .` checks them.
"""


def model_card(manifest: Manifest, made: Format) -> bytes:
    """README.md of an export of a checkpoint; it names nothing of the machine it was made on."""
    source = manifest.source
    return TEXT.format(
        repo=source.repo,
        revision=f" at commit {source.revision}" if source.revision else "",
        recipe=manifest.recipe["name"],
        version=__version__,
        format=made.name,
        title=made.title,
        usage=made.usage,
        record=RECORD_NAME,
    ).encode()
