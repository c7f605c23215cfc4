"""Reports: round trip, tables, and comparisons that refuse to mix."""

from __future__ import annotations

import pytest

from hf_ext.metrics.editing import EditingReport, KnowledgeEditingEvaluator, compare
from tests.metrics.editing.conftest import edited_facts, train

TEXTS = ["Ada lives in Lomak", "Cy likes milk"]


@pytest.fixture
def reports(world_model, oracle_model, word_tok, records):
    """Reports of an unedited, a partly edited and a fully edited model."""

    def evaluator(model, **options):
        options = {"max_new_tokens": 6, "drift_texts": TEXTS, "fluency_tokens": 8, **options}
        return KnowledgeEditingEvaluator(model, word_tok, records, **options)

    before = evaluator(world_model).predict()
    unedited = evaluator(world_model).evaluate(before)
    full = evaluator(oracle_model).evaluate(before)
    train(world_model, word_tok, edited_facts()[:6], steps=20)
    return {"none": unedited, "half": evaluator(world_model).evaluate(before), "full": full}


def test_json_round_trip(reports, tmp_path):
    report = reports["half"]
    path = tmp_path / "report.json"
    report.to_json(path)
    for copy in (EditingReport.from_json(path), EditingReport.from_json(str(path))):
        assert copy == report
        assert copy.metrics == report.metrics and copy.table() == report.table()
    for content in ("[]", '{"format_version": 99}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"report\.json is not an editing report"):
            EditingReport.from_json(path)


def test_table_keeps_protocols_apart(reports):
    table = reports["half"].table()
    header, _, first, *_ = table.splitlines()
    assert header == "| metric | teacher_forced_token | generate_exact |"
    assert first.startswith("| reliability | ") and first.count("(4)") == 2
    assert "| drift | text_kl |" in table and "| fluency | ngram_entropy |" in table
    assert "locality:neighborhood" in table and "Answer policy: any_alias" in table


def test_every_number_carries_its_conditions(reports):
    for item in reports["half"].measurements:
        assert item.protocol and item.n > 0 and item.low <= item.value + 1e-9 <= item.high + 2e-9
        assert (item.answer_policy == "any_alias") == (item.section in ("reliability", "generality", "portability"))


def test_compare(reports):
    comparison = compare(reports)
    rows = {row.name: row for row in comparison.rows}
    reliability = rows["reliability/generate_exact"]
    assert [m.value for m in reliability.measurements.values()][0::2] == [0.0, 1.0]
    assert reliability.p_values["full"] == 0.125  # 4 edits, all better: 2 of 16 sign patterns
    assert "drift/text_kl" in rows and "drift/locality_kl" in rows and "fluency/ngram_entropy" in rows
    assert not any(name.startswith("before/") for name in rows)
    assert "p=0.125" in comparison.table() and "p against none" in comparison.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": ["generate_exact"]}, "measured differently"),
        ({"answer_policy": "first"}, "answer_policy: 'any_alias' against 'first'"),
        ({"setting": "sequential"}, "measured differently"),
    ],
)
def test_compare_refuses_unlike_reports(reports, change, message):
    report = reports["half"]
    other = EditingReport({**report.settings, **change}, report.records, report.drift)
    with pytest.raises(ValueError, match=message):
        compare({"a": report, "b": other})


def test_compare_refuses_other_edits_and_single_reports(reports):
    report = reports["half"]
    with pytest.raises(ValueError, match="different edits"):
        compare({"a": report, "b": EditingReport(report.settings, report.records[1:], report.drift)})
    with pytest.raises(ValueError, match="give two or more"):
        compare({"a": report})
