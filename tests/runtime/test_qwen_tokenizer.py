"""Tokenizers that are read without transformers: which, and that they are those of transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from qwen3_ascend.errors import CheckpointError, RequestError
from qwen3_ascend.runtime.qwen_tokenizer import QwenTokenizer
from qwen3_ascend.runtime.tokenizer import TransformersTokenizer, load_tokenizer

TEXTS = [
    "Hello, world! It's 12345.678\r\n\r\n\tYes.",
    "西湖 🗺️ e\u0301 Ünïcödé HELLO",
    "<|im_start|>user <tool> a <tool>b<|im_end|>",
    "x" * 300,
    "",
]
QUESTION = {"role": "user", "content": '西湖 <a> & "b"\'s?\n'}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path) -> Path:
    """The tokenizer of the tiny model, which has Qwen's form."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(tiny_source / name, tmp_path / name)
    return tmp_path


def config(**changes: Any) -> Callable[[Path], object]:
    """Changes keys of tokenizer_config.json; None leaves one out."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: data[key] for key in data if data[key] is not None}))

    return change


def tokenizer(edit: Callable[[Backend], object]) -> Callable[[Path], object]:
    """Changes tokenizer.json."""

    def change(folder: Path) -> None:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        edit(backend)
        backend.save(str(folder / "tokenizer.json"))

    return change


def model(**changes: Any) -> Callable[[Path], object]:
    """Changes what tokenizer.json says of its model."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"] |= changes
        path.write_text(json.dumps(data))

    return change


def file(name: str, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def stated(**changes: Any) -> Callable[[Path], object]:
    """States the added tokens in the config, as Qwen does, with changes of the first."""

    def change(folder: Path) -> None:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        added[0] |= changes
        config(added_tokens_decoder={str(token.pop("id")): token for token in added})(folder)

    return change


def template_in_config(template: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        config(chat_template=template)(folder)

    return change


def surrounding(backend: Backend) -> None:
    number = backend.token_to_id("<|im_start|>")
    assert number is not None
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)]
    )


def assign(name: str, part: Any) -> Callable[[Backend], object]:
    return lambda backend: setattr(backend, name, part)


QWENS: dict[str, Callable[[Path], object]] = {
    "as it is": lambda folder: None,
    "class of Qwen": config(tokenizer_class="Qwen2Tokenizer"),
    "fast class of Qwen": config(tokenizer_class="Qwen2TokenizerFast"),
    "any fast class": config(tokenizer_class="PreTrainedTokenizerFast"),
    "as published": config(
        tokenizer_class="Qwen2Tokenizer", add_bos_token=False, add_prefix_space=False,
        errors="replace", split_special_tokens=False, model_max_length=5,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    ),
    "added tokens stated": stated(),
    "truncation": tokenizer(lambda backend: backend.enable_truncation(7)),
    "padding": tokenizer(lambda backend: backend.enable_padding(length=99, pad_id=0)),
    "vocabulary beside it": file("vocab.json", "{}"),
    "no template": template_in_config(None),
    "template in the config": template_in_config("{{ messages }}"),
}  # fmt: skip

OTHERS: dict[str, Callable[[Path], object]] = {
    "another class": config(tokenizer_class="GPT2Tokenizer"),
    "no class": config(tokenizer_class=None),
    "no end": config(eos_token=None),
    "end that is a record": config(eos_token={"content": "<|im_end|>", "__type": "AddedToken"}),
    "end that is no token": config(eos_token="<end>"),
    "unknown key": config(fix_mistral_regex=True),
    "first token": config(add_bos_token=True, bos_token="<|im_start|>"),
    "prefix space": config(add_prefix_space=True),
    "split special tokens": config(split_special_tokens=True),
    "new special token": config(additional_special_tokens=["<a>"]),
    "token by name": config(tool_token="<tool>"),
    "added tokens stated otherwise": stated(lstrip=True),
    "added in a file": file("added_tokens.json", '{"<tool>": 4096}'),
    "special in a file": file("special_tokens_map.json", '{"eos_token": "<|im_start|>"}'),
    "more templates": file("additional_chat_templates/tool_use.jinja", "x"),
    "several templates": template_in_config([{"name": "default", "template": "x"}]),
    "another normalizer": tokenizer(assign("normalizer", normalizers.NFKC())),
    "no normalizer": tokenizer(assign("normalizer", normalizers.Sequence([]))),
    "another division": tokenizer(assign("pre_tokenizer", pre_tokenizers.ByteLevel())),
    "another decoder": tokenizer(assign("decoder", decoders.Fuse())),
    "no merges of whole words": model(ignore_merges=True),
    "dropout": model(dropout=0.5),
    "unknown token": model(unk_token="<|endoftext|>"),
    "unknown tokens in one": model(fuse_unk=True),
    "bytes": model(byte_fallback=True),
    "prefix": model(continuing_subword_prefix="##"),
    "suffix": model(end_of_word_suffix="</w>"),
    "surrounding tokens": tokenizer(surrounding),
    "token that strips": tokenizer(
        lambda backend: backend.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True)])
    ),
    "token of whole words": tokenizer(
        lambda backend: backend.add_special_tokens([AddedToken("user", single_word=True)])
    ),
    "token that is normalized": tokenizer(
        lambda backend: backend.add_tokens([AddedToken("e\u0301", normalized=True)])
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", QWENS.values(), ids=QWENS)
def test_qwens_form_is_read_as_transformers_reads_it(
    change: Callable[[Path], object], folder: Path
) -> None:
    change(folder)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, QwenTokenizer)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.has_chat_template == bool(theirs.chat_template)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded
        spelled = [theirs.decode([token], clean_up_tokenization_spaces=False) for token in ids[:20]]
        assert [ours.spell(token) for token in ids[:20]] == spelled


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_says_anything_else_is_left_to_transformers(
    change: Callable[[Path], object], folder: Path
) -> None:
    change(folder)
    try:
        assert isinstance(load_tokenizer(folder), TransformersTokenizer)
    except CheckpointError as error:  # which need not take it either
        assert "tokenizer" in str(error)


