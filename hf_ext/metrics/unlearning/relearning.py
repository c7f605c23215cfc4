"""Relearning: fine-tunes copies of the weights on some rows to be forgotten and watches others come back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.unlearning import measures
from hf_ext.metrics.unlearning.attacks import AttackFailed, Model, answer_gradients, borrowed, trained_weights
from hf_ext.metrics.unlearning.options import check_option
from hf_ext.metrics.unlearning.rows import Row, read_rows, refuse_overlap
from hf_ext.metrics.unlearning.scores import AnswerScores, NotFiniteError, PromptFormat, RowEncoder, score_rows


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
            raise ValueError(
                f"other: curves with the steps {self.steps} and {other.steps} cannot be compared; relearn with the same steps."
            )
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
        ValueError: rows in common, or options that cannot be.
        AttackUnavailable: a quantised model without an adapter, or offloaded weights.
        AttackFailed: a loss or a log-probability that is not finite (naming the step).
    """
    check_option("steps", list(steps))
    check_option("learning_rate", learning_rate)
    check_option("train_batch_size", train_batch_size)
    schedule = (0, *steps)
    relearn, probe = read_rows(relearn_rows, "relearn"), read_rows(probe_rows, "probe")
    refuse_overlap(probe, "probe", relearn, "relearn")
    runner = ModelRunner(model, tokenizer, batch_size)
    encoder = RowEncoder(tokenizer, format or PromptFormat(), relearn[0].answer)
    pairs = [encoder.pair(row, row.answer) for row in relearn]
    examples = [(tuple(prompt), tuple(answer)) for prompt, answer, _ in pairs]
    order = _batches(len(examples), train_batch_size, seed)
    points = []
    with borrowed(model):
        weights = _detached_weights(model)
        optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
        with runner.evaluating():  # no dropout, so that nothing is drawn
            for step in range(schedule[-1] + 1):
                if step in schedule:
                    try:
                        points.append(_known(score_rows(runner, encoder, {"probe": probe})["probe"]))
                    except NotFiniteError as error:
                        if step == 0:
                            raise
                        raise AttackFailed(
                            f"a log-probability is not finite after {step} steps of relearning; lower "
                            f"learning_rate={learning_rate}"
                        ) from error
                if step < schedule[-1]:
                    loss = answer_gradients(runner, [examples[index] for index in next(order)], weights)
                    if not math.isfinite(loss):
                        raise AttackFailed(
                            f"the relearning loss is {loss} at step {step}; lower learning_rate={learning_rate}"
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
