"""What a card can say about an artefact by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import transformers
from torch import nn
from transformers import Cache, Trainer
from transformers.models.auto import modeling_auto as auto

from hf_ext.model_cards.facts.base_model import BaseModel
from hf_ext.model_cards.facts.training import TrainingFacts
from hf_ext.registry import Method

# What a card can be made of: a model, its trainer, a cache, a pipeline of diffusers (whose class may not be installed), or a folder.
Artefact: TypeAlias = nn.Module | Trainer | Cache | str | os.PathLike[str] | Any

# Auto class, the names it loads, PEFT's task type and the Hub's task; a class that is in several belongs to the first.
_AUTO_CLASSES: tuple[tuple[str, Mapping[str, Any], str | None, str | None], ...] = (
    ("ImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, None, "image-text-to-text"),
    ("CausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "CAUSAL_LM", "text-generation"),
    ("Seq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "SEQ_2_SEQ_LM", None),
    ("SpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, None, "automatic-speech-recognition"),
    ("MaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, None, "fill-mask"),
    (
        "SequenceClassification",
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "SEQ_CLS",
        "text-classification",
    ),
    ("TokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "TOKEN_CLS", "token-classification"),
    ("QuestionAnswering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "QUESTION_ANS", "question-answering"),
    # The last one's task type is not one of PEFT's.
    ("ImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "IMAGE_CLS", "image-classification"),
)
_FEATURES = "FEATURE_EXTRACTION"
# Classes of Sentence Transformers and the Hub's tasks.
SENTENCE_CLASSES = {
    "SentenceTransformer": "sentence-similarity",
    "SparseEncoder": "feature-extraction",
    "MultiVectorEncoder": "feature-extraction",
    "CrossEncoder": "text-ranking",
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
        """The task on the Hub."""
        if self.task or self.task_type == _FEATURES:
            return self.task or "feature-extraction"
        return next((task for _, names, kind, task in _AUTO_CLASSES if self._is(names, kind)), None)

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the model, or its base: an auto class where one knows it."""
        found = (f"AutoModelFor{name}" for name, names, kind, _ in _AUTO_CLASSES if self._is(names, kind))
        known = self.architecture if self.architecture in dir(transformers) else "AutoModel"
        return next(found, known)

    def _is(self, names: Mapping[str, Any], kind: str | None) -> bool:
        if self.architecture:
            return _loads(names, self.architecture)
        return kind is not None and kind == self.task_type

    @property
    def library(self) -> str:
        """`library_name` of the Hub."""
        if self.architecture in SENTENCE_CLASSES:
            return "sentence-transformers"
        return {"adapter": "peft", "model": "transformers", "pipeline": "diffusers", "cache": "transformers"}[
            self.kind
        ]


def task_of(architecture: str) -> str | None:
    """PEFT's task type of a model class of transformers."""
    return next((kind for _, names, kind, _ in _AUTO_CLASSES if _loads(names, architecture)), None)


def _loads(names: Mapping[str, Any], architecture: str) -> bool:
    # Some model types have several classes.
    return any(architecture in (name if isinstance(name, tuple) else (name,)) for name in names.values())
