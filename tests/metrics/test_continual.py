"""Metrics of the task matrix: recorded runs, the laws between the metrics, other conventions, and what is undefined."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.metrics.continual import ContinualReport, TaskMatrix
from tests.oracles import ORACLES

PUBLISHED = json.loads((ORACLES / "continual_eval/published_matrices.json").read_text())["runs"]
SYNTHETIC = json.loads((ORACLES / "continual_eval/synthetic_matrices.json").read_text())["full_matrices"]
NAMES = {"forward_transfer_zero_shot": "forward_transfer", "forward_transfer_vs_single": "forward_transfer_alone"}


def matrix(*scores, **options):
    return TaskMatrix(tuple(f"task {j}" for j in range(len(scores[0]))), scores, **options)


@st.composite
def matrices(draw):
    size = draw(st.integers(1, 6))
    row = st.lists(st.floats(0, 100), min_size=size, max_size=size)
    return matrix(*draw(st.lists(row, min_size=size, max_size=size)), before=draw(row), alone=draw(row))


@pytest.mark.parametrize("name", PUBLISHED)
def test_metrics_of_published_runs(name):
    run = PUBLISHED[name]
    metrics = TaskMatrix(run["tasks"], run["matrix"]).metrics()
    for key, value in run["expected"].items():
        assert metrics[key] == (value if value is None else pytest.approx(value, abs=1e-6))
    assert metrics["forward_transfer"] is None and metrics["micro_average"] is None


@pytest.mark.parametrize("case", SYNTHETIC, ids=lambda case: f"{len(case['tasks'])} tasks")
def test_metrics_of_full_matrices(case):
    found = TaskMatrix(case["tasks"], case["matrix"], case["random_init_baseline"], case["single_task"]).metrics()
    for key, value in case["expected"].items():
        assert found[NAMES.get(key, key)] == pytest.approx(value, abs=1e-6)


@given(matrices())
def test_laws(found):
    metrics, tasks = found.metrics(), found.learnt
    if tasks == 1:
        assert [metrics[name] for name in ("backward_transfer", "forgetting", "forward_transfer")] == [None] * 3
        return
    change = (tasks - 1) / tasks * metrics["backward_transfer"]
    assert metrics["average_accuracy"] == pytest.approx(metrics["learning_accuracy"] + change, abs=1e-9)
    assert metrics["forgetting"] >= -metrics["backward_transfer"] - 1e-9
    assert found.backward_transfer("sapt") == pytest.approx(change, abs=1e-9)
    assert found.backward_transfer("treelora") <= change + 1e-9
    assert found.forgetting("sapt") >= found.forgetting() - 1e-9


def test_a_frozen_model_neither_forgets_nor_learns():
    row = (30.0, 50.0, 70.0)
    metrics = matrix(row, row, row, before=row, alone=row).metrics()
    assert all(metrics[name] == 0 for name in ("backward_transfer", "forgetting", "forward_transfer"))


def test_what_was_not_measured_is_not_invented():
    lower = matrix((90.0, None, None), (80.0, 70.0, None), (60.0, 75.0, 50.0), before=(5.0, 5.0, 5.0))
    metrics = lower.metrics()
    assert metrics["average_accuracy"] == pytest.approx(185 / 3)
    assert metrics["backward_transfer"] == pytest.approx(-12.5) and metrics["forgetting"] == pytest.approx(12.5)
    assert metrics["forward_transfer"] is None
    assert lower.forgetting("sapt") == pytest.approx((30 - 5) / 2)
    assert matrix((90.0, 1.0), (None, 70.0)).backward_transfer() is None
    assert matrix((90.0, 1.0), (None, 70.0)).average_accuracy() is None


def test_other_conventions():
    found = matrix((90.0, 0.0, 0.0), (80.0, 70.0, 0.0), (60.0, 75.0, 50.0))
    assert found.backward_transfer("sapt") == pytest.approx(-25 / 3)
    assert found.backward_transfer("treelora") == pytest.approx(-10.0)
    early = matrix((90.0, 99.0, 0.0), (80.0, 70.0, 0.0), (60.0, 75.0, 50.0))
    assert (early.forgetting(), early.forgetting("sapt")) == (pytest.approx(12.5), pytest.approx(27.0))
    with pytest.raises(ValueError, match=r"convention='gem' is unknown.*standard, sapt, treelora"):
        found.backward_transfer("gem")


def test_the_micro_average_counts_examples():
    assert matrix((90.0, 0.0), (80.0, 50.0), sizes=(30, 10)).micro_average() == pytest.approx(72.5)


def test_a_sequence_that_is_not_finished():
    """Metrics are those of the tasks learnt so far."""
    found = TaskMatrix(("a", "b", "c"), ((90.0, 10.0, 20.0), (85.0, 60.0, 30.0)))
    assert found.average_accuracy() == pytest.approx(72.5) and found.backward_transfer() == pytest.approx(-5.0)


def test_files_tables_and_plots(tmp_path):
    found = matrix((90.0, None), (80.25, 70.0), before=(10.0, 20.0), sizes=(5, 6))
    found.to_json(tmp_path / "matrix.json")
    assert TaskMatrix.from_json(tmp_path / "matrix.json") == found
    lines = found.table(digits=2).splitlines()
    assert lines[0] == "| after | task 0 | task 1 |" and lines[2] == "| before | 10.00 | 20.00 |"
    assert lines[3:] == ["| task 0 | 90.00 |  |", "| task 1 | 80.25 | 70.00 |"]
    found.plot(tmp_path / "matrix.png", title="two tasks")
    assert (tmp_path / "matrix.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("tasks", "scores", "options", "named"),
    [
        ((), (), {}, "tasks is empty"),
        (("a", "a"), ((1.0, 2.0),), {}, r"\['a'\] occur twice"),
        (("a", "b"), (), {}, "0 rows for 2 tasks"),
        (("a",), ((1.0,), (2.0,)), {}, "2 rows for 1 tasks"),
        (("a", "b"), ((1.0,),), {}, r"scores\[0\] has 1 entries for 2 tasks"),
        (("a",), ((float("nan"),),), {}, r"scores\[0\]: nan is no score"),
        (("a",), ((1.0,),), {"before": (1.0, 2.0)}, "before has 2 entries"),
    ],
)
def test_bad_input(tasks, scores, options, named):
    with pytest.raises(ValueError, match=named):
        TaskMatrix(tasks, scores, **options)


def test_the_report_names_what_is_defined():
    report = ContinualReport(matrix([60.0, None], [40.0, 80.0]), ("More.",))
    assert report.metrics["score on task 0"] == 40 and report.metrics["backward transfer"] == -20
    assert "forward transfer" not in report.metrics
    assert report.datasets == {"score on task 0": "task 0", "score on task 1": "task 1"}
    table = report.table()
    assert "| task 1 | 40.0 | 80.0 |" in table and "| average accuracy | 60.0 |" in table and table.endswith("More.")
    first = ContinualReport(TaskMatrix(("a", "b"), ((60.0, None),)))
    assert set(first.metrics) == {"score on a", "average accuracy", "learning accuracy", "average anytime accuracy"}
