"""Facts about a model, gathered without asking the user and without the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType, PromptLearningConfig, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hf_ext._compat import has_injected_adapters
from hf_ext.model_cards.facts.artefacts import asked_methods, collect_artefact, is_cache, is_pipeline, versions_of
from hf_ext.model_cards.facts.base_model import BaseModel, identify
from hf_ext.model_cards.facts.records import AdapterFacts, Artefact, Facts, task_of
from hf_ext.model_cards.facts.settings import NOT_SETTINGS, SHOWN_SETTINGS, as_text, changed_fields, own_fields
from hf_ext.model_cards.facts.training import training_facts
from hf_ext.model_cards.facts.unlearning import unlearning_methods
from hf_ext.registry import METHODS, Method

Model = PeftModel | PreTrainedModel


def collect(
    model_or_trainer: Artefact,
    *,
    method: str | list[str] | None = None,
    base_model: str | None = None,
    merged: bool = False,
) -> Facts:
    """Gather the facts.

    Args:
        model_or_trainer: a `PeftModel`, a `PreTrainedModel` (with or without injected adapters), a `Trainer` of either, a pipeline of
            diffusers, a `SQuatCache`, or the folder of a saved model, adapter or pipeline.
        method: slug(s) from the registry; found from the PEFT type and the trainer's tags when absent.
        base_model: Hub id of the base model, when it was loaded from a folder.
        merged: describe the weights with the adapter merged into them.

    Raises:
        ValueError: an argument is of another kind, holds several adapters, a slug is unknown, or there is nothing to
            merge.
    """
    if is_pipeline(model_or_trainer) or is_cache(model_or_trainer) or isinstance(model_or_trainer, str | Path):
        if merged:
            raise ValueError("merged=True needs a PeftModel or its trainer; leave it out.")
        return collect_artefact(model_or_trainer, asked_methods(method), base_model)
    trainer = model_or_trainer if isinstance(model_or_trainer, Trainer) else None
    model = unwrapped_model(model_or_trainer)
    config = adapter_config(model)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    if merged:
        check_mergeable(model)
    base = _base(core, config, base_model)
    adapter = _adapter(model, config, base) if config else None
    return Facts(
        kind="adapter" if adapter and not merged else "model",
        base=base,
        architecture=type(core).__name__,
        task_type=_task_type(core, config),
        methods=_methods(method, trainer, core, config),
        tags=_tags(trainer, core),
        adapter=None if merged else adapter,
        merged=adapter if merged else None,
        parameters=_parameters(model, core, adapter, merged),
        quantization=_quantization(core),
        training=training_facts(trainer) if trainer else None,
        versions=versions_of("peft", *(("trl", "datasets", "accelerate") if trainer else ())),
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
            f"model_or_trainer is a {type(model_or_trainer).__name__}; give a PeftModel, a transformers model or "
            "Trainer, a diffusers pipeline, a SQuatCache or a folder."
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
    return task_of(name)


def _methods(
    asked: str | list[str] | None, trainer: Trainer | None, core: nn.Module, config: PeftConfig | None
) -> tuple[Method, ...]:
    if (named := asked_methods(asked)) is not None:
        return named
    tags = _tags(trainer, core)
    peft_type = PeftType(config.peft_type).value if config else None
    names = {cls.__name__ for cls in type(config).__mro__}
    found = tuple(
        m
        for m in METHODS
        if m.slug in tags or (m.peft_type is not None and m.peft_type == peft_type) or names & m.entry_points.keys()
    )
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


def _parameters(model: Model, core: Any, adapter: AdapterFacts | None, merged: bool) -> int:
    """Those of the base model and of the adapter in question: not those of others that the model carries, and all of a quantised weight."""
    whole = core.num_parameters()
    if adapter is None:
        return whole
    inside = not isinstance(model.peft_config[adapter.name], PromptLearningConfig)
    for other in set(model.peft_config) - {adapter.name} if inside else ():
        state = get_peft_model_state_dict(model, adapter_name=other, save_embedding_layers=False)
        whole -= sum(tensor.numel() for tensor in state.values())
    if merged:
        return whole - adapter.parameters
    return whole if inside else whole + adapter.parameters


def _adapter(model: Model, config: PeftConfig, base: BaseModel) -> AdapterFacts:
    name, peft_type = str(adapter_name(model)), PeftType(config.peft_type).value
    embeddings = saves_embeddings(model, config, base)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
    return AdapterFacts(
        name=name,
        peft_type=peft_type,
        settings=changed_fields(config, NOT_SETTINGS, (*SHOWN_SETTINGS, *own_fields(config))),
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
