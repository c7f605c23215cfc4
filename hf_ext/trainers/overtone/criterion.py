"""OVERTONE for `transformers.Trainer`, without TRL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_ext.trainers.overtone.chunked import overtone_from_logits
from hf_ext.trainers.overtone.loss import IGNORE_INDEX, OvertoneSettings, TokenLosses
from hf_ext.trainers.overtone.statistics import OvertoneStatistics


class OvertoneLoss:
    """The OVERTONE loss as `compute_loss_func` of a `transformers.Trainer` (https://huggingface.co/papers/2502.00602).

    The Trainer takes the labels out of the batch, so the model returns logits only; this object shifts the labels by one
    itself. In training it returns the sum over the labelled tokens divided by `num_items_in_batch`, which the Trainer counts
    over all micro-batches and ranks (their own number if it is not given). Without gradients, as in evaluation, it returns
    the plain negative log-likelihood in the same normalisation. All logits exist; a long prompt or a large vocabulary is
    cheaper with `OvertoneTrainer`.

    Args:
        settings: the numbers of the loss; alternatively give the fields of `OvertoneSettings` by name.
        mix_lambda, clip_epsilon, n_sigma, require_top1, valid_vocab_size: see `OvertoneSettings`.

    Example:
        ```python
        loss = OvertoneLoss(clip_epsilon=0.05)
        trainer = Trainer(..., compute_loss_func=loss, callbacks=[OvertoneSaturationCallback(loss.statistics)])
        ```
    """

    def __init__(self, settings: OvertoneSettings | None = None, **fields: Any) -> None:
        if settings is not None and fields:
            raise ValueError(f"give either `settings` or its fields by name, not both; got also {sorted(fields)}.")
        self.settings = settings or OvertoneSettings(**fields)
        self.statistics = OvertoneStatistics()

    def per_token(self, logits: Tensor, labels: Tensor) -> TokenLosses:
        """Per-token losses in the shape of `labels` [..., S], where the label at position i + 1 belongs to logits i."""
        return overtone_from_logits(logits, _shift(labels), self.settings)

    def __call__(
        self, outputs: Mapping[str, Tensor], labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError("OvertoneLoss needs labels: give the data collator's batches a 'labels' column.")
        logits = outputs["logits"]
        labels = labels.to(logits.device)
        labelled = _shift(labels) != IGNORE_INDEX
        losses = self.per_token(logits, labels)
        count = labelled.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=logits.device).clamp(min=1)
        if not torch.is_grad_enabled():
            return losses.nll.sum() / count
        self.statistics.record(losses, labelled)
        return losses.loss.sum() / count


def _shift(labels: Tensor) -> Tensor:
    # The labels move rather than the logits: cutting the last position off [B, S, V] would copy all of it.
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
