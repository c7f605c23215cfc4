"""The definitions: figures of the reference implementation, counts of lattice paths, and laws."""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import stats

from hf_ext.metrics.statistics import bootstrap_interval
from hf_ext.metrics.unlearning import measures
from hf_ext.metrics.unlearning.scores import TokenScores, token_scores
from tests.oracles import ORACLES

FOLDER = ORACLES / "unlearning_metrics"
EXPECTED = json.loads((FOLDER / "metrics_expected.json").read_text())
TOFU = json.loads((FOLDER / "tofu_expected.json").read_text())
TOFU_LOGS = {name: tensor.numpy() for name, tensor in load_file(FOLDER / "tofu_logs.safetensors").items()}
PAIRS = ["llama2_full_vs_retain90", "llama2_retain95_vs_retain90"]

losses = st.floats(0, 1e3)
samples = st.lists(st.floats(-50, 50), min_size=1, max_size=40)
hits = st.lists(st.booleans(), max_size=30)


def oracle_scores() -> list[TokenScores]:
    """Scores of the reference's batch; the last labelled token stands for the end of the sequence."""
    batch = load_file(FOLDER / "metrics.safetensors")
    found = []
    for logits, labels in zip(batch["mem.logits"], batch["mem.labels"], strict=True):
        places = (labels != -100).nonzero()[:, 0]
        scores = token_scores(logits[places - 1], labels[places], moments=True)
        found.append(TokenScores(scores.log_probs, scores.hits, True, scores.mean, scores.variance))
    return found


def test_probability():
    for scores, expected in zip(oracle_scores(), EXPECTED["probability"]["per_example"], strict=True):
        assert scores.nll == pytest.approx(expected["avg_loss"], rel=1e-6)
        assert measures.probability(scores.nll) == pytest.approx(expected["prob"], rel=1e-6)


def test_token_log_probs_without_the_end():
    for scores, expected in zip(oracle_scores(), EXPECTED["token_logprobs_excluding_last_label"], strict=True):
        np.testing.assert_allclose(scores.content.log_probs, expected, rtol=1e-6, atol=1e-7)


def test_memorisation():
    found = [scores.content.hits for scores in oracle_scores()]
    assert [measures.exact_memorisation(row) for row in found] == pytest.approx(
        EXPECTED["exact_memorization_reference"]["per_example"], abs=1e-6
    )
    assert [measures.extraction_strength(row) for row in found] == pytest.approx(
        EXPECTED["extraction_strength_corrected"]["per_example"], abs=1e-12
    )
    assert [measures.extraction_strength(row, reference_compat=True) for row in found] == pytest.approx(
        EXPECTED["extraction_strength_reference"]["per_example"], abs=1e-12
    )


def test_membership_scores():
    expected = EXPECTED["mia_scores"]
    for index, scores in enumerate(oracle_scores()):
        content, text = scores.content, EXPECTED["mia_texts"][index]
        assert scores.nll == pytest.approx(expected["loss"][index], rel=1e-6)
        assert measures.zlib_score(scores.nll, text) == pytest.approx(expected["zlib"][index], rel=1e-6)
        for k in (0.2, 0.4):
            assert measures.min_k(content.log_probs, k) == pytest.approx(expected[f"min_k_{k}"][index], rel=1e-6)
            found = measures.min_k_plus_plus(content.log_probs, content.mean, content.variance, k)
            assert found == pytest.approx(expected[f"min_k_plus_plus_{k}"][index], rel=1e-5, abs=1e-6)
    assert measures.min_k([]) == 0.0


def test_auc_and_privleak():
    expected = EXPECTED["mia_auc"]
    value = measures.auc(expected["forget_scores"], expected["holdout_scores"])
    assert value == pytest.approx(expected["auc"], abs=1e-12)
    reference = expected["privleak_ref_auc"]
    assert measures.privleak(value, reference) == pytest.approx(expected["privleak"], abs=1e-6)
    assert measures.privleak(value) == pytest.approx(expected["privleak_default_ref"], abs=1e-6)
    assert measures.relative_difference(value, reference) == pytest.approx(expected["rel_diff"], abs=1e-6)
    with pytest.raises(ValueError, match="separates forget from holdout completely"):
        measures.privleak(0.7, 1.0)
    assert math.isnan(measures.relative_difference(0.7, 0.0))


def test_truth_ratio():
    data = EXPECTED["truth_ratio"]
    correct, wrong = data["correct_avg_loss"], data["wrong_avg_loss"]
    ratio = measures.log_truth_ratio(correct, wrong)
    aggregates = {
        "closer_to_1_better": measures.truth_ratio_closeness,
        "true_better": measures.truth_ratio_utility,
        "prob_mean": measures.truth_ratio_knowledge,
    }
    # The reference adds 1e-10 to probabilities that are above 0.01 here.
    for name, aggregate in aggregates.items():
        assert aggregate(ratio).mean() == pytest.approx(data["results"][name]["agg"], rel=1e-6)
    expected = data["results"]["closer_to_1_better"]["per_example"]
    np.testing.assert_allclose(np.exp(ratio), expected, rtol=1e-6)
    expected = data["results"]["prob_mean"]["per_example"]
    np.testing.assert_allclose(measures.truth_ratio_knowledge(ratio), expected, rtol=1e-6)
    options = measures.probability_with_options(correct, wrong)
    np.testing.assert_allclose(options, data["probability_w_options"]["per_example"], rtol=1e-6)
    with pytest.raises(ValueError, match="mean='median'"):
        measures.log_truth_ratio(correct, wrong, mean="median")


def lattice_p(n: int, m: int, distance: int) -> Fraction:
    """P(max |i·m − j·n| >= distance) over monotone paths from (0, 0) to (n, m), counted in integers."""
    row = [0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            left = (row[j - 1] if j else 0) if i or j else 1
            row[j] = 0 if abs(i * m - j * n) >= distance else (row[j] if i else 0) + left
    return 1 - Fraction(row[m], math.comb(n + m, n))


@pytest.mark.parametrize("case", EXPECTED["ks_test"], ids=lambda case: f"{len(case['x'])}-{len(case['y'])}")
def test_forget_quality_is_exact(case):
    found = measures.forget_quality(case["x"], case["y"])
    assert found.statistic == pytest.approx(case["statistic"], abs=1e-12)
    assert found.p_value == pytest.approx(case["pvalue_exact"], rel=1e-9, abs=0)
    n, m = len(case["x"]), len(case["y"])
    counted = lattice_p(n, m, round(found.statistic * n * m))
    assert found.p_value == pytest.approx(float(counted), rel=1e-9, abs=0)
    assert found.smallest_p == pytest.approx(2 / math.comb(n + m, n), rel=1e-9, abs=0)


def test_lattice_paths_by_hand():
    # Of the C(6, 3) = 20 orders of 3 and 3 values, two are fully separated.
    assert lattice_p(3, 3, 9) == Fraction(1, 10)
    assert measures.forget_quality([1, 2, 3], [4, 5, 6]).p_value == pytest.approx(0.1, rel=1e-12)


def test_direction_and_smallest_p():
    low, high = np.linspace(-2, -1, 12), np.linspace(1, 2, 12)
    knows, over = measures.forget_quality(low, high), measures.forget_quality(high, low)
    assert (knows.direction, over.direction) == ("knows more", "over-unlearned")
    assert knows.p_value == over.p_value == pytest.approx(knows.smallest_p, rel=1e-9)
    assert measures.forget_quality([1.0], [2.0]).smallest_p == 1.0


def test_forget_quality_refuses():
    with pytest.raises(ValueError, match="none of them NaN"):
        measures.forget_quality([1.0, math.nan], [1.0])
    with pytest.raises(ValueError, match="none of them NaN"):
        measures.forget_quality([], [1.0])


def test_scipy_gives_up_near_one():
    """Why paths are counted here: rounding takes SciPy's exact value above 1, and it returns the asymptotic one."""
    first, second = [0.0] * 7, [0.0] * 6 + [1.0]
    with pytest.warns(RuntimeWarning, match="Switching to method=asymp"):
        stats.ks_2samp(first, second, method="exact")
    assert measures.forget_quality(first, second).p_value == pytest.approx(float(lattice_p(7, 7, 7)), rel=1e-12)


def tofu_utility(pair: str, side: str, mean: str) -> float:
    values = []
    for split in ("retain_set", "real_authors", "world_facts"):
        log = {
            name: TOFU_LOGS[f"{pair}.{side}.{split}.{name}"]
            for name in ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall")
            if f"{pair}.{side}.{split}.{name}" in TOFU_LOGS
        }
        gold, wrong = log["avg_gt_loss"], log["average_perturb_loss"]
        right = log.get("avg_paraphrased_loss", gold)
        prob = measures.probability(gold)
        if split != "retain_set":
            prob = measures.probability_with_options(gold, wrong)
        ratio = measures.truth_ratio_utility(measures.log_truth_ratio(right, wrong, mean=mean))
        values += [prob.mean(), log["rougeL_recall"].mean(), ratio.mean()]
    return measures.model_utility(values)


@pytest.mark.parametrize("pair", PAIRS)
def test_published_tofu_logs(pair):
    ratios = [
        measures.log_truth_ratio(
            TOFU_LOGS[f"{pair}.{side}.forget_set.avg_paraphrased_loss"],
            TOFU_LOGS[f"{pair}.{side}.forget_set.average_perturb_loss"],
        )
        for side in ("ckpt", "retain")
    ]
    quality, expected = measures.forget_quality(*ratios), TOFU[pair]
    assert quality.p_value == pytest.approx(expected["forget_quality"]["KS Test PVal Forget"], rel=1e-9, abs=0)
    assert quality.statistic == pytest.approx(expected["forget_quality"]["KS Test Forget"], abs=1e-12)
    first = expected["truth_ratio_geometric_wrong_over_correct_ckpt_first5"]
    np.testing.assert_allclose(np.exp(ratios[0][:5]), first, rtol=1e-6)
    for side, mean, key in (
        ("ckpt", "geometric", "model_utility_ckpt"),
        ("retain", "geometric", "model_utility_retain"),
        ("ckpt", "arithmetic", "model_utility_ckpt_arithmetic_truth_ratio"),
    ):
        assert tofu_utility(pair, side, mean) == pytest.approx(expected[key]["Model Utility"], abs=1e-6), key


def test_the_published_figures():
    """The numbers people know: full against retain90, and one retrained model against another."""
    assert TOFU[PAIRS[0]]["forget_quality"]["Forget Quality"] == pytest.approx(1.834e-21, rel=1e-3)
    assert tofu_utility(PAIRS[0], "ckpt", "geometric") == pytest.approx(0.62268, abs=5e-6)
    assert tofu_utility(PAIRS[0], "retain", "geometric") == pytest.approx(0.61374, abs=5e-6)
    assert tofu_utility(PAIRS[1], "ckpt", "geometric") == pytest.approx(0.60058, abs=5e-6)


def test_utility():
    data = EXPECTED["model_utility"]
    assert measures.model_utility(data["values"]) == pytest.approx(data["harmonic_mean"], abs=1e-12)
    assert measures.model_utility([0.9, 0.0, 0.8]) == 0.0
    for values in ([], [0.5, -0.1], [math.nan]):
        with pytest.raises(ValueError, match="give one or more scores"):
            measures.model_utility(values)


@pytest.mark.parametrize("case", EXPECTED["rouge"], ids=lambda case: case["generation"][:20])
def test_rouge(case):
    found = measures.rouge_l(case["generation"], case["ground_truth"])
    assert found.recall == pytest.approx(case["rougeL_recall"], abs=1e-9)
    assert found.f1 == pytest.approx(case["rougeL_f1"], abs=1e-9)


@pytest.mark.parametrize(
    "text", ["Лев Толстой родился в 1828 году.", "他出生于一八二八年", "Ο Όμηρος έγραψε την Ιλιάδα"]
)
def test_rouge_reads_other_scripts(text):
    assert measures.rouge_l(text, text) == measures.RougeL(1.0, 1.0)
    assert measures.rouge_l("nothing of it", text).recall == 0.0
    half = text[: len(text) // 2]
    assert 0 < measures.rouge_l(half, text).recall < 1


@pytest.mark.parametrize("text", ["½", "€ →", "!!!", "😀👍", "é", "Ö"])
def test_rouge_reads_symbols(text):
    assert measures.rouge_l(f" {text} ", text) == measures.RougeL(1.0, 1.0)
    assert measures.rouge_l("nothing of it", text) == measures.RougeL(0.0, 0.0)
    assert measures.rouge_l(f"{text} + x", text).recall == 1.0 > measures.rouge_l(f"{text} + x", text).f1


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'pip install "hf-ext\[unlearning\]"'):
        measures.auc([1.0], [2.0])


# -- Laws -------------------------------------------------------------------------------------------------------------


@given(samples, samples)
@settings(max_examples=60, deadline=None)
def test_inverse_ratios_have_the_same_p(first, second):
    # log(1/R) = −log R is exact, which 1/R itself is not.
    straight = measures.forget_quality(first, second)
    inverse = measures.forget_quality(-np.array(first), -np.array(second))
    swapped = measures.forget_quality(second, first)
    assert straight.p_value == pytest.approx(inverse.p_value, rel=1e-9)
    assert straight.p_value == pytest.approx(swapped.p_value, rel=1e-9)
    assert straight.smallest_p * (1 - 1e-9) <= straight.p_value <= 1


@given(samples)
@settings(max_examples=40, deadline=None)
def test_identical_samples(values):
    quality = measures.forget_quality(values, values)
    assert (quality.p_value, quality.statistic, quality.direction) == (1.0, 0.0, "equal")
    assert measures.auc(values, values) == pytest.approx(0.5, abs=1e-12)


@given(samples, samples)
@settings(max_examples=60, deadline=None)
def test_auc_is_antisymmetric(first, second):
    value = measures.auc(first, second)
    assert 0 <= value <= 1
    assert value + measures.auc(second, first) == pytest.approx(1, abs=1e-12)
    assert measures.privleak(value, value) == 0 if value < 1 else True


@given(hits)
def test_extraction_is_part_of_memorisation(row):
    exact, strength = measures.exact_memorisation(row), measures.extraction_strength(row)
    assert 0 <= strength <= exact <= 1
    assert (exact == 1) == (strength == 1)
    compatible = measures.extraction_strength(row, reference_compat=True)
    assert compatible >= strength
    assert compatible == (strength or (1 / len(row) if row else 0))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_utility_bound(values):
    utility = measures.model_utility(values)
    assert min(values) * (1 - 1e-9) <= utility <= min(min(values) * len(values), max(values)) * (1 + 1e-9)


@given(st.lists(st.tuples(losses, st.lists(losses, min_size=3, max_size=3)), min_size=1, max_size=8))
def test_truth_ratios_are_bounded_and_consistent(rows):
    correct, wrong = [row[0] for row in rows], [row[1] for row in rows]
    ratio = measures.log_truth_ratio(correct, wrong)
    for aggregate in (measures.truth_ratio_closeness, measures.truth_ratio_utility, measures.truth_ratio_knowledge):
        values = aggregate(ratio)
        assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(
        measures.truth_ratio_knowledge(ratio) + measures.truth_ratio_knowledge(-ratio), 1, atol=1e-12
    )
    # A geometric mean is never above the arithmetic one.
    assert (ratio <= measures.log_truth_ratio(correct, wrong, mean="arithmetic") + 1e-9).all()
    options = measures.probability_with_options(correct, wrong)
    assert ((options >= 0) & (options <= 1)).all()


def test_min_k_keeps_at_least_one():
    assert measures.min_k([-3.0, -1.0], 0.1) == 3.0
    assert measures.min_k_plus_plus([-2.0], [-2.0], [0.0]) == 0.0
    assert measures.min_k_plus_plus([-2.0], [-1.0], [0.0]) == pytest.approx(1e3)


def test_bootstrap():
    values = np.arange(100.0)
    interval = measures.bootstrap_of(lambda x: x.mean(axis=1), [values])
    # Two standard errors of the mean: 2 · 28.9 / √100.
    assert interval == pytest.approx((49.5 - 5.7, 49.5 + 5.7), abs=0.6)
    assert interval == pytest.approx(bootstrap_interval(values.tolist()), abs=0.6)
    low, high = measures.utility_interval([np.stack([values, values], axis=1) / 100, values[:, None] / 100])
    assert low < measures.model_utility([0.495] * 3) < high
    assert measures.utility_interval([[[0.0, 1.0]], [[1.0]]]) == (0.0, 0.0)
    assert interval == measures.bootstrap_of(lambda x: x.mean(axis=1), [values])
    assert measures.auc_interval([0.0, 0.1], [1.0, 2.0]) == (1.0, 1.0)


def test_masked_vocabulary_gives_finite_moments():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    scores = token_scores(logits, torch.tensor([1]), moments=True)
    assert np.isfinite(scores.mean).all() and np.isfinite(scores.variance).all()
    assert token_scores(logits, torch.tensor([2])).log_probs[0] == -math.inf
