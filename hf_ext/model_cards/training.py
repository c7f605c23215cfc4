"""What a `Trainer` knows about its own run."""

from __future__ import annotations

import dataclasses
import enum
import os
import platform
import sys
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_ext.model_cards.leaks import TOKEN, without_paths
from hf_ext.model_cards.results import DataMaker, MetricsReport, Reporting

# The library's arguments that shape the model. The others say how a run is watched, stored and hosted, and one of them
# holds an access token.
_SHAPING = frozenset(
    {
        *(
            "learning_rate",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
            "num_train_epochs",
            "max_steps",
        ),
        *("optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules"),
        *("max_grad_norm", "average_tokens_across_devices", "label_smoothing_factor", "neftune_noise_alpha"),
        *("bf16", "fp16", "tf32", "gradient_checkpointing", "use_liger_kernel", "load_best_model_at_end"),
        *("metric_for_best_model", "full_determinism", "dataloader_drop_last", "train_sampling_strategy"),
    }
)
_LIBRARY = frozenset(item.name for item in dataclasses.fields(TrainingArguments))
# Arguments that trainers add and that name files or processes.
_NOT_SHAPING = frozenset({"chat_template_path", "dataset_num_proc"})
_ALWAYS = ("learning_rate", "lr_scheduler_type")


@dataclass(frozen=True)
class TrainingFacts:
    """A run, as the card tells it.

    Attributes:
        trainer: class name.
        settings: learning rate, schedule, and every other training argument that differs from its default.
        batch_size: sequences per optimizer step: per device x accumulation x processes.
        losses: last logged training and evaluation losses.
        evaluation: the last `eval_*` record.
        report: what the trainer itself has measured.
        data_notes: how the data were made.
        runtime: seconds, if the run finished.
    """

    trainer: str
    settings: dict[str, str]
    optimizer: str
    batch_size: int
    seed: int
    steps: int
    epochs: float
    losses: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    report: MetricsReport | None = None
    data_notes: tuple[str, ...] = ()
    runtime: float | None = None
    hardware: str = ""
    train_rows: int | None = None
    eval_rows: int | None = None
    train_dataset: str | None = None
    eval_dataset: str | None = None


def training_facts(trainer: Trainer) -> TrainingFacts:
    args = trainer.args
    history = trainer.state.log_history
    evaluation = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    logged = next((entry for entry in reversed(history) if "loss" in entry), {})
    summary = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    losses = {"last logged training loss": logged.get("loss"), "mean training loss": summary.get("train_loss")}
    return TrainingFacts(
        trainer=type(trainer).__name__,
        settings=changed_fields(args, skip=(_LIBRARY - _SHAPING) | _NOT_SHAPING, always=(*_ALWAYS, *own_fields(args))),
        optimizer=_optimizer(trainer),
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        seed=args.seed,
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        losses={name: value for name, value in losses.items() if value is not None},
        evaluation={k: v for k, v in evaluation.items() if k.startswith("eval_") and not _is_cost(k)},
        report=trainer.report if isinstance(trainer, Reporting) else None,
        data_notes=tuple(map(as_text, trainer.data_notes)) if isinstance(trainer, DataMaker) else (),
        runtime=summary.get("train_runtime"),
        hardware=_hardware(args),
        train_rows=_rows(trainer.train_dataset),
        eval_rows=_rows(trainer.eval_dataset),
        train_dataset=dataset_id(trainer.train_dataset),
        eval_dataset=dataset_id(trainer.eval_dataset),
    )


def changed_fields(config: Any, skip: frozenset[str], always: tuple[str, ...]) -> dict[str, str]:
    """Fields of a dataclass that differ from their defaults, those in `always` in any case, as text for a table."""
    told = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if item.name not in skip and (item.name in always or value != default):
            told[item.name] = as_text(value)
    return told


def own_fields(config: Any) -> tuple[str, ...]:
    """Fields that a method of this package adds to a library's configuration: they are told even at their defaults."""
    ours = [cls for cls in type(config).__mro__ if cls.__module__.startswith("hf_ext.")]
    return tuple(name for cls in ours for name in vars(cls).get("__annotations__", ()))


def as_text(value: Any) -> str:
    """One line of text; sets sorted, numbers short, local paths and tokens removed."""
    if value is None:
        return "not set"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return TOKEN.sub("(removed)", without_paths(" ".join(text.split())))


def dataset_id(dataset: Any) -> str | None:
    """`namespace/name` of a `datasets.Dataset` that was loaded from the Hub."""
    # A Dataset can only be here if its library has been imported; importing it to find out would cost seconds.
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return None
    for address in dataset.info.download_checksums or {}:
        if address.startswith("hf://datasets/"):
            return address.removeprefix("hf://datasets/").split("@")[0]
    return None


def _is_cost(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


def _optimizer(trainer: Trainer) -> str:
    if trainer.optimizer is None:
        return as_text(trainer.args.optim)
    optimizer = trainer.optimizer
    # accelerate wraps the optimizer of a run that has started.
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return type(optimizer).__name__


def _hardware(args: TrainingArguments) -> str:
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name(args.device)
        return f"{args.world_size * max(1, args.n_gpu)} x {device}"
    if args.device.type == "cpu":
        return f"CPU ({platform.machine()}, {os.cpu_count()} logical cores)"
    return args.device.type


def _rows(dataset: Any) -> int | None:
    return len(dataset) if isinstance(dataset, Sized) else None
