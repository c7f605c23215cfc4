"""What identifies a training run: the folder it writes to, and the data it reads."""

from __future__ import annotations

import hashlib
import json

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel


def default_folder(model: str | PreTrainedModel | PeftModel, method: str) -> str:
    """`output_dir` of a trainer that was given no arguments, as TRL's: `<model>-<method>`."""
    name = model if isinstance(model, str) else str(model.config.name_or_path)
    return f"{name.split('/')[-1] or type(model).__name__}-{method}"


def dataset_digest(data: Dataset) -> str:
    """Identifies a dataset by its columns, its length and some thousand rows from all over it."""
    rows = data[:: max(1, len(data) // 1000)]
    content = json.dumps([data.column_names, len(data), rows], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
