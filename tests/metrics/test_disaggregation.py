"""Results by group: metrics and groups against a group-by, degenerate cases, the report, and what is refused."""

import sys
import time

import numpy as np
import pandas
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from hf_ext import disaggregate
from hf_ext.metrics.calibration import brier, ece, nll
from hf_ext.metrics.statistics import wilson_interval
from hf_ext.model_cards.facts.results import read_results
from tests.metrics.groups import row_of


def classified(seed=0, n=300, classes=3):
    """Predictions, references, probabilities, and factors on which the accuracy depends."""
    generator = np.random.default_rng(seed)
    language, age = generator.choice(["en", "sw"], n), generator.choice(["18-39", "40-59", "60+"], n)
    references = generator.integers(0, classes, n)
    right = generator.random(n) < np.where(language == "sw", 0.6, 0.85)
    predictions = np.where(right, references, generator.integers(0, classes, n))
    probabilities = generator.dirichlet(np.ones(classes), n) + 2 * np.eye(classes)[predictions]
    return (
        predictions,
        references,
        probabilities / probabilities.sum(1, keepdims=True),
        {"language": language, "age": age},
    )


# -- metrics and groups ------------------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_their_libraries():
    predictions, references, probabilities, factors = classified()
    names = ["accuracy", "error_rate", "f1", "ece", "brier", "nll"]
    report = disaggregate(predictions, references, factors, names, probabilities=probabilities, resamples=100)
    for label in ("en", "sw"):
        values = {}
        for side in (True, False):
            rows = (factors["language"] == label) == side
            p, r = torch.tensor(probabilities[rows]), torch.tensor(references[rows])
            right = (predictions[rows] == references[rows]).mean()
            macro = f1_score(references[rows], predictions[rows], average="macro")
            values[side] = [right, 1 - right, macro, ece(p, r), brier(p, r), nll(p, r)]
        found = [row_of(report, name, language=label) for name in names]
        assert [row.value for row in found] == pytest.approx(values[True])
        assert [row.gap for row in found] == pytest.approx(np.subtract(values[True], values[False]).tolist())


def test_a_metric_of_ones_own_is_treated_like_a_built_in_one():
    predictions, references, _, factors = classified(n=120)
    own = disaggregate(
        predictions, references, factors, {"mine": lambda p, r: (p == r).mean()}, intersections=1, resamples=400
    )
    built_in = disaggregate(
        predictions, references, factors, {"mine": "accuracy"}, method="bootstrap", intersections=1, resamples=400
    )
    for a, b in zip(own.rows, built_in.rows, strict=True):
        assert (a.group, a.n, a.value, a.gap) == (b.group, b.n, b.value, b.gap)
        assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.06)
    texts = disaggregate(
        ["a b", "c"] * 20, None, {"kind": ["long", "short"] * 20}, {"words": lambda p, _: np.mean([len(t.split()) for t in p])},
        min_n=20, resamples=100,
    )  # fmt: skip
    assert row_of(texts, kind="long").value == 2


label = st.sampled_from(["a", "b", "c|d", None])
items = st.lists(st.tuples(st.booleans(), st.integers(0, 3), label, label, label), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(items, st.integers(1, 3), st.integers(1, 8), st.sampled_from(["auto", "bootstrap"]))
def test_groups_are_those_of_a_group_by(rows, intersections, min_n, method):
    frame = pandas.DataFrame(rows, columns=["right", "cluster", "x", "y", "z"])
    names = ["x", "y", "z"]
    report = disaggregate(
        frame["right"],
        [True] * len(frame),
        frame[names],
        min_n=min_n,
        intersections=intersections,
        method=method,
        resamples=100,
        clusters=frame["cluster"] if method == "bootstrap" else None,
    )
    expected = {(): (len(frame), frame["right"].mean())}
    for subset in ([n for i, n in enumerate(names) if mask >> i & 1] for mask in range(1, 8)):
        if len(subset) <= intersections:
            stated = frame[names].astype(object).fillna("not stated")
            for key, part in frame.groupby([stated[name] for name in subset]):
                expected[tuple(zip(subset, key, strict=True))] = (len(part), part["right"].mean())
    found = {tuple(row.group.items()): row for row in report.rows}
    assert found.keys() == expected.keys() and len(found) == len(report.rows)
    for key, (n, value) in expected.items():
        row = found[key]
        assert row.n == n
        if key and n < min_n:
            assert (row.value, row.low, row.gap, row.p_value, row.note) == (None, None, None, None, "n too small")
        else:
            assert row.value == pytest.approx(value)
            assert row.low is None or 0 <= row.low <= row.value <= row.high <= 1
            assert row.low is not None or row.note
            assert row.gap_low is None or row.gap_low <= row.gap <= row.gap_high
            assert not key or row.p_value is not None or row.note
    for name in names:
        assert sum(report.factors[name].values()) == len(frame)
        assert sum(row.n for row in report.rows if row.group.keys() == {name}) == len(frame)
    assert [len(row.group) for row in report.rows] == sorted(len(row.group) for row in report.rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), label), min_size=1, max_size=40))
