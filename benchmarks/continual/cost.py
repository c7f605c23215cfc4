"""What a step of adaptive SVD costs next to full fine-tuning and to PEFT's OSF, on Gemma 3 270M.

All three train the linear layers of the transformer blocks, in float32 with fused AdamW and clipping; embeddings and norms are frozen, as OSF
freezes them. A step has sixteen rows, one at a time; the output layer reads the last `LABELS` positions of each, as in the
paper's classification tasks, whose answers are short. Both sides of a ratio run in turn in one process. Memory is all that a side holds between
steps (model, optimizer, bases) plus the peak of a step above it. One row is what no method can go below: forward and backward without the
gradient of any weight, against OSF.

    python -m benchmarks.continual.cost
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import OSFConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import cost
from benchmarks.common import write
from benchmarks.cost import Line, allocated_peak, keep_freed_memory, memory_line, show, time_line
from hf_ext.demo.model import embedded_model
from hf_ext.trainers.adaptive_svd.optimizer import SubspaceAdamW
from hf_ext.trainers.adaptive_svd.subspace import protect, singular_basis
from hf_ext.trainers.adaptive_svd.taps import tap
from hf_ext.trainers.adaptive_svd.targets import find_targets

NAME, SEED, LABELS = "continual_cost", 0, 4
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0, "fused": True}


class Size(NamedTuple):
    """How much is measured: shares that are protected, rows of a step and their tokens, turns, and with `every` other steps, too."""

    retentions: tuple[float, ...]
    rows: int
    tokens: int
    repeats: int
    every: bool


FULL, SMALL = Size((0.5, 0.8), 16, 512, 3, True), Size((0.8,), 4, 128, 3, False)


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).train()


class Step:
    """Forward, backward, clipping and update.

    Args:
        model: what is trained.
        optimizer: of what is trained.
        clip: called before the update.
        extra: tensors that are held beside those of the model and the optimizer.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        clip: Callable[[], Any],
        extra: Iterable[Tensor] = (),
    ) -> None:
        self.model, self.optimizer, self.clip, self.extra = model, optimizer, clip, list(extra)

    def draw(self, batches: int, rows: int, tokens: int) -> None:
        """Micro-batches of so many rows."""
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(3, 200_000, (batches, rows, tokens), generator=generator)

    def __call__(self) -> None:
        for ids in self.ids:
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1 - LABELS : -1]
            logits = self.model.lm_head(hidden).flatten(0, 1)
            (torch.nn.functional.cross_entropy(logits, ids[:, -LABELS:].flatten()) / len(self.ids)).backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_mib(self) -> float:
        """What is held between two steps."""
        state = [value for kept in self.optimizer.state.values() for value in kept.values() if torch.is_tensor(value)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state, *self.extra]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values()) / 2**20

    def weights_mib(self) -> float:
        """The same without embeddings, and with the gradients, which are of the size of a moment."""
        moments = [kept["exp_avg"] for kept in self.optimizer.state.values()]
        embeddings = self.model.get_input_embeddings().weight
        return self.held_mib() + (sum(moment.nbytes for moment in moments) - embeddings.nbytes) / 2**20


def full_step() -> Step:
    model = load()
    weights = [layer.weight for layer in find_targets(model, None).values()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, **OPTIONS)
    return Step(model, optimizer, lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0))


def our_step(retention: float, bases: dict[str, tuple[Tensor, Tensor]]) -> Step:
    model = load()
    layers = find_targets(model, None)
    # The gradients of the weights themselves are never computed.
    model.requires_grad_(False)
    subspaces = {
        layer.weight: protect(layer.weight, bases[name], math.floor(retention * min(layer.weight.shape)))
        for name, layer in layers.items()
    }
    optimizer = SubspaceAdamW(list(subspaces), subspaces, **OPTIONS)
    for layer in layers.values():
        tap(layer, subspaces[layer.weight], partial(optimizer.accumulate, layer.weight))
    kept = [tensor for subspace in subspaces.values() for tensor in (subspace.basis_PP, subspace.values_P)]
    return Step(model, optimizer, lambda: optimizer.clip_grad_norm_(1.0), kept)


def osf_step(retention: float) -> Step:
    model = load()
    names = sorted({name.rpartition(".")[2] for name in find_targets(model, None)})
    adapted = get_peft_model(model, OSFConfig(effective_rank=retention, target_modules=names))
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, **OPTIONS)
    clip = partial(torch.nn.utils.clip_grad_norm_, weights, 1.0)
    return Step(adapted.get_base_model(), optimizer, clip)


def floor_step() -> Step:
    """Gradients of activations alone, which the layers below need whatever is trained."""
    model = load()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return Step(model, torch.optim.SGD([torch.zeros(1)]), lambda: None)


