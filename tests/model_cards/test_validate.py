"""One broken card per rule: each is found, once, with the right severity, and nothing else is."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from hf_ext.model_cards import validate

GOOD_DATA = "base_model: user/base\nlibrary_name: peft\nlicense: mit\ntags: [hf_ext]\n"
GOOD_TEXT = "# T\n\n```python\nX.from_pretrained(1)\n```\n\n## Limitations\n\nMany.\n"
RESULT = "task: {type: a}\n    dataset: {type: b, name: c}\n    metrics: "


def index(metrics: str = "[{type: m, value: 1}]", result: str = RESULT) -> str:
    return f"model-index:\n- name: x\n  results:\n  - {result}{metrics}\n"


ERRORS = {
    "license": "license: free",
    "license-other": "license: other\nlicense_name: x",
    "licence-key": "licence: mit",
    "base-model-id": "base_model: /home/someone/model",
    "datasets-id": "datasets: [null]",
    "new-version-id": "new_version: has a space",
    "base-model-relation": "base_model_relation: cousin",
    "pipeline-tag": "pipeline_tag: writing",
    "language": "language: English",
    "tags": "tags: [1]",
    "emissions": "co2_eq_emissions: {emissions: much}",
    "metric-value": index("[{type: m, value: .nan}]"),
    "metric-twice": index("[{type: m, value: 1}, {type: m, value: 2}]"),
    "source-url": index(result="source: {name: board}\n    " + RESULT),
}
MORE_ERRORS = [
    ("license-other", "license: other\nlicense_link: LICENSE"),
    ("language", "language: no"),
    ("base-model-id", "base_model: [user/a, 'user//b']"),
    ("model-index", "model-index: text"),
    ("model-index", index(result="dataset: {type: b, name: c}\n    metrics: ")),
    ("model-index", index(result="task: {type: a}\n    dataset: {type: b}\n    metrics: ")),
    ("model-index", index("[{value: 1}]")),
    ("metric-value", index("[{type: m, value: [1]}]")),
    ("emissions", "co2_eq_emissions: .inf"),
]
WARNINGS = {
    "no-license": GOOD_TEXT,
    "no-base-model": GOOD_TEXT,
    "placeholder": GOOD_TEXT + "[More Information Needed]",
    "local-path": GOOD_TEXT + "from /home/someone/model",
    "email": GOOD_TEXT + "someone@example.org",
    "no-snippet": "# T\n\n## Limitations\n\nMany.\n",
    "no-limitations": "# T\n\n```python\nX.from_pretrained(1)\n```\n",
    "no-citation": GOOD_TEXT,
}
WARNING_DATA = {
    "no-license": GOOD_DATA.replace("license: mit\n", ""),
    "no-base-model": GOOD_DATA.replace("base_model: user/base\n", ""),
    "no-citation": GOOD_DATA.replace("[hf_ext]", "[hf_ext, roselora]"),
}


def card(data: str = GOOD_DATA, text: str = GOOD_TEXT) -> str:
    return f"---\n{data}---\n{text}"


def replaced(line: str) -> str:
    """The good metadata with the keys of `line` taken from it."""
    keys = {entry.split(":")[0] for entry in line.splitlines()}
    kept = [entry for entry in GOOD_DATA.splitlines() if entry.split(":")[0] not in keys]
    return "\n".join([*kept, line.strip()]) + "\n"


def rules(findings) -> list[str]:
    return [finding.rule for finding in findings]


def test_a_good_card_has_no_findings():
    assert str(validate(card())) == "no findings"
    assert str(validate(ModelCard(card()))) == "no findings"


@pytest.mark.parametrize(("rule", "line"), [*ERRORS.items(), *MORE_ERRORS])
def test_errors(rule, line):
    report = validate(card(replaced(line)))
    assert rules(report.errors) == [rule]
    assert set(rules(report.warnings)) <= {"no-license"}


@pytest.mark.parametrize(
    ("rule", "content"),
    [
        ("metadata-missing", GOOD_TEXT),
        ("metadata-yaml", "---\na: b: c\n---\n"),
        ("metadata-mapping", "---\n- a\n---\n"),
    ],
)
def test_metadata_block(rule, content):
    assert rules(validate(content).errors) == [rule]


@pytest.mark.parametrize("rule", WARNINGS)
def test_warnings(rule):
    report = validate(card(WARNING_DATA.get(rule, GOOD_DATA), WARNINGS[rule]))
    assert rules(report.warnings) == [rule] and report.errors == []


def test_a_token_is_an_error_and_is_not_repeated():
    token = "hf_" + "Ab1" * 11
    report = validate(card(text=GOOD_TEXT + token))
    assert rules(report.errors) == ["token"] and token not in str(report)


def test_folder_rules(tmp_path):
    assert rules(validate(tmp_path).errors) == ["card-missing"]
    (tmp_path / "README.md").write_text(card(replaced("library_name: transformers")))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert rules(validate(str(tmp_path)).warnings) == ["pickle", "library-name"]


def test_missing_folder():
    with pytest.raises(ValueError, match="card='absent' is not a folder"):
        validate("absent")


def test_stock_cards_are_flagged(tmp_path):
    from tests.model_cards.tiny import lora_model

    lora_model().save_pretrained(tmp_path, save_embedding_layers=False)
    assert {"placeholder", "no-license", "no-base-model"} <= set(rules(validate(tmp_path).warnings))
