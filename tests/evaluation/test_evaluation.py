"""`eval` against transformers: the same figures of the same models on the same windows."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from support import tiny_models, tiny_tokenizers
from support.command_line import run
from support.folders import flip_a_byte, reseal
from support.hub_client import REPO, talk_to
from support.hub_server import HubServer
from support.tiny_models import DATA
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from qwen3_ascend import convert_checkpoint
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.evaluation import Evaluation, EvaluationOptions, evaluate, measuring

TEXT = DATA / "heldout.txt"
OPTIONS = EvaluationOptions(window=64, windows=9, device="cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one layer changed, so that transformers can tell the distance."""
    folder = tmp_path_factory.mktemp("other") / "changed"
    shutil.copytree(DATA, folder)
    weights = load_file(folder / "model.safetensors")
    down = weights["model.layers.2.mlp.down_proj.weight"]
    noise: Tensor = torch.randn(down.shape, generator=torch.Generator().manual_seed(0))
    weights["model.layers.2.mlp.down_proj.weight"] = down + (0.02 * noise).bfloat16()
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, other: Path) -> Path:
    """The changed model, converted without loss."""
    folder = tmp_path_factory.mktemp("converted") / "out"
    convert_checkpoint(other, folder, "bf16")
    return folder


@pytest.fixture(scope="module")
def found(out: Path) -> Evaluation:
    return evaluate(out, TEXT, against=DATA, options=OPTIONS)


