"""What an adapter has been taught, edit by edit, and how one edit is taken back.

An edit has basis vectors of its own, or shares those of the adapter with others. What has its own can be taken back alone: the update of a block is a sum over
basis vectors, each of which reads the hidden state as the block puts it out, so that closing some leaves those of the other edits as they are. Blocks
after the first edited one see what the earlier ones put out, and follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_ext.tuners.baft.calls import Recorded
from hf_ext.tuners.baft.config import BaftConfig
from hf_ext.tuners.baft.layer import CLOSED, FREE, KEPT, BaftLayer


@dataclass
class Edit:
    """One entry of the ledger, which the configuration of an adapter holds (`BaftConfig.edits`).

    Attributes:
        name: unique.
        facts: rows of training data that taught it.
        bases: (first, one past the last) of the basis vectors that are its own; None if it shares them.
        weights: for each edited block, the mean weights of the basis vectors at the edited tokens of its rows; none while it is being taught, as in
            checkpoints.
        steps, loss: optimizer steps, and the training loss of the last one.
        closed: taken back.
    """

    name: str
    facts: int
    bases: tuple[int, int] | None
    weights: dict[str, list[float]]
    steps: int
    loss: float | None
    closed: bool = False


def layers_of(model: nn.Module, adapter_name: str | None = None) -> list[BaftLayer]:
    """The layers that BaFT attached to a model, first to last; those of one adapter, if one is named."""
    layers = [module for module in model.modules() if isinstance(module, BaftLayer)]
    return [layer for layer in layers if adapter_name is None or adapter_name in layer.baft_R]


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[Recorded]]:
    """The weights of the basis vectors in every pass inside, with their graphs.

    Raises:
        ValueError: the model has no BaFT adapter.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no BaFT adapter, whose weights could be recorded; add one with BaftConfig."
        )
    with layers[0].calls.recording() as found:
        yield found


def edits(model: Any, adapter_name: str = "default") -> list[Edit]:
    """The ledger of an adapter, first edit first.

    Raises:
        ValueError: there is no such BaFT adapter.
    """
    entries = [Edit(**entry) for entry in _config(model, adapter_name).edits]
    for entry in entries:  # JSON has lists alone
        entry.bases = None if entry.bases is None else (entry.bases[0], entry.bases[1])
    return entries


def rollback(model: Any, name: str, adapter_name: str = "default") -> None:
    """Take one edit back: the weights of its basis vectors are 0 from now on. `restore` undoes it.

    Raises:
        ValueError: there is no such edit, or it has no basis vectors of its own.
    """
    _set_closed(model, name, adapter_name, True)


def restore(model: Any, name: str, adapter_name: str = "default") -> None:
    """Undo `rollback`: the basis vectors of the edit have their learnt weights again.

    Raises:
        ValueError: there is no such edit, or it has no basis vectors of its own.
    """
    _set_closed(model, name, adapter_name, False)


def begin(model: Any, edit: Edit, adapter_name: str) -> None:
    """Write an edit that is about to be taught into the ledger."""
    _config(model, adapter_name).edits.append(asdict(edit))


def finish(model: Any, edit: Edit, adapter_name: str) -> None:
    """Complete the last entry of the ledger: its basis vectors are fixed from now on, and the use of shared ones is counted."""
    for layer in layers_of(model, adapter_name):
        usage = layer.baft_usage[adapter_name]
        usage += torch.tensor(edit.weights[layer.name]).to(usage)
        if edit.bases is not None:
            layer.baft_state[adapter_name][slice(*edit.bases)] = KEPT
    _config(model, adapter_name).edits[-1] = asdict(edit)


def has_room(model: Any, adapter_name: str) -> bool:
    """Whether some basis vector is still trained."""
    return any(bool((layer.baft_state[adapter_name] == FREE).any()) for layer in layers_of(model, adapter_name))


def _set_closed(model: Any, name: str, adapter_name: str, closed: bool) -> None:
    for entry in _config(model, adapter_name).edits:
        if entry["name"] == name:
            break
    else:
        known = [entry["name"] for entry in _config(model, adapter_name).edits]
        raise ValueError(f"name={name!r}: the ledger of {adapter_name!r} has no such edit; it has {known}.")
    if entry["bases"] is None:
        raise ValueError(
            f"name={name!r}: this edit shares its basis vectors with others, which would go with it. Teach it with vectors of its own "
            "(own_bases=True of BaftTrainerConfig) to be able to take it back."
        )
    for layer in layers_of(model, adapter_name):
        layer.baft_state[adapter_name][slice(*entry["bases"])] = CLOSED if closed else KEPT
    entry["closed"] = closed


def _config(model: Any, adapter_name: str) -> BaftConfig:
    config = model.peft_config.get(adapter_name) if layers_of(model) else None
    if not isinstance(config, BaftConfig):
        raise ValueError(f"adapter_name={adapter_name!r}: {type(model).__name__} has no BaFT adapter of this name.")
    return config
