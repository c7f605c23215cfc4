"""Teaching facts to a BaFT adapter, edit by edit (https://huggingface.co/papers/2503.00306)."""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {"BaftMixin": ".trainer", "BaftSettings": ".config", "BaftTrainer": ".trainer", "BaftTrainerConfig": ".config"}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
