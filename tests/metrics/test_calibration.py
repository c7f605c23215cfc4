"""Calibration: the recorded metrics, laws of each, the temperature, the report, and what is refused."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.metrics.calibration import (
    CalibrationReport,
    auroc,
    brier,
    ece,
    evaluate_calibration,
    fit_temperature,
    nll,
    reliability,
    risk_coverage,
)
from tests.oracles import ORACLES


def drawn(seed: int, rows: int = 400, classes: int = 5, sharpness: float = 2.0):
    """Probabilities, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    probs = (sharpness * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def test_the_recorded_metrics():
    recorded = load_file(ORACLES / "tfb/tfb.safetensors")
    probs, labels = recorded["metric_logits"].double().softmax(2).mean(1), recorded["metric_labels"]
    found = [
        float((probs.argmax(1) == labels).double().mean()),
        ece(probs, labels),
        nll(probs, labels),
        brier(probs, labels),
    ]
    assert found == pytest.approx(recorded["metric_acc_ece_nll_brier_flip"][:4].tolist(), abs=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_true_probabilities_are_calibrated_and_sharpened_ones_are_not(adaptive):
    probs, labels = drawn(0, 20000)
    assert ece(probs, labels, adaptive=adaptive) < 0.015
    sharpened = (3 * probs.log()).softmax(1)
    assert ece(sharpened, labels, adaptive=adaptive) > 0.1
    assert nll(probs, labels) < nll(sharpened, labels) and brier(probs, labels) < brier(sharpened, labels)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20), st.booleans())
@example(seed=131072, rows=9, n_bins=3, adaptive=True)
def test_the_calibration_error_by_hand(seed, rows, n_bins, adaptive):
    probs, labels = drawn(seed, rows)
    probs = (probs * 8).round() / 8  # with ties
    confidence, predicted = probs.max(1)
    correct = predicted == labels
    if adaptive:
        ordered = confidence.sort().values
        edges = [float(ordered[math.ceil(k * rows / n_bins) - 1]) for k in range(1, n_bins)]
    else:
        edges = [k / n_bins for k in range(1, n_bins)]
    total = 0.0
    for low, high in zip([-math.inf, *edges], [*edges, math.inf], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += float(inside.sum() * (confidence[inside].mean() - correct[inside].double().mean()).abs()) / rows
    assert ece(probs, labels, n_bins, adaptive) == pytest.approx(total, abs=1e-9)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert ece(probs[order], labels[order], n_bins, adaptive) == pytest.approx(total, abs=1e-9)


def test_bins_of_equal_size():
    probs, labels = drawn(1, 1003)
    rows, confidence, _ = reliability(probs.max(1).values, probs.argmax(1) == labels, 10, adaptive=True)
    assert set(rows.tolist()) <= {100.0, 101.0} and (confidence.diff() > 0).all()


def test_certainty_belongs_to_the_last_bin():
    rows, confidence, share = reliability(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 15)
    assert rows[-1] == 2 and confidence[-1] == 1 and share[-1] == 0.5 and share[:-1].isnan().all()


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_the_area_under_the_curve_is_a_share_of_pairs(rows):
    score = torch.tensor([float(value) for value, _ in rows])
    positive = torch.tensor([kind for _, kind in rows])
    pairs = [(a > b) + (a == b) / 2 for a in score[positive].tolist() for b in score[~positive].tolist()]
    found = auroc(score, positive)
    assert math.isnan(found) if not pairs else found == pytest.approx(sum(pairs) / len(pairs))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=25), st.integers(0, 100))
def test_risk_does_not_depend_on_the_order_of_ties(rows, seed):
    uncertainty, wrong = (torch.tensor(column) for column in zip(*rows, strict=True))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    risk = risk_coverage(uncertainty, wrong)
    torch.testing.assert_close(risk_coverage(uncertainty[order], wrong[order]), risk)
    assert risk[-1] == pytest.approx(float(wrong.double().mean()))


def test_errors_that_are_known_beforehand_come_last():
    wrong = torch.tensor([False, True, False, True])
    assert risk_coverage(wrong.double(), wrong).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_applied_is_found(temperature):
    probs, labels = drawn(2, 20000)
    found = fit_temperature((probs.log() * temperature).float(), labels)
    assert found == pytest.approx(temperature, rel=0.05)
    best = nll((probs.log() * temperature / found).softmax(1), labels)
    for near in (0.98 * found, 1.02 * found):
        assert best < nll((probs.log() * temperature / near).softmax(1), labels)


def test_the_temperature_has_bounds():
    logits = torch.eye(3) * 5
    assert fit_temperature(logits, torch.arange(3)) == pytest.approx(0.01)
    assert fit_temperature(-logits, torch.arange(3)) == pytest.approx(100)


def test_a_report(tmp_path):
    probs, labels = drawn(3)
    report = evaluate_calibration(probs.bfloat16(), labels)
    assert report.metrics["nll"] == pytest.approx(nll(probs, labels), rel=0.01)
    intervals = report.intervals(resamples=100)
    assert intervals == report.intervals(resamples=100)
    for name in ("accuracy", "nll", "brier", "auroc", "aurc"):
        low, high = intervals[name]
        assert low < report.metrics[name] < high
    report.to_json(tmp_path / "report.json")
    again = CalibrationReport.from_json(tmp_path / "report.json")
    assert again.metrics == report.metrics and again.table() == report.table()
    assert "| accuracy, % | " in report.table()
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_abstaining_goes_by_the_uncertainty_that_is_given():
    probs, labels = drawn(4)
    told = evaluate_calibration(probs, labels, (probs.argmax(1) != labels).double())
    assert told.metrics["auroc"] == 1 and told.metrics["aurc"] < evaluate_calibration(probs, labels).metrics["aurc"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, y: (p[:0], y[:0]), "at least one label"),
        (lambda p, y: (p, y[1:]), "labels of shape (399,) for 400 rows"),
        (lambda p, y: (p, y + 1), "and there are 5 classes from 0"),
        (lambda p, y: (p * float("nan"), y), "row 0 holds a number that is not finite"),
        (lambda p, y: (2 * p, y), "row 0 adds up to 2"),
        (lambda p, y: (p, y, y[1:].double()), "uncertainty of shape (399,)"),
        (lambda p, y: (p, y, None, 0), "n_bins=0"),
    ],
)
def test_bad_input_is_named(change, says):
    probs, labels = drawn(5)
    labels[0] = 4
    with pytest.raises(ValueError) as error:
        evaluate_calibration(*change(probs, labels))
    assert says in str(error.value)
