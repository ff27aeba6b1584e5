"""The recipe language: what it says, and what it refuses to guess."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.command_line import run
from support.group_scheme import GroupInt4

from qwen3_ascend import Recipe, recipes
from qwen3_ascend.checkpoint.schemes import BF16, SCHEMES, W8A8
from qwen3_ascend.errors import RecipeError

RULES = 'rules: [{match: "*", scheme: bf16}]'


def parse(text: str) -> Recipe:
    return Recipe.parse(text, "test.yaml")


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name and recipe.description
    assert all(rule.scheme.name in SCHEMES for rule in recipe.rules)
    assert recipe.verbatim == yaml.safe_load(recipes.text(name))


def test_the_first_match_wins() -> None:
    recipe = parse(
        """
        schema: 1
        name: mixed
        rules:
          - {match: "*.0.mlp.*", scheme: bf16}
          - {match: "*.mlp.*", scheme: w8a8}
          - {match: "*", scheme: bf16}
        """
    )
    first = recipe.rule_for("model.layers.0.mlp.up_proj")
    assert first.scheme == BF16()
    assert recipe.rule_for("model.layers.10.mlp.up_proj").scheme == W8A8()
    assert recipe.rule_for("lm_head") is recipe.rules[2]


def test_a_scheme_with_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, GroupInt4.name, GroupInt4)
    rules = 'rules: [{match: "*", scheme: {name: group-int4, group: 64}}]'
    assert parse(f"schema: 1\nname: x\n{rules}").rules[0].scheme == GroupInt4(64)
    usual = parse(f"schema: 1\nname: x\n{rules.replace(', group: 64', '')}").rules[0].scheme
    assert usual.to_json() == {"name": "group-int4", "group": 32}
    for said, message in {
        "size: 64": "has no parameter 'size'",
        "group: many": ".group: Expected `int`, got `str`",
    }.items():
        with pytest.raises(RecipeError, match=rf"rules\[0\]: scheme group-int4 ?{message}"):
            parse(f"schema: 1\nname: x\n{rules.replace('group: 64', said)}")


def test_a_file_does_not_shadow_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w8a8").write_text(f"schema: 1\nname: mine\n{RULES}\n")
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("w8a8").name == "w8a8"
    assert Recipe.load("./w8a8").name == "mine"
    assert Recipe.load(str(tmp_path / "w8a8")).name == "mine"


def test_globs_know_upper_and_lower_case() -> None:
    recipe = parse('{schema: 1, name: x, rules: [{match: "LM_HEAD", scheme: bf16}]}')
    with pytest.raises(RecipeError, match="no rule matches lm_head"):
        recipe.rule_for("lm_head")


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text(f"schema: 1\nname: mine\n{RULES}\n")
    assert Recipe.load(str(path)).name == "mine"


BAD = {
    "unknown key": (f"schema: 1\nname: x\nrulez: []\n{RULES}", ["rulez", "rules"]),
    "unknown key in a rule": (
        'schema: 1\nname: x\nrules: [{match: "*", scheme: bf16, group: 4}]',
        ["rules[0]", "'group'", "match, scheme"],
    ),
    "unknown scheme": (
        'schema: 1\nname: x\nrules: [{match: "*", scheme: w8a9}]',
        ["rules[0]", "'w8a9'", "bf16, w8a8"],
    ),
    "scheme is a list": (
        'schema: 1\nname: x\nrules: [{match: "*", scheme: [w8a8]}]',
        ["rules[0].scheme"],
    ),
    "scheme is a mapping": (
        'schema: 1\nname: x\nrules: [{match: "*", scheme: {a: 1}}]',
        ["rules[0]"],
    ),
    "no schema": (f"name: x\n{RULES}", ["missing", "`schema`"]),
    "no name": (f"schema: 1\n{RULES}", ["missing", "`name`"]),
    "no rules": ("schema: 1\nname: x", ["missing", "`rules`"]),
    "no match": ("schema: 1\nname: x\nrules: [{scheme: bf16}]", ["rules[0]", "missing", "`match`"]),
    "no scheme": ('schema: 1\nname: x\nrules: [{match: "*"}]', ["rules[0]", "missing", "`scheme`"]),
    "empty rules": ("schema: 1\nname: x\nrules: []", ["rules", "length >= 1"]),
    "rules are a mapping": ("schema: 1\nname: x\nrules: {a: 1}", ["rules", "`array`"]),
    "a rule is text": ("schema: 1\nname: x\nrules: [w8a8]", ["rules[0]", "`object`"]),
    "match is a number": (
        "schema: 1\nname: x\nrules: [{match: 7, scheme: bf16}]",
        ["rules[0].match"],
    ),
    "match is empty": (
        "schema: 1\nname: x\nrules: [{match: '', scheme: bf16}]",
        ["rules[0].match"],
    ),
    "another schema": (f"schema: 2\nname: x\n{RULES}", ["schema 2", "reads schema 1"]),
    "name is a date": (f"schema: 1\nname: 2025-01-31\n{RULES}", ["name"]),
    "name is a number": (f"schema: 1\nname: 8\n{RULES}", ["name"]),
    "description is a date": (
        f"schema: 1\nname: x\ndescription: 2025-01-31\n{RULES}",
        ["description"],
    ),
    "not a mapping": ("- 1\n- 2", ["`object`"]),
    "empty": ("", ["`object`"]),
    "not yaml": ("schema: [1", ["not valid YAML"]),
    "tabs": ("schema: 1\n\tname: x", ["not valid YAML"]),
    "python objects": ("!!python/object/apply:os.system [true]", ["not valid YAML"]),
    "control characters": ("schema: 1\nname: \x07", ["not valid YAML"]),
}


@pytest.mark.parametrize(("text", "mentions"), BAD.values(), ids=BAD)
def test_typos_are_refused(
    text: str, mentions: list[str], tiny_source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    done = run("convert", tiny_source, tmp_path / "out", "--recipe", path)
    done.one_line_error("bad.yaml", *mentions)
    assert not (tmp_path / "out").exists()


def test_unknown_names_list_the_known(tiny_source: Path, tmp_path: Path) -> None:
    done = run("convert", tiny_source, tmp_path / "out", "--recipe", "w8a9")
    done.one_line_error("'w8a9'", *recipes.names())
    for name in ("gone.yaml", "gone.yml"):
        done = run("convert", tiny_source, tmp_path / "out", "--recipe", tmp_path / name)
        done.one_line_error(name, "does not exist")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    for name in ("folder.yaml", "latin.yaml"):
        done = run("convert", tiny_source, tmp_path / "out", "--recipe", tmp_path / name)
        done.one_line_error(name, "cannot be read")
