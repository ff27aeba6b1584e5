"""Recipes: which scheme each linear gets. Ordered rules, the first match wins."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.schemes import SCHEMES, Scheme, make_scheme
from qwen3_ascend.errors import CheckpointError, RecipeError
from qwen3_ascend.files.paths import user_path

SCHEMA = 1
RECIPE_KEYS = ("schema", "name", "description", "rules")
RULE_KEYS = ("match", "scheme")


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
        match: a glob on the Hugging Face name of a linear, such as "*.mlp.down_proj".
        scheme: what becomes of it, with its parameters.
    """

    match: str
    scheme: Scheme

    def matches(self, linear: str) -> bool:
        """Whether the glob fits a linear's name (case matters)."""
        return fnmatch.fnmatchcase(linear, self.match)


@dataclass(frozen=True)
class Recipe:
    """A named list of rules. `verbatim` is what the YAML said; it goes into the manifest."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    verbatim: Mapping[str, Any]

    def rule_for(self, linear: str) -> Rule:
        """The first rule that matches; RecipeError if none does."""
        for rule in self.rules:
            if rule.matches(linear):
                return rule
        raise RecipeError(
            f"recipe {self.name}: no rule matches {linear}; end the rules with: match: '*'"
        )

    @classmethod
    def load(cls, name_or_path: str) -> Recipe:
        """A shipped recipe by name, or one from a YAML file.

        Raises:
            RecipeError: for an unknown name, unreadable YAML, or any key or value that is not
                part of the recipe language.
        """
        path = user_path(name_or_path)
        if path.suffix in (".yaml", ".yml") or os.sep in name_or_path:
            return cls.parse(_read(path), str(path))
        if name_or_path not in recipes.names():
            known = ", ".join(recipes.names())
            raise RecipeError(
                f"unknown recipe {name_or_path!r}; shipped recipes: {known}; "
                f"or give the path of a .yaml file"
            )
        return cls.parse(recipes.text(name_or_path), f"recipe {name_or_path}")

    @classmethod
    def parse(cls, text: str, where: str) -> Recipe:
        """Reads a recipe's YAML text; `where` names it in errors."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"{where} is not valid YAML: {reason}") from error
        _require_mapping(data, RECIPE_KEYS, ("schema", "name", "rules"), where)
        for key in ("name", "description"):
            if not isinstance(data.get(key, ""), str):
                raise RecipeError(f"{where}: {key} must be text; put {data[key]!s} in quotes")
        if data["schema"] != SCHEMA:
            raise RecipeError(
                f"{where}: schema {data['schema']!r}; this version reads schema {SCHEMA}"
            )
        if not isinstance(data["rules"], list) or not data["rules"]:
            raise RecipeError(f"{where}: rules must be a non-empty list")
        rules = tuple(
            _rule(item, f"{where}, rule {number}") for number, item in enumerate(data["rules"], 1)
        )
        return cls(data["name"], data.get("description", ""), rules, data)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error}") from error


def _require_mapping(
    data: Any, known: tuple[str, ...], required: tuple[str, ...], where: str
) -> None:
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}; known keys: {', '.join(known)}")
    for key in required:
        if key not in data:
            raise RecipeError(f"{where}: the key {key!r} is missing")


def _rule(data: Any, where: str) -> Rule:
    _require_mapping(data, RULE_KEYS, ("match", "scheme"), where)
    if not isinstance(data["match"], str) or not data["match"]:
        raise RecipeError(f"{where}: match must be a glob such as '*.mlp.down_proj'")
    return Rule(data["match"], _scheme(data["scheme"], where))


def _scheme(data: Any, where: str) -> Scheme:
    """A scheme by its name, or a mapping of its name and parameters."""
    parameters = {"name": data} if isinstance(data, str) else data
    if not isinstance(parameters, dict) or not isinstance(parameters.get("name"), str):
        raise RecipeError(
            f"{where}: scheme {data!r} is neither a name ({', '.join(SCHEMES)}) nor a mapping with "
            f"the key name"
        )
    rest = {key: value for key, value in parameters.items() if key != "name"}
    try:
        return make_scheme(parameters["name"], rest)
    except CheckpointError as error:
        raise RecipeError(f"{where}: {error}") from error
