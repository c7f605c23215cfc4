"""Adaptive SVD, also called orthogonal subspace fine-tuning: https://huggingface.co/papers/2504.07097.

The mathematics (`subspace`, `importance`) and the optimizer need torch alone; the trainer needs TRL, so every name is imported
when it is first used.
"""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {
    "AdaptiveSVDConfig": ".config",
    "AdaptiveSVDTrainer": ".trainer",
    "ContinualTask": "hf_ext.trainers.tasks",
    "SubspaceAdamW": ".optimizer",
}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
