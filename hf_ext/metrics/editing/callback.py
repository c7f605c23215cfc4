"""Edit evaluation inside a `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ext.metrics.editing.evaluator import KnowledgeEditingEvaluator, Predictions
from hf_ext.metrics.editing.report import FINAL, EditingReport


class EditingCallback(TrainerCallback):
    """Evaluates the edit when training ends, and on the way if asked, and logs the scores as `editing/...`.

        trainer.add_callback(EditingCallback(evaluator, trainer))

    The reference is predicted when training begins, unless it is given; for a `PeftModel` with its adapters disabled.

    Args:
        evaluator: made for the model that is trained.
        trainer: whose `log` receives the scores.
        before: predictions of the untouched model; needed when training resumes from a checkpoint of a model without
            adapters, since that model is no longer untouched.
        every_n_epochs: also evaluate after every n epochs.
        every_n_steps: also evaluate after every n optimiser steps.

    Attributes:
        report: the latest `EditingReport`.

    Raises:
        ValueError: an interval below 1.
    """

    def __init__(
        self,
        evaluator: KnowledgeEditingEvaluator,
        trainer: Trainer,
        *,
        before: Predictions | None = None,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1.")
        self.evaluator = evaluator
        self.trainer = trainer
        self.before = before
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.report: EditingReport | None = None
        self._evaluated_at = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.before is not None:
            return
        if isinstance(self.evaluator.model, PeftModel):
            with self.evaluator.model.disable_adapter():
                self.before = self.evaluator.predict()
            return
        if state.global_step > 0:
            raise ValueError(
                f"training resumes at step {state.global_step}, where the model is no longer untouched; pass before=, the "
                "evaluator's predict() on the model before editing."
            )
        self.before = self.evaluator.predict()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._evaluate(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.every_n_epochs is not None and state.epoch and round(state.epoch) % self.every_n_epochs == 0:
            self._evaluate(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluate(state)

    def _evaluate(self, state: TrainerState) -> None:
        if self._evaluated_at == state.global_step:
            return
        self._evaluated_at = state.global_step
        self.report = self.evaluator.evaluate(self.before)
        self.trainer.log({f"editing/{m.name}": m.value for m in self.report.measurements if m.stage == FINAL})
