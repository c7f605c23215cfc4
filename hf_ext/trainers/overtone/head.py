"""The fused head: what a TRL trainer's `model(..., fused_lm_head=True)` runs while it trains with OVERTONE.

TRL's SFT trainer patches the model instance's forward with a head that returns log-probabilities of the labels and never
builds all logits. This module patches that forward once more. While the model trains, `log_probs` holds minus the OVERTONE
loss, so that everything the trainer does with it (normalisation by `num_items_in_batch`, gradient accumulation, the
mixture-of-experts loss, metrics) stays the trainer's. In evaluation mode the stock head answers, so `eval_loss` is the plain
negative log-likelihood and comparable with any other run.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_ext._compat import fused_lm_head_output, gathered_lm_head
from hf_ext.trainers.output_layer import logit_transform, remember_forward
from hf_ext.trainers.overtone.chunked import overtone_from_hidden
from hf_ext.trainers.overtone.loss import IGNORE_INDEX, OvertoneSettings, TokenLosses, check_labels
from hf_ext.trainers.overtone.statistics import OvertoneStatistics


def add_overtone_head(
    model: PreTrainedModel,
    settings: OvertoneSettings,
    statistics: OvertoneStatistics,
    before: Callable | None = None,
) -> None:
    """Patch the forward of a causal language model that already carries TRL's fused head.

    Args:
        model: the model below any PEFT wrapper.
        settings: the numbers of the loss.
        statistics: receives what happened to the tokens of every training batch.
        before: what `restore_forward(model)` returned before TRL's patch; the next trainer's puts it back.

    Raises:
        ValueError: the head's weight is quantised, which the loss cannot read, or smaller than `valid_vocab_size`.
    """
    text_config = model.config.get_text_config()
    _check_head(model, settings, text_config.vocab_size)
    stock_forward, transform = model.forward, logit_transform(model.config)

    # `generate` checks its arguments against the signature of the forward, so the class's own is kept.
    @functools.wraps(type(model).forward)
    def overtone_forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not (fused_lm_head and self.training):
            return stock_forward(
                *args,
                fused_lm_head=fused_lm_head,
                labels=labels,
                shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        # Before the backbone: an embedding lookup of the same bad id would fail without naming it.
        targets = shift_labels if shift_labels is not None else labels[:, 1:]  # type: ignore[index]
        check_labels(targets, settings.valid_vocab_size or text_config.vocab_size)

        kwargs["use_cache"] = False
        backbone_outputs = self.base_model(*args, **kwargs)
        hidden = backbone_outputs.last_hidden_state
        if shift_labels is None:
            hidden = hidden[:, :-1]
        # A model split by `device_map` can end on another device than its head.
        targets = targets.to(self.get_output_embeddings().weight.device)
        losses = _token_losses(self, hidden, targets, settings, transform)
        labelled = targets != IGNORE_INDEX
        if losses.loss.requires_grad:
            statistics.record(losses, labelled)
        count = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = load_balancing_loss_func(
                backbone_outputs.router_logits,
                text_config.num_experts,
                text_config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        return fused_lm_head_output()(
            loss=losses.loss.sum() / count,
            log_probs=-losses.loss,
            entropy=losses.entropy,
            is_top1=losses.is_top1,
            label_mask=labelled,
            aux_loss=aux_loss,
        )

    model.forward = types.MethodType(overtone_forward, model)
    remember_forward(model, before)


def _check_head(model: PreTrainedModel, settings: OvertoneSettings, vocab_size: int) -> None:
    dtype = model.get_output_embeddings().weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"the language-model head is stored as {dtype}, and the loss multiplies with its weight directly: leave "
            "the head out of the quantisation (bitsandbytes: llm_int8_skip_modules=['lm_head'])."
        )
    if settings.valid_vocab_size is not None and settings.valid_vocab_size > vocab_size:
        raise ValueError(
            f"valid_vocab_size={settings.valid_vocab_size} exceeds the model's vocabulary of {vocab_size} tokens: "
            "give the number of tokens that the tokenizer really has."
        )


def _token_losses(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    settings: OvertoneSettings,
    transform: tuple[float, float | None],
) -> TokenLosses:
    """The loss of the model's head on hidden states [..., H] and targets [...] that lie on the head's device."""
    # Looked up on each call: FSDP and PEFT replace the head after it was patched.
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    gather = functools.partial(gathered_lm_head, weight, bias)
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    logit_scale, softcap = transform
    with gather():
        return overtone_from_hidden(
            hidden.to(weight.device),
            weight,
            bias,
            targets,
            settings,
            logit_scale=logit_scale,
            final_logit_softcapping=softcap,
            gather=gather,
        )
