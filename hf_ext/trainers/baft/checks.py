"""What cannot be taught, said before anything is."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import Trainer

from hf_ext.trainers.baft.config import BaftSettings
from hf_ext.tuners.baft import BaftConfig
from hf_ext.tuners.baft.ledger import layers_of
from hf_ext.tuners.baft.positions import IGNORED, parse_positions


def active_adapter(model: Any) -> tuple[str, BaftConfig]:
    """Name and configuration of the adapter that is trained.

    Raises:
        ValueError: there is not one BaFT adapter that is active and trainable.
    """
    names = list(model.active_adapters) if isinstance(model, PeftModel) else []
    if len(names) != 1 or not isinstance(model.peft_config[names[0]], BaftConfig):
        raise ValueError(
            f"model: BaftTrainer teaches one active BaFT adapter; active here: {names}. Give a PEFT model made with a BaftConfig, or a model without adapters."
        )
    if not any(p.requires_grad for layer in layers_of(model, names[0]) for p in layer.parameters()):
        raise ValueError(f"model: the adapter {names[0]!r} is not trainable; load it with is_trainable=True.")
    return names[0], model.peft_config[names[0]]


def check_datasets(train_dataset: Any, locality_dataset: Any) -> None:
    """
    Raises:
        TypeError: data without a length.
        ValueError: data without rows.
    """
    for name, data in (("train_dataset", train_dataset), ("locality_dataset", locality_dataset)):
        if data is not None and not isinstance(data, Dataset):
            raise TypeError(f"{name} is a {type(data).__name__}; give a `datasets.Dataset`.")
        if data is not None and not len(data):
            raise ValueError(f"{name}: it has no rows.")


def check_settings(settings: BaftSettings, config: BaftConfig, protects: bool) -> None:
    """
    Args:
        protects: there is a locality dataset.

    Raises:
        ValueError: a setting has no effect on this adapter, or without data.
    """
    for name in ("locality_weight", "locality_batch_size"):
        if not protects and (value := getattr(settings, name)):
            raise ValueError(f"{name}={value!r} has no effect without a locality_dataset.")
    balances = settings.load_balance_weight or settings.load_balance != "overlap"
    if config.gate == "none" and (balances or protects):
        raise ValueError(
            "the gate 'none' has weights of 1, which neither load balancing nor a locality_dataset can change."
        )
    if settings.own_bases and config.gate == "softmax":
        raise ValueError(
            "own_bases=True: the weights of a softmax depend on each other, so that new ones would change earlier edits."
        )


def check_run(settings: BaftSettings, config: BaftConfig, trainer: Trainer) -> None:
    """
    Raises:
        ValueError: the trainer's arguments or data do not go with an edit.
    """
    args: Any = trainer.args
    if settings.own_bases and args.weight_decay:
        raise ValueError(
            f"weight_decay={args.weight_decay!r} would move the basis vectors of earlier edits, which own_bases=True keeps: set it to 0."
        )
    if settings.own_bases and trainer.optimizer is not None:
        raise ValueError(
            "optimizers: own_bases=True adds parameters when the training begins; let the trainer make the optimizer."
        )
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start one process for each, with `accelerate launch`.")
    row = row_without_prompt(trainer.train_dataset)
    if row is not None and not parse_positions(config.positions).everything:
        raise ValueError(
            f"train_dataset: row {row} has no prompt before its first label, so that positions={config.positions!r} would be others than in generation. Give "
            "prompts and completions, set assistant_only_loss=True for conversations, or edit at all tokens with positions='all'."
        )


def row_without_prompt(data: Any) -> int | None:
    """The first row whose first token has a label; None if there is none, or no labels are known."""
    if data is None or "labels" not in data.column_names:
        return None
    return next((row for row, labels in enumerate(data["labels"]) if labels and labels[0] != IGNORED), None)
