"""The code that loads what the card describes."""

from __future__ import annotations

from hf_ext.model_cards.collect import Facts
from hf_ext.registry import METHODS, Method

# Stands for the repository until `publish` knows its id: Python that works inside the saved folder.
HERE = '"."  # this folder'

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "IMAGE_CLS": "AutoModelForImageClassification",
}


def snippet(facts: Facts, repo_id: str | None) -> str:
    """Python that loads the model.

    Args:
        repo_id: where it is published; the snippet loads the current folder when absent.
    """
    name = HERE if repo_id is None else f'"{repo_id}"'
    auto_class = _AUTO_CLASSES.get(facts.task_type or "", "AutoModel")
    if facts.adapter is None:
        return f"from transformers import {auto_class}\n\nname = {name}\nmodel = {auto_class}.from_pretrained(name)"
    lines = ["from peft import PeftModel", f"from transformers import {auto_class}"]
    if own_peft_method(facts):
        lines.insert(0, f"import hf_ext  # makes the PEFT type {facts.adapter.peft_type} known")
    revision = f', revision="{facts.base.commit}"' if facts.base.commit else ""
    base = f'"{facts.base.id}"{revision}' if facts.base.id else "base_folder"
    # The classifier of the base may have another size; the adapter brings its own.
    classes = f", num_labels={facts.trained_classes}, ignore_mismatched_sizes=True" if facts.trained_classes else ""
    lines += ["", f"name = {name}", f"base = {auto_class}.from_pretrained({base}{classes})"]
    if facts.base.id is None:
        lines.insert(-2, 'base_folder = "base"  # the folder of the base model described under "Model details"')
    return "\n".join([*lines, "model = PeftModel.from_pretrained(base, name)"])


def own_peft_method(facts: Facts) -> Method | None:
    """The method of this package that defines the adapter's PEFT type; `None` for PEFT's own types."""
    peft_type = facts.adapter.peft_type if facts.adapter else None
    return next((method for method in METHODS if peft_type is not None and method.peft_type == peft_type), None)
