"""What the unlearning trainers log of a batch besides the terms of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ext.trainers.flat.config import UnlearnConfig
from hf_ext.trainers.flat.divergences import flat_weights
from hf_ext.trainers.flat.loss import answer_lengths, answer_probability
from hf_ext.trainers.flat.methods import Batch, Rows


def measures(batch: Batch, config: UnlearnConfig) -> dict[str, Tensor]:
    """Name -> value of each example `(B,)`, without gradient."""
    p_forget = mean_probability(batch.forget, config.forget_probability)
    found = {"probability/forget": p_forget, "forget/top1": top1_share(batch.forget)}
    if batch.template is not None:
        p_template = mean_probability(batch.template, config.template_probability)
        found |= {"probability/template": p_template, "probability/template_first": first_probability(batch.template)}
        if config.loss_type == "flat":
            lambda_e, lambda_f = flat_weights(p_template, p_forget, config.divergence)
            found |= {"weight/lambda_e": lambda_e, "weight/lambda_f": lambda_f}
    if batch.retain is not None:
        found["retain/top1"] = top1_share(batch.retain)
    return found


def mean_probability(rows: Rows, kind: str = "mean") -> Tensor:
    """Probability of each answer, `(B,)`, without gradient."""
    return answer_probability(rows.log_probs.detach(), rows.mask, kind)


def first_probability(rows: Rows) -> Tensor:
    """Probability of the first answer token of each row, `(B,)`, without gradient."""
    first = rows.mask & (rows.mask.cumsum(-1) == 1)
    return rows.log_probs.detach().masked_fill(~first, 0).sum(-1).exp()


def top1_share(rows: Rows) -> Tensor:
    """Share of each row's answer tokens that greedy decoding would choose, `(B,)`."""
    return (rows.is_top1 & rows.mask).sum(-1, dtype=torch.float32) / answer_lengths(rows.mask)
