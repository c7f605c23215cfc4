"""Predictions of many draws of an adapter, and how far they agree."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor

from hf_ext.tuners.tfb.posterior import posterior


@dataclass(frozen=True)
class Predictive:
    """Predictions of K draws, and what they agree about. Shapes: B rows (or any shape of places, such as rows and tokens), C classes. Entropies are in nats.

    Attributes:
        logits: `(K, B, C)`, float32 or wider.
    """

    logits: Tensor

    @cached_property
    def log_probs(self) -> Tensor:
        """`(K, B, C)`, of each draw."""
        return self.logits.log_softmax(-1)

    @property
    def probs(self) -> Tensor:
        """`(K, B, C)`, of each draw."""
        return self.log_probs.exp()

    @cached_property
    def log_mean_probs(self) -> Tensor:
        """`(B, C)`, logarithm of the mean over draws; what a temperature is fitted to."""
        return self.log_probs.logsumexp(0) - torch.tensor(float(len(self.logits))).log()

    @property
    def mean_probs(self) -> Tensor:
        """`(B, C)`: the prediction."""
        return self.log_mean_probs.exp()

    @cached_property
    def entropy(self) -> Tensor:
        """`(B,)`, of the prediction: all the uncertainty there is."""
        return _entropy(self.log_mean_probs)

    @cached_property
    def expected_entropy(self) -> Tensor:
        """`(B,)`, of a draw, in the mean: what no knowledge of the weights would take away."""
        return _entropy(self.log_probs).mean(0)

    @property
    def mutual_information(self) -> Tensor:
        """`(B,)`, between prediction and weights: what the draws disagree about; at least 0."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def std(self) -> Tensor:
        """`(B, C)`: standard deviation of the probabilities over draws; 0 for one draw."""
        return self.probs.std(0, unbiased=len(self.logits) > 1)

    @property
    def disagreement(self) -> Tensor:
        """`(B,)`: share of draws whose most likely class is not that of the prediction."""
        return (self.logits.argmax(-1) != self.log_mean_probs.argmax(-1)).float().mean(0)

    @staticmethod
    def join(parts: Sequence[Predictive]) -> Predictive:
        """Batches, one after another."""
        return Predictive(torch.cat([part.logits for part in parts], 1))


def _entropy(log_probs: Tensor) -> Tensor:
    return -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


@torch.no_grad()
def scores(model: PeftModel, batch: Any, classes: Sequence[int] | None = None, n_samples: int = 1) -> Tensor:
    """Logits of a batch that holds its rows `n_samples` times: `(K, B, C)`, on the CPU.

    Of a causal language model, those of the token after the last one of each row; no others are computed.
    """
    if isinstance(batch, Tensor):
        output = model(batch)
    else:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        causal = any(config.task_type == TaskType.CAUSAL_LM for config in model.peft_config.values())
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if ids is not None and (causal or classes is not None):
            return _split(_after_last(model, inputs, ids)[..., _chosen(classes)], n_samples)
        output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return _split(logits[..., _chosen(classes)], n_samples)


def _chosen(classes: Sequence[int] | None) -> Any:
    return slice(None) if classes is None else list(classes)


def _split(logits: Tensor, n_samples: int) -> Tensor:
    """`(K, B, C)`, wide enough to compute with."""
    return logits.reshape(n_samples, -1, *logits.shape[1:]).to(torch.promote_types(logits.dtype, torch.float32)).cpu()


def _after_last(model: PeftModel, inputs: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits `(rows, V)` of the token after the last one of each row, which may be padded on either side."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(ids.shape[:2], device=ids.device)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    if "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters:
        places, last = last.unique(return_inverse=True)
        inputs = {**inputs, "logits_to_keep": places}
    logits = model(**inputs).logits
    return logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)]


def predict(
    model: PeftModel,
    batch: Tensor | Mapping[str, Tensor],
    n_samples: int = 10,
    *,
    classes: Sequence[int] | None = None,
    samples_at_once: int | None = None,
    seed: int = 0,
    sampler: str = "coherent",
    adapter_name: str | None = None,
    sigma: float | None = None,
    targets: str | None = None,
) -> Predictive:
    """Predictions of `n_samples` draws of an adapter for each row of a batch, computed as one batch.

    Args:
        model: a PEFT model in eval mode with a posterior; see [`posterior`], also for `seed`, `sampler`, `adapter_name`, `sigma` and `targets`.
        batch: what the model is called with: keywords, or one tensor. Labels are left out.
        n_samples: K.
        classes: ids of the tokens among which a language model chooses; default: the whole vocabulary.
        samples_at_once: to save memory, compute so many draws in one forward pass; the draws are the same. For the sampler "coherent".

    Raises:
        ValueError: see [`posterior`]; or `samples_at_once` for another sampler.
    """
    shared: dict[str, Any] = {
        "seed": seed,
        "sampler": sampler,
        "adapter_name": adapter_name,
        "sigma": sigma,
        "targets": targets,
    }
    step = samples_at_once or n_samples
    if step < n_samples and sampler != "coherent":
        raise ValueError(
            f"samples_at_once={samples_at_once}: the draws of the sampler {sampler!r} belong to one pass."
        )
    parts = []
    for first in range(0, n_samples, step):
        count = min(step, n_samples - first)
        with posterior(model, count, first_sample=first, **shared) as opened:
            parts.append(scores(model, opened.expand(batch), classes, count))
    return Predictive(torch.cat(parts))
