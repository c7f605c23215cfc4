"""A LoRA adapter as a distribution: while `posterior` is open, every row of a batch is computed by a drawn adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from hf_ext.tuners.tfb.config import fitted, without_posterior
from hf_ext.tuners.tfb.layers import Draws, adapter_of, layer_seed, noisy_layers
from hf_ext.tuners.tfb.reference import flipout

SAMPLERS = ("coherent", "flipout", "local")


@dataclass
class Posterior:
    """The samples of an adapter that the model computes with while `posterior` is open.

    Attributes:
        n_samples: K. A batch holds all rows for the first sample, then all for the second, and so on.
        sampler: how noise is drawn.
        sigma: its size.
        noises: those of the layers.
        rows: of the batch that the model is computing, if it is.
    """

    n_samples: int
    sampler: str
    sigma: float
    noises: list[_Noise] = field(default_factory=list)
    rows: int | None = None

    def resize(self, sigma: float) -> None:
        """Go on with the same draws at another size."""
        self.sigma = sigma
        for noise in self.noises:
            noise.resize(sigma)

    def expand(self, value: Any) -> Any:
        """A batch, or a tensor of one, K times over, as the model expects it while this is open; what is no tensor stays as it is."""
        if isinstance(value, Mapping):
            return {key: self.expand(part) for key, part in value.items()}
        if isinstance(value, Tensor) and value.ndim:
            return value.repeat(self.n_samples, *([1] * (value.ndim - 1)))
        return value


class _Noise(LoraVariant):
    """What a layer computes while a posterior is open."""

    def __init__(self, posterior: Posterior, draws: Draws, seed: int, first_sample: int) -> None:
        self.posterior, self.draws = posterior, draws
        if posterior.sampler == "coherent":
            self.directions_KRM = draws.directions(seed, range(first_sample, first_sample + posterior.n_samples))
        else:
            self.generator = torch.Generator(draws.a_RM.device).manual_seed(layer_seed(draws.name, seed))
        self.resize(posterior.sigma)

    def resize(self, sigma: float) -> None:
        if self.posterior.sampler == "coherent":
            self.factors_KRM = self.draws.factors(sigma, self.directions_KRM)

    def forward(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            inner = self._coherent(x) if self.posterior.sampler == "coherent" else self._by_token(x)
        up = module.lora_B[active_adapter]
        return result + up(inner.to(self.draws.b_NR.dtype)) * module.scaling[active_adapter]

    def _coherent(self, x: Tensor) -> Tensor:
        samples, rows = self.posterior.n_samples, self.posterior.rows
        if len(x) % samples or (rows is not None and samples > 1 and len(x) % rows):
            raise ValueError(
                f"{self.draws.name!r}: it gets {len(x)} rows while the model computes {rows or 'others'}, so that they cannot be told apart by sample: "
                "leave the layer out with targets, or use n_samples=1."
            )
        inner = x.reshape(samples, -1, x.shape[-1]).to(self.factors_KRM.dtype) @ self.factors_KRM.mT
        return inner.reshape(*x.shape[:-1], -1)

    def _by_token(self, x: Tensor) -> Tensor:
        x, map_RR = x.float(), self.draws.map_RR
        shape = (*x.shape[:-1], len(map_RR))
        if self.posterior.sampler == "local":
            z_TR = torch.randn(shape, generator=self.generator, device=x.device) * x.norm(dim=-1, keepdim=True)
        else:
            normals_RM = torch.randn(len(map_RR), x.shape[-1], generator=self.generator, device=x.device)
            signs_TM, signs_TR = (
                torch.randint(2, size, generator=self.generator, device=x.device) * 2.0 - 1
                for size in (x.shape, shape)
            )
            z_TR = flipout(x, normals_RM, signs_TM, signs_TR)
        return x @ self.draws.a_RM.float().mT + self.posterior.sigma * z_TR @ map_RR.mT

    @staticmethod
    def _no_merge(*args: Any) -> Tensor:
        raise ValueError(
            "a posterior is open: leave it before merging, or merge one draw of it made by sample_weights."
        )

    merge_safe = merge_unsafe = unmerge = _no_merge  # type: ignore[assignment]


@contextmanager
def posterior(
    model: PeftModel,
    n_samples: int = 10,
    *,
    seed: int = 0,
    sampler: str = "coherent",
    adapter_name: str | None = None,
    sigma: float | None = None,
    targets: str | None = None,
    rtol: float | None = None,
    first_sample: int = 0,
) -> Iterator[Posterior]:
    """While this is open, the model computes with adapters drawn from the posterior (https://huggingface.co/papers/2412.05723).

    A batch has to hold its rows `n_samples` times, all rows for the first sample before those for the second: `Posterior.expand` makes one.
    `predict` does both. Outside, and with a size of 0, nothing is touched.

    Args:
        model: a PEFT model in eval mode, whose adapter is LoRA, or of a type that is built on its layers.
        n_samples: K.
        seed: of the draws; sample k of a seed is the same whatever K is, and on every device.
        sampler: "coherent", one adapter per sample for all tokens and calls, also with a cache; "flipout", other signs for each token, as in the
            authors' code; "local", noise on the inner activations of each token, exact for one token alone. The last two change
            the noise with every call.
        adapter_name: default: the active one.
        sigma, targets, rtol: size of the noise, layers that get it, and see [`bayesianize`]; default: what that has stored.
        first_sample: number of the first sample, for the sampler "coherent".

    Raises:
        ValueError: nothing is stored and nothing given, the model is training, the adapter is not active, a posterior is open, or a layer
            cannot get noise.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}: choose one of {', '.join(map(repr, SAMPLERS))}.")
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples}: draw at least one.")
    if model.training:
        raise ValueError("the model is in training mode, where dropout would be drawn too: call model.eval() first.")
    adapter_name = adapter_of(model, adapter_name)
    stored = fitted(model, adapter_name, needed=sigma is None)
    if adapter_name not in model.active_adapters:
        raise ValueError(
            f"adapter_name={adapter_name!r}: it is not active; call model.set_adapter({adapter_name!r}) first."
        )
    if any(isinstance(m, LoraLayer) and isinstance(m.lora_variant.get(adapter_name), _Noise) for m in model.modules()):
        raise ValueError("a posterior is open already; leave it before opening another.")
    sigma = stored["sigma_q"] if sigma is None else sigma
    targets = stored.get("targets", "all") if targets is None else targets
    layers = noisy_layers(model, adapter_name, targets)
    rtol = stored.get("rtol", 1e-5) if rtol is None else rtol
    opened = Posterior(n_samples, sampler, sigma)
    with ExitStack() as stack:
        if sigma:
            stack.enter_context(_watched(model, opened))
            for name, layer in layers.items():
                opened.noises.append(_Noise(opened, Draws(name, layer, adapter_name, rtol), seed, first_sample))
                layer.lora_variant[adapter_name] = opened.noises[-1]
                stack.callback(layer.lora_variant.pop, adapter_name, None)
        yield opened


