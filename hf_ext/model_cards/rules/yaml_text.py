"""YAML that somebody else wrote: any text is read in bounded time, and what is read can be walked and printed."""

from __future__ import annotations

from typing import Any

import yaml

# Far above any card: a result of a benchmark takes some ten values, seven levels deep.
MAX_VALUES, MAX_DEPTH = 50_000, 50
# libyaml reads ten times as fast, but its own recursion ends the process, so `_check_depth` goes first.
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
# What the constructors raise besides `YAMLError`, for a date such as 2001-99-99 or a text with the tag `!!bool`.
_CONSTRUCTION = (ValueError, LookupError, AttributeError, TypeError, OverflowError)


def load(text: str) -> Any:
    """The value of a document of YAML.

    Raises:
        ValueError: it is not YAML, has too many values, or is nested too deeply, aliases (`&a`, `*a`) written out.
    """
    try:
        _check_depth(text)
        value = yaml.load(text, _LOADER)
    except (yaml.YAMLError, *_CONSTRUCTION) as error:
        raise ValueError(" ".join(str(error).split())[:500]) from None
    _check_size(value)
    return value


def told(value: Any) -> str:
    """`repr`, cut to what fits a message."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 200 else f"{shown[:200]} …"


def _check_depth(text: str) -> None:
    depth = 0
    for count, event in enumerate(yaml.parse(text, _LOADER)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_VALUES} values")


def _check_size(value: Any) -> None:
    """Aliases let a short text stand for a value without end."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                inner += [*entry.keys(), *entry.values()]
            elif isinstance(entry, list | tuple | set):
                inner += entry
            if count + len(inner) > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} values")
        level, count = inner, count + len(inner)
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels")
