"""How sparse a RoseLoRA (or any LoRA) adapter is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from hf_ext.tuners.roselora.reference import product_density_bound, product_nonzeros


@dataclass(frozen=True)
class LayerDensity:
    """Density of one adapted weight.

    Attributes:
        name: module name inside the base model.
        kept_a, kept_b: fractions of non-zero entries in A and in B.
        nonzeros: entries of the weight that the update B @ A changes.
        entries: entries of the weight.
        bound: guaranteed upper bound on nonzeros / entries (Proposition 1 of the paper).
    """

    name: str
    kept_a: float
    kept_b: float
    nonzeros: int
    entries: int
    bound: float

    @property
    def density(self) -> float:
        return self.nonzeros / self.entries


@dataclass(frozen=True)
class DensityReport:
    """Density of all adapted weights, and of the update as a whole."""

    layers: tuple[LayerDensity, ...]

    @property
    def nonzeros(self) -> int:
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def entries(self) -> int:
        return sum(layer.entries for layer in self.layers)

    @property
    def density(self) -> float:
        """Changed entries over entries of the adapted weights."""
        return self.nonzeros / self.entries

    @property
    def bound(self) -> float:
        """Guaranteed upper bound on `density`."""
        return sum(layer.bound * layer.entries for layer in self.layers) / self.entries

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the totals and one entry per layer."""
        return {
            "nonzeros": self.nonzeros,
            "entries": self.entries,
            "density": self.density,
            "bound": self.bound,
            "layers": [{**asdict(layer), "density": layer.density} for layer in self.layers],
        }

    def __str__(self) -> str:
        rows = [
            f"{layer.name:60s} {layer.kept_a:8.2%} {layer.kept_b:8.2%} {layer.density:8.3%}" for layer in self.layers
        ]
        head = f"{'weight':60s} {'A kept':>8s} {'B kept':>8s} {'changed':>8s}"
        total = (
            f"{self.nonzeros:,} of {self.entries:,} entries change ({self.density:.3%}; guaranteed {self.bound:.3%})"
        )
        return "\n".join([head, *rows, total])


def density_report(model: nn.Module, adapter_name: str | None = None) -> DensityReport:
    """Measure an adapter, in a `PeftModel` or injected into a plain model.

    Args:
        adapter_name: which adapter; the first active one if None.

    Raises:
        ValueError: no LoRA layer of the model holds the adapter.
    """
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        adapter = adapter_name or next(iter(module.active_adapters), None)
        factors = lora_factors(module, adapter)
        if factors is not None:
            layers.append(_measure(name, *factors))
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: no LoRA layer of this model holds it.")
    return DensityReport(tuple(layers))


def lora_factors(layer: Any, adapter_name: str | None) -> tuple[Tensor, Tensor] | None:
    """A [E, r, I] and B [E, O, r] of a LoRA layer, E the number of expert weights (1 elsewhere); None if absent."""
    if adapter_name in layer.lora_A:
        a, b = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
    elif adapter_name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter_name].detach(), layer.lora_embedding_B[adapter_name].detach()
    else:
        return None
    a, b = a.flatten(1), b.view(b.shape[:2])
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        experts = layer.num_experts
        # PEFT lays A out as (expert, rank) and B as (rank, expert).
        return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    return a[None], b[None]


def _measure(name: str, a_ERI: Tensor, b_EOR: Tensor) -> LayerDensity:
    pairs = list(zip(a_ERI, b_EOR, strict=True))
    return LayerDensity(
        name=name.removeprefix("base_model.model."),
        kept_a=float((a_ERI != 0).double().mean()),
        kept_b=float((b_EOR != 0).double().mean()),
        nonzeros=sum(product_nonzeros(a, b) for a, b in pairs),
        entries=len(pairs) * a_ERI.shape[2] * b_EOR.shape[1],
        bound=sum(product_density_bound(a, b) for a, b in pairs) / len(pairs),
    )
