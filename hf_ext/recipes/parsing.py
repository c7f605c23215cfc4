"""A recipe and the command line, as instances of the dataclasses that they fill."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from hf_ext.recipes.methods import CARD, Trained
from hf_ext.recipes.values import fitting, hints, unknown

_NESTED = "--peft."


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the options of all of TRL first.
        raise ValueError(message)


def resolve(name: str) -> Any:
    """The class that `module:name` means."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def parse(slug: str, method: Trained, arguments: Sequence[str]) -> tuple[dict[type, Any], set[str]]:
    """What the command line says, and the recipe that `--config` names, where the command line says nothing.

    Args:
        slug: of the method.
        method: how it is trained.
        arguments: of the command, after the name of the method.

    Returns:
        Instances of the method's dataclasses, of `trl.ModelConfig` and of `CardArguments`, and the names of the fields that were given.

    Raises:
        ValueError: a key that nobody reads, or a value that does not fit.
        OSError: the recipe cannot be read.
    """
    types = [resolve(name) for name in (method.config, "trl:ModelConfig", CARD, *method.arguments)]
    parser = _Parser(types, prog=f"hf-ext train {slug}", allow_abbrev=False)
    outer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outer.add_argument("--config")
    options, rest = outer.parse_known_args(arguments)
    recipe = {} if options.config is None else _read(options.config)
    rest, nested = _split_nested(rest)
    known = {name: (cls, hint) for cls in types for name, hint in hints(cls).items()}
    if nested:
        if "peft" not in known:
            raise ValueError(f"{_NESTED}{next(iter(nested))}: {slug} trains no adapter; leave it out.")
        if isinstance(recipe.get("peft"), dict | None):
            recipe["peft"] = {**(recipe.get("peft") or {}), **nested}
    values = _checked(recipe, known, options.config or "command line")
    parser.set_defaults_with_config(**values)
    *found, left = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if left:
        raise unknown(left[0].lstrip("-").partition("=")[0], known, "command line")
    written = {item[2:].partition("=")[0].replace("-", "_") for item in rest if item.startswith("--")}
    return dict(zip(types, found, strict=True)), written | set(values)


def _read(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}; a recipe is a mapping of names to values.")
    return content


def _split_nested(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(other arguments, fields of the adapter that are given as `--peft.name value` or `--peft.name=value`)."""
    rest, found, left = [], {}, iter(arguments)
    for item in left:
        if not item.startswith(_NESTED):
            rest.append(item)
            continue
        name, equals, value = item[len(_NESTED) :].partition("=")
        text = value if equals else next(left, None)
        if text is None:
            raise ValueError(f"{item}: a value is missing.")
        found[name] = yaml.safe_load(text)
    return rest, found


def _checked(recipe: dict[str, Any], known: dict[str, tuple[type, Any]], where: str) -> dict[str, Any]:
    recipe = dict(recipe)
    # TRL's recipes set environment variables so.
    environment = recipe.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{where}: env={environment!r} is no mapping of variables to values.")
    if isinstance(recipe.get("resume_from_checkpoint"), bool):
        recipe["resume_from_checkpoint"] = str(recipe["resume_from_checkpoint"])
    values = {}
    for name, value in recipe.items():
        if name not in known:
            raise unknown(str(name), known, where)
        cls, hint = known[name]
        choices = next(each.metadata.get("choices") for each in fields(cls) if each.name == name)
        values[name] = fitting(name, value, hint, where, choices)
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return values
