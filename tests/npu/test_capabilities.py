"""What a machine lacks is met by another form, and the tokens stay those of the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ascend_sim
import pytest
import torch_npu
from ascend_sim import cann
from ascend_sim.cann import pretending
from npu.lacks import LACKS

from qwen3_ascend import SamplingParams, load
from qwen3_ascend.errors import DeviceError, OptionError
from qwen3_ascend.runtime.backends.npu import capabilities, graph_updates
from qwen3_ascend.runtime.backends.npu.capabilities import (
    OPERATIONS,
    Capabilities,
    probe,
    splits_support,
)
from qwen3_ascend.runtime.backends.npu.decoding import choose_decoding
from qwen3_ascend.runtime.backends.npu.device import in_one_line, open_device
from qwen3_ascend.runtime.backends.npu.graph_updates import (
    FUSED_LENGTHS,
    PAGED_LENGTHS,
    Support,
    UpdatedArgument,
    bound_support,
    update_support,
)
from qwen3_ascend.runtime.options import DeviceOptions
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG

Patch = pytest.MonkeyPatch

PROMPTS = [f"What does {word} mean?" for word in ("river", "bicycle", "house")]
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


def tokens_of(path: Path, device: str = "npu", **options: Any) -> list[tuple[int, ...]]:
    if device == "npu":
        options = {"buckets": (1, 2, 4), **options}
    llm = load(path, device=device, max_batch=4, **{"kv_cache_tokens": 1024, **options})
    return [answer.token_ids for answer in llm.generate(PROMPTS, PARAMS)]


def probed() -> Capabilities:
    open_device()
    return probe(SMALL_CONFIG)


CHOSEN = {
    "8.3": {"cache_write": 1, "norm_quant": 1},
    "8.5": {"cache_write": 1},
    "9.0": {},
    "9.1": {},
}
"""The numbers of the forms that are used with each CANN and a wheel of it, where not the first."""


@pytest.mark.opposite_modes
@pytest.mark.parametrize("cann", [name for name in CHOSEN if name <= cann.current().name])
def test_each_cann_has_its_forms_and_the_tokens_of_the_cpu(
    cann: str, checkpoints: dict[str, Path]
) -> None:
    """With graphs, whose updates are of three generations; in a process that pretends an older
    CANN, only that and those before: what its wheel lacks cannot be given back."""
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    ascend_sim.reset_trace()
    with pretending(cann):
        capabilities = probed()
        tokens = tokens_of(checkpoints["w8a8"])
    assert tokens == expected and ascend_sim.trace.replays()
    for name, choice in capabilities.choices.items():
        form = CHOSEN[cann].get(name, 0)
        assert choice.form is OPERATIONS[name].forms[form], name
        assert bool(choice.reason) == bool(form)
    unusable = {name for name, each in capabilities.supports.items() if not each.usable}
    unusable.discard("fused_splits")  # by the version, which a process reads once
    assert unusable == ({"paged_update"} if cann == "8.3" else set())


@pytest.mark.opposite_modes
@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_is_met_by_another_form_and_equal_tokens(
    lack: str, checkpoints: dict[str, Path]
) -> None:
    plant, field, form, reason = LACKS[lack]
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    sound = probed()
    with plant():
        capabilities = probed()
        tokens = tokens_of(checkpoints["w8a8"])
    for name, choice in capabilities.choices.items():
        forms = OPERATIONS[name].forms
        usual = forms.index(sound.choices[name].form)
        assert choice.form is forms[max(form, usual) if name == field else usual], name
    assert reason in capabilities.choices[field].reason
    assert tokens == expected


@pytest.mark.parametrize(("inner", "form"), [(3072, 0), (9728, 1), (25600, 1)])
def test_wide_rows_are_tried_at_the_width_of_the_model(inner: int, form: int) -> None:
    """A kernel that is wrong only where a row takes several tiles: Qwen3-4B and larger."""
    open_device()
    config = dataclasses.replace(SMALL_CONFIG, intermediate_size=inner)
    with ascend_sim.faults.corrupt_wide_swiglu():
        chosen = probe(config).gated_quant
    assert chosen.form is OPERATIONS["gated_quant"].forms[form]
    assert ("codes are up to" in chosen.reason) == bool(form)
    assert probe(config).gated_quant.form is OPERATIONS["gated_quant"].forms[0]


def test_what_torch_npu_raises_becomes_one_line() -> None:
    raised = RuntimeError(
        "npu_x:../third_party/op-plugin/x.cpp:124 NPU function error: call aclnnX failed, error "
        "code is 161002\n[ERROR] 2026 (PID:1) ERR00100 PTA call acl api failed\n[Error]: Parameter "
        "verification failed.\n   EZ1001: the shape is wrong\n  TraceBack (most recent call last):"
    )
    assert in_one_line(raised) == (
        "call aclnnX failed, error code is 161002: EZ1001: the shape is wrong"
    )
    assert in_one_line(OSError()) == "OSError"
    assert in_one_line(RuntimeError("no stack\nbut lines")) == "no stack"


def test_an_operation_without_any_form_says_what_was_tried(monkeypatch: Patch) -> None:
    for name in ("npu_apply_rotary_pos_emb", "npu_rotary_mul"):
        monkeypatch.delattr(torch_npu, name)
    with pytest.raises(DeviceError, match="rotary embedding: no operator for it.*npu_rotary_mul"):
        probed()


@pytest.mark.parametrize("field", OPERATIONS)
def test_each_form_can_be_asked_for(field: str) -> None:
    capabilities = probed()
    for form in OPERATIONS[field].forms:
        changed = capabilities.using(field, form)
        assert changed.choices[field].form is form
        others = {name: choice for name, choice in changed.choices.items() if name != field}
        assert others.items() <= capabilities.choices.items()


# ----------------------------------------------------------------------- updates of graphs
OF_CANN_8_5 = """
    def update_capture_record(self, record, update_input):
        if record.__name__ in ["npu_fused_infer_attention_score.out"]:
            position, key = 6, "actual_seq_lengths_kv"
        elif record.__name__ == "_npu_paged_attention.default":
            position, key = 7, "context_lens"