def test_a_mean_is_in_its_interval(rows):
    scores, labels = zip(*rows, strict=True)
    for row in disaggregate(scores, None, {"x": labels}, "mean", min_n=1, resamples=100).rows:
        assert row.low <= row.value <= row.high if row.low is not None else row.note
        assert row.gap_low is None or row.gap_low <= row.gap <= row.gap_high


@pytest.mark.parametrize("clustered", [False, True])
def test_the_order_of_the_items_does_not_matter(clustered):
    predictions, references, probabilities, factors = classified()
    clusters = np.arange(300) // 3
    scores = np.random.default_rng(1).normal(size=300)
    shuffled = np.random.default_rng(2).permutation(300)

    def both(rows):
        of_rows = {name: labels[rows] for name, labels in factors.items()}
        options = {"clusters": clusters[rows] if clustered else None, "resamples": 200}
        names = ["accuracy", "f1", "ece", "nll"]
        classes = (predictions[rows], references[rows])
        yield disaggregate(*classes, of_rows, names, probabilities=probabilities[rows], **options)
        yield disaggregate(scores[rows], None, of_rows, "mean", **options)

    for first, second in zip(both(slice(None)), both(shuffled), strict=True):
        assert first == second and first.table() == second.table()
    assert next(both(slice(None))) == next(both(slice(None)))


def test_the_seed_and_the_confidence_matter():
    scores, factors = np.random.default_rng(0).normal(size=100), {"half": np.arange(100) % 2}
    first, other, wider = (
        row_of(disaggregate(scores, None, factors, "mean", **options))
        for options in ({}, {"seed": 1}, {"confidence": 0.99})
    )
    assert first.low != other.low and wider.low < first.low < first.high < wider.high


def test_factors_in_every_form():
    rows = [{"language": "en", "age": 30.0}, {"language": None, "age": float("nan")}, {"age": 4.0}]
    columns = {"language": ["en", None, None], "age": [30.0, None, 4.0]}
    frame = pandas.DataFrame(
        {"language": pandas.array(["en", None, None], dtype="string"), "age": [30.0, np.nan, 4.0]}
    )
    forms = [rows, columns, frame, Dataset.from_dict(columns), {**columns, "age": torch.tensor([30.0, np.nan, 4.0])}]
    reports = [disaggregate([1, 1, 0], [1, 0, 0], factors) for factors in forms]
    assert all(report == reports[0] for report in reports)
    assert list(reports[0].factors["age"].items()) == [("4.0", 1), ("30.0", 1), ("not stated", 1)]
    assert reports[0].factors["language"] == {"en": 1, "not stated": 2}


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, pandas.Series])
def test_predictions_in_every_form(kind):
    report = disaggregate(kind([1, 0, 2, 1]), kind([1, 1, 2, 1]), {"x": kind([0, 0, 1, 1])}, min_n=2)
    assert report.metrics == {"accuracy": 0.75, "accuracy (x=0)": 0.5, "accuracy (x=1)": 1}


def test_a_missing_answer_is_a_wrong_one():
    assert disaggregate(["a", None], ["a", "b"], {"x": [0, 0]}).metrics["accuracy"] == 0.5


