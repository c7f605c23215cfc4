"""Evaluation of unlearning inside a `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ext.metrics.unlearning.evaluate import evaluate_unlearning
from hf_ext.metrics.unlearning.report import UnlearningReport
from hf_ext.metrics.unlearning.rows import Row


class UnlearningEvalCallback(TrainerCallback):
    """Evaluates the model that is being unlearned, and logs the numbers as `unlearning/...`.

        trainer.add_callback(UnlearningEvalCallback(trainer, splits, attacks=(), max_new_tokens=32))

    It runs on the main process, on which the others wait: with many rows or attacks raise `ddp_timeout`. Attacks are
    made unless `attacks=()`; relearning takes far longer than all the rest.

    Args:
        trainer: whose model is evaluated and whose `log` receives the numbers.
        splits: as for `evaluate_unlearning`.
        retrained: as there; a report is read, while a model is evaluated anew every time.
        tokenizer: the trainer's own by default.
        every_n_steps: evaluate after every n optimiser steps, instead of whenever the trainer evaluates.
        options: of `evaluate_unlearning`.

    Attributes:
        report: the latest `UnlearningReport`; None before the first, and on all but the main process.

    Raises:
        ValueError: an interval below 1, no tokenizer, or a model in pieces on several processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        splits: Mapping[str, Iterable[Mapping[str, Any] | Row]],
        retrained: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        every_n_steps: int | None = None,
        **options: Any,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: give at least 1.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "the main process holds a part of the weights only (FSDP or DeepSpeed); call evaluate_unlearning on the "
                "saved model instead."
            )
        found = trainer.processing_class if tokenizer is None else tokenizer
        if not isinstance(found, PreTrainedTokenizerBase):
            raise ValueError(
                f"the trainer's processing_class is {type(found).__name__}; pass a tokenizer as tokenizer."
            )
        self.trainer = trainer
        self.splits = {name: list(rows) for name, rows in splits.items()}
        self.retrained = retrained
        self.tokenizer = found
        self.every_n_steps = every_n_steps
        self.options = options
        self.report: UnlearningReport | None = None
        self._evaluated_at = -1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._evaluate(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_steps is None:
            self._evaluate(state)

    def _evaluate(self, state: TrainerState) -> None:
        # A trainer with several evaluation sets calls once for each.
        if not state.is_world_process_zero or self._evaluated_at == state.global_step:
            return
        self._evaluated_at = state.global_step
        model: Any = self.trainer.model
        self.report = evaluate_unlearning(model, self.tokenizer, self.splits, self.retrained, **self.options)
        self.trainer.log({f"unlearning/{name}": value for name, value in self.report.metrics.items()})
