"""NEAT: nonlinear adaptation, an update that is a function of the frozen weight (https://huggingface.co/papers/2410.01870)."""

from hf_ext.tuners.neat.config import NeatConfig
from hf_ext.tuners.neat.export import accelerate_peanut, save_as_lora, save_as_peanut
from hf_ext.tuners.neat.layer import NeatLayer
from hf_ext.tuners.neat.model import NeatModel

__all__ = ["NeatConfig", "NeatLayer", "NeatModel", "accelerate_peanut", "save_as_lora", "save_as_peanut"]