def test_a_hundred_thousand_items():
    generator = np.random.default_rng(0)
    factors = {name: generator.integers(0, kinds, 100000) for name, kinds in (("x", 10), ("y", 6), ("z", 4))}
    references = generator.integers(0, 5, 100000)
    start = time.process_time()
    report = disaggregate(generator.integers(0, 5, 100000), references, factors, ["accuracy", "f1"], resamples=100)
    assert time.process_time() - start < 10
    assert len(report.rows) == 2 * (1 + 20 + 10 * 6 + 10 * 4 + 6 * 4)


# -- degenerate cases --------------------------------------------------------------------------------------------------


def test_groups_without_spread():
    half, right = {"half": np.arange(80) % 2}, np.ones(80, dtype=int)
    plain = row_of(disaggregate(right, right, half), half="0")
    assert (plain.low, plain.high) == wilson_interval(40, 40) and plain.gap == 0 and plain.p_value == 1
    clustered = row_of(disaggregate(right, right, half, clusters=np.arange(80) // 4), half="0")
    assert (clustered.low, clustered.high) == wilson_interval(20, 20) and clustered.p_value is None
    assert clustered.note == "all alike: Wilson's interval for 20 clusters; gap not tested"
    equal = row_of(disaggregate([0.7] * 80, None, half, "mean"), half="0")
    assert (equal.value, equal.low, equal.gap_low) == (pytest.approx(0.7), None, None)
    assert equal.note == "no interval: the same in every resample; gap not tested"


def test_too_little_to_draw_from():
    one = disaggregate([0.5], None, {"x": ["a"]}, "mean", min_n=1)
    assert [(row.value, row.low, row.n) for row in one.rows] == [(0.5, None, 1)] * 2
    assert one.rows[1].note == "no interval: the same in every resample; all items: no rest"
    assert disaggregate([1], [1], {"x": ["a"]}, min_n=1).rows[0].low == wilson_interval(1, 1)[0]
    scores, factors = np.arange(80.0), {"half": np.arange(80) // 40}
    rows = disaggregate(scores, None, factors, "mean", clusters=np.arange(80) // 40).rows
    assert rows[1].low is None and rows[1].note == "no interval: undefined in many resamples; not compared: 1 clusters"
    few = disaggregate(scores, None, factors, "mean", clusters=np.arange(80) // 8).rows[1]
    assert few.low < few.value < few.high and few.note == "not compared: 5 clusters"
    lone = disaggregate([1] * 50, [1] * 50, {"x": ["a"] * 45 + ["b"] * 5}).rows
    assert lone[1].note == "rest of 5 items too small" and lone[2].note == "n too small"


def test_a_metric_that_is_not_defined_everywhere():
    def recall(predictions, references):
        return predictions[references == 1].mean() if (references == 1).any() else float("nan")

    references = np.array([1] * 40 + [0] * 40)
    report = disaggregate(references, references, {"x": ["a"] * 40 + ["b"] * 40}, {"recall": recall}, resamples=100)
    assert report.metrics == {"recall": 1, "recall (x=a)": 1}
    assert row_of(report, x="b").note == "no interval: undefined in many resamples; gap not tested"


# -- the report --------------------------------------------------------------------------------------------------------


def report_of_two_factors():
    right = np.arange(400) % 10 < np.where(np.arange(400) < 100, 5, 9)
    factors = {"language": ["s|w\n"] * 100 + ["en"] * 300, "age": (["<!-- a", None] * 200)[:390] + ["60+"] * 10}
    return disaggregate(right, np.ones(400, dtype=bool), factors, ["accuracy", "error_rate"])


def test_the_table():
    lines = report_of_two_factors().table("unitary").splitlines()
    assert lines[:6] == [
        "| group | n | metric | value | 95 % interval | gap to the rest |",
        "| --- | --- | --- | --- | --- | --- |",
        "| all | 400 | accuracy | 0.8 | 0.758 to 0.8363 |  |",
        "| all | 400 | error_rate | 0.2 | 0.1637 to 0.242 |  |",
        "| language=en | 300 | accuracy | 0.9 | 0.8608 to 0.9291 | +0.4 [+0.296, +0.5], p < 0.001 |",
        "| language=en | 300 | error_rate | 0.1 | 0.07095 to 0.1392 | -0.4 [-0.5, -0.296], p < 0.001 |",
    ]
    assert lines[6].startswith("| language=s\\|w | 100 | accuracy | 0.5 ")
    assert lines[8].startswith("| age=60+ | 10 | accuracy | n too small |  |  |")
    assert lines[10].startswith("| age=&lt;!-- a | 195 |") and lines[12].startswith("| age=not stated | 195 |")


def test_both_kinds_of_rows_are_in_the_table_once():
    report = report_of_two_factors()
    whole, unitary, both = (report.table(kind).splitlines() for kind in (None, "unitary", "intersectional"))
    assert whole == unitary + both[2:] and whole[:2] == both[:2]
    assert all(", age=" in line for line in both[2:])
    single = disaggregate([1] * 40, [1] * 40, {"x": [1] * 40})
    assert single.table("intersectional") == "" and single.table("unitary") == single.table()


def test_the_worst_group():
    report = report_of_two_factors()
    values = [row.value for row in report.rows if row.metric == "accuracy" and row.group and row.value is not None]
    assert report.worst("accuracy").value == report.metrics[report.worst("accuracy").name] == min(values)
    assert report.worst("error_rate").group == report.worst("accuracy").group
    assert report.worst("accuracy", higher_is_better=False).value == max(values)
    assert disaggregate([1, 0], [1, 1], {"x": [1, 2]}).worst("accuracy") is None


def test_the_uncertainty_in_words():
    scores, factors = np.arange(60.0), {"half": np.arange(60) % 2}
    words = disaggregate(
        scores, None, factors, "mean", clusters=np.arange(60) // 2, seed=3, confidence=0.9
    ).uncertainty_note
    assert words.startswith("90 % intervals (mean: BCa bootstrap of 30 clusters (2,000 resamples, seed 3), gaps")
    assert (
        "Wilson" in report_of_two_factors().uncertainty_note
        and "bootstrap" not in report_of_two_factors().uncertainty_note
    )


def test_what_a_card_needs_survives_the_metadata():
    report = report_of_two_factors()
    assert read_results(report, "you/probe").values == report.metrics
    assert report.arguments.keys() == report.metrics.keys()
    assert report.arguments["accuracy (language=en)"]["group"] == {"language": "en"}
    entries = [
        EvalResult("text-classification", "you/probe", "probe", "accuracy", value, metric_name=name,
                   metric_args=report.arguments[name])
        for name, value in report.metrics.items()
    ]  # fmt: skip
    index = yaml.safe_load(yaml.safe_dump(eval_results_to_model_index("model", entries)))
    _, read = model_index_to_eval_results(index)
    assert {entry.metric_name: entry.metric_args for entry in read} == report.arguments
    assert all(len(entry.metric_args["ci95"]) == 2 for entry in read)


# -- what is refused ---------------------------------------------------------------------------------------------------

GOOD = {"predictions": [0, 1] * 20, "references": [0, 1] * 20, "factors": {"x": [0, 1] * 20}}
PROBABILITIES = np.full((40, 2), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": [0]}, r"references has 1 rows for 40 predictions; give one"),
        ({"references": None}, r"references=None: accuracy needs them"),
        ({"factors": {"x": [0]}}, r"factors\['x'\] has 1 labels for 40 predictions; give one"),
        ({"factors": {"x": "en"}}, r"factors\['x'\]='en' is a text; give one label"),
        ({"factors": {}}, r"factors: there is none; give a mapping"),
        ({"factors": 3}, r"factors of type int: give a mapping"),
        ({"factors": {"x": [["a"]] * 40}}, r"factors\['x'\]: row 0 has \['a'\], a list; give text"),
        ({"predictions": "abc"}, r"predictions='abc' is a text; give one"),
        ({"predictions": [], "references": []}, r"predictions: there is none; give at least one"),
        ({"predictions": [[0.1, 0.9]] * 40}, r"predictions of shape \(40, 2\): give one class .* argmax"),
        ({"predictions": [0.5] * 40}, r"predictions: row 0 is 0.5, which is no class; give text"),
        ({"predictions": ["0"] * 40}, r"predictions of <U1 and references of int64 are never equal; give both"),
        ({"metrics": "acuracy"}, r"'acuracy' is none of accuracy, .*; give a mapping"),
        ({"metrics": []}, r"metrics: there is none; give at least one"),
        ({"metrics": "mean"}, r"metrics='mean' is the mean of predictions .*; give references=None"),
        ({"metrics": {"own": lambda p, r: {"f1": 1}}}, r"metrics\['own'\] returned {'f1': 1}; return one number"),
        ({"metrics": "ece"}, r"probabilities=None: ece, brier and nll need them"),
        ({"metrics": "ece", "probabilities": [0.5] * 40}, r"probabilities of shape \(40,\) .*: give \(N, C\)"),
        ({"metrics": "ece", "probabilities": PROBABILITIES[:3]}, r"probabilities has 3 rows for 40 predictions"),
        ({"metrics": "ece", "probabilities": PROBABILITIES * 2}, r"probabilities: row 0 adds up to 2 .*; give a softmax"),
        ({"metrics": "ece", "probabilities": np.add(PROBABILITIES, [1, -1])}, r"row 0 adds up to 1 or has a negative number"),
        ({"metrics": "ece", "probabilities": PROBABILITIES * np.nan}, r"probabilities: row 0 adds up to nan"),
        ({"metrics": "nll", "probabilities": [[1.0, 0.0]] * 40}, r"row 1 gives its reference 0, .* clip them"),
        ({"metrics": "ece", "probabilities": PROBABILITIES, "references": [2] * 40}, r"references: row 0 is 2, .* 2 classes"),
        ({"metrics": "ece", "probabilities": PROBABILITIES, "references": ["a"] * 40}, r"give the index of a class"),
        ({"clusters": [1]}, r"clusters of shape \(1,\) for 40 predictions: give one id"),
        ({"clusters": [None] * 40}, r"clusters: row 0 has none; give items"),
        ({"min_n": 0}, r"min_n=0: give at least 1"),
        ({"confidence": 95}, r"confidence=95: give a number between 0 and 1"),
        ({"intersections": 4}, r"intersections=4: give 1, 2 or 3"),
        ({"method": "t"}, r"method='t': give 'auto'"),
        ({"method": "wilson", "metrics": "f1"}, r"method='wilson' is for scores of 0 and 1, and f1 is none; use"),
        ({"method": "wilson", "clusters": range(40)}, r"method='wilson' takes items for independent; use method='auto'"),
        ({"resamples": 10}, r"resamples=10: give at least 100"),
    ],
)  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        disaggregate(**{**GOOD, **options})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match=r"predictions: row 1 is (nan|inf); leave such items out"):
        disaggregate([0.5, bad], None, {"x": [0, 0]}, "mean")
    with pytest.raises(ValueError, match=r"predictions of shape \(2,\) and <U1: give one score"):
        disaggregate(["a", "b"], None, {"x": [0, 0]}, "mean")


def test_factors_with_too_many_labels_are_refused():
    zeros = np.zeros(2000, dtype=int)
    with pytest.raises(ValueError, match=r"factors: 'id' has 2000 labels, as an id would; leave it out"):
        disaggregate(zeros, zeros, {"language": zeros, "id": range(2000)})
    with pytest.raises(ValueError, match=r"more than 1000 groups; 'x' has the most labels. .* lower intersections=2"):
        disaggregate(zeros, zeros, {"x": np.arange(2000) % 50, "y": np.arange(2000) // 50})


def test_what_the_report_refuses():
    report = disaggregate(np.arange(40.0), None, {"x": [0] * 40}, "mean")
    with pytest.raises(ValueError, match="kind='pairs': give 'unitary'"):
        report.table("pairs")
    with pytest.raises(ValueError, match="metric='f1' is not in the report; give one of mean"):
        report.worst("f1")
    with pytest.raises(ValueError, match="higher_is_better=None: say whether a high mean is good"):
        report.worst("mean")


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'scipy is not installed: pip install "hf-ext\[cards\]"'):
        disaggregate(**GOOD)
