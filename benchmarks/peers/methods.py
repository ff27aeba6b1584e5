"""What is compared: ways to quantize, each with the settings that its makers recommend."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "qwen3-ascend"

ROWS = {
    "w8a8": "W8A8, no data",
    "w8a8-calibrated": "W8A8, calibrated",
    "w8a8-static": "W8A8 static",
    "w4a16-g128": "W4A16 g128",
    "w4a16-g64": "W4A16 g64",
    "w4a16-g32": "W4A16 g32",
    "w8a16": "W8A16",
    "w4a8": "W4A8",
    "mixture": "mixtures of experts",
}
"""In the order of the table."""


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    Attributes:
        row: where it stands.
        peer: who does it.
        name: the peer's script's word for it, or our recipe, shipped or of own.RECIPES.
        settings: for people.
        decoded: our checkpoint through the arithmetic of the peers' rows, to show that it is fair.
    """

    row: str
    peer: str
    name: str
    settings: str
    decoded: bool = False

    def takes(self, model: str) -> bool:
        """Whether it is for a model: recipes of mixtures are for those, and no other method is."""
        return (self.row == "mixture") == (model == "tiny-moe")

    @property
    def folder(self) -> str:
        """Where its result is kept, below its peer's."""
        return f"{self.name}-decoded" if self.decoded else self.name


def _grouped(recipe: str, group: int) -> str:
    """Our recipe of that size; groups of 128 ship."""
    return recipe if group == 128 else f"{recipe}-g{group}"


LLM_COMPRESSOR, MSMODELSLIM, AUTO_ROUND = "llm-compressor", "msmodelslim", "auto-round"

METHODS = (
    Method("w8a8", OURS, "w8a8", "w8a8"),
    Method("w8a8", OURS, "w8a8-plain", "w8a8-plain"),
    Method("w8a8", OURS, "w8a8-plain", "w8a8-plain, in the peers' arithmetic", True),
    Method("w8a8", OURS, "w8a8-cle", "cle alone"),
    Method("w8a8", OURS, "w8a8-head", "w8a8-head"),
    Method("w8a8", OURS, "w8a8-attention-bf16", "w8a8-attention-bf16"),
    Method("w8a8", LLM_COMPRESSOR, "rtn-w8a8", "QuantizationModifier"),
    Method("w8a8", LLM_COMPRESSOR, "spinquant-w8a8", "SpinQuant R1 and R2, QuantizationModifier"),
    Method("w8a8", MSMODELSLIM, "minmax-w8a8", "minmax"),
    Method("w8a8", AUTO_ROUND, "rtn-w8a8", "0 iterations, disable_opt_rtn"),
    Method("w8a8-calibrated", OURS, "w8a8-calibrated", "w8a8-calibrated"),
    Method("w8a8-calibrated", LLM_COMPRESSOR, "smoothquant-w8a8", "SmoothQuant 0.5"),
    Method("w8a8-calibrated", LLM_COMPRESSOR, "smoothquant-gptq-w8a8", "SmoothQuant 0.8, GPTQ"),
    Method("w8a8-calibrated", MSMODELSLIM, "smooth-w8a8", "iter_smooth 0.5, minmax"),
    Method("w8a8-calibrated", AUTO_ROUND, "tuned-w8a8", "200 iterations"),
    Method("w8a8-static", OURS, "w8a8-static", "w8a8-static"),
    Method(
        "w8a8-static", LLM_COMPRESSOR, "smoothquant-gptq-static",
        "SmoothQuant 0.8, GPTQ, asymmetric minmax",
    ),
    Method("w8a8-static", MSMODELSLIM, "smooth-static", "iter_smooth 0.5, asymmetric minmax"),
    *(
        method
        for group in (128, 64, 32)
        for method in (
            Method(f"w4a16-g{group}", OURS, _grouped("w4a16-plain", group), "w4a16-plain"),
            Method(f"w4a16-g{group}", OURS, f"w4a16-mse-g{group}", "mse"),
            Method(f"w4a16-g{group}", OURS, _grouped("w4a16", group), "w4a16"),
            Method(f"w4a16-g{group}", LLM_COMPRESSOR, f"gptq-g{group}", "GPTQ"),
            Method(f"w4a16-g{group}", AUTO_ROUND, f"opt-rtn-g{group}", "0 iterations: opt-RTN"),
            Method(f"w4a16-g{group}", AUTO_ROUND, f"tuned-g{group}", "200 iterations"),
        )
    ),
    Method("w8a16", OURS, "w8a16", "w8a16"),
    Method("w4a8", OURS, "w4a8-plain", "w4a8-plain"),
    Method("w4a8", OURS, "w4a8", "w4a8"),
    *(
        Method("mixture", OURS, recipe, recipe)
        for recipe in (
            "moe-w8a8", "moe-w8a8-experts", "w8a16", "moe-w4a16-down-w8a8", "moe-w4a16",
            "w4a16-plain", "moe-w4a8",
        )
    ),
)  # fmt: skip
