"""How much of a model's quality a checkpoint keeps: perplexity, KL divergence, agreement; a report.

evaluate     a checkpoint on a text, beside the model it was made of -> an Evaluation
write_report a checkpoint, and perhaps an Evaluation -> one HTML page
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_ascend.lazy import lazy_names

if TYPE_CHECKING:
    from qwen3_ascend.evaluation.evaluating import evaluate
    from qwen3_ascend.evaluation.options import EvaluationOptions
    from qwen3_ascend.evaluation.page import write_report
    from qwen3_ascend.evaluation.result import Comparison, Evaluation, Interval, ModelFigures

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Comparison": "qwen3_ascend.evaluation.result",
        "Evaluation": "qwen3_ascend.evaluation.result",
        "EvaluationOptions": "qwen3_ascend.evaluation.options",
        "Interval": "qwen3_ascend.evaluation.result",
        "ModelFigures": "qwen3_ascend.evaluation.result",
        "evaluate": "qwen3_ascend.evaluation.evaluating",
        "write_report": "qwen3_ascend.evaluation.page",
    },
)

__all__ = [
    "Comparison",
    "Evaluation",
    "EvaluationOptions",
    "Interval",
    "ModelFigures",
    "evaluate",
    "write_report",
]
