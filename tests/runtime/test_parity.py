"""The runtime computes what transformers computes, on random models of every supported form."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3_ascend import SamplingParams, convert_checkpoint, load
from qwen3_ascend.runtime import LLM

GREEDY = SamplingParams(max_new_tokens=64, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=20, ignore_eos=True)
TOLERANCE = 1e-3


def yarn(**more: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **more}


@dataclass(frozen=True)
class Form:
    """A form of model: changes to the configuration, and how it is saved."""

    changes: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    prompt: int = 40
    fused: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        make = tiny_models.mixture if "num_experts" in self.changes else tiny_models.config
        return make(**self.changes)

    def write(self, folder: Path) -> Path:
        """Saves a random model of this form."""
        weights = tiny_models.tensors(self.config)
        kept = tiny_models.fused(weights) if self.fused else weights
        return tiny_models.write(folder, self.config, kept, shards=self.shards)


def experts(count: int, chosen: int, fused: bool = False, **changes: Any) -> Form:
    """A form with mixtures of experts."""
    numbers = {"num_experts": count, "num_experts_per_tok": chosen}
    return Form({**numbers, **changes}, shards=1 if fused else 2, fused=fused)


FORMS = {
    "heads-4-of-4": Form({"num_key_value_heads": 4, "head_dim": 64}),
    "heads-4-of-2-head-dim-128": Form({"head_dim": 128}),
    "heads-8-of-1-tied": Form(
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64,
         "tie_word_embeddings": True}
    ),
    "head-dim-is-hidden-over-heads": Form({"hidden_size": 256, "head_dim": 64}),
    "tied-head-dim-128": Form({"head_dim": 128, "tie_word_embeddings": True}),
    "biases": Form({"attention_bias": True, "head_dim": 64}),
    "biases-sharded-tied": Form(
        {"attention_bias": True, "head_dim": 128, "tie_word_embeddings": True}, shards=3
    ),
    "odd-sizes": Form(
        {"hidden_size": 200, "intermediate_size": 328, "vocab_size": 997, "head_dim": 64}
    ),
    "odd-sizes-tied-sharded": Form(
        {"hidden_size": 72, "intermediate_size": 100, "vocab_size": 331, "head_dim": 64,
         "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
        shards=4,
    ),
    "rope-parameters": Form(
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    "yarn-rope-scaling": Form(
        {"max_position_embeddings": 256, "rope_scaling": yarn(), "rope_theta": 1e6,
         "head_dim": 128},
        prompt=150,
    ),
    "yarn-rope-scaling-type": Form(
        {"max_position_embeddings": 256, "rope_theta": 1e4, "head_dim": 64,
         "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
        prompt=180,
    ),
    "yarn-rope-parameters": Form(
        {"max_position_embeddings": 256, "rope_theta": None, "head_dim": 64,
         "rope_parameters": yarn(rope_theta=1e6, beta_fast=16.0, beta_slow=2.0)},
        prompt=150,
    ),
    "yarn-attention-factor-not-truncated": Form(
        {"max_position_embeddings": 256, "rope_theta": None, "head_dim": 64,
         "rope_parameters": yarn(rope_theta=1e6, attention_factor=1.3, truncate=False)},
        prompt=150,
    ),
    "yarn-mscale": Form(
        {"max_position_embeddings": 256, "rope_theta": None, "head_dim": 64,
         "rope_parameters": yarn(rope_theta=1e6, mscale=1.0, mscale_all_dim=0.5)},
        prompt=150,
    ),
    "experts-1-of-4": experts(4, 1, norm_topk_prob=False),
    "experts-1-of-4-normalized": experts(4, 1),
    "experts-2-of-8-fused": experts(8, 2, fused=True),
    "experts-2-of-8-not-normalized-tied": experts(
        8, 2, norm_topk_prob=False, tie_word_embeddings=True
    ),
    "experts-8-of-16": experts(16, 8, moe_intermediate_size=40),
    "experts-8-of-16-fused-not-normalized": experts(16, 8, fused=True, norm_topk_prob=False),
    "experts-in-every-other-layer": experts(4, 2, num_hidden_layers=4, decoder_sparse_step=2),
    "experts-but-for-some-layers": experts(
        6, 3, fused=True, num_hidden_layers=3, mlp_only_layers=[0, 2]
    ),
    "experts-biases-head-dim-by-default": experts(5, 2, attention_bias=True, head_dim=None),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model in both worlds."""

    form: Form
    source: Path
    converted: Path

    @cached_property
    def theirs(self) -> Any:
        """Qwen3ForCausalLM or Qwen3MoeForCausalLM."""
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.source, dtype=torch.float32, attn_implementation="eager"
        )
        return model  # from_pretrained has called eval()

    def ours(self, **options: Any) -> LLM:
        return load(self.converted, dtype="float32", **{"kv_cache_tokens": 4096, **options})

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        vocabulary = self.theirs.config.vocab_size
        return random.Random(seed).choices(range(vocabulary), k=length)

    @torch.inference_mode()
    def their_logits(self, tokens: list[int]) -> Tensor:
        logits: Tensor = self.theirs(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    def their_greedy(self, tokens: list[int], count: int) -> list[int]:
        """A plain loop, so that no generation default of transformers has a say."""
        chosen: list[int] = []
        new, cache = tokens, None
        with torch.inference_mode():
            while len(chosen) < count:
                step = self.theirs(torch.tensor([new]), past_key_values=cache, use_cache=True)
                new, cache = [int(step.logits[0, -1].argmax())], step.past_key_values
                chosen += new
        return chosen


@pytest.fixture(scope="module", params=FORMS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    form = FORMS[request.param]
    folder = tmp_path_factory.mktemp("parity")
    source = form.write(folder / "source")
    convert_checkpoint(source, folder / "converted", "bf16")
    return Case(form, source, folder / "converted")


def test_logits(case: Case) -> None:
    tokens = case.prompt(case.form.prompt)
    expected, actual = case.their_logits(tokens), case.ours().logits(tokens)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert expected.std(dim=-1).min() > 0.5, "these logits would hide a difference"
    assert (actual - expected).abs().max() < TOLERANCE


def test_greedy_continuation(case: Case) -> None:
    prompt = case.prompt(case.form.prompt, seed=1)
    expected = case.their_greedy(prompt, GREEDY.max_new_tokens)
    assert len(set(expected)) > 8, "this continuation is too plain to prove anything"
    (answer,) = case.ours().generate(prompt, GREEDY)
    assert list(answer.token_ids) == expected
    assert answer.finish_reason == "length"


def test_chunks_and_small_blocks_change_nothing(case: Case) -> None:
    prompt = case.prompt(case.form.prompt, seed=2)
    (whole,) = case.ours().generate(prompt, SHORT)
    chunked = case.ours(step_tokens=7, block_size=16)
    assert chunked.generate(prompt, SHORT)[0].token_ids == whole.token_ids
    assert (chunked.logits(prompt) - case.their_logits(prompt)).abs().max() < TOLERANCE


def test_a_batch_says_what_each_says_alone(case: Case) -> None:
    llm = case.ours(block_size=16)
    prompts = [case.prompt(length, seed=length) for length in (1, 15, 16, 17, 33, 64, 5)]
    alone = [llm.generate(prompt, SHORT)[0].token_ids for prompt in prompts]
    assert len(set(alone)) == len(alone)
    together = llm.generate(prompts, SHORT)
    assert [answer.token_ids for answer in together] == alone


@pytest.mark.parametrize("chosen", [1, 3])
def test_a_mixture_that_transformers_has_saved(chosen: int, tmp_path: Path) -> None:
    """Its config.json leaves out defaults, and has names of its own."""
    torch.manual_seed(chosen)
    config = Qwen3MoeConfig(
        num_experts=6, num_experts_per_tok=chosen, moe_intermediate_size=48, hidden_size=64,
        num_hidden_layers=2, vocab_size=320, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, initializer_range=0.3,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config)
    model.bfloat16().save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted", "bf16")
    case = Case(Form(), tmp_path / "source", tmp_path / "converted")
    prompt = case.prompt(30)
    assert (case.ours().logits(prompt) - case.their_logits(prompt)).abs().max() < TOLERANCE
