"""Rules for the metadata block: each yields (rule, message), errors for what the Hub rejects or misreads, warnings for what a reader misses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ext.model_cards.rules.hub_lists import BASE_MODEL_RELATIONS, LANGUAGES, LIBRARIES, LICENSES, PIPELINE_TAGS
from hf_ext.model_cards.rules.model_index import Result, frozen, is_finite_number, stated_results
from hf_ext.model_cards.rules.yaml_text import told

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")

# So many instances of one finding are named.
_NAMED = 8

Findings = Iterator[tuple[str, str]]


def metadata_errors(data: dict[str, Any]) -> Findings:
    yield from _license(data)
    yield from _ids(data)
    yield from _closed_lists(data)
    yield from _emissions(data)
    results, problems = stated_results(data)
    yield from (("model-index", problem) for problem in problems)
    for result in results:
        yield from _result(result)
    yield from _repeated_metrics(results)


def metadata_warnings(data: dict[str, Any], files: list[str]) -> Findings:
    if not data.get("license"):
        yield "no-license", "without `license` nobody may rely on using the model; pass license="
    library = data.get("library_name")
    if library is None:
        yield (
            "no-library",
            "without `library_name` the Hub shows no code that loads it and counts no downloads; set it",
        )
    elif not _is_one_of(library, LIBRARIES):
        yield "library", f"library_name {told(library)} is none that the Hub knows; nobody finds the model by it"
    tags = data["tags"] if isinstance(data.get("tags"), list) else []
    is_adapter = library == "peft" or "adapter" in tags or "lora" in tags or "adapter_config.json" in files
    if is_adapter and data.get("base_model", []) == []:
        yield "no-base-model", "an adapter without `base_model` cannot be found or loaded; pass base_model="
    if is_adapter and "unlearning" in tags:
        yield (
            "unlearned-adapter",
            "whoever switches the adapter off has what was forgotten; publish the merged weights with merged=True",
        )
    emissions = data.get("co2_eq_emissions")
    grams = emissions.get("emissions") if isinstance(emissions, dict) else emissions
    region = emissions.get("geographical_location") if isinstance(emissions, dict) else None
    if is_finite_number(grams) and grams > 0 and not region:
        yield "emissions-region", "emissions depend on where the electricity comes from; state geographical_location"
    yield from _uncertain_results(data)


def _uncertain_results(data: dict[str, Any]) -> Findings:
    unsure, loose = [], []
    for result in stated_results(data)[0]:
        name = result.dataset["type"]
        if "/" in name and _is_repo_id(name) and not result.dataset.get("revision"):
            loose.append(name)
        unsure += [metric.get("name") or metric["type"] for metric in result.metrics if not _has_interval(metric)]
    if unsure:
        yield "no-interval", f"{_listed(unsure)}: neither the rows nor an interval are given"
    if loose:
        yield (
            "dataset-revision",
            f"{_listed(loose)}: without a revision nobody knows which data were measured; pass evaluated_on='id@revision'",
        )


def _has_interval(metric: dict[Any, Any]) -> bool:
    arguments = metric.get("args")
    return isinstance(arguments, dict) and any(
        isinstance(key, str) and (key == "n" or key.startswith("ci")) for key in arguments
    )


def _listed(names: list[str]) -> str:
    different = list(dict.fromkeys(names))
    more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
    return ", ".join(different[:_NAMED]) + more


def _is_one_of(value: Any, known: frozenset[str]) -> bool:
    return isinstance(value, str) and value in known


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _license(data: dict[str, Any]) -> Findings:
    if "licence" in data:
        yield "licence-key", "the key is spelled `license`; the Hub ignores `licence`"
    for name in _as_list(data.get("license")):
        if not _is_one_of(name, LICENSES):
            yield "license", f"license {told(name)} is not one of the Hub's ids; use `other` with a name and a link"
    if "other" in _as_list(data.get("license")):
        for key in ("license_name", "license_link"):
            if not data.get(key):
                yield "license-other", f"`license: other` needs `{key}`"
        link = data.get("license_link")
        if link and not (link in ("LICENSE", "LICENSE.md") or re.fullmatch(r"https?://\S+", str(link))):
            yield "license-link", f"license_link {told(link)} must be a URL, 'LICENSE' or 'LICENSE.md'"


def _ids(data: dict[str, Any]) -> Findings:
    for key in ("base_model", "datasets", "new_version"):
        several = isinstance(data.get(key), list) and key != "new_version"
        for repo_id in (data[key] if several else [data[key]]) if key in data else []:
            if not _is_repo_id(repo_id):
                yield (
                    f"{key.replace('_', '-')}-id",
                    f"{key} {told(repo_id)} is not a Hub id of the form 'namespace/name'",
                )


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
    if relation is not None and not _is_one_of(relation, BASE_MODEL_RELATIONS):
        yield "base-model-relation", f"{told(relation)} is not one of {', '.join(sorted(BASE_MODEL_RELATIONS))}"
    tag = data.get("pipeline_tag")
    if tag is not None and not _is_one_of(tag, PIPELINE_TAGS):
        yield "pipeline-tag", f"pipeline_tag {told(tag)} is not a task of the Hub"
    for language in _as_list(data.get("language")):
        if not _is_language(language):
            yield (
                "language",
                f"language {told(language)} is not an ISO 639 code; YAML reads a bare `no` as false: quote it",
            )
    tags = data.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        yield "tags", f"tags must be a list of strings, not {told(tags)}"


def _is_language(value: Any) -> bool:
    """Two letters from ISO 639-1, or the form of a code with three; with or without a region or script."""
    if _is_one_of(value, frozenset({"code", "multilingual"})):
        return True
    if not isinstance(value, str) or not _LANGUAGE.fullmatch(value):
        return False
    code = value.split("-")[0]
    return len(code) == 3 or code in LANGUAGES


def _emissions(data: dict[str, Any]) -> Findings:
    stated = data.get("co2_eq_emissions")
    grams = stated.get("emissions") if isinstance(stated, dict) else stated
    if stated is not None and not (is_finite_number(grams) and grams >= 0):
        yield "emissions", f"co2_eq_emissions must give grams as a number from 0, not {told(grams)}"


def _result(result: Result) -> Findings:
    if result.source.get("name") and not result.source.get("url"):
        yield "source-url", f"{result.place} names a source without its url"
    for metric in result.metrics:
        value = metric["value"]
        if not isinstance(value, str) and not is_finite_number(value):
            yield (
                "metric-value",
                f"{result.place}: the value of {metric['type']!r} is {told(value)}; it must be one finite number or text",
            )


def _repeated_metrics(results: list[Result]) -> Findings:
    """Metrics that differ in nothing but the value. The Hub joins results of one task, data set and source."""
    seen, twice = set(), []
    for result in results:
        for metric in result.metrics:
            rest = frozen({key: entry for key, entry in metric.items() if key not in ("value", "verifyToken")})
            if (result.group, rest) in seen:
                twice.append(f"{metric.get('name') or metric['type']} in {result.place}")
            seen.add((result.group, rest))
    if twice:
        yield "metric-twice", f"{_listed(twice)}: given before for the same task and data; only one would be shown"
