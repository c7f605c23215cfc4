"""Callbacks that act on saturated steps and that record how fast the positions of an answer are learnt.

Paper: https://huggingface.co/papers/2502.00602.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ext.trainers.overtone.statistics import OvertoneStatistics


class OvertoneSaturationCallback(TrainerCallback):
    """Keeps weights still, and ends the training, once no token has a gradient.

    A step is saturated if every labelled token on every rank is within `clip_epsilon` of its target. Its gradient is
    exactly zero, yet an optimizer with momentum or weight decay would still move the weights: `skip` removes the
    gradients, so that the optimizer leaves every parameter alone. Once an epoch's worth of consecutive steps is saturated
    nothing can change any more, and `stop` ends the training.

    Args:
        statistics: fed by the loss: `OvertoneLoss.statistics` or `OvertoneTrainer.overtone_statistics`.
        stop: end the training.
        skip: skip the optimizer's update of a saturated step. The learning rate schedule goes on.
        patience: consecutive saturated steps after which to stop; `None` takes the number of steps in an epoch.
        min_steps: optimizer steps before which training does not stop, for adapters that follow a schedule of their own:
            a RoseLoRA adapter is only as sparse as it was asked to be after its `t_final`.

    Example:
        ```python
        loss = OvertoneLoss()
        trainer = Trainer(..., compute_loss_func=loss, callbacks=[OvertoneSaturationCallback(loss.statistics)])
        ```
    """

    def __init__(
        self,
        statistics: OvertoneStatistics,
        stop: bool = True,
        skip: bool = True,
        patience: int | None = None,
        min_steps: int = 0,
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience={patience}: give at least 1 step, or None for the steps of one epoch.")
        self.statistics, self.stop, self.skip, self.patience = statistics, stop, skip, patience
        self.min_steps = min_steps
        self.saturated_steps = 0
        self._needed = patience
        self._epoch_start: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.statistics.reset()
        self.saturated_steps, self._needed, self._epoch_start = 0, self.patience, None
        # The first epoch of a resumed run can be a part of one, which says nothing about an epoch's length.
        self._first_epoch_is_whole = state.global_step == 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_start = state.global_step if self._first_epoch_is_whole else None
        self._first_epoch_is_whole = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saturated = self.statistics.close_step(state.global_step).active == 0
        self.saturated_steps = self.saturated_steps + 1 if saturated else 0
        if saturated and self.skip:
            for group in kwargs["optimizer"].param_groups:
                for parameter in group["params"]:
                    # A zero gradient would not do: momentum and weight decay act on it.
                    parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_if_saturated(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._needed is None and self._epoch_start is not None:
            self._needed = state.global_step - self._epoch_start
        self._stop_if_saturated(state, control)

    def _stop_if_saturated(self, state: TrainerState, control: TrainerControl) -> None:
        if not self.stop or self._needed is None or state.global_step < self.min_steps:
            return
        if self.saturated_steps >= self._needed:
            control.should_training_stop = True


class OvertoneCurveCallback(TrainerCallback):
    """Records the mean NLL of every answer position at every optimizer step.

    The curves show heterogeneous token overfitting: without OVERTONE some positions fall to zero long before others.

    Args:
        statistics: fed by the loss: `OvertoneLoss.statistics` or `OvertoneTrainer.overtone_statistics`.
        positions: number of positions from the start of the answer; later tokens are not recorded.

    Example:
        ```python
        curve = OvertoneCurveCallback(trainer.overtone_statistics)
        trainer.add_callback(curve)
        trainer.train()
        curve.save_json("curve.json")
        ```
    """

    def __init__(self, statistics: OvertoneStatistics, positions: int = 32) -> None:
        if positions < 1:
            raise ValueError(f"positions={positions}: give at least 1 answer position.")
        self.statistics = statistics
        statistics.positions = positions
        self.steps: list[int] = []
        self.nll: list[list[float | None]] = []
        self.tokens: list[list[int]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps, self.nll, self.tokens = [], [], []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        summary = self.statistics.close_step(state.global_step)
        pairs = list(zip(summary.position_nll, summary.position_tokens, strict=True))
        self.steps.append(state.global_step)
        self.nll.append([nll / tokens if tokens else None for nll, tokens in pairs])
        self.tokens.append([int(tokens) for _, tokens in pairs])

    def to_dict(self) -> dict[str, list]:
        """`steps` [S], `nll` [S][P] in nats (`None` where no answer is that long) and `tokens` [S][P], the counts.

        P is the longest answer seen, at most `positions`. Step s is measured before its update.
        """
        longest = max((i + 1 for row in self.tokens for i, count in enumerate(row) if count), default=0)
        return {
            "steps": list(self.steps),
            "nll": [row[:longest] for row in self.nll],
            "tokens": [row[:longest] for row in self.tokens],
        }

    def save_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
