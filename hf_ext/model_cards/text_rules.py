"""Rules for the text of a card: each yields (rule, message) for what a reader would miss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_ext.model_cards.leaks import EMAIL, LOCAL_PATH, login_name, names_user
from hf_ext.model_cards.model_index import is_finite_number, stated_results
from hf_ext.model_cards.running import NOT_RUN, code_of
from hf_ext.model_cards.sections import OUT_OF_SCOPE, PLACEHOLDER, SECTIONS, bodies, content, is_stated
from hf_ext.model_cards.yaml_text import told
from hf_ext.registry import METHODS

_LOADED = re.compile(
    r"""(?:from_pretrained|load_adapter)\(\s*(?:\w+,\s*)?["']([\w.-]+/[\w.-]+)["']|^name = ["']([^"']+)["']""",
    re.MULTILINE,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", re.IGNORECASE)

# So many instances of one finding are named.
_NAMED = 8
_IDS = ("base_model", "datasets", "new_version")

Findings = Iterator[tuple[str, str]]


def text_warnings(text: str, data: dict[str, Any], repo_id: str | None) -> Findings:
    yield from _wording(text)
    yield from _leaks(text, data)
    yield from _sections(text)
    yield from _snippet(text, data, repo_id)
    yield from _numbers(text, data)
    for method in METHODS:
        if method.slug in _texts(data.get("tags")) and method.arxiv not in text:
            yield "no-citation", f"the tag {method.slug!r} is set, but the paper {method.paper_url} is not cited"


def _texts(value: Any) -> list[str]:
    """The text, or the texts in the list, that a key of the metadata gives."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]


def _wording(text: str) -> Findings:
    yield from _found("placeholder", PLACEHOLDER, text, "write the fact, or say that it was not measured")


def _leaks(text: str, data: dict[str, Any]) -> Findings:
    """What the text or the metadata tell about a machine or a person."""
    # A paper's own entry may have addresses in it; the rules for ids name a path in the place of an id.
    prose = re.sub(r"```bibtex.*?```", "", text, flags=re.DOTALL)
    parts = "\n".join([prose, *_strings({key: value for key, value in data.items() if key not in _IDS})])
    yield from _found("local-path", LOCAL_PATH, parts, "it exists on one machine only")
    yield from _found("email", EMAIL, parts, "published addresses are harvested")
    login = login_name()
    if login is not None and names_user(parts, login):
        yield "user-name", f"the card contains {login!r}, the name you are logged in with on this machine"


def _found(rule: str, pattern: re.Pattern[str], text: str, advice: str) -> Findings:
    found = sorted({match[0] for match in pattern.finditer(text)})
    if found:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        yield rule, f"the card contains {', '.join(map(told, found[:_NAMED]))}{more}: {advice}"


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested metadata, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from _strings(entry)


def _sections(text: str) -> Findings:
    found = bodies(text)
    for section in SECTIONS:
        if not is_stated(found, section):
            lack = "is not there" if content(found, section) is None else "says nothing"
            yield section.rule, f"the section on {section.name} {lack}; {section.remedy}"
    if not is_stated(found, OUT_OF_SCOPE):
        yield "out-of-scope", f"nothing says what the model is not for; {OUT_OF_SCOPE.remedy}"


def _snippet(text: str, data: dict[str, Any], repo_id: str | None) -> Findings:
    code = code_of(text)
    if code is None or "from_pretrained" not in code:
        yield "no-snippet", "no Python snippet shows how to load the model"
        return
    if NOT_RUN in text:
        yield "snippet-not-run", "the code of the card was not run; publish with run_snippet=True"
    known = {repo_id, *_texts(data.get("base_model"))}
    others = sorted({name for pair in _LOADED.findall(code) for name in pair if "/" in name} - known)
    if repo_id is not None and others:
        yield "snippet-repo", f"the code loads {', '.join(others)}, which is neither {repo_id} nor its base model"


def _numbers(text: str, data: dict[str, Any]) -> Findings:
    """Results that the text tells otherwise than the metadata."""
    values = list(_metrics(data))
    told = _told_numbers(text, {name.replace("|", "/") for name, _ in values})
    for name, value in values:
        numbers = told.get(name.replace("|", "/"), [])
        if numbers and not any(_same(number, value) for number in numbers):
            yield "metric-text", f"{name!r} is {value:g} in the metadata and {numbers[0]} in the text"


def _told_numbers(text: str, names: set[str]) -> dict[str, list[str]]:
    """Name of a metric to the numbers in the rows of tables that begin with it."""
    told: dict[str, list[str]] = {}
    for line in text.splitlines() if names else []:
        if line.startswith("|") and (name := _first_cell(line)) in names:
            told.setdefault(name, []).extend(_NUMBER.findall(line.split("|", 2)[2]))
    return told


def _metrics(data: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for result in stated_results(data)[0]:
        for metric in result.metrics:
            if is_finite_number(metric["value"]) and metric.get("name"):
                yield metric["name"], float(metric["value"])


def _first_cell(line: str) -> str:
    return line.split("|")[1].strip().strip("`").replace("\\", "")


def _same(told: str, value: float) -> bool:
    """Whether a number in the text is the value, as far as it is written out; percent count, too."""
    digits = len(told.lower().partition("e")[0].partition(".")[2])
    shown = float(told)
    step = 0.5 * 10.0**-digits
    return any(abs(shown - scaled) <= step + 1e-3 * abs(scaled) for scaled in (value, 100 * value))
