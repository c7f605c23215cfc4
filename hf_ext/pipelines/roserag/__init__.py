"""Questions answered from retrieved passages, with a short rationale that names them: https://huggingface.co/papers/2502.10993."""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {
    "BM25Retriever": ".retrievers",
    "DenseRetriever": ".retrievers",
    "FaissRetriever": ".retrievers",
    "RagPipeline": ".pipeline",
    "RagPrompts": ".prompts",
    "Retriever": ".retrievers",
    "register": ".pipeline",
}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
