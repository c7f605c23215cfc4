"""LoR-VP: one learnt picture of low rank, added to every input of a frozen image model (https://huggingface.co/papers/2502.00896)."""

from hf_ext.tuners.lorvp.config import LorVpConfig
from hf_ext.tuners.lorvp.layer import LorVpConvolution
from hf_ext.tuners.lorvp.mapping import LabelMap, LabelMappingCallback, fit_label_map
from hf_ext.tuners.lorvp.model import LorVpModel

__all__ = ["LabelMap", "LabelMappingCallback", "LorVpConfig", "LorVpConvolution", "LorVpModel", "fit_label_map"]
