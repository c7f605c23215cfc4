"""FLAT, and the unlearning losses it is compared with: https://huggingface.co/papers/2410.11143.

The mathematics (`divergences`, `loss`, `baselines`) needs torch alone; the trainers need TRL, so every name is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "FlatConfig": "config",
    "FlatTrainer": "trainer",
    "UnlearnConfig": "config",
    "UnlearnTrainer": "trainer",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
