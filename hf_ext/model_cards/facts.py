"""What a card can say about an artefact by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import nn
from transformers import Cache, Trainer

from hf_ext.model_cards.base_model import BaseModel
from hf_ext.model_cards.training import TrainingFacts
from hf_ext.registry import Method

# What a card can be made of: a model, its trainer, a cache, a pipeline of diffusers (whose class may not be installed), or a folder.
Artefact: TypeAlias = nn.Module | Trainer | Cache | str | os.PathLike[str] | Any

_PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "IMAGE_CLS": "image-classification",
}

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForImageClassification": "IMAGE_CLS",  # not one of PEFT's
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter: its name in the model, PEFT type, settings that differ from the defaults, and size as saved."""

    name: str
    peft_type: str
    settings: dict[str, str]
    parameters: int
    size: int
    density: str | None


@dataclass(frozen=True)
class Facts:
    """Everything the card can say about a model, a pipeline or a cache by itself.

    Attributes:
        kind: what is published.
        architecture: the class that loads it, of an adapter that of its base model; empty if nothing tells.
        adapter: what is published, if that is an adapter.
        merged: the adapter whose update lies in the published weights.
        parameters: all of them, those of the base model included; `None` if the base model is not at hand.
        trained_classes: number of classes of a classifier that is saved with the adapter; the base has to be loaded with as many.
        tokenizer: where it lies: `"here"`, beside the weights, `"base"`, beside those of the base model, or nowhere that is known.
        rows: more of the details, as Markdown.
        task: a pipeline tag that does not follow from the task type.
    """

    base: BaseModel
    architecture: str
    methods: tuple[Method, ...]
    versions: dict[str, str]
    kind: Literal["adapter", "model", "pipeline", "cache"] = "model"
    task_type: str | None = None
    tags: tuple[str, ...] = ()
    adapter: AdapterFacts | None = None
    merged: AdapterFacts | None = None
    parameters: int | None = None
    quantization: str | None = None
    training: TrainingFacts | None = None
    trained_classes: int | None = None
    tokenizer: str | None = None
    rows: dict[str, str] = field(default_factory=dict)
    task: str | None = None

    @property
    def pipeline_tag(self) -> str | None:
        return self.task or _PIPELINE_TAGS.get(self.task_type or "")

    @property
    def library(self) -> str:
        """`library_name` of the Hub."""
        return {"adapter": "peft", "model": "transformers", "pipeline": "diffusers", "cache": "transformers"}[
            self.kind
        ]


def task_of(architecture: str) -> str | None:
    """PEFT's task type of a model class of transformers."""
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)
