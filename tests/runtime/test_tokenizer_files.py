"""Tokenizer folders as people save them: token ids, prompts and text equal those of transformers,
and what is not usable is refused in one line."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_models, tiny_tokenizers
from support.command_line import program, run
from support.tiny_tokenizers import END, END_OF_TEXT, FLAGS, PLAIN_TEMPLATE, START
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer

from qwen3_ascend import SamplingParams, convert_checkpoint, load
from qwen3_ascend.errors import CheckpointError, RequestError
from qwen3_ascend.runtime.tokenizer import TransformersTokenizer, load_tokenizer

TEXTS = [
    "hello, world",
    "<tool> a <tool>b",
    f"{START}user{END} {END_OF_TEXT}",
    "西湖 🗺️ . it 's",
    "x" * 300,
    "<a> <b>",
]
QUESTION = {"role": "user", "content": "hello <tool>"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"<a>": "é"}}}]


def surrounding(tokenizer: Backend) -> None:
    number = tokenizer.token_to_id(START)
    assert number is not None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {START}", special_tokens=[(START, number)]
    )


def written(**options: Any) -> Callable[[Path], object]:
    return lambda folder: tiny_tokenizers.write(folder, **options)


def with_file(name: str, data: object, **options: Any) -> Callable[[Path], object]:
    def build(folder: Path) -> None:
        tiny_tokenizers.write(folder, **options)
        (folder / name).write_text(json.dumps(data))

    return build


def old_form(folder: Path) -> None:
    tiny_tokenizers.write_vocabulary_and_merges(folder)
    (folder / "added_tokens.json").write_text(json.dumps({END_OF_TEXT: 257, END: 258, START: 259}))


TOOL = {"content": "<tool>", **FLAGS, "special": False}
SPECIAL = {
    str(257 + number): {"content": text, **FLAGS, "special": True}
    for number, text in enumerate((END_OF_TEXT, END, START))
}
STRIPPING = {**TOOL, "lstrip": True, "rstrip": True}
FOLDERS: dict[str, Callable[[Path], object]] = {
    "plain": written(),
    "truncation": written(edit=lambda t: t.enable_truncation(7)),
    "padding": written(edit=lambda t: t.enable_padding(length=99, pad_id=257)),
    "surrounding tokens": written(edit=surrounding),
    "surrounding tokens, another class": written(
        edit=surrounding, tokenizer_class="PreTrainedTokenizerFast"
    ),
    "class of another model": written(edit=surrounding, tokenizer_class="LlamaTokenizerFast"),
    "class of Qwen": written(tokenizer_class="Qwen2Tokenizer"),
    "first token asked for": written(bos_token=START, add_bos_token=True),
    "added in the config": written(added_tokens_decoder={**SPECIAL, "260": TOOL}),
    "added, stripping": written(added_tokens_decoder={**SPECIAL, "260": STRIPPING}),
    "only added in the config": written(added_tokens_decoder={"260": TOOL}),
    "added in a file": with_file("added_tokens.json", {"<tool>": 260}),
    "special in the config": written(additional_special_tokens=["<a>", "<b>"]),
    "special by name": written(extra_special_tokens={"tool_token": "<tool>"}),
    "special in a file": with_file(
        "special_tokens_map.json", {"eos_token": START, "additional_special_tokens": ["<a>"]}
    ),
    "cleaned up": written(clean_up_tokenization_spaces=True),
    "vocabulary and merges": tiny_tokenizers.write_vocabulary_and_merges,
    "vocabulary, merges and added tokens": old_form,
    "short": written(model_max_length=5),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny_models.config()))
    return tmp_path


@pytest.mark.parametrize("build", FOLDERS.values(), ids=FOLDERS)
def test_folders(build: Callable[[Path], object], folder: Path) -> None:
    build(folder)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_token_id == theirs.eos_token_id
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        whole = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == whole
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == whole
        messages = [{"role": "user", "content": text}]
        prompt = ours.encode(ours.render(messages), add_special_tokens=False)
        assert prompt == theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


def test_the_folders_differ_from_each_other(tmp_path: Path) -> None:
    """What each of them is about shows in the token ids."""

    def ids(name: str, text: str) -> list[int]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        FOLDERS[name](folder)
        return load_tokenizer(folder).encode(text)

    assert len(ids("plain", "x" * 40)) == 40
    assert len(ids("truncation", "x" * 40)) == len(ids("padding", "x" * 40)) == 40
    assert len(ids("plain", "<tool>")) == 6
    assert ids("added in the config", "<tool>") == ids("added in a file", "<tool>") == [260]
    for name in ("surrounding tokens", "surrounding tokens, another class"):
        assert ids(name, "x")[::2] == [259, 259] and len(ids(name, "x")) == 3
    assert len(ids("special in the config", "<a><b>")) == 2
    assert ids("vocabulary and merges", "lo") == [256] == ids("plain", "lo")


TEMPLATES: dict[str, Any] = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "absent are none": "{{ tools is none }} {{ documents is none }}",
    "special tokens": "{{ eos_token }}{{ pad_token }}{{ messages[0].content }}",
    "trimmed": "  {% if true %}\n x\n  {% endif %}\n{{ messages | length }}",
    "loop controls": "{% for m in messages %}{% break %}{% endfor %}x",
    "no HTML escapes": "{{ tools | tojson }} {{ tools | tojson(indent=2) }}",
    "generation prompt": "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}",
    "named": [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | tojson }}"},
    ],
}


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates(template: object, tools: Any, folder: Path) -> None:
    tiny_tokenizers.write(folder, template)
    given = {} if tools is None else {"tools": tools}
    text = load_tokenizer(folder).render([QUESTION], **given)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert text == theirs.apply_chat_template(
        [QUESTION], tools=tools, tokenize=False, add_generation_prompt=True
    )


def test_templates_in_files(folder: Path) -> None:
    """They come before those in tokenizer_config.json; each name has one."""
    tiny_tokenizers.write(folder, "config")
    (folder / "chat_template.jinja").write_text("file {{ tools is none }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "additional_chat_templates" / "brief.jinja").write_text("brief")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render([QUESTION]) == "file True"
    assert tokenizer.render([QUESTION], tools=TOOLS) == "tools"
    assert tokenizer.render([QUESTION], chat_template="brief") == "brief"


BROKEN: dict[str, tuple[Any, list[str]]] = {
    "syntax": ("{% if %}", ["not valid Jinja", "line 1"]),
    "unknown tag": ("x\n{% mark %}", ["not valid Jinja", "line 2", "mark"]),
    "undefined": ("{{ messages[9].content.x }}", ["refuses these messages"]),
    "refusal": ("{{ raise_exception('no ' + messages[0].role) }}", ["refuses", "no user"]),
    "division": ("{{ 1 / 0 }}", ["refuses", "division"]),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["refuses"]),
    "endless": ("{% for i in range(10**9) %}{% endfor %}", ["refuses"]),
    "leaves the sandbox": ("{{ ''.__class__.__mro__ }}", ["refuses"]),
    "changes the messages": ("{{ messages.append(1) }}", ["refuses"]),
    "number": (5, ["refuses"]),
    "no default": ([{"name": "tool_use", "template": "x"}], ["refuses", "tool_use"]),
}


@pytest.mark.parametrize(("template", "mentions"), BROKEN.values(), ids=BROKEN)
def test_broken_templates(template: object, mentions: list[str], folder: Path) -> None:
    """Only a conversation is refused: text and token ids do without a template."""
    tiny_tokenizers.write(folder, template)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.encode("lo") == [256]
    with pytest.raises(RequestError) as refusal:
        tokenizer.render([QUESTION])
    message = str(refusal.value)
    for mention in ["chat template", str(folder / "tokenizer_config.json"), *mentions]:
        assert mention in message
    assert "\n" not in message


def test_no_template(folder: Path) -> None:
    tiny_tokenizers.write(folder, None)
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match=r"no chat template; use raw prompts"):
        tokenizer.render([QUESTION])
    assert tokenizer.render([QUESTION], chat_template="{{ messages[0].role }}") == "user"


@pytest.mark.parametrize("messages", [[], [5], ["text"], [None]], ids=str)
def test_messages_that_are_none(messages: Any, folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.write(folder))
    with pytest.raises(RequestError, match="refuses these messages"):
        tokenizer.render(messages)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 11422654\n"
)
UNREADABLE: dict[str, tuple[str, str, list[str]]] = {
    "pointer": ("tokenizer.json", POINTER, ["Git LFS pointer", "git lfs pull"]),
    "no JSON": ("tokenizer.json", "{", ["not valid JSON", "copy it"]),
    "empty object": ("tokenizer.json", "{}", ["not readable", "copy it"]),
    "list": ("tokenizer.json", "[]", ["JSON object", "copy it"]),
    "another model": ("tokenizer.json", '{"model": 1, "added_tokens": []}', ["not readable"]),
    "config": ("tokenizer_config.json", "[", ["not valid JSON"]),
    "config of a wrong type": ("tokenizer_config.json", "[]", ["JSON object"]),
    "tokens of a wrong type": ("tokenizer_config.json", '{"eos_token": []}', ["not readable"]),
    "added tokens": ("added_tokens.json", "x", ["not valid JSON"]),
    "template": ("chat_template.jinja", "caf\udce9", ["not UTF-8"]),
}


@pytest.mark.parametrize(("name", "text", "mentions"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files(name: str, text: str, mentions: list[str], folder: Path) -> None:
    tiny_tokenizers.write(folder)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as refusal:
        load_tokenizer(folder)
    message = str(refusal.value)
    for mention in [name, *mentions]:
        assert mention in message
    assert "\n" not in message


@pytest.mark.parametrize("merges", ["l\n", "zz o\n"], ids=["half a rule", "unknown letters"])
def test_unreadable_merges(merges: str, folder: Path) -> None:
    tiny_tokenizers.write_vocabulary_and_merges(folder)
    (folder / "merges.txt").write_text(merges)
    with pytest.raises(CheckpointError, match=r"vocab\.json with merges\.txt.* is not readable"):
        load_tokenizer(folder)


def test_a_tokenizer_that_works_for_no_text(folder: Path) -> None:
    tiny_tokenizers.write(folder, tokenizer_class="PreTrainedTokenizerFast")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.* is not readable"):
        load_tokenizer(folder)


def test_code_beside_the_tokenizer_is_not_run(folder: Path) -> None:
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    tiny_tokenizers.write(folder, auto_map=auto_map, tokenizer_class="OwnTokenizer")
    marker = folder / "was run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    try:
        load_tokenizer(folder)
    except CheckpointError as error:
        assert "tokenizer.json" in str(error)
    assert not marker.exists()


def test_nothing_is_asked_of_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"connects: {arguments}")

    tiny_tokenizers.write(folder)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_tokenizer(folder).render([QUESTION])


def test_what_config_json_says_else_does_not_matter(folder: Path) -> None:
    """The model is read by this project; what transformers has against it is another matter."""
    tiny_tokenizers.write(folder)
    changed = {**tiny_models.config(), "num_hidden_layers": "two", "rope_scaling": 5}
    (folder / "config.json").write_text(json.dumps(changed))
    assert load_tokenizer(folder).encode("lo") == [256]


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 383), max_size=30))
def test_a_tokenizer_in_python_streams(tokens: list[int]) -> None:
    """Bytes are its tokens, so that characters come in parts."""
    tokenizer = TransformersTokenizer(ByT5Tokenizer(), Path())
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)


def test_a_tokenizer_in_python_holds_back_halves() -> None:
    tokenizer = TransformersTokenizer(ByT5Tokenizer(), Path())
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode("é中🗺")]
    assert [piece for piece in pieces if piece] == ["é", "中", "🗺"]


def converted(tmp_path: Path, build: Callable[[Path], object]) -> Path:
    source = tiny_models.write(tmp_path / "source", tokenizer=False)
    build(source)
    convert_checkpoint(source, tmp_path / "out", "bf16")
    return tmp_path / "out"


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    out = converted(tmp_path, lambda folder: None)
    llm = load(out, kv_cache_tokens=256, max_batch=2)
    short = SamplingParams(max_new_tokens=5, ignore_eos=True)
    answers = llm.generate([[1, 2, 3], [4]], short)
    assert [len(answer.token_ids) for answer in answers] == [5, 5]
    assert {answer.text for answer in answers} == {""}
    stream = llm.stream([1, 2, 3], short)
    assert list(stream) == [] and stream.completion() == answers[0]
    assert llm.eos_ids == {2}, "config.json states it"
    asking: list[Callable[[], object]] = [
        lambda: llm.generate("text"),
        lambda: llm.generate("text", raw=True),
        lambda: llm.chat([QUESTION]),
    ]
    for ask in asking:
        with pytest.raises(RequestError, match=rf"{out}/tokenizer\.json is missing; copy it"):
            ask()
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        llm.generate([[1]], SamplingParams(stop="x"))
    for options in ([], ["--raw"], ["--chat"], ["--system", "x"]):
        done = run("generate", out, "-p", "x", *options)
        done.one_line_error("tokenizer.json is missing", "copy it")


@pytest.mark.parametrize(
    ("template", "mention"), [(None, "no chat template"), ("{% if %}", "not valid Jinja")]
)
def test_the_command_line_without_a_usable_template(
    template: str | None, mention: str, tmp_path: Path
) -> None:
    out = converted(tmp_path, lambda folder: tiny_tokenizers.write(folder, template))
    asked = ("generate", out, "-p", "lo", "--max-new-tokens", "1")
    raw = run(*asked, "--raw")
    assert raw.code == 0 and "1 prompt tokens" in raw.err
    for options in (["--chat"], ["--system", "x"], ["--thinking"], ["--chat", "-p", "another"]):
        run(*asked, *options).one_line_error(mention)
    without = run(*asked)
    if template is None:
        assert without.code == 0 and without.out == raw.out
    else:
        without.one_line_error(mention)


def test_rendered_prompts_get_no_second_first_token(tmp_path: Path) -> None:
    out = converted(
        tmp_path, lambda folder: tiny_tokenizers.write(folder, PLAIN_TEMPLATE, surrounding)
    )
    llm = load(out, kv_cache_tokens=256, max_batch=2)
    start, letters = 259, llm.tokenizer.encode("hi", add_special_tokens=False)
    assert llm.encode("hi", raw=True) == [start, *letters, start]
    assert llm.encode("hi") == llm.encode_messages([{"role": "user", "content": "hi"}])
    assert llm.encode("hi") == [start, *letters]
    once = SamplingParams(max_new_tokens=1)
    (answer,) = llm.generate("hi", once)
    assert list(answer.prompt_token_ids) == [start, *letters]
    chatted = llm.chat([{"role": "user", "content": "hi"}], once)
    assert chatted.prompt_token_ids == answer.prompt_token_ids
    for options, count in ([], 3), (["--raw"], 4):
        done = run("generate", out, "-p", "hi", "--max-new-tokens", "1", *options)
        assert f"{count} prompt tokens" in done.err


def test_nothing_of_transformers_is_printed(tmp_path: Path) -> None:
    """Its advice (too long for model_max_length, settings without effect) is for others."""

    def build(folder: Path) -> None:
        tiny_tokenizers.write(folder, model_max_length=3)
        (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')

    out = converted(tmp_path, build)
    done = program("generate", out, "-p", "hello hello", "--max-new-tokens", "1", "--quiet")
    assert (done.code, done.err) == (0, "")
