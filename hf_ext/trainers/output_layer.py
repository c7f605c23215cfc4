"""What the trainers know of a model beside its forward: where the language model is, what its output layer does, and which
forward it had.

TRL's trainers patch the forward of the model instance with a fused output layer, which returns log-probabilities of the
labels and never builds all logits.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

# Attribute of a patched model: the forward it had before a trainer touched it (`None`: its class's own).
_BEFORE = "_forward_before_training"


def base_of(model: Any) -> PreTrainedModel:
    """The causal language model itself, below a PEFT wrapper if there is one."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, soft cap) that a model of this configuration applies to its head's output.

    Families disagree on the name: Cohere has `logit_scale`, Muse `output_multiplier`, Falcon-H1 `lm_head_multiplier`;
    Granite and MiniCPM3 divide by `logits_scaling`, HyperCLOVA X multiplies by it.
    """
    values = config.get_text_config().to_dict()
    softcap = values.get("final_logit_softcapping")
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if values.get(name) is not None:
            return values[name], softcap
    scaling = values.get("logits_scaling")
    if scaling is None:
        return 1.0, softcap
    return (scaling if values["model_type"] == "hyperclovax" else 1 / scaling), softcap


def current_forward(model: Any) -> Callable | None:
    """The forward patched onto the instance, `None` if it runs its class's."""
    return vars(base_of(model)).get("forward")


def restore_forward(model: Any) -> Callable | None:
    """Undo the patches of an earlier trainer of this package, and return the `current_forward` then.

    Each trainer wraps the forward it finds. One trainer after another on the same model, as in editing fact by fact, would
    otherwise stack hundreds of wrappers and end in a `RecursionError`. For a model that is yet to be loaded by its name
    this is `None`.
    """
    if isinstance(model, str):
        return None
    base = base_of(model)
    if _BEFORE in vars(base):
        before = vars(base).pop(_BEFORE)
        if before is None:
            vars(base).pop("forward", None)
        else:
            base.forward = before
    return current_forward(model)


def remember_forward(model: Any, before: Callable | None) -> None:
    """Note what `restore_forward` returned before this trainer patched the model, for the next one."""
    vars(base_of(model))[_BEFORE] = before


def drop_copied_patches(model: Any) -> None:
    """Let a deep copy of a patched model run its own weights: a patch goes on calling the forward of the original.

    The hooks of accelerate follow a copy, and stay.
    """
    if isinstance(current_forward(model), types.MethodType):
        del base_of(model).forward
