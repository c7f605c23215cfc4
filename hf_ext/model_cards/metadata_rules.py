"""Rules for the metadata block: each yields (rule, message), errors for what the Hub rejects or misreads, warnings for what a reader misses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ext.model_cards.hub_lists import BASE_MODEL_RELATIONS, LANGUAGES, LIBRARIES, LICENSES, PIPELINE_TAGS

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")

Findings = Iterator[tuple[str, str]]


def metadata_errors(data: dict[str, Any]) -> Findings:
    yield from _license(data)
    yield from _ids(data)
    yield from _closed_lists(data)
    yield from _emissions(data)
    for entry in _as_list(data.get("model-index")):
        if not isinstance(entry, dict) or not isinstance(entry.get("results", []), list):
            yield "model-index", "model-index must be a list of {name, results: [...]}"
            continue
        for number, result in enumerate(entry.get("results", [])):
            yield from _result(f"model-index result {number}", result)


def metadata_warnings(data: dict[str, Any]) -> Findings:
    if not data.get("license"):
        yield "no-license", "without `license` nobody may rely on using the model; pass license="
    library = data.get("library_name")
    if library is not None and library not in LIBRARIES:
        yield "library", f"library_name {library!r} is none that the Hub knows; nobody finds the model by it"
    tags = data.get("tags")
    if library == "peft" and not data.get("base_model"):
        yield "no-base-model", "an adapter without `base_model` cannot be found or loaded; pass base_model="
    if library == "peft" and isinstance(tags, list) and "unlearning" in tags:
        yield (
            "unlearned-adapter",
            "whoever switches the adapter off has what was forgotten; publish the merged weights with merged=True",
        )
    emissions = data.get("co2_eq_emissions")
    grams = emissions.get("emissions") if isinstance(emissions, dict) else emissions
    region = emissions.get("geographical_location") if isinstance(emissions, dict) else None
    if isinstance(grams, int | float) and 0 < grams < math.inf and not region:
        yield "emissions-region", "emissions depend on where the electricity comes from; state geographical_location"
    yield from _uncertain_results(data)


def _uncertain_results(data: dict[str, Any]) -> Findings:
    unsure, loose = [], []
    for entry in _as_list(data.get("model-index")):
        for result in (entry.get("results") or []) if isinstance(entry, dict) else []:
            if not isinstance(result, dict):
                continue
            dataset = result.get("dataset")
            if isinstance(dataset, dict) and _is_repo_id(dataset.get("type")) and "/" in dataset["type"]:
                loose += [] if dataset.get("revision") else [dataset["type"]]
            for metric in _as_list(result.get("metrics")):
                arguments = metric.get("args") if isinstance(metric, dict) else None
                if not (
                    isinstance(arguments, dict) and ("n" in arguments or any(k.startswith("ci") for k in arguments))
                ):
                    unsure.append(str(metric.get("name") or metric.get("type")) if isinstance(metric, dict) else "?")
    if unsure:
        yield "no-interval", f"{', '.join(dict.fromkeys(unsure))}: neither the rows nor an interval are given"
    if loose:
        yield (
            "dataset-revision",
            f"{', '.join(dict.fromkeys(loose))}: without a revision nobody knows which data were measured; pass evaluated_on='id@revision'",
        )


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _license(data: dict[str, Any]) -> Findings:
    if "licence" in data:
        yield "licence-key", "the key is spelled `license`; the Hub ignores `licence`"
    for name in _as_list(data.get("license")):
        if name not in LICENSES:
            yield "license", f"license {name!r} is not one of the Hub's ids; use `other` with a name and a link"
    if data.get("license") == "other":
        for key in ("license_name", "license_link"):
            if not data.get(key):
                yield "license-other", f"`license: other` needs `{key}`"
        link = data.get("license_link")
        if link and not (link in ("LICENSE", "LICENSE.md") or re.fullmatch(r"https?://\S+", str(link))):
            yield "license-link", f"license_link {link!r} must be a URL, 'LICENSE' or 'LICENSE.md'"


def _ids(data: dict[str, Any]) -> Findings:
    for key in ("base_model", "datasets", "new_version"):
        for repo_id in _as_list(data[key]) if key in data else []:
            if not _is_repo_id(repo_id):
                yield f"{key.replace('_', '-')}-id", f"{key} {repo_id!r} is not a Hub id of the form 'namespace/name'"


def _is_repo_id(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _closed_lists(data: dict[str, Any]) -> Findings:
    relation = data.get("base_model_relation")
    if relation is not None and relation not in BASE_MODEL_RELATIONS:
        yield "base-model-relation", f"{relation!r} is not one of {', '.join(sorted(BASE_MODEL_RELATIONS))}"
    tag = data.get("pipeline_tag")
    if tag is not None and tag not in PIPELINE_TAGS:
        yield "pipeline-tag", f"pipeline_tag {tag!r} is not a task of the Hub"
    for language in _as_list(data.get("language")):
        if not _is_language(language):
            yield (
                "language",
                f"language {language!r} is not an ISO 639 code; YAML reads a bare `no` as false: quote it",
            )
    tags = data.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        yield "tags", f"tags must be a list of strings, not {tags!r}"


def _is_language(value: Any) -> bool:
    """Two letters from ISO 639-1, or the form of a code with three; with or without a region or script."""
    if value in ("code", "multilingual"):
        return True
    if not isinstance(value, str) or not _LANGUAGE.fullmatch(value):
        return False
    code = value.split("-")[0]
    return len(code) == 3 or code in LANGUAGES


def _emissions(data: dict[str, Any]) -> Findings:
    stated = data.get("co2_eq_emissions")
    grams = stated.get("emissions") if isinstance(stated, dict) else stated
    if stated is not None and not _is_finite_number(grams):
        yield "emissions", f"co2_eq_emissions must give grams as a number, not {grams!r}"


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _result(place: str, result: Any) -> Findings:
    if not isinstance(result, dict):
        yield "model-index", f"{place} must be a mapping with task, dataset and metrics"
        return
    for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
        if not (isinstance(result.get(part), dict) and result[part].get(key)):
            yield "model-index", f"{place} lacks {part}.{key}"
    source = result.get("source")
    if isinstance(source, dict) and source.get("name") and not source.get("url"):
        yield "source-url", f"{place} names a source without its url"
    seen = []
    for metric in _as_list(result.get("metrics")):
        if not isinstance(metric, dict) or not metric.get("type") or "value" not in metric:
            yield "model-index", f"{place} has a metric without type or value"
            continue
        value = metric["value"]
        if isinstance(value, dict | list) or (isinstance(value, float) and not math.isfinite(value)):
            yield (
                "metric-value",
                f"{place}: the value of {metric['type']!r} is {value!r}; it must be one finite number or text",
            )
        identity = {key: entry for key, entry in metric.items() if key != "value"}
        if identity in seen:
            yield (
                "metric-twice",
                f"{place} gives {metric.get('name', metric['type'])!r} twice; only one would be shown",
            )
        seen.append(identity)
