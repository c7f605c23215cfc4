"""The options of an evaluation and of its attacks, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_ext.metrics.unlearning.scores import PromptFormat

ATTACKS: dict[str, dict[str, Any]] = {
    "adapter_off": {},
    "quantization": {"bits": (8, 4)},
    "paraphrased_prompts": {},
    "in_context": {},
    "sampling": {"samples": 10},
    "relearning": {"steps": (2, 4, 8, 16), "learning_rate": 1e-4, "train_batch_size": 16},
    "gradient_norm": {},
}
"""Attacks of `evaluate_unlearning` by name, each with its options and their defaults."""
_RULES = {
    "bits": "a list of whole numbers from 2 to 8, e.g. (8, 4)",
    "samples": "a whole number of at least 1",
    "steps": "a list of increasing numbers of at least 1, e.g. (2, 4, 8, 16)",
    "learning_rate": "a number above 0",
    "train_batch_size": "a whole number of at least 1",
}


def read_attacks(attacks: str | Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every chosen attack with all its options.

    Raises:
        ValueError: an attack or option that does not exist, or a value that it cannot have.
    """
    names = (attacks,) if isinstance(attacks, str) else attacks
    given = dict(names) if isinstance(names, Mapping) else {name: {} for name in names}
    for name, options in given.items():
        if name not in ATTACKS:
            raise ValueError(f"attacks: {name!r} is unknown; choose from {list(ATTACKS)}.")
        if not isinstance(options, Mapping):
            raise ValueError(
                f"attacks: the options of {name!r} are {options!r}; pass a dict of {list(ATTACKS[name])}."
            )
        unknown = sorted(set(options) - set(ATTACKS[name]))
        if unknown:
            raise ValueError(f"attacks: {name!r} has no option {unknown[0]!r}; it takes {list(ATTACKS[name])}.")
        for option, value in options.items():
            check_option(option, value, f"attacks: {name!r}: ")
    return {name: {**ATTACKS[name], **options} for name, options in given.items()}


def check_option(option: str, value: Any, where: str = "") -> None:
    """Raises ValueError naming the option of an attack, its value and the rule."""
    if option in ("bits", "steps"):
        found = list(value) if isinstance(value, (list, tuple)) else []
        fits = bool(found) and all(whole(item, *((2, 8) if option == "bits" else (1,))) for item in found)
        fits = fits and (option == "bits" or found == sorted(set(found)))
    elif option == "learning_rate":
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    else:
        fits = whole(value, 1)
    if not fits:
        raise ValueError(f"{where}{option}={value!r}: give {_RULES[option]}.")


def check_arguments(
    batch_size: int, seed: int, max_new_tokens: int, stop_strings: Sequence[str], format: PromptFormat | None
) -> None:
    """Raises ValueError naming the argument of an evaluation, its value and the rule."""
    for name, value, low in (("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
        if not whole(value, low, 2**32 - 1):
            raise ValueError(f"{name}={value!r}: give a whole number of at least {low}.")
    if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ValueError(f"stop_strings={stop_strings!r}: give a list of texts that are not empty.")
    if format is not None and not isinstance(format, PromptFormat):
        raise ValueError(f"format={format!r}: give a PromptFormat.")


def whole(value: Any, low: int, high: float = math.inf) -> bool:
    """Whether it is an int (no bool) from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
