"""Statistics, saturation bookkeeping and the learning curves of answer positions."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState

from hf_ext.trainers.overtone import OvertoneCurveCallback, OvertoneSaturationCallback, OvertoneStatistics
from hf_ext.trainers.overtone.loss import TokenLosses
from hf_ext.trainers.overtone.statistics import answer_positions
from tests.trainers.helpers import column
from tests.trainers.overtone.helpers import make_trainer


def losses_of(labelled: torch.Tensor, nll: torch.Tensor, active: torch.Tensor) -> TokenLosses:
    zero = torch.zeros_like(nll)
    return TokenLosses(zero, nll * labelled, nll * labelled / 2, zero, active & labelled, labelled, labelled)


def test_positions_restart_in_every_answer():
    labelled = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    positions = answer_positions(labelled)
    assert positions[labelled].tolist() == [0, 1, 0, 1, 2, 0, 1, 0]


def test_statistics_sum_micro_batches_and_average_over_tokens():
    statistics = OvertoneStatistics(positions=2)
    labelled = torch.tensor([[False, True, True, True]])
    nll = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    statistics.record(losses_of(labelled, nll, torch.tensor([[True, True, False, False]])), labelled)
    single = torch.tensor([[False, True, False, False]])
    statistics.record(losses_of(single, nll, torch.ones_like(single)), single)
    summary = statistics.close_step(0)
    assert (summary.tokens, summary.active, summary.accepted) == (4, 2, 4)
    assert (summary.nll, summary.kl) == (7.0, 3.5)
    assert summary.position_nll == (2.0, 2.0) and summary.position_tokens == (2.0, 1.0)
    assert statistics.close_step(0) is summary
    assert statistics.pop_log() == {
        "overtone/active_fraction": 0.5,
        "overtone/accepted_fraction": 1.0,
        "overtone/kl": 0.875,
        "overtone/nll": 1.75,
    }
    assert statistics.pop_log() == {}


def drive(callback: OvertoneSaturationCallback, epochs: list[list[int]], start: int = 0) -> int:
    """Steps taken until the callback stops a run whose epochs have steps with these numbers of active tokens."""
    state, control = TrainerState(global_step=start), TrainerControl()
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    callback.on_train_begin(None, state, control)
    labelled = torch.ones(1, 3, dtype=torch.bool)
    for epoch in epochs:
        callback.on_epoch_begin(None, state, control)
        for active in epoch:
            parameter.grad = torch.ones(1)
            mask = torch.arange(3)[None] < active
            callback.statistics.record(losses_of(labelled, torch.ones(1, 3), mask), labelled)
            callback.on_pre_optimizer_step(None, state, control, optimizer=optimizer)
            assert (parameter.grad is None) == (callback.skip and active == 0)
            state.global_step += 1
            callback.on_step_end(None, state, control)
            if control.should_training_stop:
                return state.global_step - start
        callback.on_epoch_end(None, state, control)
        if control.should_training_stop:
            break
    return state.global_step - start


@pytest.mark.parametrize(
    "epochs, options, start, expected",
    [
        ([[0, 0, 0], [0, 0, 0]], {}, 0, 3),
        ([[3, 0, 0], [0, 0, 0]], {}, 0, 4),
        ([[3, 0, 1], [0, 0, 1], [0, 0, 0], [0]], {}, 0, 9),
        ([[0, 0, 0], [0]], {"patience": 2}, 0, 2),
        ([[0, 0, 0], [0, 0, 0]], {"stop": False}, 0, 6),
        ([[0, 0, 0], [0, 0, 0]], {"stop": False, "skip": False}, 0, 6),
        # A resumed run: its first, partial epoch of one step must not count as a whole one.
        ([[0], [0, 0, 0], [0, 0, 0]], {}, 5, 4),
    ],
)
def test_saturation_bookkeeping(epochs, options, start, expected):
    assert drive(OvertoneSaturationCallback(OvertoneStatistics(), **options), epochs, start) == expected


def test_curve_of_a_real_run(tmp_path):
    data = Dataset.from_list(
        [{"prompt": "w1 w2 ", "completion": "w3 w4 w5 </s>"}, {"prompt": "w6 ", "completion": "w7 </s>"}]
    )
    trainer = make_trainer(
        tmp_path,
        data=data,
        overrides={"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    )
    curve = OvertoneCurveCallback(trainer.overtone_statistics, positions=8)
    trainer.add_callback(curve)
    trainer.train()
    table = curve.to_dict()
    assert table["steps"] == [0, 1, 2]
    assert table["tokens"] == [[2, 2, 1, 1]] * 3
    for nll, counts, mean in zip(table["nll"], table["tokens"], column(trainer, "overtone/nll"), strict=True):
        total = sum(value * count for value, count in zip(nll, counts, strict=True))
        assert total / sum(counts) == pytest.approx(mean, rel=1e-5)
    curve.save_json(tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == table


def test_curve_leaves_out_positions_beyond_the_limit(tmp_path):
    trainer = make_trainer(tmp_path, overrides={"max_steps": 1})
    curve = OvertoneCurveCallback(trainer.overtone_statistics, positions=1)
    trainer.add_callback(curve)
    trainer.train()
    assert curve.to_dict()["tokens"] == [[4]]