def log_probabilities(folder: Path) -> tuple[Tensor, Tensor]:
    """(windows [W, T], log probabilities [W, T, vocab]) by transformers, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT.read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(tokens[: 9 * 64]).view(9, 64)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return windows, model(windows).logits.log_softmax(-1)


def test_figures_are_those_of_transformers(found: Evaluation, other: Path) -> None:
    windows, reference = log_probabilities(DATA)
    _, changed = log_probabilities(other)
    right = windows[:, 1:, None]
    losses = [-each[:, :-1].gather(2, right)[..., 0].double() for each in (reference, changed)]
    kl = (reference.exp() * (reference - changed)).sum(-1)[:, :-1].double()
    said = found.comparison
    assert said is not None and found.reference is not None and found.tokens == 9 * 63
    assert found.reference.perplexity.value == pytest.approx(
        losses[0].mean().exp().item(), rel=1e-5
    )
    assert found.model.perplexity.value == pytest.approx(losses[1].mean().exp().item(), rel=1e-5)
    change = (losses[1].mean() - losses[0].mean()).exp().item() - 1
    assert said.perplexity_change.value == pytest.approx(change, abs=1e-5)
    assert said.kl.value == pytest.approx(kl.mean().item(), rel=1e-3)
    assert said.kl.value > 1e-3
    assert said.kl_99 == pytest.approx(kl.flatten().quantile(0.99).item(), rel=1e-3)
    assert said.kl_max.value == pytest.approx(kl.max().item(), rel=1e-3)
    assert (said.kl_max.window, said.kl_max.token) == divmod(int(kl.argmax()), 63)
    same = (reference.argmax(-1) == changed.argmax(-1))[:, :-1].double().mean().item()
    assert said.same_top_token.value == pytest.approx(same)
    probability = losses[1].neg().exp().mean() - losses[0].neg().exp().mean()
    assert said.right_token.value == pytest.approx(probability.item(), abs=1e-6)


def test_groups_of_windows_change_nothing(
    found: Evaluation, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "STATES_BYTES", 2 * 2 * 64 * 256 * 4)  # two windows at a time
    calls: list[tuple[int, int]] = []
    again = evaluate(
        out, TEXT, against=DATA, options=OPTIONS, progress=lambda *call: calls.append(call)
    )
    assert calls == [(done, 40) for done in range(1, 41)]  # 5 groups, 2 models, 4 layers
    assert again.comparison is not None and found.comparison is not None
    assert again.comparison.kl.value == pytest.approx(found.comparison.kl.value, rel=1e-4)
    assert again.model.perplexity.value == pytest.approx(found.model.perplexity.value, rel=1e-6)


def test_a_model_against_itself(out: Path, other: Path) -> None:
    said = evaluate(out, TEXT, against=other, options=OPTIONS).comparison
    assert said is not None
    assert said.kl.value == pytest.approx(0, abs=1e-6) and said.same_top_token.value == 1
    assert said.verdict == "not distinguishable"


def test_two_models_with_one_reference(out: Path, found: Evaluation, tmp_path: Path) -> None:
    convert_checkpoint(DATA, tmp_path / "plain", "w8a8-plain")
    both = evaluate(tmp_path / "plain", TEXT, against=DATA, compare=out, options=OPTIONS)
    assert both.comparison is not None and both.kl_difference is not None
    assert both.other_comparison is not None and both.other_comparison == found.comparison
    assert both.kl_difference.value == pytest.approx(
        both.other_comparison.kl.value - both.comparison.kl.value, rel=1e-6
    )
    low, high = both.kl_difference.low, both.kl_difference.high
    assert low is not None and high is not None and low > 0  # the changed one is clearly farther
    assert both.model.recipe == "w8a8-plain" and both.model.bits_per_weight < 10


def test_perplexity_alone(out: Path, found: Evaluation) -> None:
    alone = evaluate(out, TEXT, options=OPTIONS)
    assert alone.model == found.model
    assert (alone.reference, alone.comparison, alone.kl_difference) == (None, None, None)


def test_a_text_that_it_was_calibrated_with_is_noted(out: Path, tmp_path: Path) -> None:
    seen = shutil.copytree(out, tmp_path / "seen")
    record = {"name": "a.txt", "blake3": blake3(TEXT.read_bytes()).hexdigest(), "tokens": 9,
              "windows": 1, "device": "cpu"}  # fmt: skip
    reseal(seen, lambda manifest: manifest.update(calibration=record))
    notes: list[str] = []
    evaluate(seen, TEXT, options=replace(OPTIONS, windows=1), note=notes.append)
    assert len(notes) == 1 and "calibrated with this text" in notes[0]


def test_few_windows_have_no_interval(out: Path) -> None:
    options = replace(OPTIONS, windows=7)
    said = evaluate(out, TEXT, against=DATA, options=options).comparison
    assert said is not None and said.kl.low is None and said.kl.high is None
    assert said.verdict == "unknown"


def test_the_reference_may_be_on_a_hub(
    hub: HubServer, found: Evaluation, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model(REPO, DATA)
    talk_to(hub, tmp_path / "cache", monkeypatch)
    said = evaluate(out, TEXT, against=REPO, options=OPTIONS).comparison
    assert said == found.comparison


def test_it_is_read_back_as_it_was_saved(found: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(found.to_json()))
    assert Evaluation.read(path) == found
    del (data := found.to_json())["windows"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="windows"):
        Evaluation.read(path)


def test_the_command_prints_saves_and_bounds(out: Path, found: Evaluation, tmp_path: Path) -> None:
    options = ("--window", "64", "--windows", "9", "--device", "cpu")
    asked = ("eval", out, "--text", TEXT, "--against", DATA, *options)
    done = run(*asked, "--save", tmp_path / "eval.json", "--max-kl", "10")
    assert (done.code, done.err) == (0, "")
    assert "few windows" in done.out and "KL divergence" in done.out and "change" in done.out
    saved = Evaluation.read(tmp_path / "eval.json")
    assert saved.comparison == found.comparison
    printed = run(*asked, "--json", "--max-kl", "0.0001")
    assert printed.code == 1 and "above 0.0001" in printed.err
    assert json.loads(printed.out) == json.loads((tmp_path / "eval.json").read_text())


def refused(*arguments: str | Path, text: Path = TEXT) -> str:
    return run("eval", *arguments, "--text", text).one_line_error()


def test_refusals_are_one_line(out: Path, tmp_path: Path) -> None:
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("Two words.")
    latin.write_bytes("Ümlaut".encode("latin-1"))
    assert "fewer than one window" in refused(out, text=short)
    assert "not UTF-8: byte 0 is 0xdc" in refused(out, text=latin)
    assert "No such file" in refused(out, text=tmp_path / "none.txt")
    assert "windows of 512" in refused(out, "--windows", "100000")
    assert "--against" in refused(out, "--compare", out)
    assert "--against" in refused(out, "--max-kl", "1")
    assert "longer than the context" in refused(out, "--window", "100000")
    assert "neither an existing folder" in refused(tmp_path / "none")


def test_models_of_other_tokens(out: Path, tmp_path: Path) -> None:
    vocabulary = tiny_models.write(tmp_path / "small")
    assert "4096 tokens" in refused(out, "--against", vocabulary)
    untold = tiny_models.write(tmp_path / "untold", tokenizer=False)
    assert "has no tokenizer" in refused(untold)
    respelt = shutil.copytree(DATA, tmp_path / "respelt")
    tiny_tokenizers.write(respelt)
    assert "divide" in refused(out, "--against", respelt)
    few = tiny_models.write(tmp_path / "few")
    assert "has 320: its tokenizer is that of another model" in refused(few)


def test_a_reference_without_a_tokenizer_is_read_with_the_models(
    out: Path, found: Evaluation, tmp_path: Path
) -> None:
    bare = shutil.copytree(DATA, tmp_path / "bare")
    for name in tiny_models.TOKENIZER_FILES:
        (bare / name).unlink()
    said = evaluate(out, TEXT, against=bare, options=OPTIONS).comparison
    assert said is not None and said == found.comparison


def test_a_text_may_come_through_a_pipe(found: Evaluation) -> None:
    """As of a shell's <(...): it can be read once."""
    reading, writing = os.pipe()
    text = TEXT.read_bytes()[:8000]
    os.write(writing, text)
    os.close(writing)
    piped = evaluate(DATA, f"/dev/fd/{reading}", options=OPTIONS)
    os.close(reading)
    assert piped.text_blake3 == blake3(text).hexdigest() and found.reference is not None
    assert piped.model.perplexity == found.reference.perplexity


