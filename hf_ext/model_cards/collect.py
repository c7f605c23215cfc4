"""Facts about a model, gathered without asking the user and without the network."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, PromptLearningConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hf_ext._compat import has_injected_adapters
from hf_ext.model_cards.base_model import BaseModel, identify
from hf_ext.model_cards.training import TrainingFacts, as_text, changed_fields, own_fields, training_facts
from hf_ext.model_cards.unlearning import unlearning_methods
from hf_ext.registry import METHODS, Method
from hf_ext.registry import method as method_named

Model = PeftModel | PreTrainedModel

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
# Said elsewhere in the card, or meaningless outside the run.
_NOT_SETTINGS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version"),
        *("base_model_name_or_path", "revision", "inference_mode"),
    }
)
_LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")


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
    """Everything the card can say about a model by itself.

    Attributes:
        adapter: what is published, if that is an adapter.
        merged: the adapter whose update lies in the published weights.
        trained_classes: number of classes of a classifier that is saved with the adapter; the base has to be loaded with as many.
        tokenizer: where it lies: `"here"`, beside the weights, `"base"`, beside those of the base model, or nowhere that is known.
    """

    base: BaseModel
    architecture: str
    task_type: str | None
    methods: tuple[Method, ...]
    tags: tuple[str, ...]
    adapter: AdapterFacts | None
    merged: AdapterFacts | None
    parameters: int
    quantization: str | None
    training: TrainingFacts | None
    versions: dict[str, str]
    trained_classes: int | None
    tokenizer: str | None

    @property
    def pipeline_tag(self) -> str | None:
        return _PIPELINE_TAGS.get(self.task_type or "")


def collect(
    model_or_trainer: nn.Module | Trainer,
    *,
    method: str | list[str] | None = None,
    base_model: str | None = None,
    merged: bool = False,
) -> Facts:
    """Gather the facts.

    Args:
        model_or_trainer: a `PeftModel`, a `PreTrainedModel` (with or without injected adapters) or a `Trainer` of either.
        method: slug(s) from the registry; found from the PEFT type and the trainer's tags when absent.
        base_model: Hub id of the base model, when it was loaded from a folder.
        merged: describe the weights with the adapter merged into them.

    Raises:
        ValueError: an argument is of another kind, holds several adapters, a slug is unknown, or there is nothing to
            merge.
    """
    trainer = model_or_trainer if isinstance(model_or_trainer, Trainer) else None
    model = unwrapped_model(model_or_trainer)
    config = adapter_config(model)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if merged:
        check_mergeable(model)
    adapter = _adapter(model, config) if config else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    base = _base(core, config, base_model)
    return Facts(
        base=base,
        architecture=type(core).__name__,
        task_type=_task_type(core, config),
        methods=_methods(method, trainer, core, config),
        tags=_tags(trainer, core),
        adapter=None if merged else adapter,
        merged=adapter if merged else None,
        parameters=parameters - adapter.parameters if adapter and merged else parameters,
        quantization=_quantization(core),
        training=training_facts(trainer) if trainer else None,
        versions=_versions(trainer is not None),
        trained_classes=_trained_classes(core, config),
        tokenizer=_tokenizer(trainer, base, published_whole=config is None or merged),
    )


def _tokenizer(trainer: Trainer | None, base: BaseModel, published_whole: bool) -> str | None:
    if trainer is not None and tokenizer_of(trainer) is not None:
        return "here"
    return "base" if base.has_tokenizer and not published_whole else None


def tokenizer_of(model_or_trainer: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a trainer that has one."""
    processing = model_or_trainer.processing_class if isinstance(model_or_trainer, Trainer) else None
    return processing if isinstance(processing, PreTrainedTokenizerBase) else None


def _trained_classes(core: Any, config: PeftConfig | None) -> int | None:
    if config is None or not config.to_dict().get("modules_to_save"):
        return None
    return core.config.num_labels if _task_type(core, config) in ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS") else None


def unwrapped_model(model_or_trainer: Any) -> Model:
    """The `PeftModel` or `PreTrainedModel` behind the argument."""
    model = model_or_trainer
    if isinstance(model, Trainer):
        model = model.accelerator.unwrap_model(model.model)
    if not isinstance(model, PeftModel | PreTrainedModel):
        raise ValueError(
            f"model_or_trainer is a {type(model_or_trainer).__name__}; give a PeftModel, a transformers model or a "
            "transformers Trainer."
        )
    return model


def check_mergeable(model: Model) -> None:
    """Raises `ValueError` where no adapter can be merged into the weights."""
    if not isinstance(model, PeftModel):
        raise ValueError("merged=True needs a PeftModel: this model has no adapter to merge; leave it out.")
    if isinstance(model.active_peft_config, PromptLearningConfig):
        raise ValueError("merged=True: prompt learning adds no weights that could be merged; publish the adapter.")
    if _quantization(model.get_base_model()):
        raise ValueError(
            "merged=True: the base is quantised, and merging would round the adapter's update to its grid. Publish the "
            "adapter, or attach it to the base in bfloat16 and merge that."
        )


