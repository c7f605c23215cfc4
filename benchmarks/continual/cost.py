"""What a step of adaptive SVD costs next to full fine-tuning and to PEFT's OSF, on Gemma 3 270M.

All three train the linear layers of the transformer blocks, in float32 with AdamW and clipping; embeddings and norms are frozen, as OSF
freezes them. A step is forward, backward, clipping and update; both sides of a ratio run in turn in one process. The output layer reads
`LABELS` positions, so that the vocabulary does not hide what is compared.

    python -m benchmarks.continual.cost
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from hf_ext.trainers.adaptive_svd.subspace import Subspace, singular_basis
from hf_ext.trainers.adaptive_svd.taps import tap
from hf_ext.trainers.adaptive_svd.targets import find_targets

NAME, SEED, REPEATS = "continual_cost", 0, 5
ROWS, TOKENS, LABELS = 4, 512, 64
RETENTIONS = (0.5, 0.8)
OPTIONS: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0, "fused": True}


def load() -> Any:
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    return model.requires_grad_(False).train()


def step_of(model: Any, optimizer: Any, clip: Callable[[], Any]) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 200_000, (ROWS, TOKENS), generator=generator)

    def step() -> None:
        hidden = model.model(input_ids=ids).last_hidden_state[:, -1 - LABELS : -1]
        logits = model.lm_head(hidden)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -LABELS:].flatten()).backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()

    return step


def full_step() -> Callable[[], None]:
    model = load()
    weights = [layer.weight.requires_grad_() for layer in find_targets(model, None).values()]
    optimizer = torch.optim.AdamW(weights, **OPTIONS)
    return step_of(model, optimizer, lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0))


def our_step(retention: float, bases: dict[str, tuple[Tensor, Tensor]]) -> Callable[[], None]:
    model = load()
    layers = find_targets(model, None)
    subspaces = {}
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        subspaces[layer.weight] = Subspace(*bases[name], math.floor(retention * min(rows, columns)), rows <= columns)
    optimizer = SubspaceAdamW(list(subspaces), subspaces, **OPTIONS)
    for layer in layers.values():
        tap(layer, subspaces[layer.weight], False, partial(optimizer.accumulate, layer.weight))
    return step_of(model, optimizer, lambda: optimizer.clip_grad_norm_(1.0))


def osf_step(retention: float) -> Callable[[], None]:
    names = sorted({name.rpartition(".")[2] for name in find_targets(load(), None)})
    model = get_peft_model(load(), OSFConfig(effective_rank=retention, target_modules=names))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, **OPTIONS)
    return step_of(model.get_base_model(), optimizer, lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0))


def main() -> None:
    bases = {name: singular_basis(layer.weight) for name, layer in find_targets(load(), None).items()}
    results = []
    for retention in RETENTIONS:
        for peer, build in (("full fine-tuning", full_step), ("OSF", lambda r=retention: osf_step(r))):
            row = compare(our_step(retention, bases), build(), REPEATS)
            results.append({"name": f"{retention:.0%} protected, against {peer}", **row})
            show(results[-1]["name"], row)
    note = (
        f"Gemma 3 270M, float32, {ROWS} x {TOKENS} tokens, linear layers of the blocks. Medians of {REPEATS} turns, {torch.get_num_threads()} threads. "
        "`python -m benchmarks.continual.cost` repeats it."
    )
    report = {"command": "python -m benchmarks.continual.cost", "seed": SEED, "repeats": REPEATS, "results": results}
    write(NAME, report | {"table": f"{table(results, 'peer')}\n\n{note}"})


if __name__ == "__main__":
    main()
