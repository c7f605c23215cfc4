"""Two processes, each with its own rows, train the adapter that one process trains on all of them."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.trainers.distributed import run_two_processes
from tests.tuners.adapted import adapted, trainable
from tests.tuners.contract import TUNERS
from tests.tuners.families import FAMILIES


def rows_of(family: str) -> dict[str, torch.Tensor]:
    """Four of them, inputs and labels."""
    return {name: torch.cat([value, value[:1].flip(-1)]) for name, value in FAMILIES[family].inputs.items()}


def train(
    model: nn.Module, rows: dict[str, torch.Tensor], prepare=lambda model, optimizer: (model, optimizer)
) -> nn.Module:
    own = trainable(model).values()
    wrapped, optimizer = prepare(model.train(), torch.optim.SGD(own, lr=0.1))
    for _ in range(3):
        wrapped(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def same_in_both(model: nn.Module, accelerator: Accelerator) -> dict[str, list]:
    found = {name: p.detach() for name, p in trainable(model).items()}
    for name, both in accelerator.gather({name: p[None] for name, p in found.items()}).items():
        assert torch.equal(both[0], both[1]), name
    return {name: p.tolist() for name, p in found.items()}


def data_parallel(folder, run) -> dict[str, list]:
    accelerator = Accelerator(cpu=True)
    tuner = next(tuner for tuner in TUNERS if tuner.name == run["tuner"])
    family = tuner.families[0]
    rows = {name: value.chunk(2)[accelerator.process_index] for name, value in rows_of(family).items()}
    model = adapted(tuner, family)
    same_in_both(model, accelerator)
    return same_in_both(train(model, rows, accelerator.prepare), accelerator)


@pytest.mark.slow
def test_ranks_agree_with_one_process(tmp_path):
    results = run_two_processes(data_parallel, tmp_path, [{"tuner": tuner.name} for tuner in TUNERS])
    for tuner, found in zip(TUNERS, results, strict=True):
        alone = trainable(train(adapted(tuner, tuner.families[0]), rows_of(tuner.families[0])))
        assert set(found) == set(alone)
        for name, value in found.items():
            message = f"{tuner.name}: {name}: {{}}".format
            torch.testing.assert_close(torch.tensor(value), alone[name].detach(), rtol=1e-5, atol=1e-6, msg=message)
