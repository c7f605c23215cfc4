"""RoseRAG: preference data that a small model writes itself, and a trainer for them: https://huggingface.co/papers/2502.10993.

The mathematics (`loss`, `selection`) needs no Hugging Face library; every name is imported when it is first used.
"""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {
    "EndpointBackend": ".servers",
    "PreferenceLoss": ".loss",
    "RoseRAGConfig": ".config",
    "RoseRAGDatasetBuilder": ".builder",
    "RoseRAGTrainer": ".trainer",
    "Sampling": ".sampling",
    "TransformersBackend": ".backends",
    "VLLMBackend": ".servers",
    "register_preference_loss": ".loss",
}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