def turns(sides: dict[str, Step], batches: int, rows: int, size: Size) -> dict[str, dict[str, Any]]:
    """Seconds of every turn, and MiB, of steps of so many micro-batches of so many rows."""
    peaks = {}
    for name, step in sides.items():
        # Two micro-batches have the highest memory of any number, and warm up.
        step.draw(2, rows, size.tokens)
        step()
        peaks[name] = allocated_peak(step) + step.held_mib()
        step.draw(batches, rows, size.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(size.repeats):
        # The order alternates, so that no side always runs on the caches that another left behind.
        for name in sorted(sides, reverse=bool(turn % 2)):
            start = time.process_time()
            sides[name]()
            seconds[name].append(time.process_time() - start)
    return {
        name: {"seconds": seconds[name], "peak_mib": peaks[name], "weights_mib": sides[name].weights_mib()}
        for name in sides
    }


def ratio(name: str, ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    ratios = [a / b for a, b in zip(ours["seconds"], peer["seconds"], strict=True)]
    row = {
        "name": name,
        "seconds": {"ours": statistics.median(ours["seconds"]), "peer": statistics.median(peer["seconds"])},
        "time_ratio": statistics.median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
    }
    for kind in ("peak", "weights"):
        row[f"{kind}_mib"] = {"ours": ours[f"{kind}_mib"], "peer": peer[f"{kind}_mib"]}
    row["memory_ratio"], row["weights_ratio"] = (ours[kind] / peer[kind] for kind in ("peak_mib", "weights_mib"))
    show(name, row)
    return row


def decompositions() -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The bases of all weights, and how many seconds they took."""
    start = time.perf_counter()
    bases = {name: singular_basis(layer.weight) for name, layer in find_targets(load(), None).items()}
    return bases, time.perf_counter() - start


def measure(size: Size, bases: dict[str, tuple[Tensor, Tensor]] | None = None) -> list[dict[str, Any]]:
    bases = bases or decompositions()[0]
    results = []
    for retention in size.retentions:
        sides = {"full": full_step(), "osf": osf_step(retention), "ours": our_step(retention, bases)}
        last = retention == size.retentions[-1]
        if size.every and last:
            sides["floor"] = floor_step()
        found, title = turns(sides, size.rows, 1, size), f"{retention:.0%} protected, against"
        results.append(ratio(f"{title} full fine-tuning", found["ours"], found["full"]))
        results.append(ratio(f"{title} OSF", found["ours"], found["osf"]))
        if size.every and last:
            results.append(ratio("no weight trained, against OSF with 80%", found["floor"], found["osf"]))
            sides.pop("floor"), sides.pop("full")
            found = turns(sides, size.rows // 2, 2, size)
            results.append(ratio(f"{title} OSF, two rows at a time", found["ours"], found["osf"]))
        elif size.every:
            sides.pop("osf")
            found, half = turns(sides, size.rows // 2, 1, size), f"{size.rows // 2} rows a step"
            results.append(ratio(f"{title} full fine-tuning, {half}", found["ours"], found["full"]))
        del sides
        gc.collect()  # hooks of a model refer to it
    return results


def table(rows: list[dict[str, Any]]) -> str:
    return cost.table(rows, "peer")


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    """OSF protects the same directions; full fine-tuning protects none, and is what the step is compared with all the same."""
    found = []
    for row in rows:
        work, _, peer = row["name"].partition(", against ")
        named = {**row, "name": f"step of {size.rows} rows of {size.tokens} tokens, {work}"}
        found += [line(named, peer, bar=1.0 if peer.startswith("OSF") else None) for line in (time_line, memory_line)]
    return found


def main() -> None:
    keep_freed_memory()
    bases, decomposition = decompositions()
    results = measure(FULL, bases)
    alone = "; ".join(
        f"{row['name']}: {row['weights_ratio']:.2f}"
        for row in results
        if "rows" not in row["name"] and "no weight" not in row["name"]
    )
    note = (
        f"Gemma 3 270M, float32, linear layers of the blocks, steps of {FULL.rows} rows of {FULL.tokens} tokens, one at a time, of which the output layer reads "
        f"{LABELS}. Medians of {FULL.repeats} turns, {torch.get_num_threads()} threads; memory is what is held between steps plus the peak above it. Memory of the protected "
        f"weights alone, with bases, gradients and moments, ours / peer: {alone}. The decomposition of all weights before a task took {decomposition:.0f} s. "
        "Freed memory stays with the process, as in long runs on a CPU; otherwise a part of every step, which varies, goes into getting it back from the system. "
        "`python -m benchmarks.continual.cost` repeats it."
    )
    report = {
        "command": "python -m benchmarks.continual.cost",
        "seed": SEED,
        "repeats": FULL.repeats,
        "results": results,
    }
    write(NAME, report | {"table": f"{table(results)}\n\n{note}"})


if __name__ == "__main__":
    main()
