"""RoseLoRA: row- and column-wise sparse low-rank adaptation (https://huggingface.co/papers/2406.10777)."""

from hf_ext.tuners.roselora.callback import RoseLoraCallback
from hf_ext.tuners.roselora.config import RoseLoraConfig
from hf_ext.tuners.roselora.density import DensityReport, density_report
from hf_ext.tuners.roselora.export import relabel_as_lora, save_as_lora
from hf_ext.tuners.roselora.model import RoseLoraModel
from hf_ext.tuners.roselora.patch import SparsePatch
from hf_ext.tuners.roselora.state import RoseLoraState

__all__ = [
    "DensityReport",
    "RoseLoraCallback",
    "RoseLoraConfig",
    "RoseLoraModel",
    "RoseLoraState",
    "SparsePatch",
    "density_report",
    "relabel_as_lora",
    "save_as_lora",
]
