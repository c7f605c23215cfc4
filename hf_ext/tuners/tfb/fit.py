"""How large the noise may be: `bayesianize`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hf_ext.tuners.tfb.config import check_kind, store
from hf_ext.tuners.tfb.layers import adapter_of, noisy_layers
from hf_ext.tuners.tfb.posterior import Posterior, posterior
from hf_ext.tuners.tfb.predict import Predictive, scores
from hf_ext.tuners.tfb.reference import Search, largest_accepted, reference_search

Criterion = Callable[[Predictive, Predictive, Tensor], float]
_RTOL = 1e-5


def nll(prediction: Predictive, labels: Tensor) -> float:
    """Mean negative log-probability of the labels, in nats."""
    return float(-prediction.log_mean_probs.double().gather(-1, labels[..., None]).mean())


def flips(alone: Predictive, drawn: Predictive, labels: Tensor) -> float:
    """Share of rows whose most likely class is another than without noise."""
    changed = drawn.log_mean_probs.argmax(-1) != alone.log_mean_probs.argmax(-1)
    return float(changed.double().mean())


def nll_absolute(alone: Predictive, drawn: Predictive, labels: Tensor) -> float:
    """By how many nats per row the NLL differs from that without noise."""
    return abs(nll(drawn, labels) - nll(alone, labels))


def nll_relative(alone: Predictive, drawn: Predictive, labels: Tensor) -> float:
    """By what share of itself the NLL differs from that without noise."""
    return nll_absolute(alone, drawn, labels) / nll(alone, labels)


CRITERIA: dict[str, Criterion] = {"flips": flips, "nll_absolute": nll_absolute, "nll_relative": nll_relative}
_TOLERANCES = {"flips": 0.01, "nll_relative": 0.003}


@dataclass(frozen=True)
class TFBResult:
    """What `bayesianize` found: the size of the noise, every trial of the search, and what the adapter predicts without noise.

    Attributes:
        sigma_q: the size of the noise.
        search: what was tried.
        criterion, tolerance: what was asked for.
        alone: predictions without noise for the anchor.
        layers: names of the layers that get noise.
    """

    sigma_q: float
    search: Search
    criterion: str
    tolerance: float
    alone: Predictive
    layers: tuple[str, ...]

    def table(self) -> str:
        """Markdown: what was tried, by size."""
        lines = ["| sigma | change | accepted |", "| --- | --- | --- |"]
        for trial in sorted(self.search.trials, key=lambda trial: trial.sigma):
            lines.append(f"| {trial.sigma:.4g} | {trial.change:.4g} | {'yes' if trial.accepted else 'no'} |")
        return "\n".join(
            [*lines, "", f"{self.criterion}, tolerance {self.tolerance:g}; sigma_q = {self.sigma_q:.4g}."]
        )

    def plot(self, path: str | Path) -> None:
        """Draw the change over the size of the noise; needs matplotlib."""
        from matplotlib.figure import Figure

        trials = sorted(self.search.trials, key=lambda trial: trial.sigma)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([trial.sigma for trial in trials], [trial.change for trial in trials], marker="o")
        axes.axhline(self.tolerance, color="grey", linewidth=1)
        axes.axvline(self.sigma_q, color="grey", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="size of the noise", ylabel=self.criterion)
        figure.savefig(path)


def bayesianize(
    model: PeftModel,
    anchor: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    labels: Tensor | None = None,
    classes: Sequence[int] | None = None,
    criterion: str | Criterion = "flips",
    tolerance: float | None = None,
    n_samples: int = 10,
    sigma_bracket: tuple[float, float] = (1e-4, 1.0),
    max_iters: int = 16,
    targets: str = "all",
    adapter_name: str | None = None,
    seed: int = 0,
    rtol: float = _RTOL,
    anchor_id: str | None = None,
    reference_compat: bool = False,
) -> TFBResult:
    """Turn a finished LoRA adapter into a distribution (https://huggingface.co/papers/2412.05723): find the largest noise that hardly changes the
    predictions for an anchor, and store its size with the adapter, whose tensors stay as they are.

    The samples are the same for every size. `predict`, `posterior`, `sample_weights` and `save_pretrained` take it from there.

    Args:
        model: a PEFT model in eval mode with an adapter of LoRA or RoseLoRA, on any base.
        anchor: batches that the model is called with, some hundred rows in all; a list or a `DataLoader`.
        labels: `(rows,)`, for criteria that use them; default: "labels" of the batches, else the classes that the model predicts without noise.
        classes: ids of the tokens among which a language model chooses; default: the whole vocabulary. Labels count among them, from 0.
        criterion: "flips", the share of predictions that change, which needs no labels; "nll_absolute" and "nll_relative", the change of the
            NLL in nats per row, or as a share; or a function of (`Predictive` without noise, with noise, labels).
        tolerance: largest change that is accepted. Default: 0.01 for "flips", 0.003 for "nll_relative"; the others need one.
        n_samples: draws in each evaluation.
        sigma_bracket: smallest and largest size that is tried.
        max_iters: evaluations of the anchor at most.
        targets: layers that get noise: "all", "last", or a regular expression for their names.
        adapter_name: default: the active one.
        seed: of the draws.
        rtol: directions of B whose singular value is at most this share of the largest get no noise.
        anchor_id: what the anchor is called, for the record, such as the id of a dataset.
        reference_compat: search as the authors' code does: bisection in the bracket with `max_iters` steps, keeping the smallest size that was rejected.

    Returns:
        The size and how it was found. A warning says if no size was accepted, which stores nothing, or none was rejected.

    Raises:
        ValueError: an argument is out of its range, the anchor is empty, labels do not match, or the adapter cannot have noise.
    """
    adapter_name = adapter_of(model, adapter_name)
    check_kind(model, adapter_name)
    name, change_of, tolerance = _judge(criterion, tolerance)
    low, high = sigma_bracket
    if not 0 < low < high:
        raise ValueError(
            f"sigma_bracket={sigma_bracket!r}: give a smallest size above 0 and a largest one above that."
        )
    if max_iters < 1:
        raise ValueError(f"max_iters={max_iters}: give at least one evaluation.")
    batches = list(anchor)
    layers = noisy_layers(model, adapter_name, targets)
    with posterior(model, 1, adapter_name=adapter_name, sigma=0.0):
        alone = _predicted(model, batches, classes)
    known = _labels(batches, labels, alone)

    with posterior(
        model, n_samples, seed=seed, adapter_name=adapter_name, sigma=low, targets=targets, rtol=rtol
    ) as opened:

        def change(sigma: float) -> float:
            opened.resize(sigma)
            return change_of(alone, _predicted(model, batches, classes, opened), known)

        if reference_compat:
            search = reference_search(change, tolerance, (low, high), max_iters, 5e-4 if name == "flips" else 0.0)
        else:
            search = largest_accepted(change, tolerance, (low, high), max_iters)
    _warn(search, name, tolerance, (low, high))
    if search.sigma:
        posterior_of = {
            "method": "tfb",
            "version": 1,
            "sigma_q": search.sigma,
            "targets": targets,
            "rtol": rtol,
            "n_samples": n_samples,
            "criterion": name,
            "tolerance": tolerance,
            "seed": seed,
            "anchor": {"id": anchor_id, "size": len(known), "sha256": _digest(batches)},
            "trace": [asdict(trial) for trial in search.trials],
            "fitted_with": {package: version(package) for package in ("hf-ext", "peft", "torch")},
        }
        store(model, adapter_name, posterior_of)
    return TFBResult(search.sigma, search, name, tolerance, alone, tuple(layers))


def _judge(criterion: str | Criterion, tolerance: float | None) -> tuple[str, Criterion, float]:
    """The name of a criterion, its function, and the change that is accepted.

    Raises:
        ValueError: there is no such criterion, or no tolerance for it.
    """
    name, change_of = (criterion, CRITERIA.get(criterion)) if isinstance(criterion, str) else ("own", criterion)
    if change_of is None:
        raise ValueError(f"criterion={name!r}: choose one of {', '.join(map(repr, CRITERIA))}, or give a function.")
    tolerance = _TOLERANCES.get(name) if tolerance is None else tolerance
    if tolerance is None or not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r}: give the largest change of {name!r} that is accepted, above 0.")
    return name, change_of, tolerance


def _predicted(
    model: PeftModel, batches: list[Any], classes: Sequence[int] | None, opened: Posterior | None = None
) -> Predictive:
    """
    Raises:
        ValueError: there are no batches.
    """
    if not batches:
        raise ValueError("anchor: it has no batches; give some hundred rows like those that the model will see.")
    count = opened.n_samples if opened else 1
    expanded = (opened.expand(batch) if opened else batch for batch in batches)
    return Predictive.join([Predictive(scores(model, batch, classes, count)) for batch in expanded])


def _labels(batches: list[Any], labels: Tensor | None, alone: Predictive) -> Tensor:
    """
    Raises:
        ValueError: labels that do not match the predictions.
    """
    predicted = alone.log_mean_probs.argmax(-1)
    if labels is None:
        inside = [batch["labels"] for batch in batches if isinstance(batch, Mapping) and "labels" in batch]
        if len(inside) < len(batches) or inside[0].ndim != predicted.ndim:
            return predicted
        labels = torch.cat(inside)
    labels = labels.cpu()
    if labels.shape != predicted.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for an anchor of {tuple(predicted.shape)}: give one for each row."
        )
    count = alone.logits.shape[-1]
    if (outside := (labels < 0) | (labels >= count)).any():
        row = int(outside.flatten().nonzero()[0])
        raise ValueError(f"labels: row {row} has {int(labels.flatten()[row])}, and there are {count} classes from 0.")
    return labels


def _digest(batches: list[Any]) -> str:
    """Of the tensors of an anchor."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]:
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _warn(search: Search, criterion: str, tolerance: float, bracket: tuple[float, float]) -> None:
    if not search.sigma:
        warnings.warn(
            f"sigma_q: even noise of {bracket[0]:g} changes {criterion!r} by {search.trials[0].change:.3g}, above {tolerance:g}, and nothing is stored. "
            "Lower sigma_bracket, or raise tolerance.",
            stacklevel=3,
        )
    elif not search.bounded:
        warnings.warn(
            f"sigma_q: noise of {search.sigma:g}, the largest that was tried, still changes {criterion!r} by less than {tolerance:g}. Raise sigma_bracket "
            "or max_iters.",
            stacklevel=3,
        )
