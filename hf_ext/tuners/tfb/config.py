"""Where a posterior is stored: one more field of the adapter's configuration. The tensors of the adapter stay as they are."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.utils import cached_file

from hf_ext.tuners.roselora.config import RoseLoraConfig

FIELD = "bayesian_lora"


@dataclass
class BayesianLoraConfig(LoraConfig):
    """[`~peft.LoraConfig`] with the posterior of its adapter, which [`bayesianize`] writes.

    Args:
        bayesian_lora (`dict`, *optional*): `sigma_q`, the size of the noise; `targets`, the layers that get it; `rtol`; and how it was found.
    """

    bayesian_lora: dict[str, Any] | None = field(default=None, metadata={"help": "Posterior of the adapter."})


@dataclass
class BayesianRoseLoraConfig(RoseLoraConfig):
    """[`RoseLoraConfig`] with the posterior of its adapter, as in [`BayesianLoraConfig`]."""

    bayesian_lora: dict[str, Any] | None = field(default=None, metadata={"help": "Posterior of the adapter."})


_KINDS: dict[type[PeftConfig], type[PeftConfig]] = {
    LoraConfig: BayesianLoraConfig,
    RoseLoraConfig: BayesianRoseLoraConfig,
}
_PLAIN = {bayesian: plain for plain, bayesian in _KINDS.items()}


def store(model: PeftModel, adapter_name: str, posterior: dict[str, Any]) -> None:
    """Keep what was fitted in the configuration of an adapter, from where `save_pretrained` and `push_to_hub` write it."""
    config: Any = without_posterior(model.peft_config[adapter_name])
    config.__class__ = _KINDS[type(config)]
    config.bayesian_lora = posterior
    model.peft_config[adapter_name] = config


def without_posterior(config: PeftConfig) -> PeftConfig:
    """The configuration as the adapter's own type has it; a copy."""
    plain: Any = copy.copy(config)
    if type(config) in _PLAIN:
        plain.__class__ = _PLAIN[type(config)]
        del plain.bayesian_lora
    return plain


def check_kind(model: PeftModel, adapter_name: str) -> None:
    """
    Raises:
        ValueError: the model has no such adapter, or not one of LoRA.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has {sorted(model.peft_config)}.")
    kind = type(model.peft_config[adapter_name])
    if kind not in {**_KINDS, **_PLAIN}:
        raise ValueError(
            f"adapter_name={adapter_name!r}: it is of the type {kind.__name__}; a posterior is for LoRA and RoseLoRA."
        )


def fitted(model: PeftModel, adapter_name: str, needed: bool) -> dict[str, Any]:
    """What is stored for an adapter; empty if nothing is and nothing is needed.

    Raises:
        ValueError: something is needed, and nothing is stored.
    """
    check_kind(model, adapter_name)
    stored = vars(model.peft_config[adapter_name]).get(FIELD)
    if stored is None and needed:
        raise ValueError(
            f"adapter_name={adapter_name!r}: no posterior is stored with it. Fit one with bayesianize, load it with load_bayesian, or give sigma."
        )
    return stored or {}


def load_bayesian(model: nn.Module, model_id: str | Path, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, which loads the adapter, and then what [`bayesianize`] stored with it.

    Args:
        model: the base model.
        model_id: a folder or a repository of the Hub.
        kwargs: for `PeftModel.from_pretrained`.

    Raises:
        ValueError: nothing is stored there, or not what this version understands.
    """
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder") if key in kwargs}
    file: Any = cached_file(str(model_id), CONFIG_NAME, **hub)
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    stored = content.get(FIELD)
    if not isinstance(stored, dict) or "sigma_q" not in stored:
        raise ValueError(
            f"{model_id}: {CONFIG_NAME} has no {FIELD} with sigma_q; load it with PeftModel.from_pretrained and fit a posterior with bayesianize."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=rf"Unexpected keyword arguments \['{FIELD}'\]")
        loaded = PeftModel.from_pretrained(model, str(model_id), adapter_name=adapter_name, **kwargs)
    store(loaded, adapter_name, stored)
    return loaded
