"""Attacks on an unlearned model: what a user, an owner of the weights, or mere deployment can bring back.

Every attack leaves the model as it found it, bit by bit, also after an exception: parameters are pointed at copies and
then back at the tensors they had, which are never written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_ext._compat import has_injected_adapters
from hf_ext.metrics.editing.encoding import pad
from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.unlearning import measures
from hf_ext.metrics.unlearning.measures import Floats
from hf_ext.metrics.unlearning.scores import (
    AnswerScores,
    PromptFormat,
    Row,
    RowEncoder,
    read_rows,
    refuse_overlap,
    score_rows,
)

Model = PreTrainedModel | PeftModel


class AttackUnavailable(ValueError):
    """The attack has nothing to act on in this model."""


# -- Relearning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RelearningCurve:
    """What a model knows of the probe rows after so many steps of training on other rows to be forgotten.

    Attributes:
        steps: optimiser steps, beginning with 0.
        values: measure -> its mean over the probe rows at each of them. `"choice_accuracy"` (share of rows whose right
            answer is more probable than every perturbed one; chance is 1/(k+1)) is there if the rows have perturbed
            answers; `"probability"`, `"exact_memorization"` and `"extraction_strength"` always are.
    """

    steps: tuple[int, ...]
    values: dict[str, tuple[float, ...]]

    @property
    def measure(self) -> str:
        """The measure that says most about the fact: template words of an answer are relearnt by any model."""
        return "choice_accuracy" if "choice_accuracy" in self.values else "exact_memorization"

    def area(self, measure: str | None = None) -> float:
        """Mean height of the curve over its steps (trapezoids)."""
        heights = np.asarray(self.values[measure or self.measure])
        widths = np.diff(self.steps)
        return float((widths * (heights[1:] + heights[:-1]) / 2).sum() / widths.sum())

    def area_between(self, other: RelearningCurve, measure: str | None = None) -> float:
        """`area` minus that of another curve: above 0, this model relearns what the other has to learn.

        Raises:
            ValueError: curves with different steps.
        """
        if self.steps != other.steps:
            raise ValueError(f"relearning curves with the steps {self.steps} and {other.steps} cannot be compared")
        return self.area(measure) - other.area(measure)

    def steps_to(self, level: float = 0.5, measure: str | None = None) -> float | None:
        """First step at which the measure reaches `level`, interpolated; None if it never does."""
        heights = self.values[measure or self.measure]
        if heights[0] >= level:
            return 0.0
        for left in range(len(heights) - 1):
            low, high = heights[left : left + 2]
            if high >= level:
                share = (level - low) / (high - low)
                return self.steps[left] + share * (self.steps[left + 1] - self.steps[left])
        return None


def relearning_curve(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    relearn_rows: Iterable[Mapping[str, Any] | Row],
    probe_rows: Iterable[Mapping[str, Any] | Row],
    steps: Sequence[int] = (2, 4, 8, 16),
    *,
    learning_rate: float = 1e-4,
    train_batch_size: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    format: PromptFormat | None = None,
) -> RelearningCurve:
    """Fine-tunes copies of the weights on some rows to be forgotten and watches others come back.

    If the knowledge is gone, the probe rows stay unknown, since nothing in the other rows tells them; if it is merely
    suppressed, a few steps bring it back (https://huggingface.co/papers/2406.13356). Only the difference to the curve
    of a retrained model says which.

    All weights of the base model are trained in float32 with AdamW (no weight decay, constant rate, no dropout), also
    under a `PeftModel`, whose curve is therefore the one of the merged model. Where the base is quantised, the adapter
    is trained.

    Args:
        relearn_rows: rows to train on.
        probe_rows: rows to ask about; none of the former.
        steps: increasing numbers of optimiser steps after which to ask; 0 is added.
        train_batch_size: rows per step, drawn without replacement until all have been used.
        seed: of that order; the global random state is not touched.

    Raises:
        ValueError: rows in common, steps that do not increase, or a loss that is not finite (naming the step).
        AttackUnavailable: a quantised model without an adapter, or offloaded weights.
    """
    schedule = tuple(sorted({0, *steps}))
    if list(schedule[-len(steps) :]) != list(steps) or schedule[0] < 0 or len(schedule) < 2:
        raise ValueError(f"steps={list(steps)} must be increasing numbers of at least 1")
    relearn, probe = read_rows(relearn_rows, "relearn"), read_rows(probe_rows, "probe")
    refuse_overlap(probe, "probe", relearn, "relearn")
    runner = ModelRunner(model, tokenizer, batch_size)
    encoder = RowEncoder(tokenizer, format or PromptFormat(), relearn[0].answer)
    examples = [encoder.pair(row, row.answer)[:2] for row in relearn]
    order = _batches(len(examples), train_batch_size, seed)
    points = []
    with borrowed(model):
        weights = _detached_weights(model)
        optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
        with runner.evaluating():  # no dropout, so that nothing is drawn
            for step in range(schedule[-1] + 1):
                if step in schedule:
                    points.append(_known(score_rows(runner, encoder, {"probe": probe})["probe"]))
                if step < schedule[-1]:
                    with torch.enable_grad():
                        loss = _answer_loss(runner, [examples[index] for index in next(order)])
                        loss.backward()
                    if not torch.isfinite(loss):
                        raise ValueError(
                            f"the relearning loss is {loss.item()} at step {step}; lower learning_rate={learning_rate}"
                        )
                    optimizer.step()
                    optimizer.zero_grad()
    return RelearningCurve(schedule, {name: tuple(point[name] for point in points) for name in points[0]})


def _detached_weights(model: Model) -> list[nn.Parameter]:
    """Points the trained parameters at float32 copies: an update of 1e-5 would be rounded away in bfloat16."""
    weights = trained_weights(model)
    with torch.no_grad():
        for weight in weights:
            weight.data = weight.data.to(torch.float32, copy=True)
            weight.requires_grad_(True)
    return weights


def _known(scores: Sequence[AnswerScores]) -> dict[str, float]:
    answers = [score.answer for score in scores]
    correct = [score.correct_nll for score in scores]
    known = {
        "probability": float(measures.probability([answer.nll for answer in answers]).mean()),
        "exact_memorization": float(np.mean([measures.exact_memorisation(a.content.hits) for a in answers])),
        "extraction_strength": float(np.mean([measures.extraction_strength(a.content.hits) for a in answers])),
    }
    if scores[0].perturbed:
        wrong = [[other.nll for other in score.perturbed] for score in scores]
        known["choice_accuracy"] = float(measures.choice_hits(correct, wrong).mean())
    return known


def _batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        while len(left) < min(size, rows):
            left += torch.randperm(rows, generator=generator).tolist()
        yield left[:size]
        left = left[size:]


def _answer_loss(runner: ModelRunner, examples: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch of (prompt, answer) ids."""
    ids, mask = pad([prompt + answer for prompt, answer in examples], runner.pad_id, "right")
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(examples):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    device = runner.model.get_input_embeddings().weight.device
    # The head runs from the first answer token of the batch on.
    keep = ids.shape[1] - min(len(prompt) for prompt, _ in examples) + 1
    logits = runner.model(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=keep
    ).logits
    targets = labels[:, -keep:][:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


# -- Weights ----------------------------------------------------------------------------------------------------------


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to parameters inside, each has its own tensor, flag and gradient again on leaving."""
    kept = [(weight, weight.data, weight.requires_grad, weight.grad) for weight in model.parameters()]
    for weight, *_ in kept:
        weight.grad = None
    try:
        yield
    finally:
        for weight, data, requires_grad, grad in kept:
            weight.grad = None
            weight.data = data
            # Quantised weights cannot even be asked to require a gradient.
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)
            weight.grad = grad


def trained_weights(model: Model) -> list[nn.Parameter]:
    """What an attacker with the weights trains: the base model, or the adapter where the base is quantised.

    Training the base of an adapted layer W + BA is the same as training the merged weight, so that packing an
    unlearned model differently does not change what it relearns.

    Raises:
        AttackUnavailable: a quantised model without an adapter, or parameters that are not in memory.
    """
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        raise AttackUnavailable("some weights are offloaded; load the model without offloading")
    adapters = _adapter_weights(model)
    base = [weight for weight in weights if id(weight) not in adapters]
    if all(weight.is_floating_point() for weight in base):
        return base
    trainable = [weight for weight in weights if id(weight) in adapters and weight.is_floating_point()]
    if not trainable:
        raise AttackUnavailable("the weights are quantised; load the model unquantised, or add an adapter to train")
    return trainable


def _adapter_weights(model: Model) -> set[int]:
    """Identities of the parameters that adapters add; copies of whole modules count as the model's own."""
    if isinstance(model, PeftModel):
        states = [
            get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            for name in model.peft_config
        ]
    elif has_injected_adapters(model):
        states = [model.get_adapter_state_dict(name) for name in model.peft_config]
    else:
        return set()
    pointers = {tensor.data_ptr() for state in states for tensor in state.values()}
    return {
        id(weight)
        for name, weight in model.named_parameters()
        if weight.data_ptr() in pointers and ".modules_to_save." not in name
    }


@contextmanager
def quantized_copy(model: Model, bits: int) -> Iterator[Model]:
    """The model with the weights of its linear layers rounded to `bits` bits, and as before on leaving.

    Round-to-nearest with one scale per output channel, symmetric: ŵ = s · round(w / s), s = max|w| / (2^(bits−1) − 1).
    The output head stays as it is, as in bitsandbytes. Adapters are merged first, because that is what is deployed: an
    update smaller than half a step of the grid is rounded away, and the knowledge is back
    (https://huggingface.co/papers/2410.16454).

    Raises:
        ValueError: `bits` outside 2 to 8.
        AttackUnavailable: a model without linear layers in floating point.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be from 2 to 8")
    adapters = _adapter_weights(model)
    head = model.get_output_embeddings()
    head_weights = set() if head is None else {id(weight) for weight in head.parameters()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in adapters | head_weights
    ]
    if not layers or not all(w.is_floating_point() for w in model.parameters() if id(w) not in adapters):
        raise AttackUnavailable("the model has no linear layers in floating point; load it unquantised")
    tuned = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not module.merged and not module.disable_adapters
    ]
    with borrowed(model), torch.no_grad():
        for module in {id(tuner.get_base_layer()): tuner.get_base_layer() for tuner in tuned}.values():
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.clone()
        try:
            for tuner in tuned:
                tuner.merge()
            for layer in layers:
                layer.weight.data = rounded(layer.weight.data, bits, channel=1 if isinstance(layer, Conv1D) else 0)
            yield model
        finally:
            for tuner in tuned:
                if tuner.merged:
                    tuner.unmerge()


def rounded(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """`weight` [out, in] rounded to a symmetric grid of 2^bits − 1 points per slice along dimension `channel`."""
    others = [dim for dim in range(weight.dim()) if dim != channel]
    exact = weight.float()
    scale = exact.abs().amax(dim=others, keepdim=True) / (2 ** (bits - 1) - 1)
    # A slice of zeros has the scale 0.
    return (torch.round(exact / scale.where(scale > 0, 1)) * scale).to(weight.dtype)


@contextmanager
def without_adapter(model: Model) -> Iterator[Model]:
    """The model with its adapters switched off: what anyone has who drops the adapter file.

    Raises:
        AttackUnavailable: there is no adapter, or it is merged into the weights already.
    """
    if not isinstance(model, PeftModel) and not has_injected_adapters(model):
        raise AttackUnavailable("the model has no adapter")
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise AttackUnavailable("the adapter is merged into the weights, where nobody can switch it off")
    # PEFT marks the adapter as trainable when it switches it on again.
    with borrowed(model):
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield model
        else:
            model.disable_adapters()
            try:
                yield model
            finally:
                model.enable_adapters()


def gradient_norms(
    model: Model, encoder: RowEncoder, rows: Sequence[Row], runner: ModelRunner, *, p: float = 2.0
) -> Floats:
    """Mean over the weights of the p-norm of the gradient of each row's NLL, [n].

    https://huggingface.co/papers/2402.17012; the end token is left out. Larger means less likely a member of the
    training set.
    """
    norms = []
    with borrowed(model), runner.evaluating(), torch.enable_grad():
        weights = trained_weights(model)
        for weight in weights:
            weight.requires_grad_(True)
        for row in rows:
            prompt, answer, ended = encoder.pair(row, row.answer)
            loss = _answer_loss(runner, [(prompt, answer[:-1] if ended else answer)])
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            values = [gradient.float().norm(p).item() for gradient in gradients if gradient is not None]
            norms.append(math.fsum(values) / len(values))
    return np.asarray(norms)


# -- Prompts ----------------------------------------------------------------------------------------------------------


def in_context(rows: Sequence[Row], separator: str = " ") -> list[Row]:
    """Rows with the knowledge put back into the prompt (https://huggingface.co/papers/2407.00106).

    The facts are the row's `context`, or else its own question and answer. A model that never saw them can read them
    off as well, so only the comparison with a retrained model tells what a high score means.
    """
    facts = [row.context or f"{row.question}{separator}{row.answer}" for row in rows]
    return [row.asked(f"{fact}\n{row.question}", "context") for row, fact in zip(rows, facts, strict=True)]


def paraphrased(rows: Sequence[Row]) -> list[Row]:
    """One row for every entry of `prompt_paraphrases`."""
    return [
        row.asked(text, f"paraphrase-{index}") for row in rows for index, text in enumerate(row.prompt_paraphrases)
    ]