def test_the_published_tokenizer_has_qwens_form(qwen3_tokenizer: Path) -> None:
    assert isinstance(load_tokenizer(qwen3_tokenizer), QwenTokenizer)


TEMPLATES = [
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "  {% if true %}\n x\n  {% endif %}\n{{ messages | length }} {{ tools is none }}",
    "{{ documents is none }}{{ messages | tojson }}\n{{ messages | tojson(indent=2) }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }} {{ enable_thinking }}",
    "{{ strftime_now('%Y') }}{% if add_generation_prompt %}!{% endif %}",
    "{{ messages[0]['content'].split()[::-1] }}{{ messages[0].reasoning_content is defined }}",
]
CONVERSATIONS = [[QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION]]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("template", [None, *TEMPLATES], ids=range(len(TEMPLATES) + 1))
def test_plain_conversations_are_rendered_as_transformers_does(
    template: str | None, messages: list[Any], thinking: bool | None, folder: Path
) -> None:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    ours = load_tokenizer(folder)
    switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **switch
    )
    assert ours.render(messages, enable_thinking=thinking) == expected
    assert "_whole" not in vars(ours), "transformers was asked"


def test_the_published_template(qwen3_tokenizer: Path) -> None:
    ours, theirs = load_tokenizer(qwen3_tokenizer), AutoTokenizer.from_pretrained(qwen3_tokenizer)
    for messages in CONVERSATIONS:
        for thinking in (True, False):
            assert ours.render(messages, enable_thinking=thinking) == theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
    assert "_whole" not in vars(ours)


MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "special tokens": ("{{ eos_token }}{{ messages[0].content }}", {}, {}),
    "generation": ("{% generation %}{{ messages[0].content }}{% endgeneration %}", {}, {}),
    "parts": ("{{ messages[0].content[0].text }}", {"content": [{"text": "x"}]}, {}),
    "nothing": ("{{ messages[0].content is defined }}", {"content": None}, {}),
    "reasoning": ("{{ messages[0].reasoning_content }}", {"thinking": "x"}, {}),
    "tools": ("{{ tools | tojson }}", {}, {"tools": [{"name": "f"}]}),
    "another template": ("x", {}, {"chat_template": "{{ messages[0].role }}"}),
    "no opening": ("{{ add_generation_prompt }}", {}, {"add_generation_prompt": False}),
}


@pytest.mark.parametrize(("template", "more", "variables"), MORE.values(), ids=MORE)
def test_other_conversations_are_left_to_transformers(
    template: str, more: dict[str, Any], variables: dict[str, Any], folder: Path
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{**QUESTION, **more}]
    expected = theirs.apply_chat_template(
        messages, **{"tokenize": False, "add_generation_prompt": True, **variables}
    )
    assert ours.render(messages, **variables) == expected


BROKEN = [
    "{% if %}",
    "{{ raise_exception('no ' + messages[0].role) }}",
    "{{ messages[9].content.x }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{% set ns = namespace(_x=1) %}{{ ns._x }}",
]


@pytest.mark.parametrize("template", BROKEN)
def test_broken_templates_are_refused_in_transformers_words(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    ours = load_tokenizer(folder)
    assert isinstance(ours, QwenTokenizer) and ours.has_chat_template
    with pytest.raises(RequestError, match="the chat template of") as refusal:
        ours.render([QUESTION])
    assert "\n" not in str(refusal.value)


def test_generating_imports_only_what_it_needs(tiny_w8a8: Path) -> None:
    script = (
        "import sys; from qwen3_ascend.cli import main\n"
        "main.main(['generate', *sys.argv[1:]], standalone_mode=False)\n"
        "heavy = {'transformers', 'huggingface_hub', 'safetensors', 'yaml', 'starlette',\n"
        "         'uvicorn', 'httpx', 'httpx2', 'requests', 'torch._dynamo', 'torch._inductor',\n"
        "         'qwen3_ascend.convert.pipeline', 'qwen3_ascend.runtime.serving'}\n"
        "print('imported:', heavy & set(sys.modules))"
    )
    arguments = [str(tiny_w8a8), "--prompt", "What does river mean?", "--quiet"]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("As a noun") and done.stdout.endswith("imported: set()\n")
