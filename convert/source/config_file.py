"""config.json in its dialects, read as transformers 5 reads it, or refused by name.

Every key is one that is read, one that no forward pass depends on, or one that might change what
the model computes: the last are honoured where a Qwen3 has them, and refused where they say
anything that a Qwen3 does not do. Where two keys contradict each other, transformers decides, and
a note says so; where transformers cannot decide either, both are named.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3_ascend.checkpoint.config import (
    MAX_CONTEXT,
    ExpertsConfig,
    Qwen3Config,
    RopeConfig,
)
from qwen3_ascend.convert.exchange import DESCRIPTION_NAME
from qwen3_ascend.errors import ConfigError

DENSE, MIXTURE = "qwen3", "qwen3_moe"

ARCHITECTURES = {
    DENSE: ("Qwen3ForCausalLM", "Qwen3Model"),
    MIXTURE: ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
}
"""Of each model type, a causal language model, and its backbone as embedding models publish it."""

OTHER_HEADS = {
    "ForSequenceClassification": "a classifier or reward model",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a question-answering model",
    "ForConditionalGeneration": "a multimodal or encoder-decoder model",
}

OTHER_MODELS = {
    "qwen3_next": "its linear attention is not supported",
    "qwen3_vl": "it is a vision-language model",
    "qwen3_vl_moe": "it is a vision-language model",
    "qwen3_5": "it is another architecture",
}

READ_KEYS = frozenset({
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "hidden_act", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "rope_theta", "rope_scaling", "rope_parameters",
})  # fmt: skip

COUNT_KEYS = ("num_local_experts", "num_experts")
"""The number of experts: as newer transformers write it, and as the models of the Hub have it."""

MIXTURE_KEYS = frozenset({
    *COUNT_KEYS, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers", "output_router_logits", "router_aux_loss_coef",
})  # fmt: skip
"""Of mixtures of experts: read, but for the last two, which steer training; neutral, or refused,
elsewhere."""

IDLE_KEYS = frozenset({
    "attention_dropout", "hidden_dropout", "initializer_range", "use_cache", "torch_dtype", "dtype",
    "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "output_attentions", "output_hidden_states", "return_dict",
    "id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "name_or_path",
    "chunk_size_feed_forward", "torchscript", "use_bfloat16", "tokenizer_class", "prefix",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "_commit_hash", "tie_encoder_decoder", "finetuning_task", "task_specific_params",
    "pretraining_tp", "unsloth_version", "unsloth_fixed", "model_name", "gradient_checkpointing",
    "use_flash_attn", "use_liger_kernel", "is_decoder",
})  # fmt: skip
"""What steers training, output or bookkeeping; no forward pass depends on it."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "use_qk_norm": (True, None),
    "qk_norm": (True, None),
    "partial_rotary_factor": (1, None),
    "rotary_percent": (1, None),
    "num_experts": (0, None),
    "transformers_weights": (None,),
    "auto_map": (None, {}),
}
"""Keys that change a model unless they say this, where that is not merely off."""

OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
"""A key that nobody knows says nothing if its value is one of these."""

SUSPECT = re.compile(
    r"scal|multipl|softcap|clip|bias|norm|sink|expert|moe|router|window|sliding|alibi|causal|"
    r"bidirection|parallel|rope|rotary|position|residual|gat(e|ing)|activation|lora|adapter|mtp|"
    r"nextn|kv_|qk_|cross|layer_config|vision|audio|text_config|num_.*layers|temperature"
)
"""A key that nobody knows and that has such a word in it might change what is computed."""

HARMLESS = re.compile(r"drop|init|loss|coef|_token_ids?$|version|path")
"""Unless it also has one of these."""

ROPE_TYPES = ("default", "yarn")

YARN_KEYS = frozenset({
    "factor", "original_max_position_embeddings", "attention_factor", "attn_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate",
})  # fmt: skip
ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, None),
    "extrapolation_factor": (1, None),
    "apply_yarn_scaling": (True, None),
    "finetuned": (True, False, None),
}