"""
"""The names in npu/graphs.py of torch_npu 2.9.0; 2.7.1 has the first of them only, and in no table
the key of it."""

OF_CANN_8_3 = """
    def __torch_dispatch__(self, func):
        elif func.__name__ == "npu_fused_infer_attention_score.out":
"""

ARGUMENTS = (FUSED_LENGTHS, PAGED_LENGTHS)


def with_code(code: str, patch: Patch, folder: Path) -> None:
    """A torch_npu without handlers, whose npu/graphs.py is this."""
    path = folder / "graphs.py"
    path.write_text("class Mode:\n" + "\n".join(f"    # {line}" for line in code.splitlines()))
    spec = importlib.util.spec_from_file_location("old_graphs", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    patch.setattr(torch_npu.npu, "graphs", module)
    patch.setitem(sys.modules, graph_updates.HANDLERS, None)


def usable() -> list[bool]:
    return [update_support(argument).usable for argument in ARGUMENTS]


def test_updates_of_wheels_without_handlers(monkeypatch: Patch, tmp_path: Path) -> None:
    with_code(OF_CANN_8_5, monkeypatch, tmp_path)
    assert usable() == [True, True]
    assert update_support(PAGED_LENGTHS).detail == "npu/graphs.py"


def test_updates_of_wheels_that_do_not_record_paged_attention(
    monkeypatch: Patch, tmp_path: Path
) -> None:
    """There a replay would attend over the lengths of the capture."""
    with_code(OF_CANN_8_3, monkeypatch, tmp_path)
    assert usable() == [True, False]
    assert "does not update it" in update_support(PAGED_LENGTHS).detail


def handlers_of_cann_9_0() -> ModuleType:
    """The registry of torch_npu 2.10.0: no get_update_specs, and no table for the fused kernel."""
    fused = type("_IFAv1DefaultHandler", (), {})
    table = {"_npu_paged_attention.default": (7, "context_lens")}
    simple = type("_SimpleGraphHandler", (), {"_OP_ARG_SPECS": table})
    module = ModuleType(graph_updates.HANDLERS)
    registry = {FUSED_LENGTHS.operator: fused, PAGED_LENGTHS.operator: simple}
    module.__dict__["_NPU_GRAPH_OP_HANDLERS"] = registry
    return module


def test_updates_of_wheels_whose_handlers_have_tables(monkeypatch: Patch) -> None:
    module = handlers_of_cann_9_0()
    monkeypatch.setitem(sys.modules, graph_updates.HANDLERS, module)
    assert usable() == [True, True]
    assert update_support(PAGED_LENGTHS).detail == "its table of handlers"
    module.__dict__["_NPU_GRAPH_OP_HANDLERS"].pop(FUSED_LENGTHS.operator)
    assert usable() == [False, True]


def test_an_argument_that_does_not_exist_is_not_updated() -> None:
    """torch_npu itself ignores an unknown key in silence."""
    for argument in ARGUMENTS:
        wrong = UpdatedArgument(argument.operator, "context_length", argument.place)
        assert "does not update it" in update_support(wrong).detail
        assert not update_support(wrong).usable
    unknown = UpdatedArgument("npu_no_such_operator.out", "lengths", place=None)
    assert not update_support(unknown).usable


# -------------------------------------------------------------------- how decode steps are run
def lacking(what: str) -> Support:
    return Support(what, False, f"it has no {what}")


def there(what: str) -> Support:
    return Support(what, True, "")


def machine(**lacks: bool) -> Capabilities:
    """A machine that lacks what is named."""
    names = ("bound_update", "fused_update", "paged_update", "masked", "fused_splits", "paged")
    found: dict[str, Any] = {
        name: lacking(name) if lacks.get(name) else there(name) for name in names
    }
    form: Any = None
    return Capabilities(form, form, form, form, **found)


def decoding(attention: str = "auto", graph: bool = True, way: str = "auto", **lacks: bool) -> Any:
    options = DeviceOptions("npu", attention=attention, graph=graph, graph_lengths=way)
    return choose_decoding(options, machine(**lacks))


def test_updates_are_bound_then_dispatched_then_masked() -> None:
    assert decoding().lengths == "bound" and decoding().lengths_reason == ""
    dispatched = decoding(bound_update=True)
    assert dispatched.lengths == "dispatched" and "no bound_update" in dispatched.lengths_reason
    masked = decoding(bound_update=True, fused_update=True)
    assert masked.lengths == "masked" and "no fused_update" in masked.lengths_reason
    nothing = decoding(bound_update=True, fused_update=True, masked=True)
    assert nothing.lengths is None and "no masked" in nothing.lengths_reason
    assert decoding(way="update", bound_update=True, fused_update=True).lengths is None
    assert decoding(way="masked").lengths == "masked"
    assert decoding(way="masked", masked=True).lengths is None
    assert decoding(graph=False).lengths is None
    paged = decoding("paged", bound_update=True, paged_update=True)
    assert paged.lengths is None  # who asks for this kernel does not get another
    with pytest.raises(OptionError, match="attention=paged takes no mask"):
        decoding("paged", way="masked")
    assert decoding("paged", graph=False, way="masked").attention == "paged"


def test_attention_is_paged_where_the_fused_kernel_does_not_split_and_graphs_are_kept() -> None:
    assert decoding().attention == "fused"
    chosen = decoding(fused_splits=True)
    assert (chosen.attention, chosen.lengths) == ("paged", "bound")
    assert chosen.attention_reason == "it has no fused_splits"
    assert decoding(fused_splits=True, paged=True).attention == "fused"
    assert decoding(fused_splits=True, bound_update=True).attention == "paged"
    kept = decoding(fused_splits=True, bound_update=True, paged_update=True)
    assert (kept.attention, kept.lengths) == ("fused", "dispatched")
    assert "graphs cannot contain paged attention" in kept.attention_reason
    lacks: Any = {"fused_splits": True, "bound_update": True, "paged_update": True}
    assert decoding(graph=False, **lacks).attention == "paged"
    assert decoding(way="masked", fused_splits=True).attention == "fused"
    for kernel in ("fused", "paged"):
        assert decoding(kernel, fused_splits=True).attention == kernel


@pytest.mark.parametrize(
    ("version", "splits"),
    [("8.3.RC1", False), ("8.5.0", False), ("9.0.0", True), ("9.1.0", True), (None, True)],
)
def test_which_cann_spreads_a_context(version: str | None, splits: bool) -> None:
    assert splits_support(version).usable == splits


def test_the_attention_of_this_cann() -> None:
    """Another one in a process that pretends CANN 8 (make simulated-releases)."""
    capabilities, splits = probed(), cann.current().decode_splits_keys
    assert capabilities.fused_splits.usable == splits
    chosen = choose_decoding(DeviceOptions("npu"), capabilities)
    assert chosen.attention == ("fused" if splits else "paged") and chosen.lengths == "bound"


@pytest.mark.parametrize("name", ["graph_task_group_begin", "ExternalEvent", "_weak_ref_tensor"])
def test_functions_that_a_wheel_lacks_for_bound_updates(name: str, monkeypatch: Patch) -> None:
    assert bound_support().usable
    monkeypatch.delattr(torch_npu._C if name == "_weak_ref_tensor" else torch_npu.npu, name)
    assert not bound_support().usable and name in bound_support().detail


def test_a_mask_that_hides_nothing_is_not_used(monkeypatch: Patch) -> None:
    right = torch_npu.npu_fused_infer_attention_score

    def unmasked(*arguments: Any, atten_mask: Any = None, **named: Any) -> Any:
        return right(*arguments, **named)

    monkeypatch.setattr(torch_npu, "npu_fused_infer_attention_score", unmasked)
    assert not probed().masked.usable and "attention is" in probed().masked.detail


def without_any_update(patch: Patch, folder: Path) -> None:
    """A wheel that records only the fused operator, and has no functions for us to do it."""
    with_code(OF_CANN_8_3, patch, folder)
    patch.setattr(capabilities, "bound_support", lambda: lacking("bound_update"))


@pytest.mark.opposite_modes
def test_without_updates_steps_run_eagerly_with_a_warning(
    checkpoints: dict[str, Path], monkeypatch: Patch, tmp_path: Path
) -> None:
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    without_any_update(monkeypatch, tmp_path)
    ascend_sim.reset_trace()
    with pytest.warns(UserWarning, match="not captured as graphs.*context_lens.*graph=off"):
        assert tokens_of(checkpoints["w8a8"], attention="paged") == expected
    assert ascend_sim.trace.replays() == []
    assert tokens_of(checkpoints["w8a8"], attention="paged", graph=False) == expected


@pytest.mark.opposite_modes
def test_without_updates_graphs_are_masked(
    checkpoints: dict[str, Path], monkeypatch: Patch
) -> None:
    expected = tokens_of(checkpoints["w8a8"], "cpu")
    monkeypatch.setattr(capabilities, "bound_support", lambda: lacking("bound_update"))
    monkeypatch.setattr(capabilities, "update_support", lambda argument: lacking(argument.key))
    ascend_sim.reset_trace()
    assert tokens_of(checkpoints["w8a8"], kv_cache_tokens=4096) == expected
    assert ascend_sim.trace.replays() and not ascend_sim.trace.host_updates()


OPEN_PAGED = """
import sys, ascend_sim
ascend_sim.install()
from qwen3_ascend import load
for attention in ("fused", "paged"):
    load(sys.argv[1], device="npu", attention=attention, kv_cache_tokens=256, graph=False)
    print(attention, "loaded")
