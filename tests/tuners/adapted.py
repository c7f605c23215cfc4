"""What tests of the contract share: the matrix, and adapted models that are trained and looked into."""

import pytest
import torch
from peft import (
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tests.tuners.contract import TUNERS, Tuner, config
from tests.tuners.families import GENERATING, build, loss

MATRIX = [pytest.param(tuner, family, id=f"{tuner.name}-{family}") for tuner in TUNERS for family in tuner.families]
EACH = [pytest.param(tuner, id=tuner.name) for tuner in TUNERS]
LINEAR = [pytest.param(tuner, id=tuner.name) for tuner in TUNERS if tuner.linear]
DECODERS = [p for p in MATRIX if p.values[1] in GENERATING]
CLOSE = dict(rtol=1e-4, atol=1e-5)
# Tensors that are read from a file lie at other addresses, which changes the last bit of products.
SAME = dict(rtol=1e-5, atol=1e-5)


def adapted(tuner: Tuner, family: str, **options):
    return get_peft_model(build(family), config(tuner, family, **options)).eval()


def layers(model) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def trainable(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def own(model) -> dict[str, nn.Parameter]:
    """Without the classifier that PEFT saves with an adapter."""
    return {name: p for name, p in trainable(model).items() if "modules_to_save" not in name}


def train(model, family: str, steps: int = 3, rate: float = 1e-2) -> list[float]:
    model.train()
    optimizer, losses = torch.optim.SGD(trainable(model).values(), lr=rate), []
    for _ in range(steps):
        now = loss(model, family)
        now.backward()
        losses.append(float(now))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses
