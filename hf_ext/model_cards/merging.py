"""Our card and the README that is there: what people have said stays, what the model tells is written anew."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_ext.model_cards.card import NO_TRAINING
from hf_ext.model_cards.facts.cost import Cost
from hf_ext.model_cards.markers import BEGIN, END, is_ours, our_part, run_note_of, span, with_run_note
from hf_ext.model_cards.rules.sections import UNSTATED, leaves
from hf_ext.model_cards.rules.yaml_text import load
from hf_ext.model_cards.running import NOT_RUN, code_of
from hf_ext.model_cards.stock import without_template
from hf_ext.registry import METHODS

# (heading, what we say now, what stands there) to whether the latter stays.
Kept = Callable[[str, str, str], bool]
# Facts of a run, which nobody writes by hand.
_MEASURED = ("model-index", "model_name", "co2_eq_emissions")
# Sections of our template that hold an author's words and no facts.
_WORDS = frozenset({"### Intended use", "### Out-of-scope use", "### Ethical considerations"})
_SILENT = (*UNSTATED.values(), *NO_TRAINING.values(), *Cost().sentences)
# What libraries write themselves; anything else is an author's choice.
_LIBRARIES = frozenset({"transformers", "peft", "diffusers", "sentence-transformers", "hf_ext"})
# Where the words of an argument of `build_card` stand in our template, and in the metadata.
_SECTIONS_OF = {
    "intended_use": ("### Intended use",),
    "out_of_scope": ("### Out-of-scope use",),
    "factors": ("### Factors",),
    "ethics": ("### Ethical considerations",),
    "caveats": ("### Caveats and recommendations",),
    "datasets": ("### Training data",),
    "evaluated_on": ("### Testing data",),
    "metrics": ("### Testing data", "### Factors", "### Metrics", "### Results"),
    "contact": ("## Contact",),
    "cost": ("## Environmental impact",),
}
_KEYS_OF = {
    **{name: name for name in ("base_model", "license", "license_name", "license_link", "language", "datasets")},
    "cost": "co2_eq_emissions",
    "title": "model_name",
}


def merge(ours: ModelCard, theirs: ModelCard, before: Mapping[str, Any] | None = None) -> ModelCard:
    """Our card inside an existing one: their text around our part, and the union of both metadata.

    Where both have a key, lists are united and otherwise ours is taken. What we wrote the last time and do not say any more is gone, but for what
    an author has said about use and ethics.

    Args:
        before: metadata that we wrote into `theirs`, if that is known. Otherwise the results and emissions in a card of ours count as ours.

    Raises:
        ValueError: the markers in the existing card are damaged, so that our part cannot be told from theirs.
    """
    if before is None and is_ours(theirs.text):
        before = {key: value for key, value in theirs.data.to_dict().items() if key in _MEASURED}
    said, there = ours.data.to_dict(), _theirs(ours, theirs, before or {})
    data = {**said, **{key: _united(said[key], value) if key in said else value for key, value in there.items()}}
    results = _results_united(_own(ours), _own(theirs), (before or {}).get("model-index"))

    def kept(heading: str, new: str, old: str) -> bool:
        return heading in _WORDS and _is_silent(new) and not _is_silent(old)

    return _card(ours, theirs, data, results, _united_text(ours.text, theirs.text, kept))


def update(ours: ModelCard, theirs: ModelCard, given: Mapping[str, Any]) -> ModelCard:
    """Our card, which knows a model's files alone, inside an existing one, which may know more: whatever is not said now stays as it was.

    Args:
        given: arguments of `build_card` that were said now; a metric among them replaces that of the same name on whatever data.

    Raises:
        ValueError: the markers in the existing card are damaged, so that our part cannot be told from theirs.
    """
    said, there = ours.data.to_dict(), _theirs(ours, theirs, {})
    now = {_KEYS_OF[name] for name in given if name in _KEYS_OF} & said.keys()
    if there.get("library_name") in _LIBRARIES:
        now.add("library_name")
    if "license" in given:
        # Name and link are those of the licence that was there.
        there = {key: value for key, value in there.items() if key not in ("license_name", "license_link")}
    data = {**said, **there, **{key: said[key] for key in now}}
    outdated = {method.slug for method in METHODS} if "method" in given else set()
    data["tags"] = _united(said.get("tags", []), [tag for tag in there.get("tags", []) if tag not in outdated])
    again = {heading for name in given for heading in _SECTIONS_OF.get(name, ())}

    def kept(heading: str, new: str, old: str) -> bool:
        says_all = set(new.split("\n")) <= set(old.split("\n"))
        return heading not in again and (says_all or (_is_silent(new) and not _is_silent(old)))

    text = ours.text
    if is_ours(theirs.text) and code_of(our_part(text)) == code_of(our_part(theirs.text)):
        text = with_run_note(text, run_note_of(our_part(theirs.text)) or NOT_RUN)
    text = _united_text(text, theirs.text, kept, more=True)
    measured = given.get("metrics", {})
    theirs_left = [result for result in _own(theirs) if result.metric_name not in measured]
    return _card(ours, theirs, data, _results_united(_own(ours), theirs_left), text)


def _card(ours: ModelCard, theirs: ModelCard, data: dict[str, Any], results: list[EvalResult], text: str) -> ModelCard:
    rest = {key: value for key, value in data.items() if key not in ("model-index", "model_name")}
    name = ours.data.get("model_name") or (theirs.data if results else data).get("model_name")
    metadata = ModelCardData(**rest, model_name=name, eval_results=results or None)
    # In the order that is there, so that the same card gives the same bytes.
    return ModelCard(f"---\n{metadata.to_yaml(original_order=_keys(theirs))}\n---\n{text}")


def _keys(card: ModelCard) -> list[str]:
    block = REGEX_YAML_BLOCK.search(card.content)
    return list(load(block[2]) or ()) if block else []


def _theirs(ours: ModelCard, theirs: ModelCard, before: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of people: without what we had written, a base model that is a folder on somebody's machine, and a misspelt `licence`."""
    kept = {}
    for key, value in theirs.data.to_dict().items():
        written = before.get(key)
        is_folder = key == "base_model" and not _are_ids(value, of_adapter=ours.data.get("library_name") == "peft")
        if key in ("licence", "model-index") or value == written or is_folder:
            continue
        if isinstance(value, list):
            value = [item for item in value if not (isinstance(written, list) and item in written)]
        if key == "tags" and isinstance(value, list):
            # The base model of a tag is the one of this card, which has its own.
            value = [tag for tag in value if not str(tag).startswith("base_model:")]
        if value != []:
            kept[key] = value
    return kept


def _are_ids(value: Any, of_adapter: bool) -> bool:
    # Some ids of old have no namespace; PEFT writes relative folders of the same form.
    form = r"[\w.-]+/[\w.-]+" if of_adapter else r"[\w.-]+(/[\w.-]+)?"
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and re.fullmatch(form, name) for name in names)


def _united(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return ours
    return ours + [item for item in theirs if item not in ours]


def _results_united(ours: list[EvalResult], theirs: list[EvalResult], before: Any = None) -> list[EvalResult]:
    """Our results, and those of people on other data or by other metrics, but for those that we wrote before."""
    try:
        written = model_index_to_eval_results(before)[1] if before else []
    except (LookupError, TypeError, AttributeError):
        written = []
    known = {_measure(result) for result in (*ours, *written)}
    return ours + [result for result in theirs if _measure(result) not in known]


def _own(card: ModelCard) -> list[EvalResult]:
    return list(card.data.get("eval_results") or [])


def _measure(result: EvalResult) -> tuple[Any, ...]:
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def _united_text(ours: str, theirs: str, kept: Kept, more: bool = False) -> str:
    """Our part in the place of the one that `theirs` has, or behind what people have written.

    Args:
        kept: chooses sections of the part before that stay.
        more: sections of the part before stay that ours does not have at all.
    """
    part = _inside(our_part(ours))
    if BEGIN not in theirs and END not in theirs:
        rest = without_template(theirs).rstrip()
        return (f"{rest}\n\n" if rest.strip() else "\n") + f"{BEGIN}{part}{END}\n"
    start, stop = span(theirs)
    old = _inside(theirs[start:stop])
    part = _with_kept(part, old, kept)
    if more:
        part = _with_more(part, old)
    return f"{theirs[:start]}{BEGIN}{part}{END}{theirs[stop:]}"


def _inside(part: str) -> str:
    return part.removeprefix(BEGIN).removesuffix(END)


def _with_kept(part: str, old: str, kept: Kept) -> str:
    before = {heading.strip(): body for _, heading, body in leaves(old)}
    text = []
    for _, heading, body in leaves(part):
        name = heading.strip()
        text += [heading, before[name] if name in before and kept(name, body, before[name]) else body]
    return "".join(text)


def _with_more(part: str, old: str) -> str:
    there = {heading.strip() for _, heading, _ in leaves(part)}
    found = [heading + body for level, heading, body in leaves(old) if level > 1 and heading.strip() not in there]
    return "\n\n".join([part.rstrip("\n"), *(each.strip("\n") for each in found)]) + "\n"


def _is_silent(body: str) -> bool:
    """Whether nobody has said anything: nothing stands there but what we write in that case."""
    for sentence in _SILENT:
        body = body.replace(sentence, "")
    return not body.strip()
