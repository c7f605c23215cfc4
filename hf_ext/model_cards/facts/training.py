"""What a `Trainer` knows about its own run."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_ext._compat import dataset_fingerprint
from hf_ext.model_cards.facts.cost import Cost, measured_cost
from hf_ext.model_cards.facts.results import DataMaker, DatasetName, MetricsReport, Reporting
from hf_ext.model_cards.facts.settings import as_text, changed_fields, own_fields

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
_LOSS = re.compile(r"eval_(\w+_)?loss")
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
        sentences: what else is known of the run.
        runtime: seconds, if the run finished.
        cost: what callbacks measured.
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
    sentences: tuple[str, ...] = ()
    runtime: float | None = None
    cost: Cost | None = None
    hardware: str = ""
    train_rows: int | None = None
    train_fingerprint: str | None = None
    eval_rows: int | None = None
    train_dataset: DatasetName | None = None
    eval_dataset: DatasetName | None = None


def training_facts(trainer: Trainer) -> TrainingFacts:
    args = trainer.args
    history = trainer.state.log_history
    evaluation = _evaluation(trainer)
    logged = next((entry for entry in reversed(history) if "loss" in entry), {})
    summary = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    losses = {"last logged training loss": logged.get("loss"), "mean training loss": summary.get("train_loss")}
    return TrainingFacts(
        trainer=type(trainer).__name__,
        settings=changed_fields(args, skip=(_LIBRARY - _SHAPING) | _NOT_SHAPING, always=(*_ALWAYS, *own_fields(args))),
        optimizer=_optimizer(trainer),
        batch_size=(trainer.state.train_batch_size or args.train_batch_size)
        * args.gradient_accumulation_steps
        * args.world_size,
        seed=args.seed,
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        losses={name: value for name, value in losses.items() if value is not None},
        evaluation={k: v for k, v in evaluation.items() if k.startswith("eval_") and not _is_cost(k)},
        report=trainer.report if isinstance(trainer, Reporting) else None,
        data_notes=tuple(map(as_text, trainer.data_notes)) if isinstance(trainer, DataMaker) else (),
        sentences=tuple(_sentences(trainer, summary)),
        runtime=summary.get("train_runtime"),
        cost=measured_cost(trainer),
        hardware=_hardware(args),
        train_rows=_rows(trainer.train_dataset),
        train_fingerprint=dataset_fingerprint(trainer.train_dataset),
        eval_rows=_rows(trainer.eval_dataset) if _is_of(evaluation, trainer.eval_dataset) else _rows_of(evaluation),
        train_dataset=dataset_name(trainer.train_dataset),
        eval_dataset=dataset_name(trainer.eval_dataset) if _is_of(evaluation, trainer.eval_dataset) else None,
    )


def dataset_name(dataset: Any) -> DatasetName | None:
    """Id, configuration, split and revision of a `datasets.Dataset` that was loaded from the Hub."""
    # A Dataset can only be here if its library has been imported; importing it to find out would cost seconds.
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return None
    for address in dataset.info.download_checksums or {}:
        if address.startswith("hf://datasets/"):
            name, _, rest = address.removeprefix("hf://datasets/").partition("@")
            config = dataset.info.config_name if dataset.info.config_name != "default" else None
            split = str(dataset.split) if dataset.split is not None else None
            return DatasetName(name, config, split, rest.split("/")[0] or None)
    return None


def _evaluation(trainer: Trainer) -> dict[str, float]:
    """What was measured on the weights that the trainer holds: the last record, or that of the best checkpoint if it was loaded at the end.

    Of several evaluation sets, the records of one step together.
    """
    records = [entry for entry in trainer.state.log_history if any(_LOSS.fullmatch(key) for key in entry)]
    if not records:
        return {}
    step = records[-1]["step"]
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step and step == trainer.state.global_step:
        step = trainer.state.best_global_step
    several = isinstance(trainer.eval_dataset, Mapping)
    of_step = [entry for entry in records if entry["step"] == step]
    return {key: value for entry in (of_step if several else of_step[-1:]) for key, value in entry.items()}


def _rows_of(evaluation: Mapping[str, float]) -> int | None:
    """How many rows a record is of: the trainer logs only how fast they were."""
    if not {"eval_runtime", "eval_samples_per_second"} <= evaluation.keys():
        return None
    return round(evaluation["eval_runtime"] * evaluation["eval_samples_per_second"])


def _is_of(evaluation: Mapping[str, float], dataset: Any) -> bool:
    """Whether the record can be of this data: `evaluate` takes others, and its record does not say which."""
    rows, known = _rows_of(evaluation), _rows(dataset)
    # Both factors of the product are rounded to three or four digits.
    return rows is None or known is None or abs(rows - known) <= max(1, 0.02 * known)


def _sentences(trainer: Trainer, summary: Mapping[str, Any]) -> Iterator[str]:
    state = trainer.state
    counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
    tokens = int(state.num_input_tokens_seen or (counted[-1] if counted else 0))
    if tokens:
        yield f"Tokens seen: {tokens:,}."
    if "train_samples_per_second" in summary:
        yield f"Throughput: {summary['train_samples_per_second']:.3g} sequences per second."
    if trainer.args.world_size > 1:
        yield f"Processes: {trainer.args.world_size}."
    if state.best_model_checkpoint:
        name = Path(state.best_model_checkpoint).name
        yield f"Best checkpoint: `{name}`, with {trainer.args.metric_for_best_model} {state.best_metric:.4g}."
    if script := _script():
        yield f"Started by {script}."


def _script() -> str | None:
    """The script that runs, with its commit, if git knows it."""
    file = Path(vars(sys.modules["__main__"]).get("__file__") or "")
    if not file.is_file():
        return None
    told = _git(file, "ls-files", "--error-unmatch", file.name), _git(file, "rev-parse", "HEAD")
    if None in told:
        return None
    changed = " with uncommitted changes" if _git(file, "status", "--porcelain", "--", file.name) else ""
    return f"`{told[0]}` at commit `{told[1]}`{changed}"


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


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
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, Mapping) else None
