"""Settings of configurations, as text for a table."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from hf_ext.model_cards.rules.leaks import TOKEN, without_paths

# Said elsewhere in the card, or meaningless outside the run.
NOT_SETTINGS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version"),
        *("base_model_name_or_path", "revision", "inference_mode"),
    }
)
SHOWN_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")


def changed_fields(config: Any, skip: frozenset[str], always: tuple[str, ...]) -> dict[str, str]:
    """Fields of a dataclass that differ from their defaults, those in `always` in any case, as text for a table."""
    told = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if item.name not in skip and (item.name in always or value != default):
            told[item.name] = as_text(value)
    return told


def own_fields(config: Any) -> tuple[str, ...]:
    """Fields that a method of this package adds to a library's configuration: they are told even at their defaults."""
    ours = [cls for cls in type(config).__mro__ if cls.__module__.startswith("hf_ext.")]
    return tuple(name for cls in ours for name in vars(cls).get("__annotations__", ()))


def as_text(value: Any) -> str:
    """One line of text; sets sorted, numbers short, local paths and tokens removed."""
    if value is None:
        return "not set"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return TOKEN.sub("(removed)", without_paths(" ".join(text.split())))
