"""Which kernel of attention decodes, and how captured steps learn the context lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3_ascend.errors import OptionError
from qwen3_ascend.runtime.backends.npu.capabilities import Capabilities
from qwen3_ascend.runtime.backends.npu.graph_updates import Support
from qwen3_ascend.runtime.options import DeviceOptions

Lengths = Literal["bound", "dispatched", "masked"]
"""Calls bound at capture and issued again; the same by `NPUGraph.update`; lengths of the capture
and a mask on the device."""


@dataclass(frozen=True)
class Decoding:
    """How decode steps are computed.

    Attributes:
        attention: the kernel, "fused" or "paged".
        attention_reason: why it was taken; empty if it was asked for.
        lengths: how graphs learn the context lengths; None if nothing is captured.
        lengths_reason: why no better way was taken, or none at all; empty for the best.
    """

    attention: str
    attention_reason: str
    lengths: Lengths | None
    lengths_reason: str


def choose_decoding(options: DeviceOptions, capabilities: Capabilities) -> Decoding:
    """What options come to on a machine.

    Raises:
        OptionError: for options that exclude each other.
    """
    if options.attention == "paged" and options.graph and options.graph_lengths == "masked":
        raise OptionError(
            "attention=paged takes no mask: graph_lengths=masked needs attention=fused or auto"
        )
    attention, reason = _attention(options, capabilities)
    lengths, lack = _lengths(options, attention, capabilities)
    return Decoding(attention, reason, lengths, lack)


def _attention(options: DeviceOptions, capabilities: Capabilities) -> tuple[str, str]:
    """(kernel, reason). Paged attention is taken where the fused one leaves cores idle, unless that
    would cost the graphs."""
    if options.attention != "auto":
        return options.attention, ""
    splits, paged = capabilities.fused_splits, capabilities.paged
    if splits.usable or not paged.usable:
        return "fused", splits.detail if splits.usable else paged.detail
    if options.graph and options.graph_lengths == "masked":
        return "fused", "graph_lengths=masked takes no other"
    lengths, lack = _lengths(options, "paged", capabilities)
    if options.graph and lengths is None:
        return "fused", f"graphs cannot contain paged attention: {lack}"
    return "paged", splits.detail


def _lengths(
    options: DeviceOptions, attention: str, capabilities: Capabilities
) -> tuple[Lengths | None, str]:
    """(way, why no better one)."""
    if not options.graph:
        return None, "graph=off"
    lacks: list[str] = []
    if options.graph_lengths != "masked":
        updates: tuple[tuple[Lengths, Support], ...] = (
            ("bound", capabilities.bound_update),
            ("dispatched", capabilities.update_of(attention)),
        )
        for way, support in updates:
            if support.usable:
                return way, "; ".join(lacks)
            lacks.append(f"{support.what}: {support.detail}")
    if options.graph_lengths != "update" and attention == "fused":
        if capabilities.masked.usable:
            return "masked", "; ".join(lacks)
        lacks.append(f"{capabilities.masked.what}: {capabilities.masked.detail}")
    return None, "; ".join(lacks)
