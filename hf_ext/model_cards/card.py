"""Build a model card from what a model or a trainer knows about itself."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_ext.model_cards.facts.base_model import BaseModel
from hf_ext.model_cards.facts.collect import collect
from hf_ext.model_cards.facts.cost import Cost, EmissionsData, read_cost
from hf_ext.model_cards.facts.records import Artefact, Facts
from hf_ext.model_cards.facts.results import DatasetName, MetricsReport, Results, read_results
from hf_ext.model_cards.facts.unlearning import TAG, read_unlearning
from hf_ext.model_cards.loading import own_peft_method, snippet, without_us
from hf_ext.model_cards.markers import BEGIN, END, run_note
from hf_ext.model_cards.rules.sections import UNSTATED
from hf_ext.model_cards.running import NOT_RUN

# What a card made from a model alone says of its training.
NO_TRAINING = {
    "model": "The card was made from the model alone, which does not know how it was trained.",
    "adapter": "The card was made from the adapter alone, which does not know how it was trained.",
    "pipeline": "Nothing was trained for this pipeline; how its models were trained is told by their cards.",
    "cache": "Nothing was trained.",
}


def build_card(
    model_or_trainer: Artefact,
    *,
    method: str | list[str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    language: str | list[str] | None = None,
    metrics: Mapping[str, float] | MetricsReport | None = None,
    evaluated_on: str | None = None,
    cost: Cost | EmissionsData | str | os.PathLike[str] | None = None,
    intended_use: str | None = None,
    out_of_scope: str | None = None,
    factors: str | None = None,
    ethics: str | None = None,
    caveats: str | list[str] | None = None,
    developers: str | None = None,
    contact: str | None = None,
    title: str | None = None,
    extra_sections: Mapping[str, str] | None = None,
    template: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    merged: bool = False,
) -> ModelCard:
    """A complete card: every sentence is a fact, or says that something was not stated or not measured.

    Args:
        model_or_trainer: a `PeftModel`, a transformers model or a `Trainer`, which knows more: settings, losses, data, cost.
            Also a pipeline of diffusers, a `SQuatCache`, or the folder of any saved model, adapter or pipeline.
        method: slug(s) of the registry, e.g. `"roselora"`. Found from the PEFT type and the trainer class if absent.
        base_model: Hub id of the base model. Found if the base was loaded from the Hub; needed if it was loaded from
            a folder that does not name its origin.
        license: licence id of the Hub, e.g. `"apache-2.0"`. The base model's licence, if its card lies in the local
            cache or folder, otherwise left out. For `"other"` set `card.data["license_name"]` and `["license_link"]`.
        datasets: Hub ids of the training data, `"you/facts"` or `"you/facts@revision"`. Found for a dataset loaded from the Hub.
        language: ISO 639 codes.
        metrics: results as a flat dict, metric name (with its protocol) to number, or an evaluator's report, such as
            that of `disaggregate`, which has groups and intervals. What the trainer has measured, or its last evaluation, if absent.
        evaluated_on: Hub id (`"you/probe@revision"`) or name of the data `metrics` were measured on. Without it they stay out of
            the metadata, where the Hub requires a dataset.
        cost: a `Cost`, CodeCarbon's data or its `emissions.csv`. What `CostCallback` or transformers' `CodeCarbonCallback`
            measured, if absent.
        intended_use: what the model is for.
        out_of_scope: what it is not for.
        factors: groups, instruments or environments for which results may differ.
        ethics: sensitive data, risks and harms, and what was done about them.
        caveats: known limits and recommendations, added to those of the method.
        developers, contact: who made it, and where to ask.
        title: heading; made from method and base model if absent.
        extra_sections: more sections, heading to Markdown.
        template: a Jinja template, as a path or as text, in the place of ours; it gets the same variables.
        repo_id: where the model will be published, for the code that loads it. `publish` sets it.
        merged: the card of the weights with the adapter merged into them, as `save` and `publish` write them with
            `merged=True`.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """
    facts = collect(model_or_trainer, method=method, base_model=base_model, merged=merged)
    if base_model is None and facts.adapter is None and facts.base.id == repo_id:
        # A model that was loaded from where it is published is not its own base.
        facts = replace(facts, base=BaseModel())
    words: dict[str, Any] = {
        "intended_use": _text(intended_use),
        "out_of_scope": _text(out_of_scope),
        "ethics": _text(ethics),
        "caveats": _caveats(facts, caveats),
        "contact": _text(contact),
        "extra_sections": {heading: _text(text) for heading, text in (extra_sections or {}).items()},
    }
    results = _results(facts, metrics, evaluated_on)
    unlearning = read_unlearning(facts.tags, facts.methods, metrics)
    named = _datasets(facts, datasets)
    license_data: dict[str, Any] = {"license": license} if license else dict(facts.base.license)
    title = title or _title(facts)
    spent = read_cost(cost) if cost is not None else facts.training.cost if facts.training else None
    data = _metadata(facts, results, named, language, license_data, title, spent, unlearned=unlearning is not None)
    return ModelCard.from_template(
        data,
        template_str=_template(template),
        begin=BEGIN,
        end=END,
        unstated=UNSTATED,
        title=title,
        summary=_summary(facts),
        details=_details(facts, license_data, _text(developers)),
        methods=facts.methods,
        no_method=_no_method(facts),
        adapter=facts.adapter,
        merged=facts.merged,
        snippet=snippet(facts, repo_id),
        snippet_note="\n\n".join([*_other_ways(facts, repo_id), run_note(NOT_RUN)]),
        datasets=[dataset.words for dataset in named],
        training=facts.training,
        no_training=NO_TRAINING[facts.kind],
        results=results,
        testing_data=_testing_data(facts, results, given=metrics is not None),
        factors=_factors(results, _text(factors)),
        metrics_note=_metrics_note(results),
        unlearning=unlearning,
        cost=_cost(facts, spent),
        versions=facts.versions,
        **words,
    )


def _metadata(
    facts: Facts,
    results: Results | None,
    datasets: list[DatasetName],
    language: str | list[str] | None,
    license_data: dict[str, Any],
    title: str,
    cost: Cost | None,
    unlearned: bool,
) -> ModelCardData:
    eval_results = results.eval_results(facts.pipeline_tag or "other") if results else []
    emissions = cost.metadata(facts.training.hardware if facts.training else None) if cost else None
    more = {**license_data, **({"co2_eq_emissions": emissions} if emissions else {})}
    return ModelCardData(
        base_model=facts.base.id,
        library_name=facts.library,
        pipeline_tag=facts.pipeline_tag,
        language=language,
        datasets=[dataset.id for dataset in datasets] or None,
        tags=_card_tags(facts, unlearned),
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
        **more,
    )


def _template(given: str | os.PathLike[str] | None) -> str:
    if given is None:
        return (files("hf_ext.model_cards") / "templates" / "card.md.j2").read_text(encoding="utf-8")
    if isinstance(given, str) and "\n" in given:
        return given
    if not Path(given).is_file():
        raise ValueError(f"template={str(given)!r} is neither a file nor the text of a template.")
    return Path(given).read_text(encoding="utf-8")


def _results(facts: Facts, metrics: Any, evaluated_on: str | None) -> Results | None:
    dataset = DatasetName.parse(evaluated_on) if evaluated_on else None
    training = facts.training
    if metrics is None and training and training.report:
        metrics = training.report
    if metrics is None and training and training.evaluation:
        measured = {name.removeprefix("eval_"): value for name, value in training.evaluation.items()}
        return read_results(measured, dataset or training.eval_dataset, training.eval_rows)
    return read_results(metrics, dataset)


def _datasets(facts: Facts, named: str | list[str] | None) -> list[DatasetName]:
    if named is not None:
        return [DatasetName.parse(name) for name in ([named] if isinstance(named, str) else named)]
    return [facts.training.train_dataset] if facts.training and facts.training.train_dataset else []


def _testing_data(facts: Facts, results: Results | None, given: bool) -> str:
    names = list(dict.fromkeys(results.datasets.values())) if results else []
    named = results.dataset.words if results and results.dataset else ", ".join(names)
    rows = facts.training.eval_rows if facts.training and not given else None
    return (named or UNSTATED["evaluation_data"]) + (f" Rows: {rows:,}." if rows is not None else "")


def _factors(results: Results | None, words: str | None) -> str:
    groups = results.factors if results else {}
    told = [
        f"- {factor}: " + ", ".join(f"{name} ({rows:,})" for name, rows in found.items())
        for factor, found in groups.items()
    ]
    if told:
        words = "\n\n".join(filter(None, [words, "Results are broken down by these, with the rows of every group:"]))
        return "\n".join([words, "", *told])
    return words or UNSTATED["factors"]


def _metrics_note(results: Results | None) -> str:
    if results is None:
        return UNSTATED["metrics"]
    names = ", ".join(dict.fromkeys(name.split(" (")[0] for name in results.values))
    if results.uncertainty is None:
        return f"{names}. No uncertainty was estimated beyond what the results show."
    return f"{names}. {results.uncertainty}"


def _caveats(facts: Facts, given: str | list[str] | None) -> list[str]:
    own = [f"{method.name}: {limit}" for method in facts.methods for limit in method.limits]
    return own + ([given] if isinstance(given, str) else list(given or ()))


def _no_method(facts: Facts) -> str:
    if facts.kind == "pipeline":
        return "The pipeline is not one of `hf_ext`."
    if facts.adapter:
        name = facts.adapter.peft_type
        if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
            return f"PEFT {version('peft')} does not know the adapter type `{name}`: it comes from a later version or another package."
        return f"The adapter type `{name}` is PEFT's own; no other method was involved."
    return "No method of `hf_ext` was involved."


def _other_ways(facts: Facts, repo_id: str | None) -> list[str]:
    """To load it without this package."""
    ours, code = own_peft_method(facts), without_us(facts, repo_id)
    if code is not None:
        return [
            f"Without hf_ext, the same code is in `pipeline.py` here; read it before you trust it:\n\n```python\n{code}\n```"
        ]
    if ours is None or ours.lora_export is None:
        return []
    return [f"`{ours.lora_export}` writes a LoRA adapter with the same outputs, which loads without `hf_ext`."]


def _cost(facts: Facts, cost: Cost | None) -> str:
    told = []
    if facts.training:
        told.append(f"Hardware: {facts.training.hardware}.")
        if facts.training.runtime:
            told.append(f"Training time: {_duration(facts.training.runtime)}.")
    return " ".join([*told, *(cost or Cost()).sentences])


def _card_tags(facts: Facts, unlearned: bool) -> list[str]:
    tags = ["hf_ext", *(method.slug for method in facts.methods), *facts.tags]
    if unlearned:
        tags.append(TAG)
    if facts.adapter:
        tags.append(facts.adapter.peft_type.lower())
    if facts.adapter and facts.base.id:
        tags.append(f"base_model:adapter:{facts.base.id}")
    return list(dict.fromkeys(tags))


def _base_name(facts: Facts) -> str:
    return facts.base.id or (
        f"a local {facts.architecture} checkpoint" if facts.architecture else "a local checkpoint"
    )


def _title(facts: Facts) -> str:
    names = " + ".join(method.name for method in facts.methods)
    if facts.adapter:
        return f"{names or facts.adapter.peft_type} adapter for {_base_name(facts)}"
    if facts.kind == "pipeline":
        return facts.architecture + (f" with {facts.base.id}" if facts.base.id else "")
    if facts.kind == "cache":
        return f"{names} cache for {facts.base.id or 'a local checkpoint'}"
    if not names and facts.training is None:
        return facts.base.id or facts.architecture
    return f"{_base_name(facts)}, fine-tuned" + (f" with {names}" if names else "")


def _summary(facts: Facts) -> str:
    names = " and ".join(f"[{method.name}]({method.paper_url})" for method in facts.methods)
    made = f", made with {names}" if names else ""
    size = f" with {facts.parameters:,} parameters" if facts.parameters else ""
    if facts.kind == "pipeline":
        return f"A pipeline of diffusers, `{facts.architecture}`,{size or ' saved as a folder'}{made}."
    if facts.kind == "cache":
        return f"A prompt that {_base_name(facts)} has read, as a key-value cache: `{facts.architecture}`{made}."
    if facts.adapter is None:
        tuned = "A fine-tuned" if facts.methods or facts.training else "A"
        return f"{tuned} `{facts.architecture}`{size}{made}."
    told = f"A PEFT adapter of type `{facts.adapter.peft_type}` for {_base_name(facts)}{made}."
    if not facts.adapter.parameters:
        return told
    told += f" It adds {facts.adapter.parameters:,} parameters"
    if facts.parameters is None:
        return told + "."
    share = facts.adapter.parameters / max(1, facts.parameters - facts.adapter.parameters)
    return f"{told}, {share:.2%} of the base model's."


def _details(facts: Facts, license_data: dict[str, Any], developers: str | None) -> dict[str, str]:
    """Rows of the first table."""
    rows = {"Developed by": developers} if developers else {}
    if facts.base != BaseModel() or facts.adapter:
        rows["Base model"] = _base_row(facts)
    if facts.architecture:
        rows["Architecture"] = f"`{facts.architecture}`"
    if facts.quantization:
        rows["Base model loaded as"] = facts.quantization
    rows |= facts.rows
    if facts.adapter:
        rows |= {f"`{name}`": f"`{value}`" for name, value in facts.adapter.settings.items() if value}
        if facts.adapter.parameters:
            rows["Parameters of the adapter"] = f"{facts.adapter.parameters:,} ({facts.adapter.size / 1e6:.2f} MB)"
    adapter = facts.adapter or facts.merged
    if adapter and adapter.density:
        rows["Weights the merged adapter changes"] = adapter.density
    if facts.merged:
        settings = ", ".join(f"`{name}` {value}" for name, value in facts.merged.settings.items() if value)
        rows["Adapter, merged into the weights"] = f"`{facts.merged.peft_type}`: {settings}"
    if facts.parameters:
        rows["Parameters in all"] = f"{facts.parameters:,}"
    rows["Licence"] = str(license_data.get("license_name") or license_data.get("license") or "not stated")
    return {name: " ".join(value.replace("|", "\\|").split()) for name, value in rows.items()}


def _base_row(facts: Facts) -> str:
    base = facts.base
    if base.id is None:
        return "local checkpoint, " + (f"sha256 `{base.digest}`" if base.digest else "not identified")
    told = f"[{base.id}](https://huggingface.co/{base.id})"
    if base.commit:
        return f"{told} at commit `{base.commit}`"
    return f"{told}, from a local copy with sha256 `{base.digest}`" if base.digest else told


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if seconds >= 60 else f"{seconds:.1f} s"


def _text(text: str | None) -> str | None:
    return text.strip() if text else None
