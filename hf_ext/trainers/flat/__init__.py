"""FLAT, and the unlearning losses it is compared with: https://huggingface.co/papers/2410.11143.

The mathematics (`divergences`, `loss`, `baselines`) needs torch alone; the trainers need TRL, so every name is
imported when it is first used.
"""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {
    "FlatConfig": ".config",
    "FlatTrainer": ".trainer",
    "UnlearnConfig": ".config",
    "UnlearnTrainer": ".trainer",
}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