def test_a_source_with_named_chat_templates(tmp_path: Path, found: Evaluation) -> None:
    """They lie in a folder of their own."""
    source = shutil.copytree(DATA, tmp_path / "source")
    named = source / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    named.write_text("{{ messages }}")
    assert found.reference is not None
    assert evaluate(source, TEXT, options=OPTIONS).model.perplexity == found.reference.perplexity


def test_a_model_that_is_far_too_sure(tmp_path: Path) -> None:
    """exp of its loss is beyond float64."""
    config = tiny_models.config(vocab_size=4096, num_hidden_layers=1)
    weights = tiny_models.tensors(config)
    weights["lm_head.weight"] *= 3000
    loud = tiny_models.write(tmp_path / "loud", config, weights)
    said = refused(loud, "--window", "64", "--windows", "1", "--device", "cpu")
    assert "nats a token" in said and str(loud) in said


def test_what_was_measured_is_printed_even_if_it_cannot_be_saved(out: Path, tmp_path: Path) -> None:
    asked = ("--window", "64", "--windows", "1", "--device", "cpu")
    done = run("eval", out, "--text", TEXT, *asked, "--save", tmp_path / "none" / "eval.json")
    assert done.one_line_error("No such file") and "perplexity" in done.out


def test_a_bound_is_a_number(out: Path) -> None:
    asked = ("--window", "64", "--windows", "1", "--device", "cpu", "--against", DATA)
    assert run("eval", out, "--text", TEXT, *asked, "--max-kl", "nan").code != 0


def test_weights_that_are_damaged_or_not_finite_are_named(out: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(out, tmp_path / "damaged")
    flip_a_byte(damaged, "model.layers.1.mlp.down_proj.weight")
    assert "its bytes differ" in refused(damaged, "--window", "64", "--windows", "1")
    infinite = shutil.copytree(DATA, tmp_path / "infinite")
    weights = load_file(infinite / "model.safetensors")
    weights["model.norm.weight"][3] = torch.inf
    save_file(weights, infinite / "model.safetensors")
    said = refused(infinite, "--window", "64", "--windows", "1", "--device", "cpu")
    assert "logits that are not finite" in said
