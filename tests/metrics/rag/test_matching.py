"""When an answer is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.metrics.rag.matching import (
    AnswerMatcher,
    contains_answer,
    exact_match,
    is_refusal,
    normalize_answer,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("“Köln”", "köln"),
        ("ﬁlm", "film"),
        ("The The", "the the"),
        ("…", ""),
        ("東京。", "東京"),
        ("19th-century", "19thcentury"),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@given(st.text())
def test_normalisation_is_its_own_fixed_point_and_matches_itself(text):
    once = normalize_answer(text)
    if once not in ("a", "an", "the"):
        assert exact_match(text, [text]) == bool(once)
    assert 0 <= token_f1(text, [text, "other"]) <= 1
    assert once.strip() == once


def test_exact_match_f1_and_containment():
    golds = ["Barack Obama", "Obama"]
    assert exact_match("obama.", golds) and not exact_match("Michelle Obama", golds)
    assert token_f1("Michelle Obama", golds) == pytest.approx(2 / 3)
    assert token_f1("", golds) == 0 and token_f1("x", []) == 0
    assert contains_answer("It was Barack Obama who won", golds)
    # At borders of words, so that "no" is not found in "know".
    assert not contains_answer("I know", ["no"])
    assert contains_answer("首都は東京です", ["東京"])
    assert not contains_answer("anything", ["..."])


@pytest.mark.parametrize("match", ["exact", "contains"])
def test_yes_and_no_are_looked_for_in_order(match):
    matcher = AnswerMatcher(match)
    assert matcher("Yes, there is no doubt.", ["yes"])
    assert not matcher("No, yes would be wrong.", ["yes"])
    assert not matcher("perhaps", ["no"]) and not matcher("", ["no"])
    # An alias that happens to be one of the words.
    assert matcher("none", ["no", "none"]) and matcher("Dr No", ["Dr. No", "No"])


def test_matchers():
    assert not AnswerMatcher()("the city of Paris", ["Paris"])
    assert AnswerMatcher("contains")("the city of Paris", ["Paris"])
    for match in ("exact", "contains"):
        assert not AnswerMatcher(match)("", ["Paris"]) and not AnswerMatcher(match)(" .", ["Paris"])
    with pytest.raises(ValueError, match="match='fuzzy'"):
        AnswerMatcher("fuzzy")


def test_refusals():
    assert (
        is_refusal("I don't know.") and is_refusal("Unknown") and is_refusal("Not enough information in the passages")
    )
    assert not is_refusal("Paris") and not is_refusal("Unknown Pleasures") and not is_refusal("")
