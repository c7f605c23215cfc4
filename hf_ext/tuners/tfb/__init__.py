"""TFB: training-free Bayesianization of LoRA adapters (https://huggingface.co/papers/2412.05723)."""

from hf_ext.tuners.tfb.config import BayesianLoraConfig, BayesianRoseLoraConfig, load_bayesian
from hf_ext.tuners.tfb.fit import TFBResult, bayesianize
from hf_ext.tuners.tfb.generation import Generated, generate_with_uncertainty
from hf_ext.tuners.tfb.posterior import Posterior, posterior, sample_weights
from hf_ext.tuners.tfb.predict import Predictive, predict

__all__ = [
    "BayesianLoraConfig",
    "BayesianRoseLoraConfig",
    "Generated",
    "Posterior",
    "Predictive",
    "TFBResult",
    "bayesianize",
    "generate_with_uncertainty",
    "load_bayesian",
    "posterior",
    "predict",
    "sample_weights",
]