def adapter_config(model: Model) -> PeftConfig | None:
    """Configuration of the adapter that `model` carries; `None` for a full model."""
    name = adapter_name(model)
    if name is None:
        return None
    config = model.peft_config[name]
    assert isinstance(config, PeftConfig)
    return config


def adapter_name(model: Model) -> str | None:
    """The adapter to describe and save: the only one, or the active one among several."""
    if isinstance(model, PeftModel):
        names = list(model.peft_config)
        return names[0] if len(names) == 1 else model.active_adapter
    if isinstance(model, PreTrainedModel) and has_injected_adapters(model):
        active = model.active_adapters()
        if len(active) != 1:
            raise ValueError(f"the model has the active adapters {active}; activate one with `set_adapter`.")
        return active[0]
    return None


def saves_embeddings(model: Model, config: PeftConfig, base: BaseModel) -> bool:
    """Whether the embedding layers belong to the adapter: they are adapted, or the vocabulary was resized.

    PEFT's own `"auto"` answers the same question by asking the Hub for the base model's config.
    """
    token_wise = config.peft_type == "TRAINABLE_TOKENS" or vars(config).get("trainable_token_indices") is not None
    if not token_wise and any(
        isinstance(module, BaseTunerLayer) and name.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES
        for name, module in model.named_modules()
    ):
        return True
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.vocab_size is None or not isinstance(core, PreTrainedModel):
        return False
    embeddings = core.get_input_embeddings()
    return isinstance(embeddings, nn.Embedding) and embeddings.num_embeddings != base.vocab_size


def _base(core: nn.Module, config: PeftConfig | None, explicit: str | None) -> BaseModel:
    name = config.base_model_name_or_path if config else None
    if not name and isinstance(core, PreTrainedModel):
        name = core.config.name_or_path
    return identify(name, config.revision if config else None, explicit)


def _task_type(core: nn.Module, config: PeftConfig | None) -> str | None:
    if config is not None and config.task_type is not None:
        return TaskType(config.task_type).value
    name = type(core).__name__
    return next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None)


def _methods(
    asked: str | list[str] | None, trainer: Trainer | None, core: nn.Module, config: PeftConfig | None
) -> tuple[Method, ...]:
    if asked is not None:
        try:
            return tuple(method_named(slug) for slug in ([asked] if isinstance(asked, str) else asked))
        except KeyError as error:
            raise ValueError(f"method={asked!r}: {error.args[0]}.") from None
    tags = _tags(trainer, core)
    peft_type = PeftType(config.peft_type).value if config else None
    found = tuple(m for m in METHODS if m.slug in tags or (m.peft_type is not None and m.peft_type == peft_type))
    return found + unlearning_methods(tags)


def _tags(trainer: Trainer | None, core: nn.Module) -> tuple[str, ...]:
    """Tags that the trainer class, and trainers before it, put on the model."""
    tags: list[str] = []
    for cls in type(trainer).__mro__ if trainer else ():
        tags += vars(cls).get("_tag_names", ())
        # Ours name all that applies to them: unlearning is no DPO, although its trainer is derived from DPO's.
        if tags and cls.__module__.startswith("hf_ext."):
            break
    if isinstance(core, PreTrainedModel):
        tags += core.model_tags or ()
    return tuple(dict.fromkeys(tags))


def _adapter(model: Model, config: PeftConfig) -> AdapterFacts:
    name, peft_type = str(adapter_name(model)), PeftType(config.peft_type).value
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return AdapterFacts(
        name=name,
        peft_type=peft_type,
        settings=changed_fields(config, _NOT_SETTINGS, (*_LORA_SETTINGS, *own_fields(config))),
        parameters=sum(tensor.numel() for tensor in state.values()),
        size=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        density=_density(model, name) if peft_type == "ROSELORA" else None,
    )


def _density(model: Model, name: str) -> str:
    from hf_ext.tuners.roselora import density_report

    report = density_report(model, name)
    return f"{report.nonzeros:,} of {report.entries:,} entries of the adapted weights ({report.density:.3%})"


def _quantization(core: nn.Module) -> str | None:
    if not isinstance(core, PreTrainedModel):
        return None
    config = core.config.to_dict().get("quantization_config") or {}
    bits = [text for key, text in (("load_in_4bit", "4-bit"), ("load_in_8bit", "8-bit")) if config.get(key)]
    return " ".join([as_text(config["quant_method"]), *bits]) if config else None


def _versions(trained: bool) -> dict[str, str]:
    names = ["hf-ext", "peft", "transformers", "torch", *(["trl", "datasets", "accelerate"] if trained else [])]
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}
