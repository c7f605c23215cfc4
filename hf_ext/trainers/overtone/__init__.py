"""OVERTONE: a token loss that stops pushing answer tokens which are already learnt.

Paper: https://huggingface.co/papers/2502.00602. The mathematics (`loss`, `chunked`) needs torch alone; the trainer needs
TRL, so every name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "OvertoneConfig": "config",
    "OvertoneCurveCallback": "callbacks",
    "OvertoneLoss": "criterion",
    "OvertoneMixin": "trainer",
    "OvertoneSaturationCallback": "callbacks",
    "OvertoneSettings": "loss",
    "OvertoneStatistics": "statistics",
    "OvertoneTrainer": "trainer",
    "TokenLosses": "loss",
    "overtone_from_hidden": "chunked",
    "overtone_from_logits": "chunked",
    "overtone_reference": "loss",
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
