"""The mathematics against recorded values and by its laws."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.metrics.editing import scoring
from hf_ext.metrics.editing.probes import Probe
from hf_ext.metrics.editing.protocols import answer_text, score_answer, score_unchanged
from hf_ext.metrics.statistics import bootstrap_interval, paired_permutation_test

ORACLE = json.loads((Path(__file__).parents[2] / "oracles/knowledge_editing_eval/metrics.json").read_text())


@pytest.mark.parametrize("case", ORACLE["ngram_entropy"])
def test_ngram_entropy_matches_the_reference(case):
    assert scoring.ngram_entropy(case["tokens"]) == pytest.approx(case["ngram_entropy"], abs=1e-9)


@pytest.mark.parametrize("case", ORACLE["normalized_exact_match"])
def test_normalised_match_matches_the_reference(case):
    assert scoring.normalise(case["prediction"]) == case["normalized_prediction"]
    assert scoring.normalise(case["ground_truth"]) == case["normalized_ground_truth"]
    assert scoring.normalised_exact_match(case["prediction"], case["ground_truth"]) == case["exact_match"]


@pytest.mark.parametrize("case", ORACLE["teacher_forced"])
def test_token_scores_match_the_reference(case):
    start = case["prompt_len"]
    predicted, labels = case["argmax_per_position"][start - 1 : -1], case["input_ids"][start:]
    assert (predicted, labels) == (case["predicted_tokens"], case["label_tokens"])
    assert scoring.token_accuracy(predicted, labels) == pytest.approx(case["token_accuracy"], abs=1e-9)
    assert scoring.token_exact(predicted, labels) == case["exact_match"]


@pytest.mark.parametrize("case", ORACLE["locality"])
def test_locality_matches_the_reference(case):
    assert scoring.token_accuracy(case["post_tokens"], case["pre_tokens"]) == pytest.approx(case["locality"], abs=1e-9)


@pytest.mark.parametrize("case", ORACLE["contains"])
def test_contains_matches_the_reference(case):
    assert scoring.contains(case["generated"], case["answers"]) == case["contains_all"]


@pytest.mark.parametrize("case", ORACLE["aggregation"])
def test_aggregation_matches_the_reference(case):
    success = scoring.mean([record["rewrite_acc"][0] for record in case["records"]])
    assert 100 * success == pytest.approx(case["edit_success"])
    for section in ("portability", "locality"):
        found = [scoring.section_score(record[section]) for record in case["records"] if record.get(section)]
        assert 100 * scoring.mean(found) == pytest.approx(case[f"{section}_knowedit"])


texts = st.text(alphabet="abAB .,!\né日", max_size=12)


@given(texts, texts)
def test_exact_never_exceeds_contains(prediction, answer):
    assert scoring.answers_exactly(prediction, answer) <= scoring.answer_contained(prediction, answer)


@given(texts)
def test_every_answer_answers_itself(answer):
    assert scoring.answers_exactly(answer, answer) == 1.0


def test_an_article_is_not_matched_by_any_article():
    assert scoring.answers_exactly("the", "A") == 0.0 and scoring.answers_exactly(" A ", "A") == 1.0


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1, max_size=3))
def test_any_alias_is_the_most_lenient_policy(scores):
    lenient = scoring.reduce_answers(scores, "any_alias")
    assert lenient >= scoring.reduce_answers(scores, "first")
    assert lenient >= scoring.reduce_answers(scores, "all_groups")


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_entropy_is_bounded(tokens):
    value = scoring.ngram_entropy(tokens)
    assert 0 <= value <= math.log2(max(len(tokens), 1)) + 1e-9


@pytest.mark.parametrize(
    ("raw", "answer", "expected"),
    [
        (" Paris. It is", "Paris", "Paris"),
        (" J. K. Rowling. She wrote", "J. K. Rowling", "J. K. Rowling"),
        (" Washington, D.C. It is", "Washington, D.C.", "Washington, D.C"),
        (" J. R", "Tolkien", "J"),
        ("\nParis", "Paris", ""),
    ],
)
def test_stop_strings_spare_the_answer(raw, answer, expected):
    assert answer_text(raw, answer, [".", "\n"]) == expected


def test_generated_locality_compares_texts_not_truth():
    probe = Probe("r", "locality", "k", 0, "p", (("truth",),))
    assert score_unchanged("generate_exact", probe, " wrong.", " wrong. other", ["."], None) == 1
    assert score_unchanged("generate_contains", probe, " wrong", " so wrong", ["."], None) == 1
    assert score_unchanged("generate_contains", probe, "", " so wrong", ["."], None) == 0
    assert score_unchanged("generate_judge", probe, "a", "b", ["."], lambda p, old, new: 0.5) == 0.5


def test_judge_sees_prompt_answer_and_prediction():
    probe = Probe("r", "portability", "k", 0, "p", (("a", "b"),))
    seen = []
    score = score_answer(
        "generate_judge", probe, " b. c", ["."], "any_alias", lambda *args: seen.append(args) or args[1] == args[2]
    )
    assert score == 1 and seen == [("p", "a", "b"), ("p", "b", "b")]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_holds_the_mean(values):
    low, high = bootstrap_interval(values)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9 or len(set(values)) > 1
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap_interval(values) == (low, high)


def test_interval_covers_the_true_mean():
    draws = np.random.default_rng(1).binomial(1, 0.3, size=(200, 80))
    covered = [low <= 0.3 <= high for low, high in (bootstrap_interval(row, resamples=400) for row in draws)]
    assert np.mean(covered) > 0.9


def test_interval_with_weights_is_that_of_the_ratio():
    low, high = bootstrap_interval([1.0, 0.0], [3.0, 1.0])
    assert (low, high) == (0.0, 1.0)
    assert all(math.isnan(bound) for bound in bootstrap_interval([]))


def test_paired_test_enumerates_small_samples():
    first, second = [1.0, 0.8, 0.9, 0.4], [0.5, 0.9, 0.2, 0.1]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=4)]
    assert paired_permutation_test(first, second) == np.mean([s >= abs(sum(differences)) - 1e-12 for s in sums])
    assert paired_permutation_test(first, first) == 1.0
    with pytest.raises(ValueError, match="same rows"):
        paired_permutation_test(first, second[:2])


def test_paired_test_draws_for_large_samples():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=60)
    assert paired_permutation_test(noise + 2, noise) < 1e-3
    assert paired_permutation_test(generator.normal(size=60), generator.normal(size=60)) > 0.01
