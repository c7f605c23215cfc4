"""Conditions are made of the right passages, and reports are means of judged answers."""

from __future__ import annotations

import pytest

from hf_ext.metrics.rag import (
    CLOSED_BOOK,
    Condition,
    RagReport,
    compare,
    evaluate_rag,
    read_questions,
)
from hf_ext.metrics.rag.matching import contains_answer

CITIES = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima", "Egypt": "Cairo", "Japan": "Tokyo"}


def rows(distractors: int = 5):
    found = []
    for country, city in CITIES.items():
        documents = [{"title": country, "text": f"The capital of {country} is {city}.", "is_gold": True}]
        others = [name for name in CITIES if name != country][:distractors]
        documents += [{"title": other, "text": f"{other} lies far away."} for other in others]
        found.append({"id": country, "question": f"Capital of {country}?", "answers": [city], "documents": documents})
    return found


def first_capital(inputs):
    """Believes the first passage that speaks of a capital."""
    found = []
    for row in inputs:
        told = next((p["text"] for p in row["documents"] if "capital" in p["text"]), "")
        answer = told.rpartition(" ")[2].strip(".")
        found.append({"answer": answer or "I do not know", "rationale": f"[1] {told}"})
    return found


def test_conditions_have_the_passages_they_name():
    question = read_questions(rows())[0]
    wrong = ["Madrid", "Rome", "Lima"]
    for level in (0, 2, 5):
        passages = Condition(distractors=level).passages(question, wrong, 0)
        assert len(passages) == 1 + level and sum("Paris" in p["text"] for p in passages) == 1
    few, many = (Condition(distractors=n).passages(question, wrong, 0) for n in (2, 4))
    assert {p["title"] for p in few} <= {p["title"] for p in many}
    assert Condition(distractors=6).passages(question, wrong, 0) is None
    assert len(Condition(distractors=None).passages(question, wrong, 0)) == 6
    assert Condition(gold=False).passages(question, wrong, 0) == []
    nothing = Condition(gold=False, distractors=3).passages(question, wrong, 0)
    assert len(nothing) == 3 and not any("Paris" in p["text"] for p in nothing)
    assert Condition(gold=False, distractors=None).passages(question, wrong, 0) is not None
    lies = Condition(adversarial=2).passages(question, wrong, 0)
    assert len(lies) == 3 and sum("Paris" in p["text"] for p in lies) == 1
    assert all(contains_answer(p["text"], ["Paris", *wrong]) for p in lies)
    assert Condition(adversarial=2).passages(question, wrong, 0) == lies
    orders = {tuple(p["title"] for p in Condition(distractors=5).passages(question, wrong, seed)) for seed in range(9)}
    assert len(orders) > 1


def test_conditions_that_differ_have_different_names():
    values = [Condition(g, d, a) for g in (True, False) for d in (0, 1, 4, None) for a in (0, 1, 2)]
    assert len({condition.name for condition in values}) == len(values)
    assert Condition(gold=False).name == CLOSED_BOOK and Condition(gold=False, distractors=4).name == "no gold + 4"
    with pytest.raises(ValueError, match=">= 0"):
        Condition(distractors=-1)


def test_an_answer_that_no_passage_has_cannot_be_replaced():
    (question,) = read_questions(
        [{"question": "Is it?", "answers": ["yes"], "documents": [{"text": "yes", "is_gold": True}]}]
    )
    assert Condition(adversarial=1).passages(question, ["Rome"], 0) is None


def test_a_report():
    conditions = (Condition(), Condition(distractors=4), Condition(adversarial=1), Condition(gold=False))
    report = evaluate_rag(first_capital, rows(), conditions)
    assert report.conditions == ("gold + 0", "gold + 4", "gold + 1 adversarial", CLOSED_BOOK)
    assert report.mean("gold + 4", "exact_match") == 100
    assert report.mean(CLOSED_BOOK, "refusal") == 100 and report.mean(CLOSED_BOOK, "exact_match") == 0
    assert 0 < report.mean("gold + 1 adversarial", "exact_match") < 100
    low, high = report.interval("gold + 1 adversarial", "exact_match")
    assert low < report.mean("gold + 1 adversarial", "exact_match") < high
    assert report.mean("gold + 0", "answer_in_passages") == 100
    assert report.metrics["exact_match/gold + 0"] == 100
    assert "| gold + 4 | 100.0 [100.0, 100.0] |" in report.table()
    with pytest.raises(ValueError, match="condition='gold \\+ 7'"):
        report.values("gold + 7", "f1")


def test_reports_are_files_curves_and_comparisons(tmp_path):
    conditions = (Condition(), Condition(distractors=4), Condition(gold=False))
    report = evaluate_rag(first_capital, rows(), conditions)
    report.to_json(tmp_path / "report.json")
    assert RagReport.from_json(tmp_path / "report.json") == report
    silent = evaluate_rag(lambda inputs: [{"answer": ""}] * len(inputs), rows(), conditions)
    both = compare({"reads": report, "silent": silent})
    gain, p = both.difference("silent", "gold + 4")
    assert gain == -100 and p < 0.05
    assert "| silent | 0.0 (-100.0, p 0.03) |" in both.table()
    report.plot(tmp_path / "one.png")
    both.plot(tmp_path / "both.png")
    assert (tmp_path / "one.png").stat().st_size > 5000 < (tmp_path / "both.png").stat().st_size
    other = evaluate_rag(first_capital, rows(), conditions, seed=1)
    with pytest.raises(ValueError, match="other questions, conditions or settings"):
        compare({"a": report, "b": other})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"answers": []}, r"row 1 \(id 'Spain'\): answers=\[\] has no gold answer"),
        ({"answers": ["."]}, "has no gold answer"),
        ({"answers": "Madrid"}, "is no list"),
        ({"answers": {"text": ["Madrid"], "answer_start": [0]}}, "is no list"),
        ({"documents": {"title": ["x"], "text": ["y"]}}, "documents has columns"),
        ({"question": " "}, "question=' '"),
        ({"id": "France"}, r"row 1 \(id 'France'\): the id occurs twice"),
        ({"documents": [{"title": "x"}]}, "has no text"),
    ],
)
def test_bad_questions_are_named(change, named):
    bad = rows()
    bad[1] = {**bad[1], **change}
    with pytest.raises(ValueError, match=named):
        read_questions(bad)


def test_bad_evaluations():
    with pytest.raises(ValueError, match="row 0 is 'train'; give rows"):
        evaluate_rag(first_capital, {"train": rows()})
    with pytest.raises(ValueError, match="there are no questions"):
        evaluate_rag(first_capital, [])
    with pytest.raises(ValueError, match="no question has passages for it"):
        evaluate_rag(first_capital, rows(1), [Condition(distractors=4)])
    with pytest.raises(ValueError, match="different names"):
        evaluate_rag(first_capital, rows(), [Condition(), Condition()])
    with pytest.raises(ValueError, match="5 answers to 6 questions"):
        evaluate_rag(lambda inputs: first_capital(inputs)[1:], rows(), [Condition()])
    with pytest.raises(ValueError, match="the reader gave 'Paris'; give a mapping with answer"):
        evaluate_rag(lambda inputs: ["Paris"] * len(inputs), rows(), [Condition()])
