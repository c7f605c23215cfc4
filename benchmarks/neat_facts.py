"""150 changed facts in a small model that knows 600 by heart: how low does the loss come, at which learning rate?

The model is that of `memorised_facts`. Adapters of rank 4 on q_proj and v_proj, whose weights are square, or on gate_proj and up_proj, which have
twice as many outputs as inputs, are trained for 150 steps of AdamW on all changed facts at once.

    python -m benchmarks.neat_facts
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from benchmarks.common import markdown, write
from benchmarks.memorised_facts import OBJECTS, RELATIONS, SUBJECTS, answers, loss, world
from hf_ext import NeatConfig

NAME, SEEDS, RANK, STEPS, CHANGED = "neat_facts", (0, 1, 2), 4, 150, 150
RATES = (1e-3, 1e-2, 5e-2)
TARGETS = {"q_proj, v_proj": ["q_proj", "v_proj"], "gate_proj, up_proj": ["gate_proj", "up_proj"]}
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "NEAT, input": {"side": "input", "normalize": False},
    "NEAT, input, normalised": {"side": "input"},
    "NEAT, input, normalised, linear": {"side": "input", "act_fn": "linear"},
    "NEAT, output": {"side": "output", "normalize": False},
    "NEAT, output, normalised": {"side": "output"},
}


def config(arm: str, targets: list[str]) -> PeftConfig:
    shared = dict(r=RANK, target_modules=targets, task_type="CAUSAL_LM")
    return LoraConfig(**shared, lora_alpha=RANK) if arm == "LoRA" else NeatConfig(**shared, **ARMS[arm])


def train(model: Any, facts: torch.Tensor, rate: float) -> dict[str, float]:
    """Loss on the changed facts at the end, and the share of the others that is still right."""
    changed = facts[torch.randperm(len(facts))][:CHANGED].clone()
    first = SUBJECTS + RELATIONS
    changed[:, 2] = first + (changed[:, 2] - first + 1 + torch.arange(CHANGED)) % OBJECTS
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(STEPS):
        loss(model, changed).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = float(loss(model, changed))
    kept = ~(facts[:, None, :2] == changed[None, :, :2]).all(-1).any(1)
    still = (answers(model, facts) == facts[:, 2])[kept].float().mean()
    return {"loss": after, "others": float(still), "parameters": model.get_nb_trainable_parameters()[0]}


def measure(
    seeds: tuple[int, ...] = SEEDS,
    arms: tuple[str, ...] = tuple(ARMS),
    rates: tuple[float, ...] = RATES,
    places: tuple[str, ...] = tuple(TARGETS),
) -> list[dict[str, Any]]:
    runs = []
    for seed in seeds:
        model, facts = world(seed)
        for where in places:
            for arm in arms:
                for rate in rates:
                    torch.manual_seed(seed)
                    adapted = get_peft_model(copy.deepcopy(model), config(arm, TARGETS[where]))
                    run = {"seed": seed, "where": where, "arm": arm, "rate": rate, **train(adapted, facts, rate)}
                    runs.append(run)
                    print(run, flush=True)
    return runs


def main() -> None:
    runs = measure()
    rows = []
    for where in TARGETS:
        for arm in ARMS:
            found = {
                rate: [run for run in runs if (run["where"], run["arm"], run["rate"]) == (where, arm, rate)]
                for rate in RATES
            }
            cells = []
            for of_rate in found.values():
                losses = [run["loss"] for run in of_rate]
                cells.append(f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}")
            rows.append([where, arm, str(found[RATES[0]][0]["parameters"]), *cells])
    table = markdown(["layers", "adapter", "parameters", *(f"loss at {rate:g}" for rate in RATES)], rows)
    note = (
        f"Cross-entropy in nats on {CHANGED} changed facts after {STEPS} steps; mean and standard deviation over seeds "
        f"{', '.join(map(str, SEEDS))}, rank {RANK}. `python -m benchmarks.neat_facts` repeats it."
    )
    write(NAME, {"command": "python -m benchmarks.neat_facts", "runs": runs, "table": f"{table}\n\n{note}"})


if __name__ == "__main__":
    main()
