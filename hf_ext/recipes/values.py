"""Whether what a recipe says fits the fields of a dataclass."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator


def hints(cls: type) -> dict[str, Any]:
    """Field name -> type of what the constructor of a dataclass takes."""
    found = get_type_hints(cls)
    return {each.name: found[each.name] for each in fields(cls) if each.init}


def unknown(name: str, known: Iterable[str], where: str) -> ValueError:
    """The error for a key that nobody reads."""
    near = get_close_matches(name, list(known), 3)
    remedy = f"did you mean {' or '.join(near)}?" if near else "remove it."
    return ValueError(f"{where}: the key {name!r} is unknown; {remedy}")


def checked(cls: type, values: Any, where: str) -> dict[str, Any]:
    """`values` as the constructor of the dataclass `cls` takes them.

    Raises:
        ValueError: `values` is no mapping, or a key is unknown, missing, or has a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r} is no mapping of names to values.")
    known = hints(cls)
    for name in values:
        if name not in known:
            raise unknown(str(name), known, where)
    for each in fields(cls):
        if each.init and each.name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{where}: {each.name} is missing.")
    return {name: fitting(name, value, known[name], where) for name, value in values.items()}


def fitting(name: str, value: Any, hint: Any, where: str, choices: Any = None) -> Any:
    """`value` as a field of the type `hint` takes it: numbers may be written as `1e-3`, which YAML reads as text, and one value as a list of one.

    Raises:
        ValueError: it does not fit.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if lists and isinstance(value, list) and is_dataclass(item := get_args(lists[0])[0]):
        assert isinstance(item, type)
        return [item(**checked(item, each, f"{where}, {name}[{place}]")) for place, each in enumerate(value)]
    if lists and isinstance(value, (str, int, float)) and not {str, type(value)} & set(kinds):
        value = [value]
    if not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, str) and str not in kinds)):
        value = _number(value, kinds)
    try:
        type_validator(name, value, hint)
    except TypeError as error:
        told = " or ".join(
            each.__name__ if isinstance(each, type) else str(each) for each in kinds if each is not types.NoneType
        )
        quotes = " YAML reads yes, no, on and off as true and false: quote them." if isinstance(value, bool) else ""
        raise ValueError(
            f"{where}: {name}={value!r} has the type {type(value).__name__}; give {told}.{quotes}"
        ) from error
    if choices and value is not None and value not in choices:
        raise ValueError(f"{where}: {name}={value!r} is unknown; choose one of {', '.join(map(str, choices))}.")
    return value


def _number(value: str | int, kinds: tuple[Any, ...]) -> Any:
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    return value
