"""OVERTONE: a token loss that stops pushing answer tokens which are already learnt.

Paper: https://huggingface.co/papers/2502.00602. The mathematics (`loss`, `chunked`) needs torch alone; the trainer needs
TRL, so every name is imported when it is first used.
"""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {
    "OvertoneConfig": ".config",
    "OvertoneCurveCallback": ".callbacks",
    "OvertoneLoss": ".criterion",
    "OvertoneMixin": ".trainer",
    "OvertoneSaturationCallback": ".callbacks",
    "OvertoneSettings": ".loss",
    "OvertoneStatistics": ".statistics",
    "OvertoneTrainer": ".trainer",
    "TokenLosses": ".loss",
    "overtone_from_hidden": ".chunked",
    "overtone_from_logits": ".chunked",
    "overtone_reference": ".loss",
}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
