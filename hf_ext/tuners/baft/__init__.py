"""BaFT: basis-level representation fine-tuning (https://huggingface.co/papers/2503.00306)."""

from hf_ext.tuners.baft.config import BaftConfig
from hf_ext.tuners.baft.layer import BaftLayer
from hf_ext.tuners.baft.ledger import Edit, edits, recorded_weights, restore, rollback
from hf_ext.tuners.baft.model import BaftModel

__all__ = ["BaftConfig", "BaftLayer", "BaftModel", "Edit", "edits", "recorded_weights", "restore", "rollback"]
