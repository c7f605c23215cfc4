"""What a step of adaptive SVD costs next to full fine-tuning and to PEFT's OSF, on Gemma 3 270M.

All three train the linear layers of the transformer blocks, in float32 with fused AdamW and clipping; embeddings and norms are frozen, as OSF
freezes them. A step has `BATCHES` micro-batches of `ROWS` rows, together the paper's 8 examples; the output layer reads the last `LABELS`
positions of each row, as when prompts are masked, so that the vocabulary does not hide what is compared. Both sides of a ratio run in turn in
one process. Memory is all that a side holds between steps (model, optimizer, bases) plus the peak of a step above it. The last row is what no
method can go below: forward and backward without the gradient of any weight, against OSF.

    python -m benchmarks.continual.cost
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft import OSFConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import write
from benchmarks.cost import compare, show, table
from hf_ext.demo.model import embedded_model
from hf_ext.trainers.adaptive_svd.optimizer import SubspaceAdamW
from hf_ext.trainers.adaptive_svd.subspace import protect, singular_basis
from hf_ext.trainers.adaptive_svd.taps import tap
from hf_ext.trainers.adaptive_svd.targets import find_targets

NAME, SEED, REPEATS = "continual_cost", 0, 3
BATCHES, ROWS, TOKENS, LABELS = 4, 2, 512, 64
RETENTIONS = (0.5, 0.8)
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0, "fused": True}


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
        self, model: Any, optimizer: torch.optim.Optimizer, clip: Callable[[], Any], extra: Iterable[Tensor] = ()
    ) -> None:
        self.model, self.optimizer, self.clip, self.extra = model, optimizer, clip, list(extra)
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(3, 200_000, (BATCHES, ROWS, TOKENS), generator=generator)

    def __call__(self) -> None:
        for ids in self.ids:
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1 - LABELS : -1]
            logits = self.model.lm_head(hidden).flatten(0, 1)
            (torch.nn.functional.cross_entropy(logits, ids[:, -LABELS:].flatten()) / BATCHES).backward()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_mib(self) -> float:
        """What is held between two steps."""
        state = [value for kept in self.optimizer.state.values() for value in kept.values() if torch.is_tensor(value)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state, *self.extra]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values()) / 2**20


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
    return Step(adapted.get_base_model(), optimizer, lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0))


def floor_step() -> Step:
    """Gradients of activations alone, which the layers below need whatever is trained."""
    model = load()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return Step(model, torch.optim.SGD([torch.zeros(1)]), lambda: None)


def main() -> None:
    start = time.perf_counter()
    bases = {name: singular_basis(layer.weight) for name, layer in find_targets(load(), None).items()}
    decomposition = time.perf_counter() - start
    pairs: dict[str, tuple[Callable[[], Step], Callable[[], Step]]] = {}
    for retention in RETENTIONS:
        for peer, build in (("full fine-tuning", full_step), ("OSF", partial(osf_step, retention))):
            pairs[f"{retention:.0%} protected, against {peer}"] = partial(our_step, retention, bases), build
    pairs["no weight trained, against OSF with 80%"] = floor_step, partial(osf_step, 0.8)
    results = []
    for name, builders in pairs.items():
        ours, peer = (build() for build in builders)
        row = compare(ours, peer, REPEATS)
        row["peak_mib"] = {
            "ours": row["peak_mib"]["ours"] + ours.held_mib(),
            "peer": row["peak_mib"]["peer"] + peer.held_mib(),
        }
        row["memory_ratio"] = row["peak_mib"]["ours"] / row["peak_mib"]["peer"]
        results.append({"name": name, **row})
        show(name, row)
        del ours, peer
        gc.collect()  # hooks of a model refer to it
    note = (
        f"Gemma 3 270M, float32, linear layers of the blocks, {BATCHES} micro-batches of {ROWS} x {TOKENS} tokens, of which the output layer reads "
        f"{LABELS} per row. Medians of {REPEATS} turns, {torch.get_num_threads()} threads; memory is what is held between steps plus the peak above it. "
        f"The decomposition of all weights before a task took {decomposition:.0f} s. "
        "`python -m benchmarks.continual.cost` repeats it."
    )
    report = {"command": "python -m benchmarks.continual.cost", "seed": SEED, "repeats": REPEATS, "results": results}
    write(NAME, report | {"table": f"{table(results, 'peer')}\n\n{note}"})


if __name__ == "__main__":
    main()
