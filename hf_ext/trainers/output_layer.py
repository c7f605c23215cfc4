"""What the trainers know of a model beside its forward: where the language model is, what its output layer does, and which
forward it had.

TRL's trainers patch the forward of the model instance with a fused output layer, which returns log-probabilities of the
labels and never builds all logits.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ext.tuners.baft.ledger import layers_of

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


@contextlib.contextmanager
def patching(trainer: Any, model: Any, ref_model: Any = None) -> Iterator[None]:
    """Around the constructor of TRL's trainer, which patches the forward of these models: `restore_forward` before, `remember_forward` after."""
    before = restore_forward(model)
    ref_before = None if ref_model is None else restore_forward(ref_model)
    yield
    remember_forward(trainer.model, before)
    if ref_model is not None:
        remember_forward(ref_model, ref_before)


def drop_copied_patches(model: Any) -> None:
    """Let a deep copy of a patched model run its own weights: a patch goes on calling the forward of the original.

    The hooks of accelerate follow a copy, and stay.
    """
    if isinstance(current_forward(model), types.MethodType):
        del base_of(model).forward


@contextlib.contextmanager
def fused_head(base: PreTrainedModel) -> Iterator[None]:
    """Give a model TRL's fused head for a while, and then the forward it had, that of a trainer included."""
    from trl.trainer import add_fused_lm_head  # model cards read `base_of`, and need no trainer

    names = ("forward", _BEFORE)
    kept = {name: vars(base)[name] for name in names if name in vars(base)}
    add_fused_lm_head(base, outputs=("log_probs",))
    try:
        yield
    finally:
        for name in names:
            vars(base).pop(name, None)
        vars(base).update(kept)


# What TRL's fused head may be asked for, of every next token.
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class AnswersOnly:
    """Stands for a model with TRL's fused head that is called for a loss or a score, and lets the head see the answers alone.

    Without Triton, TRL's head projects all positions onto the vocabulary, those of the prompts and the padding too. The output is the same: it is
    0 where the next token has no label.

    Args:
        model: what is called: `base`, or what PEFT and accelerate wrapped around it.
        base: the causal language model, with the fused head.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel) -> None:
        self._model, self._base = model, base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head") or kwargs.get("labels") is None:
            return self._model(*args, **kwargs)
        whole = kwargs.pop("labels")
        if layers_of(self._base):  # adapters that ask where the prompts end
            kwargs["intervention_labels"] = whole
        labels = whole[:, 1:]
        mask = labels != -100
        with _narrowed(self._base, nn.functional.pad(mask, (0, 1))):
            outputs = self._model(*args, **kwargs, shift_labels=labels[mask][None])
        for name in _PER_TOKEN:
            if outputs.get(name) is not None:
                values = outputs[name].to(mask.device)
                outputs[name] = values.new_zeros(mask.shape).masked_scatter(mask, values)
        outputs["label_mask"] = mask
        return outputs


@contextlib.contextmanager
def _narrowed(base: PreTrainedModel, mask_BS: Tensor) -> Iterator[None]:
    """Let the output layer see the last hidden states in the mask alone, as one sequence."""

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        # Prompt learning puts virtual tokens in front; a model split over devices may end on another one.
        hidden_BSH = output.last_hidden_state[:, -mask_BS.shape[1] :]
        output.last_hidden_state = hidden_BSH[mask_BS.to(hidden_BSH.device)][None]
        return output

    handle = base.base_model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def score_answers(model: nn.Module, base: PreTrainedModel, inputs: dict[str, Any], answer: Tensor) -> Any:
    """A forward through TRL's fused head: its output, with log-probabilities and top-1 flags of each next token `(B, S-1)`.

    They are zero where the next token is not of the answer.

    Args:
        model, base: as for `AnswersOnly`.
        inputs: arguments of the forward, `input_ids` `(B, S)` among them.
        answer: boolean, True at the tokens of the answer, `(B, S)`.
    """
    labels = inputs["input_ids"].masked_fill(~answer, -100)
    return AnswersOnly(model, base)(**inputs, labels=labels, fused_lm_head=True)