DEFAULT_EXPERTS, DEFAULT_PER_TOKEN, DEFAULT_EXPERT_SIZE = 128, 8, 768
"""Of transformers' Qwen3MoeConfig."""

DEFAULT_CONTEXT, DEFAULT_THETA = 32768, 10000.0
DEFAULT_WINDOW, DEFAULT_WINDOW_LAYERS = 4096, 28
"""Of transformers' Qwen3Config."""

Note = Callable[[str], None]


def read_config(
    data: Mapping[str, Any], where: str = "config.json", note: Note = lambda line: None
) -> Qwen3Config:
    """Reads a Hugging Face configuration.

    Args:
        data: the JSON object.
        where: its place, for errors and notes.
        note: is told what was decided where the configuration is not clear.

    Raises:
        ConfigError: naming the first thing that is not a Qwen3 this project supports.
    """
    return _Reader(data, where, note).config()


class _Reader:
    """Turns a foreign config.json into ours; all guessing about its dialects stays in here."""

    def __init__(self, data: Mapping[str, Any], where: str, note: Note) -> None:
        self.data, self.where, self._note_line = data, where, note

    def config(self) -> Qwen3Config:
        self._check_kind()
        self._check_quantization()
        self._check_other_keys()
        heads = self.count("num_attention_heads")
        config = Qwen3Config(
            hidden_size=self.count("hidden_size"),
            intermediate_size=self.count("intermediate_size"),
            num_layers=self.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=self.count("num_key_value_heads", heads),
            head_dim=self.count("head_dim", self._default_head_dim()),
            vocab_size=self.count("vocab_size"),
            max_position=self.count("max_position_embeddings", DEFAULT_CONTEXT),
            rms_norm_eps=self.number("rms_norm_eps", self.data.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            attention_bias=self.flag("attention_bias"),
            rope=_RopeReader(self).config(),
            experts=_ExpertsReader(self).config() if self._is_mixture else None,
        )
        self._check_windows(config.num_layers)
        self._check_heads(config)
        self._check_context(config)
        return config

    @property
    def _is_mixture(self) -> bool:
        return bool(self.data.get("model_type") == MIXTURE)

    def _default_head_dim(self) -> int:
        """What transformers takes: its Qwen3MoeConfig has no such field of its own."""
        if not self._is_mixture:
            return 128
        return max(1, self.count("hidden_size") // self.count("num_attention_heads"))

    def fail(self, message: str) -> ConfigError:
        """An error that names the file."""
        return ConfigError(f"{self.where}: {message}")

    def note(self, line: str) -> None:
        """A note that names the file."""
        self._note_line(f"{self.where}: {line}")

    def _check_kind(self) -> None:
        kind = self.data.get("model_type")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            why = f" ({known})" if (known := _other_model(kind)) else ""
            raise self.fail(
                f"model_type is {kind!r}{why}; only {DENSE!r} (dense Qwen3) and {MIXTURE!r} "
                f"(mixtures of experts) are supported"
            )
        architectures = self.data.get("architectures") or []
        if not isinstance(architectures, list):
            raise self.fail(f"architectures must be a list, not {architectures!r}")
        for name in architectures:
            if name not in ARCHITECTURES[kind]:
                what = next((w for end, w in OTHER_HEADS.items() if str(name).endswith(end)), None)
                raise self.fail(
                    f"architectures names {name!r}{f', {what}' if what else ''}; only a causal "
                    f"language model ({', '.join(ARCHITECTURES[kind])}) can be converted"
                )
        hidden_act = self.data.get("hidden_act", "silu")
        if hidden_act != "silu":
            raise self.fail(f"hidden_act is {hidden_act!r}; Qwen3 uses 'silu'")

    def _check_quantization(self) -> None:
        for key in ("quantization_config", "compression_config", "quantization", "quantize"):
            said = self.data.get(key)
            if said:
                raise self.fail(
                    f"{key} says that the weights are already quantized ({_method(key, said)}), "
                    f"which is read of compressed-tensors, FP8, GPTQ and AWQ, and of ModelSlim "
                    f"with its {DESCRIPTION_NAME}; use the original bf16 model, or remove {key} if "
                    f"they are not"
                )

    def _check_other_keys(self) -> None:
        """Honours or refuses by name whatever might change the forward pass."""
        unread = []
        for key, value in self.data.items():
            if key in READ_KEYS or key in IDLE_KEYS or (self._is_mixture and key in MIXTURE_KEYS):
                continue
            if key == "auto_map" and value:
                self.note("auto_map names code of its own, which is not run, as in transformers")
            elif key in NEUTRAL:
                self.require_neutral(key, value, NEUTRAL[key])
            elif _is_one_of(value, OFF):
                continue
            elif SUSPECT.search(key.lower()) and not HARMLESS.search(key.lower()):
                raise self.fail(
                    f"{key} is {_short(value)}, and a Qwen3 has no such key: it may change what "
                    f"the model computes; remove it if it does not"
                )
            else:
                unread.append(key)
        if unread:
            self.note(f"keys that a Qwen3 does not have are ignored: {', '.join(unread)}")

    def require_neutral(self, key: str, value: Any, neutral: Sequence[Any]) -> None:
        """Refuses a value that would change the model."""
        if not _is_one_of(value, neutral):
            raise self.fail(f"{key} is {_short(value)}, which is not supported")

    def _check_windows(self, layers: int) -> None:
        """layer_types decides, as in transformers; without it, the flags of the windows do."""
        flag = self.data.get("use_sliding_window", False)
        window = self.data.get("sliding_window", DEFAULT_WINDOW) if flag else None
        first = self.data.get("max_window_layers", DEFAULT_WINDOW_LAYERS)
        if window is not None and not isinstance(first, int):
            raise self.fail(f"max_window_layers must be a whole number, not {first!r}")
        by_flags = window is not None and first < layers
        kinds = self._layer_types(layers)
        if kinds is None and by_flags:
            raise self.fail(
                f"use_sliding_window is on from layer {first}: sliding window attention is in use; "
                f"only full attention is supported"
            )
        if kinds is not None and "sliding_attention" in kinds:
            off = "" if flag else ", although use_sliding_window is off"
            raise self.fail(
                f"layer_types has sliding_attention{off}: sliding window attention is in use; "
                f"only full attention is supported"
            )
        if kinds is not None and by_flags:
            self.note(
                "layer_types says full attention and use_sliding_window says windows; layer_types "
                "counts, as in transformers"
            )

    def _layer_types(self, layers: int) -> list[str] | None:
        kinds = self.data.get("layer_types")
        if kinds is None or kinds == []:
            return None
        if not isinstance(kinds, list):
            raise self.fail(f"layer_types must be a list, not {kinds!r}")
        if len(kinds) != layers:
            raise self.fail(
                f"layer_types has {len(kinds)} entries, but num_hidden_layers is {layers}"
            )
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise self.fail(f"layer_types has {kind!r}; only full_attention is supported")
        return kinds

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
            raise self.fail(f"{key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, value: Any) -> float:
        """A positive number that was found under a key."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise self.fail(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where nothing is said."""
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, not {value!r}")
        return value

    def _check_heads(self, config: Qwen3Config) -> None:
        if config.num_heads % config.num_kv_heads:
            raise self.fail(
                f"num_attention_heads {config.num_heads} is not a multiple of "
                f"num_key_value_heads {config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise self.fail(f"head_dim {config.head_dim} is odd: rotary embedding needs pairs")

    def _check_context(self, config: Qwen3Config) -> None:
        rope = config.rope
        context = max(config.max_position, rope.original_max_position * rope.factor)
        if context > MAX_CONTEXT:
            raise self.fail(f"a context of {context:.0f} tokens is beyond {MAX_CONTEXT}")


class _ExpertsReader:
    """The mixtures of experts, as transformers' Qwen3MoeDecoderLayer places them."""

    def __init__(self, reader: _Reader) -> None:
        self._reader, self._data = reader, reader.data

    def config(self) -> ExpertsConfig:
        read = self._reader
        count = self._count()
        per_token = read.count("num_experts_per_tok", DEFAULT_PER_TOKEN)
        if per_token > count:
            raise read.fail(f"num_experts_per_tok is {per_token}, but num_experts only {count}")
        layers = read.count("num_hidden_layers")
        dense = self._dense_layers(layers)
        if len(dense) == layers:
            raise read.fail(
                "mlp_only_layers and decoder_sparse_step leave no layer with experts: set "
                f"model_type to {DENSE!r} if it is a dense Qwen3"
            )
        size = read.count("moe_intermediate_size", DEFAULT_EXPERT_SIZE)
        return ExpertsConfig(count, per_token, size, read.flag("norm_topk_prob"), dense)

    def _count(self) -> int:
        said = {key: self._data[key] for key in COUNT_KEYS if self._data.get(key) is not None}
        if len({*map(repr, said.values())}) > 1:
            text = " and ".join(f"{key} {_short(value)}" for key, value in said.items())
            raise self._reader.fail(f"{text} contradict each other: remove the one that is wrong")
        return self._reader.count(next(iter(said), COUNT_KEYS[0]), DEFAULT_EXPERTS)

    def _dense_layers(self, layers: int) -> tuple[int, ...]:
        step, named = self._reader.count("decoder_sparse_step", 1), self._named_layers(layers)
        return tuple(n for n in range(layers) if n in named or (n + 1) % step)

    def _named_layers(self, layers: int) -> frozenset[int]:
        said = self._data.get("mlp_only_layers") or []
        numbers = said if isinstance(said, list) else [said]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise self._reader.fail(
                f"mlp_only_layers must be numbers of layers, not {_short(said)}"
            )
        if any(not 0 <= n < layers for n in numbers):
            self._reader.note(f"mlp_only_layers names layers that there are not, of {layers}")
        return frozenset(numbers)


class _RopeReader:
    """The rotary embedding, in both of its spellings.

    transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling. If both
    are there, transformers takes rope_scaling (`convert_rope_params_to_dict`).
    """

    def __init__(self, reader: _Reader) -> None:
        self._reader, self._data = reader, reader.data

    def config(self) -> RopeConfig:
        section = self._chosen()
        kind = section["rope_type"]
        theta = self._reader.number("rope_theta", section["rope_theta"])
        if theta <= 1:
            raise self._reader.fail(f"rope_theta must be above 1, not {theta!r}")
        if kind not in ROPE_TYPES:
            known = ", ".join(ROPE_TYPES)
            raise self._reader.fail(f"rope type {kind!r} is not supported; known types: {known}")
        self._check_keys(section, kind)
        return RopeConfig("default", theta) if kind == "default" else self._yarn(section, theta)

    def _chosen(self) -> dict[str, Any]:
        """The section that counts, under the names of transformers 5."""
        found = [self._section(key) for key in ("rope_scaling", "rope_parameters")]
        there = [section for section in found if section is not None]
        if len(there) == 2 and there[0] != there[1]:
            self._reader.note(
                "rope_scaling and rope_parameters differ; rope_scaling counts, as in transformers"
            )
        return there[0] if there else {"rope_type": "default", "rope_theta": self._theta()}

    def _section(self, name: str) -> dict[str, Any] | None:
        said = self._data.get(name)
        if not said:
            return None
        if not isinstance(said, dict):
            raise self._reader.fail(f"rope parameters must be an object, not {said!r}")
        section = {key: value for key, value in said.items() if value is not None}
        old = section.pop("type", "default")
        if section.setdefault("rope_type", old) != old and "type" in said:
            self._reader.note(
                f"{name} has type {old!r} and rope_type {section['rope_type']!r}; rope_type counts"
            )
        theta = self._data.get("rope_theta")
        if theta is not None and section.setdefault("rope_theta", theta) != theta:
            self._reader.note(
                f"rope_theta is {theta!r}, but {section['rope_theta']!r} in {name}, which counts"
            )
        section.setdefault("rope_theta", self._theta())
        return section

    def _theta(self) -> Any:
        theta = self._data.get("rope_theta")
        return DEFAULT_THETA if theta is None else theta

    def _check_keys(self, section: Mapping[str, Any], kind: str) -> None:
        known = ROPE_KEYS | YARN_KEYS
        for key, value in section.items():
            if key in ROPE_NEUTRAL:
                self._reader.require_neutral(key, value, ROPE_NEUTRAL[key])
            elif key not in known and not _is_one_of(value, OFF):
                raise self._reader.fail(
                    f"the rope parameters have the key {key!r} ({_short(value)}), which is not "
                    f"supported for the rope type {kind!r}; remove it if it changes nothing"
                )
        idle = [key for key in section if kind == "default" and key in YARN_KEYS]
        if idle:
            self._reader.note(f"the rope type 'default' does not use {', '.join(idle)}")

    def _yarn(self, section: dict[str, Any], theta: float) -> RopeConfig:
        def number(key: str, default: float) -> float:
            return self._reader.number(key, section.get(key, default))

        trained = self._reader.count("max_position_embeddings", DEFAULT_CONTEXT)
        original = number("original_max_position_embeddings", trained)
        factor = number("factor", trained / original)
        scales = [number(key, 1.0) for key in ("mscale", "mscale_all_dim") if section.get(key)]
        return RopeConfig(
            type="yarn",
            theta=theta,
            factor=factor,
            original_max_position=int(original),
            attention_factor=number("attention_factor", _yarn_attention(factor, scales))
            * self._further_factor(section),
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(section.get("truncate", True)),
        )

    def _further_factor(self, section: Mapping[str, Any]) -> float:
        """attn_factor, with which vLLM and SGLang multiply what the paper states; the distilled
        DeepSeek-R1-0528-Qwen3-8B undoes the paper's factor by it. transformers ignores it."""
        if "attn_factor" not in section:
            return 1.0
        factor = self._reader.number("attn_factor", section["attn_factor"])
        if "attention_factor" in section:
            raise self._reader.fail(
                f"the rope parameters have attention_factor {section['attention_factor']!r} and "
                f"attn_factor {factor!r}; keep the one that is meant"
            )
        self._reader.note(
            f"attn_factor {factor!r} scales the rotary embedding, as in vLLM and SGLang; "
            f"transformers ignores it"
        )
        return factor


def _yarn_attention(factor: float, scales: Sequence[float]) -> float:
    """The scale of cosine and sine when the configuration does not state one; mscale and
    mscale_all_dim count only together."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(scales[0]) / scale(scales[1]) if len(scales) == 2 else scale(1.0)


def _other_model(kind: object) -> str | None:
    """What a model of another type is, if its name tells."""
    if not isinstance(kind, str):
        return None
    multimodal = re.search(r"_vl|vision|llava|omni|audio|asr", kind)
    return OTHER_MODELS.get(kind) or ("it is a multimodal model" if multimodal else None)


def _method(key: str, said: object) -> str:
    """Who quantized, as far as a configuration tells."""
    if key == "quantize":
        return f"ModelSlim, {said}"
    if not isinstance(said, dict):
        return str(said)
    if method := said.get("quant_method") or said.get("quant_algo") or said.get("format"):
        return str(method)
    bits = said.get("bits")
    return f"MLX, {bits} bits" if bits else "by an unnamed method"


def _is_one_of(value: object, known: Sequence[Any]) -> bool:
    """As `in`, but False is no 0 and True is no 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
