"""Whether a model that vLLM was given is a checkpoint of ours, and what vLLM does with it then.

Everything that headers and options tell is checked here, in the process that the user has started,
before any engine runs.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.platforms import current_platform

from qwen3_ascend.checkpoint.companions import CONFIG_NAME
from qwen3_ascend.checkpoint.manifest import MANIFEST_NAME
from qwen3_ascend.checkpoint.reader import CheckpointReader
from qwen3_ascend.checkpoint.target import TARGETS
from qwen3_ascend.checkpoint.verify import structure_problems
from qwen3_ascend.errors import CheckpointError, OptionError, UserError
from qwen3_ascend.vllm.linears import check_platform
from qwen3_ascend.vllm.names import PLUGIN
from qwen3_ascend.vllm.one_line import end_in_one_line, say_in_one_line
from qwen3_ascend.vllm.shards import check_division

LOG = logging.getLogger("vllm.qwen3_ascend")
TIED = "tie_word_embeddings"


def settle(arguments: Any) -> None:
    """Sets what vLLM needs to know of checkpoints of ours; leaves any other model alone.

    Args:
        arguments: vLLM's EngineArgs, which are changed.

    Raises:
        UserError: if a checkpoint is not whole, or an option asks for what it cannot do.
    """
    try:
        target = _checkpoint_of(arguments, arguments.model, arguments.revision)
        draft = _draft_of(arguments)
    except UserError:
        raise
    except Exception as error:  # whatever the arguments of a version that we do not know are
        LOG.warning("qwen3-ascend: %s cannot be recognised (%s)", arguments.model, error)
        return
    if target is None and draft is None:
        return
    end_in_one_line()
    with say_in_one_line():
        check_platform(current_platform.device_type)
        _check_unset("--load-format", arguments.load_format, "auto")
        if target is not None:
            _settle_target(arguments, target)
        if draft is not None:
            _settle_draft(arguments, draft)
        arguments.load_format = PLUGIN  # which both share; the loader knows whose a model is


def _settle_target(arguments: Any, folder: Path) -> None:
    _check_options(arguments)
    reader = _opened(arguments, folder)
    if str(folder) != arguments.model:
        arguments.served_model_name = arguments.served_model_name or arguments.model
        arguments.model, arguments.revision = str(folder), None
    arguments.quantization = PLUGIN
    if _has_another_head(reader, folder):
        arguments.hf_overrides = {**_overrides(arguments), TIED: reader.config.tie_word_embeddings}


def _settle_draft(arguments: Any, folder: Path) -> None:
    """vLLM computes with a draft by its own configuration, but has no place to correct that."""
    if _has_another_head(_opened(arguments, folder), folder):
        raise OptionError(
            f"{folder} has a head of its own, though its config.json ties it to the embedding, "
            f"which vLLM does not take in the draft of speculative decoding; convert the draft "
            f"with a recipe that leaves the head alone, such as w8a8-plain"
        )
    given = arguments.speculative_config or {}
    _check_unset("the draft's quantization", given.get("quantization"))
    if "model" not in given:
        arguments.spec_model = None  # --spec-model, which vLLM takes beside no other name
    arguments.speculative_config = {
        **given, "model": str(folder), "revision": None, "quantization": PLUGIN
    }  # fmt: skip


def _opened(arguments: Any, folder: Path) -> CheckpointReader:
    """A checkpoint that is whole as far as headers tell, and can be divided among the ranks."""
    reader = CheckpointReader(folder)
    for problem in structure_problems(reader):
        raise CheckpointError(f"{folder}: {problem}")
    if reader.config.experts and getattr(arguments, "enable_expert_parallel", False):
        raise OptionError(
            "--enable-expert-parallel: ranks share the inner dimension of every expert of this "
            "checkpoint; leave the option out, or export the checkpoint"
        )
    on_device = current_platform.device_type == "npu"
    target = TARGETS[reader.manifest.target] if on_device else None
    check_division(reader.manifest, arguments.tensor_parallel_size, target)
    return reader


def _has_another_head(reader: CheckpointReader, folder: Path) -> bool:
    """Whether a head that differs from the embedding is stored though config.json ties the two."""
    stated = json.loads((folder / CONFIG_NAME).read_text()).get(TIED, True)
    return bool(stated != reader.config.tie_word_embeddings)


def _draft_of(arguments: Any) -> Path | None:
    """The folder of the draft, if that is a checkpoint of ours."""
    given = arguments.speculative_config or {}
    model = given.get("model") or getattr(arguments, "spec_model", None)
    return _checkpoint_of(arguments, model, given.get("revision")) if model else None


def _checkpoint_of(arguments: Any, model: str, revision: str | None) -> Path | None:
    """The folder of a checkpoint of ours, downloaded if it is on a hub; None for other models."""
    folder = Path(model)
    if folder.is_dir():
        return folder if (folder / MANIFEST_NAME).is_file() else None
    try:
        return _from_hub(arguments, model, revision)
    except UserError:
        raise
    except Exception as error:  # whatever a hub may answer about somebody else's model
        LOG.debug("%s: %s", model, error)
        return None


def _from_hub(arguments: Any, name: str, revision: str | None) -> Path | None:
    """Downloads all of a checkpoint once, before engines and their workers want parts of it."""
    options = {"revision": revision}
    if envs.VLLM_USE_MODELSCOPE:  # as vLLM takes models from there; the token is in its environment
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download

        listed = HubApi().get_model_files(name, **options)
        is_ours = MANIFEST_NAME in [file["Path"] for file in listed]
    else:
        from huggingface_hub import file_exists, snapshot_download

        options["token"] = arguments.hf_token if isinstance(arguments.hf_token, str) else None
        is_ours = file_exists(name, MANIFEST_NAME, **options)
    if not is_ours:
        return None
    end_in_one_line()
    try:
        return Path(snapshot_download(name, cache_dir=arguments.download_dir, **options))
    except Exception as error:  # each library has its own, over those of requests or httpx
        line = " ".join(str(error).split())
        raise CheckpointError(f"{name} cannot be downloaded: {line}") from error


def _check_unset(what: str, value: object, default: object = None) -> None:
    if value not in {default, PLUGIN}:
        raise OptionError(
            f"{what} {value} is not for a checkpoint of qwen3-ascend, which is quantized and "
            f"laid out already; leave {what} out"
        )


def _check_options(arguments: Any) -> None:
    """Refuses what vLLM would do to weights that these cannot bear."""
    _check_unset("--quantization", arguments.quantization)
    if arguments.enable_lora:
        raise OptionError(
            "--enable-lora: adapters are not supported on a checkpoint of qwen3-ascend; merge the "
            "adapter into its base model, convert the result and serve that"
        )
    if arguments.enable_sleep_mode:
        raise OptionError(
            "--enable-sleep-mode: weights in FRACTAL_NZ cannot be put to sleep and loaded again; "
            "leave the option out, or stop the engine and start it anew"
        )


def _overrides(arguments: Any) -> dict[str, Any]:
    given = arguments.hf_overrides or {}
    if not isinstance(given, dict):
        raise OptionError(
            "hf_overrides must be a dictionary: this checkpoint stores a head of its own, and vLLM "
            "has to be told"
        )
    return given