"""


def test_paged_attention_without_atb_says_what_to_install(checkpoints: dict[str, Path]) -> None:
    """In a process of its own: a machine without libatb.so."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_PAGED, str(checkpoints["w8a8"])],
        env=os.environ | {"ASCEND_SIM_FAULTS": "no_atb", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "fused loaded" in done.stdout and "paged loaded" not in done.stdout
    assert "DeviceError: libatb.so is missing" in done.stderr
    assert "install Ascend-cann-nnal" in done.stderr and "attention=fused" in done.stderr


# ----------------------------------------------------------- where a refusal ends the process
WITH_TASK_QUEUE_2 = """
import sys, ascend_sim
ascend_sim.install()
from qwen3_ascend import SamplingParams, load
from qwen3_ascend.runtime.backends.npu.capabilities import OPERATIONS, probe
from qwen3_ascend.runtime.synthetic import SMALL_CONFIG
llm = load(sys.argv[1], device="npu", kv_cache_tokens=1024, max_batch=4, graph=False)
for answer in llm.generate(sys.argv[2:], SamplingParams(max_new_tokens=12, ignore_eos=True)):
    print(*answer.token_ids)
capabilities = probe(SMALL_CONFIG)
choices = capabilities.choices.items()
print(all(choice.form is OPERATIONS[name].forms[-1] for name, choice in choices))
"""


def test_with_a_queue_that_does_not_survive_refusals_nothing_is_tried(
    checkpoints: dict[str, Path],
) -> None:
    """TASK_QUEUE_ENABLE=2 is read once, so this is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_TASK_QUEUE_2, str(checkpoints["w8a8"]), *PROMPTS],
        env=os.environ | {"TASK_QUEUE_ENABLE": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    expected = [" ".join(map(str, tokens)) for tokens in tokens_of(checkpoints["w8a8"], "cpu")]
    assert done.stdout.splitlines()[-4:] == [*expected, "True"], done.stderr
