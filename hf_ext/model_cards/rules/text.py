"""Rules for the text of a card: each yields (rule, message) for what a reader would miss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_ext.model_cards.rules.leaks import EMAIL, LOCAL_PATH, login_name, names_user
from hf_ext.model_cards.rules.model_index import is_finite_number, stated_results
from hf_ext.model_cards.rules.sections import OUT_OF_SCOPE, PLACEHOLDER, SECTIONS, bodies, content, is_stated
from hf_ext.model_cards.rules.yaml_text import told
from hf_ext.model_cards.running import NOT_RUN, python_blocks
from hf_ext.registry import METHODS

# How code gets a model: with transformers, PEFT and diffusers, Sentence Transformers, vLLM, or file by file.
_LOADING = re.compile(
    r"\b(?:from_pretrained|pipeline|load_(?!dataset)\w{1,40}|SentenceTransformer|LLM|snapshot_download|hf_hub_download)\("
)
_LOADED = re.compile(
    r"""(?:from_pretrained|load_adapter)\(\s*(?:\w+,\s*)?["']([\w.-]+/[\w.-]+)["']|^name = ["']([^"']+)["']""",
    re.MULTILINE,
)
# A tokenizer may well be another model's.
_BESIDE = re.compile(r"(?:Tokenizer|TokenizerFast|Processor|FeatureExtractor)\.from_pretrained\([^()\n]{0,300}\)")
_NUMBER = re.compile(r"[-\u2212]?(?:\d[\d,]{0,30}(?:\.\d{0,30})?|\.\d{1,30})(?:e[+-]?\d{1,2})?", re.IGNORECASE)
# Columns by the words in their heads: those that hold a metric's value, those that never do, and tables that are not of results.
_VALUES = frozenset(["value", "values", "result", "results", "score", "scores", "estimate", "ours"])
_COUNTS = frozenset(
    [
        "n",
        "rows",
        "support",
        "count",
        "counts",
        "examples",
        "samples",
        "size",
        "step",
        "steps",
        "epoch",
        "epochs",
        "seed",
        "shots",
        "description",
    ]
)
_SETTINGS = frozenset(
    ["setting", "settings", "parameter", "parameters", "hyperparameter", "hyperparameters", "argument", "option"]
)

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
    code = "\n".join(python_blocks(text))
    if not _LOADING.search(code):
        yield "no-snippet", "no Python snippet shows how to load the model"
        return
    if NOT_RUN in text:
        yield "snippet-not-run", "the code of the card was not run; publish with run_snippet=True"
    known = {repo_id, *_texts(data.get("base_model"))}
    loaded = _LOADED.findall(_BESIDE.sub("", code))
    others = sorted({name for pair in loaded for name in pair if "/" in name} - known)
    # Code that has the model may need more beside it, such as a VAE.
    if repo_id is not None and others and not any(f"{quote}{repo_id}{quote}" in code for quote in "\"'"):
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
    heads: list[str] | None = None
    for line in text.splitlines() if names else []:
        if not line.startswith("|"):
            heads = None
            continue
        name = _first_cell(line)
        cells = [cell.strip(" \t*`_~\u2248") for cell in line.split("|")[1:]]
        if name in names and not (heads and heads[0] in _SETTINGS):
            numbers = [_NUMBER.match(cell) for cell in _value_cells(cells, heads or [])]
            told.setdefault(name, []).extend(number[0] for number in numbers if number)
        heads = [cell.lower() for cell in cells] if heads is None else heads
    return told


def _value_cells(cells: list[str], heads: list[str]) -> list[str]:
    """Those cells of a row that may hold the value of the metric named in the first."""
    columns = [(heads[i] if i < len(heads) else "", cell) for i, cell in enumerate(cells)][1:]
    values = [cell for head, cell in columns if head in _VALUES]
    return values or [cell for head, cell in columns if head not in _COUNTS]


def _metrics(data: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for result in stated_results(data)[0]:
        for metric in result.metrics:
            if is_finite_number(metric["value"]) and metric.get("name"):
                yield metric["name"], float(metric["value"])


def _first_cell(line: str) -> str:
    return line.split("|")[1].strip().strip("`").replace("\\", "")


def _same(told: str, value: float) -> bool:
    """Whether a number in the text is the value, as far as it is written out; percent count, too."""
    written = told.lower().replace(",", "").replace("\u2212", "-")
    mantissa, _, exponent = written.partition("e")
    digits = len(mantissa.partition(".")[2])
    shown = float(written)
    step = 0.5 * 10.0 ** (int(exponent or 0) - digits)
    return any(abs(shown - scaled) <= step + 1e-3 * abs(scaled) for scaled in (value, 100 * value))
