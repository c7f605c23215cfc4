"""What scripts share that train: trainers that say nothing, and the settings of an edit."""

from __future__ import annotations

import warnings
from typing import Any

from datasets.utils.logging import disable_progress_bar
from transformers.utils import logging

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
}


def silence() -> None:
    """No progress bars, notes or warnings of the libraries: what a script prints is its results."""
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.filterwarnings("ignore")


def edit_settings(folder: str, rows: int, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Arguments of a trainer that reads all rows in every step, at a constant rate, and logs each loss."""
    return QUIET | {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "seed": seed,
    }
