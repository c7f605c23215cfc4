"""One broken card per rule: each is found, once, with the right severity, and nothing else is."""

from __future__ import annotations

import time

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings, strategies
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_ext.model_cards import score, validate
from hf_ext.model_cards.rules.sections import SECTIONS, UNSTATED
from hf_ext.model_cards.running import NOT_RUN
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import tiny_tokenizer

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


ERRORS = {
    "license": "license: free",
    "license-other": "license: other\nlicense_name: x",
    "license-link": "license: other\nlicense_name: x\nlicense_link: a file",
    "licence-key": "licence: mit",
    "base-model-id": "base_model: /home/someone/model",
    "datasets-id": "datasets: [null]",
    "new-version-id": "new_version: has a space",
    "base-model-relation": "base_model_relation: cousin",
    "pipeline-tag": "pipeline_tag: writing",
    "language": "language: English",
    "tags": "tags: [1]",
    "emissions": "co2_eq_emissions: {emissions: much}",
    "metric-value": index("[{type: m, value: .nan, args: {n: 3}}]"),
    "metric-twice": index("[{type: m, value: 1, args: {n: 3}}, {type: m, value: 2, args: {n: 3}}]"),
    "source-url": index(result="source: {name: board}\n    " + RESULT),
}
MORE_ERRORS = [
    ("license-other", "license: other\nlicense_link: LICENSE"),
    ("language", "language: no"),
    ("language", "language: xx"),
    ("base-model-id", "base_model: [user/a, 'user//b']"),
    ("base-model-id", "base_model: null"),
    ("datasets-id", "datasets: null"),
    ("new-version-id", "new_version: null"),
    ("new-version-id", "new_version: [user/a, user/b]"),
    ("metric-twice", index(f"{METRIC}\n  - {RESULT}{METRIC}")),
    ("metric-twice", index(f"{METRIC}\n  - {RESULT}{METRIC}\n  - {RESULT}{METRIC}")),
    ("model-index", "model-index: text"),
    ("model-index", index(result="dataset: {type: b, name: c}\n    metrics: ")),
    ("model-index", index(result="task: {type: a}\n    dataset: {type: b}\n    metrics: ")),
    ("model-index", index("[{value: 1, args: {n: 3}}]")),
    ("metric-value", index("[{type: m, value: [1], args: {n: 3}}]")),
    ("emissions", "co2_eq_emissions: .inf"),
]
STRANGE = [
    ("license", "license: {a: b}"),
    ("license", "license: [[mit]]"),
    ("pipeline-tag", "pipeline_tag: [a]"),
    ("base-model-relation", "base_model_relation: [a]"),
    ("tags", "tags: 5"),
    ("language", "language: [[en]]"),
    ("model-index", "model-index: 5"),
    ("model-index", "model-index: [{name: a, results: 5}]"),
    ("model-index", index("5")),
    ("model-index", index("[5]")),
    ("model-index", index("[{type: [a], value: 1}]")),
    ("model-index", index(result="task: [a]\n    dataset: {type: b, name: c}\n    metrics: ")),
    ("model-index", index(result="task: {type: a}\n    dataset: {type: b, name: [c]}\n    metrics: ")),
    ("model-index", index(result="source: 5\n    " + RESULT)),
    ("metric-value", index(f"[{{type: m, value: 1{'0' * 400}, args: {{n: 3}}}}]")),
    ("metric-value", index("[{type: m, value: {a: b}, args: {n: 3}}]")),
    ("emissions", f"co2_eq_emissions: 1{'0' * 400}"),
    ("emissions", f"co2_eq_emissions: {{emissions: 0x{'f' * 9000}}}"),
]
KEYS = [
    *("base_model", "base_model_relation", "co2_eq_emissions", "datasets", "language", "library_name", "license"),
    *("license_link", "license_name", "model-index", "new_version", "pipeline_tag", "tags"),
]
VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.dates()
    | strategies.sampled_from(["other", "a/b", "peft", "unlearning", "10" * 300]),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from(
                ["results", "task", "dataset", "metrics", "type", "name", "value", "args", "n", "source", 1, None]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
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
WARNINGS = {
    **{rule: text(**{name: None}) for rule, name in SECTION_RULES.items()},
    "no-license": GOOD_TEXT,
    "no-base-model": GOOD_TEXT,
    "library": GOOD_TEXT,
    "unlearned-adapter": GOOD_TEXT,
    "emissions-region": GOOD_TEXT,
    "no-interval": GOOD_TEXT,
    "dataset-revision": GOOD_TEXT,
    "metric-text": text(Results="| a | 0.6 |"),
    "placeholder": GOOD_TEXT + "[More Information Needed]",
    "local-path": GOOD_TEXT + "from /home/someone/model",
    "email": GOOD_TEXT + "someone@example.org",
    "no-snippet": text(How_to_get_started=None),
    "snippet-not-run": GOOD_TEXT + NOT_RUN,
    "no-citation": GOOD_TEXT,
}
WARNING_DATA = {
    "no-license": GOOD_DATA.replace("license: mit\n", ""),
    "no-base-model": GOOD_DATA.replace("base_model: user/base\n", ""),
    "library": GOOD_DATA.replace("peft", "peaft"),
    "unlearned-adapter": GOOD_DATA.replace("[hf_ext]", "[unlearning]"),
    "emissions-region": GOOD_DATA + "co2_eq_emissions: {emissions: 3}\n",
    "no-interval": GOOD_DATA + index("[{type: m, name: a, value: 0.5}]"),
    "dataset-revision": GOOD_DATA + index(result=RESULT.replace("type: b", "type: user/d")),
    "metric-text": GOOD_DATA + index(),
    "no-citation": GOOD_DATA.replace("[hf_ext]", "[hf_ext, roselora]"),
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


def test_a_good_card_has_no_findings():
    assert str(validate(card())) == "no findings"
    assert str(validate(ModelCard(card()))) == "no findings"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_ends_of_lines(end, tmp_path):
    content = card(GOOD_DATA + index()).replace("\n", end)
    assert str(validate(content)) == "no findings"
    (tmp_path / "README.md").write_bytes(content.encode())
    assert str(validate(tmp_path)) == "no findings"


@pytest.mark.parametrize(("rule", "line"), [*ERRORS.items(), *MORE_ERRORS, *STRANGE])
def test_errors(rule, line):
    report = validate(card(replaced(line)))
    assert rules(report.errors) == [rule]
    assert set(rules(report.warnings)) <= {"no-license"}


ALIASES = "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i},' * 9}]\n" for i in range(9))


@pytest.mark.parametrize("other", ["split: test", "config: en", "revision: abc"])
def test_a_metric_of_other_data_is_another(other):
    second = RESULT.replace("name: c", f"name: c, {other}") + METRIC
    assert str(validate(card(GOOD_DATA + index(f"{METRIC}\n  - {second}")))) == "no findings"


def test_strange_values_that_only_warn():
    assert rules(validate(card(replaced("library_name: [x]"))).warnings) == ["library"]
    assert rules(validate(card(GOOD_DATA + index("[{type: m, value: 1, args: {1: 2}}]"))).warnings) == ["no-interval"]


@given(strategies.dictionaries(strategies.sampled_from(KEYS), VALUES, max_size=4), VALUES)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_no_metadata_end_in_a_traceback(data, result):
    data = {"model-index": [{"name": "a", "results": [result]}], **data}
    str(validate(f"---\n{yaml.safe_dump(data)}---\n{GOOD_TEXT}", repo_id="user/mine"))


@pytest.mark.parametrize(
    ("rule", "content"),
    [
        ("metadata-missing", GOOD_TEXT),
        ("metadata-yaml", "---\na: b: c\n---\n"),
        ("metadata-mapping", "---\n- a\n---\n"),
        ("metadata-yaml", "---\na: 2001-99-99\n---\n"),
        ("metadata-yaml", "---\na: !!bool b\n---\n"),
        ("metadata-yaml", f"---\na: {'[' * 50_000}\n---\n"),
        ("metadata-yaml", f"---\na: [{'1,' * 150_000}]\n---\n"),
        ("metadata-yaml", "---\na: &a [*a]\n---\n"),
        ("metadata-yaml", f"---\na0: &a0 [1]\n{ALIASES}---\n"),
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
    report = validate(card(body=f"{GOOD_TEXT}{token} sk-{'aB3' * 10}"))
    assert rules(report.errors) == ["token"] and token not in str(report)


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("local-path", "model_name: /home/jane/secret/out"),
        ("local-path", "tags: ['base_model:adapter:/home/jane/models/x', /home/jane/y]"),
        ("email", "co2_eq_emissions: {emissions: 0, source: someone@example.org}"),
        ("user-name", "model_name: model of janedoe"),
    ],
)
def test_leaks_in_the_metadata_and_the_text_are_one_finding(rule, line, monkeypatch):
    monkeypatch.setenv("LOGNAME", "janedoe")
    for body in (GOOD_TEXT, WARNINGS.get(rule, GOOD_TEXT + "by janedoe")):
        assert rules(validate(card(replaced(line), body)).warnings) == [rule]


@pytest.mark.parametrize("name", SECTION_RULES.values())
def test_a_placeholder_or_a_comment_fills_no_section(name):
    """The Hub's template has these; each is named for the section, and once more as a placeholder where it is one."""
    for body in ("[More Information Needed]", "<!-- Tell it. -->", "- **Who:**"):
        (rule,) = [rule for rule, known in SECTION_RULES.items() if known == name]
        found = rules(validate(card(body=text(**{name: body}))).warnings)
        assert [entry for entry in found if entry != "placeholder"] == [rule]


def test_what_nobody_stated_is_missing():
    body = text(Factors=UNSTATED["factors"])
    assert rules(validate(card(body=body)).warnings) == ["section-factors"]
    assert score(card(body=body)) == {section.name: True for section in SECTIONS}
    assert not any(score(card(body="# T\n")).values())


def test_headings_in_code_are_no_sections():
    body = text(Factors=None, How_to_get_started=f"```python\n## Factors\n# x\n{CODE}```")
    assert rules(validate(card(body=body)).warnings) == ["section-factors"]


def test_code_that_loads_something_else():
    for code in ("X.from_pretrained('user/other')", 'name = "user/other"\nX.from_pretrained(name)'):
        body = card(body=text(How_to_get_started=f"```python\n{code}\n```"))
        assert rules(validate(body, repo_id="user/mine").warnings) == ["snippet-repo"]
        assert validate(body, repo_id="user/other").warnings == validate(body).warnings == []


@pytest.mark.parametrize(("told", "fits"), [("0.5", True), ("50.0", True), ("0.50 [0.4, 0.6]", True), ("0.46", False)])
def test_numbers_in_the_text_and_in_the_metadata(told, fits):
    report = validate(card(GOOD_DATA + index(), text(Results=f"| a | {told} |")))
    assert rules(report.warnings) == ([] if fits else ["metric-text"])


@pytest.mark.parametrize(
    ("table", "fits"),
    [
        ("| metric | value |\n| --- | --- |\n| a | 0.6 |", False),
        ("| metric | base | ours |\n| --- | --- | --- |\n| a | 0.5 | 0.6 |", False),
        ("| metric | base | this |\n| --- | --- | --- |\n| a | 0.4 | **0.5** |", True),
        ("| metric | n | value |\n| --- | --- | --- |\n| a | 300 | 0.5 [0.4, 0.6] |", True),
        ("| group | n |\n| --- | --- |\n| a | 300 |", True),
        ("| setting | value |\n| --- | --- |\n| `a` | 3 |", True),
        ("| metric | what |\n| --- | --- |\n| a | top-1 of 1,000 classes |", True),
        ("| a | 0.46 [0.4, 0.5] |", False),
        ("| a | 1e-3 |", False),
        ("| a | 1e999 |", False),
    ],
)
def test_only_a_column_of_values_is_compared(table, fits):
    report = validate(card(GOOD_DATA + index(), text(Results=table)))
    assert rules(report.warnings) == ([] if fits else ["metric-text"])


@pytest.mark.parametrize(("told", "fits"), [("1,234.5", True), ("1234.5", True), ("1,334.5", False)])
def test_thousands(told, fits):
    data = GOOD_DATA + index("[{type: m, name: a, value: 1234.5, args: {n: 3}}]")
    assert rules(validate(card(data, text(Results=f"| a | {told} |"))).warnings) == ([] if fits else ["metric-text"])


@pytest.mark.parametrize(
    "code",
    [
        "AutoTokenizer.from_pretrained('org/other')\nX.from_pretrained('user/base')",
        "X.from_pretrained('user/mine', vae=Y.from_pretrained('org/vae'))",
        "pipeline('text-generation', model='user/mine')",
    ],
)
def test_code_that_loads_more_besides(code):
    for fence in ("python", "py"):
        body = text(How_to_get_started=f"```python\nprompt = 'a'\n```\n\n```{fence}\n{code}\n```")
        assert str(validate(card(body=body), repo_id="user/mine")) == "no findings"


def test_a_spanish_word_is_no_placeholder():
    assert str(validate(card(body=GOOD_TEXT + "Todo o nada, todo el modelo."))) == "no findings"


def test_folder_rules(tmp_path):
    assert rules(validate(tmp_path).errors) == ["card-missing"]
    (tmp_path / "README.md").write_text(card(replaced("library_name: transformers")))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert rules(validate(str(tmp_path)).warnings) == ["pickle", "library-name"]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    assert rules(validate(tmp_path).errors) == ["weights-damaged", "encoding"]


def test_size_of_the_adapter(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    for stated, found in (("14", []), ("1,400", ["adapter-size"])):
        body = text(Model_details=f"| Parameters of the adapter | {stated} (0.1 MB) |")
        (tmp_path / "README.md").write_text(card(body=body))
        assert rules(validate(tmp_path).warnings) == found


@pytest.mark.parametrize(
    "entries", ["a: b: c", "- {value: 1}", "- {dataset: {id: a/b}, value: 1}", "- {dataset: {id: a/b, task_id: c}}"]
)
def test_results_of_benchmarks(tmp_path, entries):
    (tmp_path / "README.md").write_text(card())
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "results.yaml").write_text(entries)
    assert rules(validate(tmp_path).errors) == ["eval-results"]


LENGTH = 200_000
LONG = {
    "heading": "# a" + " " * LENGTH + "b",
    "blank lines": "\n" * LENGTH,
    "comments": "<!--" * (LENGTH // 4),
    "letters": "a" * LENGTH,
    "item": "-" + " " * LENGTH + "b",
    "items": "- a:\n" * (LENGTH // 5),
    "headings": "# factors\n" * (LENGTH // 10),
    "path": "/a" * (LENGTH // 2),
    "home": " /home/" + "a " * (LENGTH // 2),
    "drives": "C:\\a b " * (LENGTH // 7),
    "shares": "\\\\ab" * (LENGTH // 4),
    "addresses": "a@a.a." * (LENGTH // 6),
    "tokens": "hf_" * (LENGTH // 3),
    "loading": "```python\n" + "from_pretrained(' " * (LENGTH // 18) + "\n```",
    "blocks": "```python\n" * (LENGTH // 10),
    "numbers": "| a | " + "1" * LENGTH + " |\n",
    "rows": "| a | 0.5 |\n" * (LENGTH // 12),
}


@pytest.mark.parametrize("shape", LONG)
def test_time_grows_with_the_length_only(shape):
    """Patterns that take quadratic time need minutes for these; a quarter of a second is usual."""
    start = time.process_time()
    validate(card(GOOD_DATA + index(), GOOD_TEXT + LONG[shape]))
    assert time.process_time() - start < 2.5


def test_missing_folder(tmp_path):
    for absent in ("absent", tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"card='.*absent' is no folder"):
            validate(absent)


def test_stock_cards_are_flagged(tmp_path):
    """PEFT's of a base from the disk, whose path is in it, and TRL's, with its misspelt key."""
    make_tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "peft")
    report = validate(tmp_path / "peft")
    assert rules(report.errors) == ["base-model-id"]
    assert {"placeholder", "no-license", "section-factors", "section-intended-use", "out-of-scope"} <= set(
        rules(report.warnings)
    )
    assert sum(score((tmp_path / "peft" / "README.md").read_text()).values()) <= 3
    arguments = SFTConfig(str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}])
    trainer = SFTTrainer(
        make_tiny_llama(), arguments, train_dataset=rows, processing_class=tiny_tokenizer(), peft_config=LoraConfig()
    )
    trainer.create_model_card()
    report = validate(tmp_path / "trl")
    assert "licence-key" in rules(report.errors)
    missing = {"no-license", *SECTION_RULES}
    assert missing <= set(rules(report.warnings)), missing - set(rules(report.warnings))
