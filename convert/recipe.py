"""Recipes: which scheme each linear gets, by which quantizer, after which transforms of the model.

Rules are ordered, and the first match wins.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from msgspec import Meta

from qwen3_ascend import recipes
from qwen3_ascend.checkpoint.schemes import Scheme, make_scheme
from qwen3_ascend.convert.quantizers import QUANTIZERS
from qwen3_ascend.convert.transforms import TRANSFORMS
from qwen3_ascend.errors import CheckpointError, RecipeError
from qwen3_ascend.files.json_file import Name, check_keys, plain, typed
from qwen3_ascend.files.paths import user_path

SCHEMA = 1

OPTIONAL = ("description", "transforms", "quantizer")

NEAREST = "nearest"
"""The quantizer of a rule that names none."""


@dataclass(frozen=True)
class RuleFile:
    """A rule as YAML spells it; a scheme is a name, or a mapping of its name and parameters."""

    match: Name
    scheme: str | dict[str, Any]
    quantizer: str = NEAREST


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as YAML spells it."""

    schema: int
    name: Name
    rules: Annotated[tuple[RuleFile, ...], Meta(min_length=1)]
    description: str = ""
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
        match: a glob on the Hugging Face name of a linear, such as "*.mlp.down_proj".
        scheme: what becomes of it, with its parameters.
        quantizer: the name of who finds its codes.
    """

    match: str
    scheme: Scheme
    quantizer: str = NEAREST

    def matches(self, linear: str) -> bool:
        """Whether the glob fits a linear's name (case matters)."""
        return fnmatch.fnmatchcase(linear, self.match)


@dataclass(frozen=True)
class Recipe:
    """A named list of rules.

    Attributes:
        name, description: for people.
        rules: the first that matches a linear counts.
        verbatim: what the YAML said; it goes into the manifest.
        transforms: names of what makes equivalent weights of the model's first, in this order.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    verbatim: Mapping[str, Any]
    transforms: tuple[str, ...] = ()

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
        try:
            said = typed(data, RecipeFile, where)
            check_keys(data, plain(said), where, optional=OPTIONAL)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if said.schema != SCHEMA:
            raise RecipeError(f"{where}: schema {said.schema}; this version reads schema {SCHEMA}")
        rules = tuple(
            _rule(rule, f"{where}.rules[{number}]") for number, rule in enumerate(said.rules)
        )
        for name in said.transforms:
            _check_name(name, "transform", TRANSFORMS, where)
        return cls(said.name, said.description, rules, data, said.transforms)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error}") from error


def _rule(said: RuleFile, where: str) -> Rule:
    scheme = {"name": said.scheme} if isinstance(said.scheme, str) else {**said.scheme}
    _check_name(said.quantizer, "quantizer", QUANTIZERS, where)
    try:
        made = make_scheme(str(scheme.pop("name", "")), scheme)
        return Rule(said.match, made, said.quantizer)
    except CheckpointError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_name(name: str, what: str, known: Collection[str], where: str) -> None:
    if name not in known:
        listed = ", ".join(known) or "none"
        raise RecipeError(f"{where}: unknown {what} {name!r}; this version knows {listed}")
