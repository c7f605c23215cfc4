"""A card without a fault, and parts of it to spoil."""

from __future__ import annotations

GOOD_DATA = "base_model: user/base\nlibrary_name: peft\nlicense: mit\ntags: [hf_ext]\n"
CODE = 'X.from_pretrained("user/base")\n'
PARTS = {
    "Model details": "A.",
    "Intended use": "B.",
    "Out-of-scope use": "C.",
    "How to get started": f"```python\n{CODE}```",
    "Training data": "D.",
    "Testing data": "E.",
    "Factors": "F.",
    "Metrics": "G.",
    "Results": "| a | 0.5 |",
    "Ethical considerations": "H.",
    "Caveats and recommendations": "Many.",
}


def text(**changed: str | None) -> str:
    """The good text with other contents of some parts, named with underscores; `None` leaves one out."""
    parts = {**PARTS, **{name.replace("_", " "): content for name, content in changed.items()}}
    return "# T\n\n" + "".join(f"## {name}\n\n{body}\n\n" for name, body in parts.items() if body is not None)


GOOD_TEXT = text()
RESULT = "task: {type: a}\n    dataset: {type: b, name: c}\n    metrics: "
METRIC = "[{type: m, name: a, value: 0.5, args: {n: 3}}]"


def index(metrics: str = METRIC, result: str = RESULT) -> str:
    return f"model-index:\n- name: x\n  results:\n  - {result}{metrics}\n"


SECTION_RULES = {
    "section-model-details": "Model_details",
    "section-intended-use": "Intended_use",
    "section-factors": "Factors",
    "section-metrics": "Metrics",
    "section-evaluation-data": "Testing_data",
    "section-training-data": "Training_data",
    "section-quantitative-analyses": "Results",
    "section-ethical-considerations": "Ethical_considerations",
    "section-caveats-and-recommendations": "Caveats_and_recommendations",
    "out-of-scope": "Out-of-scope_use",
}


def card(data: str = GOOD_DATA, body: str = GOOD_TEXT) -> str:
    return f"---\n{data}---\n{body}"


def replaced(line: str) -> str:
    """The good metadata with the keys of `line` taken from it."""
    keys = {entry.split(":")[0] for entry in line.splitlines()}
    kept = [entry for entry in GOOD_DATA.splitlines() if entry.split(":")[0] not in keys]
    return "\n".join([*kept, line.strip()]) + "\n"


def rules(findings) -> list[str]:
    return [finding.rule for finding in findings]
