"""A plain checkpoint from a model with an adapter: what cannot be merged, and its way to the disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel, PromptLearningConfig
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ext._compat import has_injected_adapters
from hf_ext.trainers.output_layer import base_of

# A folder without one of these files does not load.
_ENTRY = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def check_mergeable(model: PreTrainedModel | PeftModel, path: Path, sharded: bool) -> None:
    """Raises `ValueError`, with a remedy, for a folder or a model from which no plain checkpoint can be written."""
    if any(path.glob("adapter_*")):
        raise ValueError(
            f"{path} holds an adapter, which from_pretrained would apply to the merged weights once more: give another "
            f"folder, e.g. {path / 'merged'}."
        )
    if not isinstance(model, PeftModel):
        if has_injected_adapters(model):
            raise ValueError(
                "the adapter was added with add_adapter or load_adapter, which can write it but not merge it: call "
                "save_model, load the base, attach the adapter with PeftModel.from_pretrained, and call "
                "merge_and_unload()."
            )
        return
    if sharded:
        raise ValueError(
            "the weights are sharded over the processes, so none of them can merge: call save_model, and in a single "
            "process load the base, attach the adapter with PeftModel.from_pretrained and call merge_and_unload()."
        )
    if base_of(model).config.to_dict().get("quantization_config"):
        raise ValueError(
            "the base is quantised: merging would round the small update of the adapter to its grid, which can bring "
            "the forgotten answers back. Save the adapter, load the base in bfloat16, attach it with "
            "PeftModel.from_pretrained and call merge_and_unload()."
        )
    if isinstance(model.active_peft_config, PromptLearningConfig):
        raise ValueError("prompt learning adds no weights that could be merged: publish the adapter with save_model.")


def write_checkpoint(model: PreTrainedModel, processing_class: Any, path: Path) -> None:
    """Save both so that a folder in which this was interrupted does not load.

    Everything is written beside the folder and then moved, the file that a folder is loaded from last. Weights of an
    earlier checkpoint in the folder are replaced, its other files stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        staged = Path(beside) / "checkpoint"
        model.save_pretrained(staged)
        processing_class.save_pretrained(staged)
        for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
            for old in path.glob(pattern):
                old.unlink()
        files = [file for file in staged.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name in _ENTRY):
            place = path / file.relative_to(staged)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
