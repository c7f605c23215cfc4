"""What a training run starts with: its arguments, the folder it writes to, and the data it reads."""

from __future__ import annotations

import hashlib
import json
from typing import TypeVar

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def arguments_of(
    args: object, kind: type[Arguments], model: str | PreTrainedModel | PeftModel, trainer: type, method: str
) -> Arguments:
    """`args`, or for `None` the defaults of their `kind` with TRL's `output_dir`, `<model>-<method>`.

    Raises:
        TypeError: they are of another kind.
    """
    if args is None:
        name = model if isinstance(model, str) else str(model.config.name_or_path)
        return kind(f"{name.split('/')[-1] or type(model).__name__}-{method}")
    if not isinstance(args, kind):
        raise TypeError(
            f"args is a {type(args).__name__}: {trainer.__name__} takes {kind.__name__}, which has the same fields."
        )
    return args


def dataset_digest(data: Dataset) -> str:
    """Identifies a dataset by its columns, its length and some thousand rows from all over it."""
    rows = data[:: max(1, len(data) // 1000)]
    content = json.dumps([data.column_names, len(data), rows], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
