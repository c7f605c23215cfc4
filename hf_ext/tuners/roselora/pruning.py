"""When RoseLoRA prunes: around every optimizer step, wherever that step comes from.

`torch.optim` calls global hooks before and after each `optimizer.step()`. The first takes |weight * gradient| while both
belong to the same step, the second zeroes what the optimizer moved outside the mask. The hooks find their parameters by
walking the live RoseLoRA layers, never by a reference kept from injection: PEFT replaces Parameter objects when it moves or
casts an adapter.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_ext.tuners.roselora.config import RoseLoraConfig
from hf_ext.tuners.roselora.reference import (
    MASK_RULES,
    density_at,
    keep_count,
    prune_,
    sensitivity,
    update_importance,
)

# Which dimension runs along a line: inside a row of A, inside a column of B.
ALONG_ROW, ALONG_COLUMN = -1, -2
ATTRIBUTE = "_roselora"


class PruningSchedule:
    """The step counter of one adapter, shared by its layers.

    Attributes:
        config: the adapter's configuration.
        step: finished optimizer steps.
        total_step: horizon for fractional limits when the configuration has none; set by the callback.
    """

    def __init__(self, config: RoseLoraConfig) -> None:
        self.config = config
        self.step = 0
        self.total_step: int | None = None
        self._stepped: set[int] | None = None
        self.advanced = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_stepped": None}  # identities mean nothing in a copy

    def advance(self, factors: set[int]) -> None:
        """Count one step for these factors, given by identity; optimizers that share an adapter count as one step."""
        if self._stepped is None or self._stepped & factors:
            self.step += 1
            self._stepped = set()
        self._stepped |= factors
        self.advanced = True

    def restart(self, step: int = 0) -> None:
        """Continue after `step` finished steps."""
        self.step, self._stepped, self.advanced = step, None, False

    @property
    def limits(self) -> tuple[int, int]:
        return self.config.schedule(self.total_step)

    @property
    def density(self) -> float:
        """Fraction of entries that every line keeps after the current step."""
        if self.config.sparsity == 0:
            return 1.0
        return density_at(self.step, *self.limits, 1 - self.config.sparsity)

    @property
    def frozen(self) -> bool:
        return self.config.freeze_mask and self.step >= self.limits[1]

    @property
    def prunes_now(self) -> bool:
        return self.density < 1 and (self.step % self.config.prune_interval == 0 or self.step >= self.limits[1])


@dataclass
class LineState:
    """What is remembered about one factor (A or B) of one adapter in one layer; local shards under FSDP2.

    Attributes:
        importance: averaged sensitivity, float32, the shape of the factor; None before the first gradient.
        mask: entries to keep, bool; set once the masks are frozen.
        last_weight: the factor as the last manual step left it; only with `update_and_allocate` alone.
    """

    importance: Tensor | None = None
    mask: Tensor | None = None
    last_weight: Tensor | None = None


@dataclass
class AdapterState:
    """RoseLoRA's state for one adapter in one layer."""

    schedule: PruningSchedule
    lines: dict[str, LineState] = field(default_factory=lambda: {"A": LineState(), "B": LineState()})


class Factor(NamedTuple):
    """One prunable parameter with its state."""

    parameter: nn.Parameter
    dim: int
    state: LineState
    schedule: PruningSchedule


