"""The statistics of results by group: published values, SciPy's bootstrap, and what their intervals promise."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from hf_ext import disaggregate
from hf_ext.metrics.statistics import bca_interval, holm, newcombe_interval, wilson_interval
from tests.metrics.groups import row_of


@pytest.mark.parametrize(
    ("successes", "n", "expected"), [(0, 10, (0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1))]
)
def test_wilson_gives_the_published_values(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_newcombe_gives_the_published_value_of_his_first_example():
    assert newcombe_interval((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []


def test_bca_is_that_of_scipy():
    scores = np.random.default_rng(0).exponential(size=80)
    found = bootstrap((scores,), np.mean, n_resamples=999, random_state=1)
    left_out = (scores.sum() - scores) / (len(scores) - 1)
    ours = bca_interval(found.bootstrap_distribution, scores.mean(), left_out)
    assert ours == pytest.approx(tuple(found.confidence_interval), rel=1e-12)


@pytest.mark.parametrize("n", [150, 600])  # each item left out, and blocks of them
def test_the_interval_of_a_skewed_mean_is_that_of_scipy(n):
    scores = np.random.default_rng(0).lognormal(sigma=1.3, size=n)
    low, high = bootstrap((scores,), np.mean, n_resamples=10000, random_state=1).confidence_interval
    row = row_of(disaggregate(scores, None, {"half": np.arange(n) % 2}, "mean", resamples=10000))
    assert (row.low, row.high) == pytest.approx((low, high), abs=0.03 * (high - low))


# -- coverage: hundreds of groups are hundreds of experiments ----------------------------------------------------------


def coverage(report, truth, attributes=("low", "high")):
    rows = [row for row in report.rows if row.group]
    return np.mean([getattr(row, attributes[0]) <= truth <= getattr(row, attributes[1]) for row in rows])


def test_wilson_newcombe_and_fisher_keep_what_they_promise():
    experiments = np.arange(500).repeat(100)
    right = np.random.default_rng(0).random(50000) < 0.8
    report = disaggregate(right, np.ones(50000, dtype=bool), {"experiment": experiments})
    assert 0.93 <= coverage(report, 0.8) <= 0.97
    assert 0.93 <= coverage(report, 0, ("gap_low", "gap_high")) <= 0.97
    assert min(row.p_value for row in report.rows if row.group) > 0.05


def test_bca_of_a_skewed_mean_keeps_what_it_promises():
    experiments = np.arange(400).repeat(200)
    scores = np.random.default_rng(0).exponential(size=80000)
    report = disaggregate(scores, None, {"experiment": experiments}, "mean", resamples=600)
    assert 0.93 <= coverage(report, 1) <= 0.97
    assert 0.93 <= coverage(report, 0, ("gap_low", "gap_high")) <= 0.97
    assert min(row.p_value for row in report.rows if row.group) > 0.05


def test_clusters_are_drawn_as_a_whole():
    generator = np.random.default_rng(1)
    experiments, clusters = np.arange(400).repeat(200), np.arange(400 * 100).repeat(2)
    scores = generator.normal(size=400 * 100).repeat(2) + 0.3 * generator.normal(size=400 * 200)
    naive, honest = (
        disaggregate(scores, None, {"experiment": experiments}, "mean", clusters=ids, resamples=400)
        for ids in (None, clusters)
    )
    assert coverage(naive, 0) < 0.87 and 0.93 <= coverage(honest, 0) <= 0.97
    wider = [b.high - b.low > a.high - a.low for a, b in zip(naive.rows, honest.rows, strict=True)]
    assert all(wider)


def test_a_cluster_on_both_sides_is_drawn_for_both():
    """Each document is judged in both languages: documents differ much, languages by 0.1 in each of them."""
    generator = np.random.default_rng(0)
    documents = generator.normal(size=200).repeat(2)
    scores = documents + np.tile([0, 0.1], 200) + 0.05 * generator.normal(size=400)
    factors = {"language": ["en", "sw"] * 200}
    paired = row_of(disaggregate(scores, None, factors, "mean", clusters=np.arange(400) // 2), language="sw")
    spread = 1.96 * (scores[1::2] - scores[::2]).std(ddof=1) / np.sqrt(200)
    assert (paired.gap_low, paired.gap_high) == pytest.approx(
        (paired.gap - spread, paired.gap + spread), abs=0.1 * spread
    )
    assert paired.p_value < 1e-6 < 0.05 < row_of(disaggregate(scores, None, factors, "mean"), language="sw").p_value


def test_the_calibration_error_of_few_items_is_called_biased():
    """It is above that of the model, which is close to 0 here, and only an interval that knows it covers that."""
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(10000, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    references = (probabilities.cumsum(1) < generator.random((10000, 1))).sum(1).clip(max=3)
    report = disaggregate(
        probabilities.argmax(1),
        references,
        {"experiment": np.arange(100).repeat(100)},
        "ece",
        probabilities=probabilities,
        resamples=300,
    )
    rows = [row for row in report.rows if row.group]
    assert coverage(report, 0.001) == 1 and np.mean([row.value for row in rows]) > 0.08
    assert all(row.note == "biased at this n; gap not tested" and row.p_value is None for row in rows)
