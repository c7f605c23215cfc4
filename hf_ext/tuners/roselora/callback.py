"""RoseLoRA's companion for `transformers.Trainer`."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ext.tuners.roselora import pruning
from hf_ext.tuners.roselora.density import density_report
from hf_ext.tuners.roselora.state import RoseLoraState, write_state


class RoseLoraCallback(TrainerCallback):
    """Tells RoseLoRA how long training lasts, carries its state through checkpoints, and logs its density.

    Pruning itself happens in optimizer hooks and needs no callback. This one sets the horizon for fractional `t_init` and
    `t_final`, writes `roselora_state.safetensors` into every checkpoint and reads it on resume, so that a resumed run
    equals an uninterrupted one. The log history gets `roselora/density`, what the schedule keeps of each line, and at the
    end `roselora/delta_density`, the share of changed entries. Each `train()` runs the schedule anew.

    Args:
        resume_from_checkpoint (`str`, *optional*): the folder handed to `trainer.train(resume_from_checkpoint=...)`, where
            that is not a `checkpoint-<step>` folder inside `output_dir`. The Trainer does not tell its callbacks.

    Raises:
        RuntimeError: the optimizer never reached a RoseLoRA parameter (DeepSpeed ZeRO and FSDP1 flatten parameters, so
            that no line can be scored); use DDP or FSDP2.
        FileNotFoundError: on resume, when the checkpoint lacks RoseLoRA's state.
    """

    def __init__(self, resume_from_checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.resume_from_checkpoint = resume_from_checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        schedules = pruning.schedules(model)
        if not schedules:
            raise ValueError(
                "RoseLoraCallback: the model has no RoseLoRA adapter; use RoseLoraConfig, or drop the callback."
            )
        for name, schedule in schedules.items():
            schedule.total_step = state.max_steps
            _, t_final = schedule.limits
            if schedule.config.sparsity and t_final > state.max_steps:
                warnings.warn(
                    f"adapter {name!r}: t_final is step {t_final}, but training ends at step {state.max_steps}; the "
                    "adapter will stay denser than its `sparsity`.",
                    stacklevel=2,
                )
        if state.global_step:
            RoseLoraState(model).load(self.resume_from_checkpoint or _checkpoint(args, state))
        else:
            pruning.restart(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedules = pruning.schedules(kwargs["model"])
        skipped = kwargs["optimizer"].step_was_skipped  # accelerate's, after an overflow of the loss scale
        if not skipped and not any(schedule.advanced for schedule in schedules.values()):
            raise RuntimeError(
                f"RoseLoRA: no adapter parameter took part in this step of {type(kwargs['optimizer'].optimizer).__name__}. "
                "Either none of them trains, or the engine flattens parameters (DeepSpeed ZeRO, FSDP1); use DDP or FSDP2."
            )
        for schedule in schedules.values():
            schedule.advanced = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, schedule in pruning.schedules(kwargs["model"]).items():
            state.log_history[-1][_log_name(name, "density")] = schedule.density

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        snapshot = RoseLoraState(kwargs["model"]).state_dict()  # on every rank: gathering shards is collective
        if state.is_world_process_zero:
            write_state(snapshot, _checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        for name, schedule in pruning.schedules(model).items():
            if schedule.config.sparsity and 0 < schedule.step < schedule.limits[1]:
                warnings.warn(
                    f"adapter {name!r}: training stopped at step {schedule.step}, before t_final={schedule.limits[1]}; "
                    f"each line keeps {schedule.density:.1%} instead of {1 - schedule.config.sparsity:.1%}.",
                    stacklevel=2,
                )
            if state.log_history and state.is_world_process_zero:
                state.log_history[-1][_log_name(name, "delta_density")] = density_report(model, name).density


def _log_name(adapter: str, quantity: str) -> str:
    return f"roselora/{quantity}" if adapter == "default" else f"roselora/{adapter}/{quantity}"


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder into which the Trainer saves this step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
