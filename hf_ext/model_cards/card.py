"""Build a model card from what a model or a trainer knows about itself."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import Trainer

from hf_ext.model_cards.collect import Facts, collect
from hf_ext.model_cards.loading import own_peft_method, snippet
from hf_ext.model_cards.markers import BEGIN, END
from hf_ext.model_cards.results import MetricsReport, Results, read_results
from hf_ext.model_cards.unlearning import TAG, read_unlearning


def build_card(
    model_or_trainer: nn.Module | Trainer,
    *,
    method: str | list[str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    language: str | list[str] | None = None,
    metrics: Mapping[str, float] | MetricsReport | None = None,
    evaluated_on: str | None = None,
    intended_use: str | None = None,
    limitations: str | list[str] | None = None,
    title: str | None = None,
    extra_sections: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    merged: bool = False,
) -> ModelCard:
    """A complete card: every sentence is a fact, or says that something was not stated or not measured.

    Args:
        model_or_trainer: a `PeftModel`, a transformers model or a `Trainer`. A trainer knows more: settings, losses,
            data, cost.
        method: slug(s) of the registry, e.g. `"roselora"`. Found from the PEFT type and the trainer class if absent.
        base_model: Hub id of the base model. Found if the base was loaded from the Hub; needed if it was loaded from
            a folder that does not name its origin.
        license: licence id of the Hub, e.g. `"apache-2.0"`. The base model's licence, if its card lies in the local
            cache or folder, otherwise left out. For `"other"` set `card.data["license_name"]` and `["license_link"]`.
        datasets: Hub ids of the training data. Found for a dataset loaded from the Hub.
        language: ISO 639 codes.
        metrics: results as a flat dict, metric name (with its protocol) to number, or an evaluator's report. What
            the trainer has measured, or its last evaluation, if absent.
        evaluated_on: Hub id or name of the data `metrics` were measured on. Without it they stay out of the metadata,
            where the Hub requires a dataset.
        intended_use: what the model is for, and what it is not for.
        limitations: known limits, added to those of the method.
        title: heading; made from method and base model if absent.
        extra_sections: more sections, heading to Markdown.
        repo_id: where the model will be published, for the code that loads it. `publish` sets it.
        merged: the card of the weights with the adapter merged into them, as `save` and `publish` write them with
            `merged=True`.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """
    facts = collect(model_or_trainer, method=method, base_model=base_model, merged=merged)
    results = _results(facts, metrics, evaluated_on)
    unlearning = read_unlearning(facts.tags, facts.methods, metrics)
    our_type = own_peft_method(facts)
    named = _datasets(facts, datasets)
    title = title or _title(facts)
    license_data: dict[str, Any] = {"license": license} if license else dict(facts.base.license)
    eval_results = results.eval_results(facts.pipeline_tag or "other") if results else []
    data = ModelCardData(
        base_model=facts.base.id,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=facts.pipeline_tag,
        language=language,
        datasets=named or None,
        tags=_card_tags(facts, unlearned=unlearning is not None),
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
        **license_data,
    )
    template = (files("hf_ext.model_cards") / "templates" / "card.md.j2").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        begin=BEGIN,
        end=END,
        title=title,
        summary=_summary(facts),
        details=_details(facts, license_data),
        methods=facts.methods,
        adapter=facts.adapter,
        intended_use=_text(intended_use),
        snippet=snippet(facts, repo_id),
        lora_export=our_type.lora_export if our_type else None,
        datasets=named,
        training=facts.training,
        runtime=_duration(facts.training.runtime) if facts.training and facts.training.runtime else None,
        results=results,
        eval_rows=facts.training.eval_rows if facts.training and metrics is None else None,
        unlearning=unlearning,
        merged=facts.merged,
        limitations=[limitations] if isinstance(limitations, str) else list(limitations or ()),
        extra_sections={heading: _text(text) for heading, text in (extra_sections or {}).items()},
        versions=facts.versions,
    )


def _results(facts: Facts, metrics: Any, evaluated_on: str | None) -> Results | None:
    if metrics is None and facts.training and facts.training.report:
        metrics = facts.training.report
    if metrics is None and facts.training and facts.training.evaluation:
        metrics = {name.removeprefix("eval_"): value for name, value in facts.training.evaluation.items()}
        evaluated_on = evaluated_on or facts.training.eval_dataset
    return read_results(metrics, evaluated_on)


def _datasets(facts: Facts, named: str | list[str] | None) -> list[str]:
    if named is not None:
        return [named] if isinstance(named, str) else list(named)
    return [facts.training.train_dataset] if facts.training and facts.training.train_dataset else []


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
    return facts.base.id or f"a local {facts.architecture} checkpoint"


def _title(facts: Facts) -> str:
    names = " + ".join(method.name for method in facts.methods)
    if facts.adapter:
        return f"{names or facts.adapter.peft_type} adapter for {_base_name(facts)}"
    return f"{_base_name(facts)}, fine-tuned" + (f" with {names}" if names else "")


def _summary(facts: Facts) -> str:
    names = " and ".join(f"[{method.name}]({method.paper_url})" for method in facts.methods)
    made = f", made with {names}" if names else ""
    if facts.adapter is None:
        return f"A fine-tuned `{facts.architecture}` with {facts.parameters:,} parameters{made}."
    share = facts.adapter.parameters / max(1, facts.parameters - facts.adapter.parameters)
    return (
        f"A PEFT adapter of type `{facts.adapter.peft_type}` for {_base_name(facts)}{made}. It adds "
        f"{facts.adapter.parameters:,} parameters, {share:.2%} of the base model's."
    )


def _details(facts: Facts, license_data: dict[str, Any]) -> dict[str, str]:
    """Rows of the first table."""
    base = f"[{facts.base.id}](https://huggingface.co/{facts.base.id})" if facts.base.id else "local checkpoint"
    if facts.base.commit:
        base += f" at commit `{facts.base.commit}`"
    if facts.base.id is None:
        base += f", sha256 `{facts.base.digest}`" if facts.base.digest else ", not identified"
    rows = {"Base model": base, "Architecture": f"`{facts.architecture}`"}
    if facts.quantization:
        rows["Base model loaded as"] = facts.quantization
    if facts.adapter:
        rows |= {f"`{name}`": f"`{value}`" for name, value in facts.adapter.settings.items() if value}
        rows["Parameters of the adapter"] = f"{facts.adapter.parameters:,} ({facts.adapter.size / 1e6:.2f} MB)"
    adapter = facts.adapter or facts.merged
    if adapter and adapter.density:
        rows["Weights the merged adapter changes"] = adapter.density
    if facts.merged:
        settings = ", ".join(f"`{name}` {value}" for name, value in facts.merged.settings.items() if value)
        rows["Adapter, merged into the weights"] = f"`{facts.merged.peft_type}`: {settings}"
    rows["Parameters in all"] = f"{facts.parameters:,}"
    rows["Licence"] = str(license_data.get("license_name") or license_data.get("license") or "not stated")
    return {name: value.replace("|", "\\|") for name, value in rows.items()}


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if seconds >= 60 else f"{seconds:.1f} s"


def _text(text: str | None) -> str | None:
    return text.strip() if text else None