class LayerPruner:
    """RoseLoRA's state on one LoRA layer. It follows the layer through deepcopy and pickle.

    It is a plain attribute of the layer, so it is no part of any state dict.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.adapters: dict[str, AdapterState] = {}
        self.number = next(_NUMBERS)
        self._layer = weakref.ref(layer)

    def __getstate__(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "layer": self._layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.adapters = state["adapters"]
        self.number = next(_NUMBERS)
        self._layer = weakref.ref(state["layer"])
        _watch(self)

    def factors(self, adapter_name: str) -> dict[str, tuple[Any, int]]:
        """The parameters of A and B, each with the dimension along its lines. Empty if the adapter was deleted."""
        layer = self._layer()
        if layer is None:
            return {}
        if adapter_name in layer.lora_A:
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        elif adapter_name in layer.lora_embedding_A:
            a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            return {}
        return {"A": (a, ALONG_ROW), "B": (b, ALONG_COLUMN)}

    def trainable(self, adapter_name: str | None = None) -> Iterator[Factor]:
        """Factors of the active adapters (of one, if named) that an optimizer may move."""
        layer = self._layer()
        for name in list(self.adapters):
            if layer is None or name not in layer.active_adapters or adapter_name not in (None, name):
                continue
            state = self.adapters[name]
            for key, (parameter, dim) in self.factors(name).items():
                if parameter.requires_grad:
                    yield Factor(parameter, dim, state.lines[key], state.schedule)


# -- which layers are alive, and the hooks that look for them ---------------------------------------------------------

# In order of attachment, which is the same on every rank: choosing along a sharded line is a collective operation.
_LIVE: weakref.WeakValueDictionary[int, LayerPruner] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_HANDLES: list[Any] = []
_IN_STEP: dict[int, list[Factor]] = {}


def _watch(pruner: LayerPruner) -> None:
    _LIVE[pruner.number] = pruner
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_pre_hook(_before_step))
        _HANDLES.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _LIVE:
        return
    stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors = [f for pruner in list(_LIVE.values()) for f in pruner.trainable() if id(f.parameter) in stepping]
    advance(factors)
    for factor in factors:
        if factor.parameter.grad is not None:
            score(factor, factor.parameter, factor.parameter.grad)
    _IN_STEP[id(optimizer)] = factors


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    prune(_IN_STEP.pop(id(optimizer), ()))


# -- one step ---------------------------------------------------------------------------------------------------------


def advance(factors: Iterable[Factor]) -> None:
    """Count one optimizer step for the schedules behind `factors`."""
    moved: dict[PruningSchedule, set[int]] = defaultdict(set)
    for factor in factors:
        moved[factor.schedule].add(id(factor.state))
    for schedule, identities in moved.items():
        schedule.advance(identities)


@torch.no_grad()
def score(factor: Factor, weight: Tensor, grad: Tensor) -> None:
    """Average |weight * grad| into the importance; nothing once the masks are frozen or where nothing is ever pruned."""
    state = factor.state
    if state.mask is not None or factor.schedule.config.sparsity == 0:
        return
    now = sensitivity(_local(weight), _local(grad))
    if state.importance is None:
        state.importance = now.nan_to_num_(0.0, 0.0, 0.0)
    else:
        state.importance = update_importance(state.importance.to(now.device), now, factor.schedule.config.beta)


@torch.no_grad()
def prune(factors: Iterable[Factor]) -> None:
    """Zero what the schedules no longer keep. Factors of equal shape are selected in one call."""
    alike: dict[tuple, list[Factor]] = defaultdict(list)
    for factor in factors:
        if not factor.schedule.prunes_now:
            continue
        if factor.state.mask is not None:
            _apply(factor, factor.state.mask)
        elif factor.state.importance is not None:  # a factor that never had a gradient is left alone
            keep = keep_count(factor.parameter.shape[factor.dim], factor.schedule.density)
            alike[(factor.parameter.shape, factor.dim, factor.parameter.device, keep, factor.schedule)].append(factor)
    for (_, dim, _, _, schedule), group in alike.items():
        masks = _select(group, dim, schedule)
        for factor, mask in zip(group, masks, strict=True):
            _apply(factor, mask)
            if schedule.frozen:
                factor.state.mask, factor.state.importance = mask.clone(), None


def _select(group: list[Factor], dim: int, schedule: PruningSchedule) -> list[Tensor]:
    """Masks for factors of one shape, sharded as the factors are."""
    scores = torch.stack([_lines(whole(cast(Tensor, f.state.importance), f.parameter), dim) for f in group])
    masks = MASK_RULES[schedule.config.mask_rule](scores, schedule.density, dim)
    return [shard(m.view(f.parameter.shape), f.parameter) for m, f in zip(masks, group, strict=True)]


def _lines(importance: Tensor, dim: int) -> Tensor:
    """As a matrix: the kernel of a convolution's A is part of its rows, and its B is 1x1."""
    return importance.flatten(1) if dim == ALONG_ROW else importance.view(importance.shape[:2])


def _apply(factor: Factor, mask: Tensor) -> None:
    prune_(_local(factor.parameter.data), mask, factor.schedule.config.value_clip)


# -- FSDP2 shards parameters as DTensors: scores are local, the choice along a sharded line is not ---------------------


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(local: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def shard(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


# -- attaching --------------------------------------------------------------------------------------------------------


def attach(model: nn.Module, adapter_name: str, config: RoseLoraConfig) -> PruningSchedule:
    """Give every LoRA layer of `model` that holds the adapter a fresh state with one shared schedule."""
    schedule = PruningSchedule(config)
    for layer in lora_layers(model):
        pruner = vars(layer).get(ATTRIBUTE)
        if pruner is None:
            pruner = LayerPruner(layer)
            setattr(layer, ATTRIBUTE, pruner)
        if pruner.factors(adapter_name):
            pruner.adapters[adapter_name] = AdapterState(schedule)
            _watch(pruner)
    return schedule


def detach(model: nn.Module, adapter_name: str) -> None:
    """Forget the adapter; the hooks go with the last one."""
    for pruner in pruners(model):
        pruner.adapters.pop(adapter_name, None)
    for number, pruner in list(_LIVE.items()):
        if not pruner.adapters:
            del _LIVE[number]
    while _HANDLES and not _LIVE:
        _HANDLES.pop().remove()


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def pruners(model: nn.Module) -> Iterator[LayerPruner]:
    return (vars(layer)[ATTRIBUTE] for layer in lora_layers(model) if ATTRIBUTE in vars(layer))


def schedules(model: nn.Module) -> dict[str, PruningSchedule]:
    """The schedule of every RoseLoRA adapter in `model`, by adapter name."""
    return {name: state.schedule for pruner in pruners(model) for name, state in pruner.adapters.items()}


def restart(model: nn.Module) -> None:
    """Begin every schedule of `model` anew, without scores."""
    for pruner in pruners(model):
        for state in pruner.adapters.values():
            state.lines = {key: LineState() for key in state.lines}
            state.schedule.restart()
