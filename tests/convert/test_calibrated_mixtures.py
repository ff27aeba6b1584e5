"""Calibrated mixtures of experts: what each one is fed, and what becomes of those that are not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.command_line import run
from support.inputs import hessian_of
from support.planted import EXPERTS, NEVER, PER_TOKEN, write_tiny_mixture
from support.tiny_models import DATA, TOKENIZER_FILES
from transformers import AutoModelForCausalLM

from qwen3_ascend import Recipe, convert_checkpoint
from qwen3_ascend.checkpoint.manifest import Manifest
from qwen3_ascend.checkpoint.schemes import W4A16
from qwen3_ascend.convert.calibration.data import choose_windows, plan_calibration
from qwen3_ascend.convert.options import CalibrationOptions, ConvertOptions
from qwen3_ascend.convert.pipeline import Conversion
from qwen3_ascend.convert.plan import Item
from qwen3_ascend.convert.statistics import Seen
from qwen3_ascend.evaluation.evaluating import evaluate
from qwen3_ascend.evaluation.options import EvaluationOptions

TOKENS = ConvertOptions(calibration_tokens=4096)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mixture(tmp_path_factory.mktemp("planted") / "model")


def recipe(quantizer: str) -> dict[str, object]:
    scheme = W4A16(128).to_json()
    rule = {"match": "*.mlp.experts.*", "scheme": scheme, "quantizer": quantizer}
    rules = [rule, {"match": "*", "scheme": "bf16"}]
    return {"schema": 1, "name": quantizer, "rules": rules}


def made(source: Path, out: Path, quantizer: str, options: ConvertOptions = TOKENS) -> Manifest:
    text = json.dumps(recipe(quantizer))
    return convert_checkpoint(source, out, Recipe.parse(text, quantizer), options)


def test_experts_are_fed_what_transformers_feeds_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, before which nothing is quantized: each expert sees the tokens whose
    greatest logits choose it, and what it makes of them."""
    seen: dict[str, Seen] = {}
    make = Conversion.make_stage

    def make_stage(self: Conversion, items: Sequence[Item], statistics: dict[str, Seen]) -> None:
        seen.update(statistics)
        make(self, items, statistics)

    monkeypatch.setattr(Conversion, "make_stage", make_stage)
    manifest = made(source, tmp_path / "out", "gptq")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    mlp, fed = model.model.layers[0].mlp, dict[str, torch.Tensor]()
    mlp.register_forward_pre_hook(lambda _, inputs: fed.update(x=inputs[0].flatten(0, 1)))
    options = CalibrationOptions(calibration_tokens=TOKENS.calibration_tokens)
    planned = plan_calibration(options, manifest.model, ["tokenizer.json"])
    files = {name: (DATA / name).read_bytes() for name in TOKENIZER_FILES}
    with torch.inference_mode():
        model(torch.tensor(choose_windows(planned, manifest.model, files, print)))
    weights, x = model.state_dict(), fed["x"]
    prefix = "model.layers.0.mlp"
    logits = x @ weights[f"{prefix}.gate.weight"].t()
    chosen = logits.topk(PER_TOKEN).indices
    stored = load_file(source / "model.safetensors")
    gate, up = (
        stored[f"{prefix}.experts.0.{name}.weight"].float().t() for name in ("gate_proj", "up_proj")
    )
    for expert in range(EXPERTS):
        rows = x[(chosen == expert).any(1)]
        gated = F.silu(rows @ gate) * (rows @ up)
        for name, inputs in (("gate_up_proj", rows), ("down_proj", gated)):
            found = seen[f"{prefix}.experts.{name}"][expert]
            if expert == NEVER:
                assert found is None and len(rows) == 0
                continue
            assert found is not None and abs(found.tokens - len(rows)) <= 2  # nearly equal logits
            expected = inputs.t() @ inputs / len(inputs)
            scale = float(expected.diagonal().max())
            torch.testing.assert_close(hessian_of(found), expected, rtol=2e-2, atol=2e-3 * scale)


def divergence(source: Path, out: Path) -> float:
    """The mean KL divergence of a conversion from its source, in thousandths of a nat."""
    options = EvaluationOptions(window=256, windows=8, dtype="float32", device="cpu")
    found = evaluate(out, DATA / "heldout.txt", against=source, options=options).comparison
    assert found is not None
    return 1000 * found.kl.value


def test_calibrated_experts_lose_less(source: Path, tmp_path: Path) -> None:
    """Calibrated with the text's second half; the first tokens of it are scored."""
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[len(text) // 2 :])
    options = ConvertOptions(calibration=str(tmp_path / "text.txt"), calibration_tokens=8192)
    made(source, tmp_path / "nearest", "nearest")
    made(source, tmp_path / "gptq", "gptq", options)
    nearest, gptq = (divergence(source, tmp_path / name) for name in ("nearest", "gptq"))
    assert gptq < 0.6 * nearest
    assert run("verify", tmp_path / "gptq", "--against", source).code == 0


def test_an_expert_that_nothing_reaches_is_named(source: Path, tmp_path: Path) -> None:
    """It gets the codes of least error, which need no data."""
    file = tmp_path / "gptq.yaml"
    file.write_text(json.dumps(recipe("gptq")))
    done = run(
        "convert", source, tmp_path / "out", "--recipe", file, "--calibration-tokens", "1024"
    )
    assert done.code == 0
    assert f"model.layers.0.mlp.experts: {NEVER}\n" in done.out + done.err
    assert "never reached 4 experts in 4 layers" in done.out + done.err
    plain = made(source, tmp_path / "mse", "mse")
    found = Manifest.read(tmp_path / "out")
    for name, entry in found.linears.items():
        if ".experts." in name:
            assert entry.unreached == (NEVER,)
            assert entry.experts_sqnr_db[NEVER] == plain.linears[name].experts_sqnr_db[NEVER]
            assert plain.linears[name].unreached == ()
