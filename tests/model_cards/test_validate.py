"""One broken card per rule: each is found, once, with the right severity, and nothing else is."""

from __future__ import annotations

from pathlib import Path

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
from hf_ext.model_cards.markers import BEGIN, END
from hf_ext.model_cards.rules.hub_lists import LICENSES, PIPELINE_TAGS
from hf_ext.model_cards.running import NOT_RUN
from tests.conftest import make_tiny_llama
from tests.hub.fixtures import run_against_hub
from tests.model_cards.tiny import tiny_tokenizer
from tests.model_cards.written import (
    GOOD_DATA,
    GOOD_TEXT,
    METRIC,
    RESULT,
    SECTION_RULES,
    card,
    index,
    replaced,
    rules,
    text,
)

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
    ("emissions", "co2_eq_emissions: {emissions: -1}"),
    ("license-other", "license: [other]\nlicense_link: LICENSE"),
    ("license-link", "license: [mit, other]\nlicense_name: x\nlicense_link: a file"),
    ("metric-value", index("[{type: m, value: true, args: {n: 3}}]")),
]
# What `ModelCard` of huggingface_hub refuses to read.
REFUSED = [
    "model-index: [{results: []}]",
    "model-index: [{name: a}]",
    f"model-index: [{{name: a, results: [{{{RESULT.strip().splitlines()[0]}, dataset: {{type: b, name: c}}}}]}}]",
    index("null"),
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
WARNINGS = {
    **{rule: text(**{name: None}) for rule, name in SECTION_RULES.items()},
    "no-license": GOOD_TEXT,
    "no-base-model": GOOD_TEXT,
    "no-library": GOOD_TEXT,
    "library": GOOD_TEXT,
    "markers": GOOD_TEXT + END + BEGIN,
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
    "no-library": GOOD_DATA.replace("library_name: peft\n", ""),
    "library": GOOD_DATA.replace("peft", "peaft"),
    "unlearned-adapter": GOOD_DATA.replace("[hf_ext]", "[unlearning]"),
    "emissions-region": GOOD_DATA + "co2_eq_emissions: {emissions: 3}\n",
    "no-interval": GOOD_DATA + index("[{type: m, name: a, value: 0.5}]"),
    "dataset-revision": GOOD_DATA + index(result=RESULT.replace("type: b", "type: user/d")),
    "metric-text": GOOD_DATA + index(),
    "no-citation": GOOD_DATA.replace("[hf_ext]", "[hf_ext, roselora]"),
}


def test_a_good_card_has_no_findings():
    assert str(validate(card())) == "no findings"
    assert str(validate(ModelCard(card()))) == "no findings"


@pytest.mark.parametrize("line", REFUSED)
def test_a_model_index_that_cannot_be_read(line):
    assert rules(validate(card(replaced(line))).errors) == ["model-index"]
    with pytest.raises(ValueError, match="Invalid `model_index`"):
        ModelCard(card(replaced(line)))


FINE = [
    *(f"base_model_relation: {relation}" for relation in ("adapter", "finetune", "merge", "quantized")),
    *(f"language: {code}" for code in ("en", "'no'", "swh", "pt-BR", "zh-Hant", "code", "multilingual", "[en, de]")),
    *(
        f"license: other\nlicense_name: x\nlicense_link: {link}"
        for link in ("https://x.org/a", "LICENSE", "LICENSE.md")
    ),
    "license: [mit, apache-2.0]",
    "base_model: [user/a, gpt2]",
    "datasets: [user/a, squad]",
    "new_version: user/b",
    "library_name: transformers",
    "co2_eq_emissions: 0",
    "co2_eq_emissions: {emissions: 2.5, source: CodeCarbon, geographical_location: SWE}",
    index("[{type: m, name: a, value: '0.5 ± 0.1', args: {n: 3}}]"),
    index("[{type: m, name: a, value: 0.5, args: {ci95: [1, 2]}}]"),
    index("[]"),
    index(result="source: {name: board, url: 'https://x.org'}\n    " + RESULT),
    index(result="source: {url: 'https://x.org'}\n    " + RESULT),
    index(result=RESULT.replace("type: b", "type: user/d").replace("name: c", "name: c, revision: abc")),
    index("[{type: m, name: a, value: 0.5, args: {n: 3}}, {type: k, name: d, value: 0.5, args: {n: 3}}]"),
    "model-index: [{name: a, results: []}]",
]


@pytest.mark.parametrize("line", FINE)
def test_these_are_fine(line):
    assert str(validate(card(replaced(line)))) == "no findings"


def test_closed_lists():
    """Every value is taken, and there are as many as in the Hub's own lists of that commit."""
    assert (len(LICENSES), len(PIPELINE_TAGS)) == (83, 57)
    for name in LICENSES:
        more = "\nlicense_name: x\nlicense_link: LICENSE" if name == "other" else ""
        assert str(validate(card(replaced(f"license: {name}{more}")))) == "no findings"
    for name in PIPELINE_TAGS:
        assert str(validate(card(replaced(f"pipeline_tag: {name}")))) == "no findings"


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


PICKLED = ["Model.BIN", "a.ckpt", "a.joblib", "a.pickle", "a.pkl", "a.pth", "model.PT"]
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


@pytest.mark.parametrize("markers", [BEGIN, END, BEGIN + BEGIN + END, BEGIN + END + END])
def test_markers_that_are_not_there_once(markers):
    assert rules(validate(card(body=GOOD_TEXT + markers)).warnings) == ["markers"]
    assert str(validate(card(body=BEGIN + GOOD_TEXT + END))) == "no findings"


@pytest.mark.parametrize("tag", ["adapter", "lora"])
def test_an_adapter_is_known_by_its_tags_and_files(tag, tmp_path):
    data = "library_name: transformers\nlicense: mit\n"
    assert rules(validate(card(f"{data}tags: [{tag}]\n")).warnings) == ["no-base-model"]
    (tmp_path / "README.md").write_text(card(data))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert rules(validate(tmp_path).warnings) == ["no-base-model", "library-name"]


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


def test_folder_rules(tmp_path):
    assert rules(validate(tmp_path).errors) == ["card-missing"]
    (tmp_path / "README.md").write_text(card(replaced("library_name: transformers")))
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in PICKLED:
        (tmp_path / name).write_bytes(b"")
    assert rules(validate(str(tmp_path)).warnings) == ["pickle"] * len(PICKLED) + ["library-name"]


def test_leaks_beside_the_card(tmp_path):
    """In what is published and is text; a vocabulary has pieces of paths, and git's own files stay here."""
    leaks = '{"a": "/home/jane/x", "b": "hf_' + "Ab1" * 11 + '"}'
    (tmp_path / "README.md").write_text(card())
    (tmp_path / ".git").mkdir()
    for name in ("notes.txt", "args.JSON", "weights.bin.txt", "tokenizer.json", ".git/config.txt", "image.png"):
        (tmp_path / name).write_text(leaks)
    (tmp_path / "data.jsonl").write_text(leaks * 2**15)
    (tmp_path / "fine.json").write_text('{"a": "user/model", "b": "hf_ext", "c": "https://x.org/home/a"}')
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    report = validate(tmp_path)
    assert rules(report.errors) == ["token"] * 3 and rules(report.warnings) == ["local-path"] * 3
    for finding, name in zip(
        report.errors + report.warnings, ["args.JSON", "notes.txt", "weights.bin.txt"] * 2, strict=True
    ):
        assert finding.message.startswith(name) and "Ab1Ab1" not in finding.message


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


def test_a_result_of_a_benchmark_that_is_fine(tmp_path):
    (tmp_path / "README.md").write_text(card())
    (tmp_path / ".eval_results").mkdir()
    results = tmp_path / ".eval_results" / "results.yaml"
    for entry in (
        "- {dataset: {id: a/b, task_id: c}, value: 0}",
        "- {dataset: {id: a/b, task_id: c}, value: 1, date: x}",
    ):
        results.write_text(entry)
        assert str(validate(tmp_path)) == "no findings"


def test_repositories():
    run_against_hub(Path(__file__).parent / "repository_checks.py")


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
