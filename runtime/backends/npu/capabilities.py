"""What this torch_npu and CANN offer, found out once by trying: everything else reads it here.

Wheels and CANN differ in names, arguments, accepted shapes and, once in a while, in what a kernel
computes. A version number would have to be right for every pair of them; a call on a few numbers is
right by itself. Each form of an operation is given values of the model's own sizes, and is taken if
it runs and agrees with its definition on the host.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch_npu

from qwen3_ascend.checkpoint.config import Qwen3Config
from qwen3_ascend.errors import DeviceError
from qwen3_ascend.runtime.backends.npu import trials
from qwen3_ascend.runtime.backends.npu.device import in_one_line, require_atb, running_cann
from qwen3_ascend.runtime.backends.npu.experts import (
    CHOICES,
    EXPERT_GATES,
    ROUTES,
    ChooseExperts,
    GateExperts,
    RouteCodes,
)
from qwen3_ascend.runtime.backends.npu.graph_updates import (
    FUSED_LENGTHS,
    PAGED_LENGTHS,
    Support,
    bound_support,
    update_support,
)
from qwen3_ascend.runtime.backends.npu.mixtures import ExpertForms
from qwen3_ascend.runtime.backends.npu.operators import (
    CACHE_WRITES,
    GATED_QUANTS,
    NORM_QUANTS,
    ROTATIONS,
    CacheWrite,
    Call,
    Form,
    GatedQuant,
    MaskedAttention,
    NormQuant,
    Rotate,
    masked_attention,
    reshape_and_cache,
)

UNTRIED = "with TASK_QUEUE_ENABLE=2 a refusal would end the process, so it was not tried"


@dataclass(frozen=True)
class Choice(Generic[Call]):
    """The form of an operation that is used here.

    Attributes:
        operation: what it computes, for people.
        form: how.
        reason: why no faster form was taken; empty for the fastest.
    """

    operation: str
    form: Form[Call]
    reason: str = ""

    @property
    def call(self) -> Call:
        """What computes it."""
        return self.form.call


@dataclass(frozen=True)
class Capabilities:
    """What this machine offers to one model.

    Attributes:
        cache_write: stores keys and values.
        norm_quant: norms a sum and quantizes it.
        gated_quant: gates and quantizes, at the width of the model's MLP.
        rotate: applies the rotary embedding.
        bound_update: whether we can update the lengths of any captured attention ourselves.
        fused_update, paged_update: whether `NPUGraph.update` does, of the two kernels.
        masked: whether attention of fixed lengths takes a mask.
        fused_splits: whether fused attention spreads one long context over many cores.
        paged: whether paged attention is there.
        expert_choice: says which experts a token is given to; None for a model without experts, as
            the next ones.
        expert_route: quantizes rows for the experts that their tokens are given to.
        expert_gate: multiplies rows with gate and up of their experts, gates and quantizes.
    """

    cache_write: Choice[CacheWrite]
    norm_quant: Choice[NormQuant]
    gated_quant: Choice[GatedQuant]
    rotate: Choice[Rotate]
    bound_update: Support
    fused_update: Support
    paged_update: Support
    masked: Support
    fused_splits: Support
    paged: Support
    expert_choice: Choice[ChooseExperts] | None = None
    expert_route: Choice[RouteCodes] | None = None
    expert_gate: Choice[GateExperts] | None = None

    @property
    def choices(self) -> dict[str, Choice[Any]]:
        """The operations that have more than one form, by field."""
        return {name: value for name, value in self._values().items() if isinstance(value, Choice)}

    @property
    def supports(self) -> dict[str, Support]:
        """What is there or not, by field."""
        return {name: value for name, value in self._values().items() if isinstance(value, Support)}

    @property
    def of_experts(self) -> ExpertForms:
        """What computes the mixtures of a model that has some."""
        choice, route, gate = self.expert_choice, self.expert_route, self.expert_gate
        assert choice and route and gate, "the model was probed without them"
        return ExpertForms(choice.call, route.call, gate.call, self.gated_quant.call)

    def update_of(self, attention: str) -> Support:
        """Whether `NPUGraph.update` gives a captured "fused" or "paged" attention its lengths."""
        return {"fused": self.fused_update, "paged": self.paged_update}[attention]

    def using(self, field: str, form: Form[Any]) -> Capabilities:
        """The same machine, but with another form of one operation."""
        choice = dataclasses.replace(self.choices[field], form=form, reason="it was asked for")
        changed: dict[str, Any] = {field: choice}
        return dataclasses.replace(self, **changed)

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Operation:
    """Something that can be computed in more than one form.

    Attributes:
        name: for people.
        forms: the fastest first.
        trial: of a model's sizes, what a form is tried with.
    """

    name: str
    forms: tuple[Form[Any], ...]
    trial: Callable[[Qwen3Config], Callable[[Any], None]]


OPERATIONS: dict[str, Operation] = {
    "cache_write": Operation("cache write", CACHE_WRITES, trials.cache_write),
    "norm_quant": Operation("norm and quantization", NORM_QUANTS, trials.norm_quant),
    "gated_quant": Operation("gate and quantization", GATED_QUANTS, trials.gated_quant),
    "rotate": Operation("rotary embedding", ROTATIONS, trials.rotate),
}
"""By the field of Capabilities."""


OF_EXPERTS: dict[str, Operation] = {
    "expert_choice": Operation("choice of experts", CHOICES, trials.expert_choice),
    "expert_route": Operation("routing to experts", ROUTES, trials.expert_route),
    "expert_gate": Operation("gate of experts", EXPERT_GATES, trials.expert_gate),
}
"""Of models with mixtures of experts alone."""


def operations(config: Qwen3Config) -> dict[str, Operation]:
    """What is computed for a model and has more than one form, by the field of Capabilities."""
    return {**OPERATIONS, **OF_EXPERTS} if config.experts else OPERATIONS


def probe(config: Qwen3Config) -> Capabilities:
    """Tries what a model needs on the current device; takes some milliseconds.

    Raises:
        DeviceError: if no form of an operation works.
    """
    with torch.inference_mode():
        chosen = _chosen(config, operations(config))
        masked, paged = masked_support(config), paged_support(config)
    return Capabilities(
        **chosen,
        bound_update=bound_support(),
        fused_update=update_support(FUSED_LENGTHS),
        paged_update=update_support(PAGED_LENGTHS),
        masked=masked,
        fused_splits=splits_support(running_cann()),
        paged=paged,
    )


def probe_experts(config: Qwen3Config) -> ExpertForms:
    """The same of what mixtures need alone."""
    needed = {**OF_EXPERTS, "gated_quant": OPERATIONS["gated_quant"]}
    with torch.inference_mode():
        chosen = _chosen(config, needed)
    names = ("expert_choice", "expert_route", "expert_gate", "gated_quant")
    return ExpertForms(*(chosen[name].call for name in names))


def _chosen(config: Qwen3Config, asked: Mapping[str, Operation]) -> dict[str, Any]:
    return {
        field: choose(operation.name, operation.forms, operation.trial(config))
        for field, operation in asked.items()
    }


def last_forms(capabilities: Capabilities) -> Capabilities:
    """The same machine, as if it had no newer operator than every torch_npu has."""
    for field in capabilities.choices:
        operation = {**OPERATIONS, **OF_EXPERTS}[field]
        capabilities = capabilities.using(field, operation.forms[-1])
    return capabilities


def choose(
    operation: str, forms: tuple[Form[Call], ...], trial: Callable[[Call], None]
) -> Choice[Call]:
    """The first form that a trial does not object to.

    torch_npu refuses a call while it is made, unless TASK_QUEUE_ENABLE=2 has moved that to a thread
    which does not survive it: then only the last form is tried.

    Raises:
        DeviceError: if there is none; says why each failed.
    """
    objections: list[str] = []
    for form in forms:
        fatal = refusals_are_fatal() and form is not forms[-1]
        objected = UNTRIED if fatal else objection(form, trial)
        if objected is None:
            return Choice(operation, form, "; ".join(objections))
        objections.append(f"{form.name}: {objected}")
    raise DeviceError(f"{operation}: no operator for it works here ({'; '.join(objections)})")


def refusals_are_fatal() -> bool:
    """Whether torch_npu asks an operator on a thread that does not survive its refusal."""
    return os.environ.get("TASK_QUEUE_ENABLE") == "2"


def objection(form: Form[Call], trial: Callable[[Call], None]) -> str | None:
    """Why a form cannot be used on this machine; None if it can."""
    try:
        trial(form.call)
        torch_npu.npu.synchronize()
    except Exception as error:  # whatever a wheel or a driver raises, another form may work
        return f"{type(error).__name__}: {in_one_line(error)}"
    return None


ATB_WRITE: Form[CacheWrite] = Form("_npu_reshape_and_cache", reshape_and_cache)
MASKED: Form[MaskedAttention] = Form("a mask with one query token", masked_attention)


def masked_support(config: Qwen3Config) -> Support:
    """Whether attention over contexts of one fixed length takes a mask for each."""
    what = "attention with a mask on the device"
    if refusals_are_fatal():
        return Support(what, False, UNTRIED)
    objected = objection(MASKED, trials.masked_attention(config))
    if objected is not None:
        return Support(what, False, objected)
    return Support(what, True, "it hides what lies behind the end of each context")


WITHOUT_SPLIT = "8"
"""The CANN whose decode in the layout TND goes to the kernel for prompts, which gives a request to
one core each (fused_infer_attention_score_tiling.cpp, usingIFA). Speed is not to be tried when a
model is loaded, so this one thing is told by a version; `doctor` measures it."""


def splits_support(cann: str | None) -> Support:
    """Whether fused attention spreads a long context over cores, by the version of CANN."""
    what = "fused attention spreads a long context over cores"
    if cann is None:
        return Support(what, True, "the version of CANN is not known; newer ones do")
    splits = cann.split(".")[0] != WITHOUT_SPLIT
    detail = f"CANN {cann} does" if splits else f"CANN {cann} decodes with the kernel for prompts"
    return Support(what, splits, detail)


def paged_support(config: Qwen3Config) -> Support:
    """Whether decoding with ATB's paged attention is possible: ATB is there, and writes a cache."""
    what = "paged attention"
    try:
        require_atb()
    except DeviceError as error:
        return Support(what, False, str(error))
    for name in ("_npu_paged_attention", "_npu_paged_attention_get_workspace"):
        if not hasattr(torch_npu, name):
            return Support(what, False, f"torch_npu {torch_npu.__version__} has no {name}")
    objected = None if refusals_are_fatal() else objection(ATB_WRITE, trials.cache_write(config))
    return Support(what, objected is None, objected or "ATB is there")