@contextmanager
def _watched(model: PeftModel, opened: Posterior) -> Iterator[None]:
    """Tell the layers how many rows the model computes."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        rows = len(tensors[0]) if tensors else None
        if rows is not None and rows % opened.n_samples:
            raise ValueError(
                f"a batch of {rows} rows for n_samples={opened.n_samples}: it has to hold all rows of each sample one after another. Use predict, or "
                "Posterior.expand; rows that are packed into one cannot be told apart."
            )
        opened.rows = rows

    def after(*args: Any) -> None:
        opened.rows = None

    base = model.get_base_model()
    hooks = [
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def sample_weights(
    model: PeftModel, sample: int, name: str | None = None, *, seed: int = 0, adapter_name: str | None = None
) -> str:
    """Add one draw of the posterior as an ordinary adapter, which can be saved, served and merged.

    Args:
        sample: its number; the same adapter that computes this sample in [`posterior`].
        name: of the new adapter; default: "<adapter>_sample_<number>".

    Returns:
        The name. The active adapter stays active.

    Raises:
        ValueError: nothing is stored for the adapter, or the name is taken.
    """
    adapter_name = adapter_of(model, adapter_name)
    stored = fitted(model, adapter_name, needed=True)
    name = name or f"{adapter_name}_sample_{sample}"
    if name in model.peft_config:
        raise ValueError(f"name={name!r}: the model has an adapter of that name; give another.")
    layers = noisy_layers(model, adapter_name, stored["targets"])
    config = without_posterior(copy.deepcopy(model.peft_config[adapter_name]))
    config.inference_mode = True
    model.add_adapter(name, config)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            layer.lora_A[name].load_state_dict(layer.lora_A[adapter_name].state_dict())
            layer.lora_B[name].load_state_dict(layer.lora_B[adapter_name].state_dict())
            key = layer_name.removeprefix("base_model.model.")
            if key in layers:
                draws = Draws(key, layer, adapter_name, stored["rtol"])
                directions = draws.directions(seed, range(sample, sample + 1))
                cast(Tensor, layer.lora_A[name].weight).copy_(draws.factors(stored["sigma_q"], directions)[0])
    return name
