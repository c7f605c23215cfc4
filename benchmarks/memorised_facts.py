"""One edit in a small model that knows 600 facts by heart: does the answer change, and do the other 599 stay?

A four-layer Llama (hidden size 128) is trained until it answers 150 subjects x 4 relations out of 100 objects without an
error. Each arm then edits one fact at a time (Adam, until the loss is below 0.1; RoseLoRA not before `t_final`), and the edit
is taken back before the next. Locality is the share of the other 599 answers that did not change. "random mask" is RoseLoRA
with fixed random entries instead of important ones.

    python -m benchmarks.memorised_facts
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import markdown, write
from hf_ext import RoseLoraConfig
from hf_ext.tuners.roselora import density_report, pruning

SUBJECTS, RELATIONS, OBJECTS = 150, 4, 100
SEEDS, EDITS, MOST_STEPS, T_FINAL, SPARSITY = (0, 1, 2), 8, 60, 20, 0.95


@dataclass(frozen=True)
class Arm:
    name: str
    learning_rate: float


ARMS = tuple(
    Arm(name, rate)
    for name, rates in (("LoRA", (5e-4, 1e-3, 5e-3, 1e-2)), ("RoseLoRA", (5e-3, 1e-2)), ("random mask", (5e-3,)))
    for rate in rates
)


def world(seed: int) -> tuple[LlamaForCausalLM, Tensor]:
    """A model that knows all facts, and the facts [600, 3]: subject, relation, object as token ids."""
    torch.manual_seed(seed)
    subjects = torch.arange(SUBJECTS).repeat_interleave(RELATIONS)
    relations = SUBJECTS + torch.arange(RELATIONS).repeat(SUBJECTS)
    objects = SUBJECTS + RELATIONS + torch.randint(OBJECTS, (len(subjects),))
    facts = torch.stack([subjects, relations, objects], 1)
    config = LlamaConfig(
        vocab_size=SUBJECTS + RELATIONS + OBJECTS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=8,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(1000):
        now = loss(model, facts)
        now.backward()
        optimizer.step()
        optimizer.zero_grad()
        if now.item() < 0.01 and bool((answers(model, facts) == facts[:, 2]).all()):
            return model.requires_grad_(False), facts
    raise RuntimeError(f"seed {seed}: the model did not learn its facts")


def loss(model: nn.Module, facts: Tensor) -> Tensor:
    logits = model(input_ids=facts[:, :2]).logits[:, -1]
    return nn.functional.cross_entropy(logits, facts[:, 2])


@torch.no_grad()
def answers(model: nn.Module, facts: Tensor) -> Tensor:
    return model(input_ids=facts[:, :2]).logits[:, -1].argmax(-1)


def adapter(model: nn.Module, arm: Arm) -> Any:
    shared = dict(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if arm.name == "LoRA":
        return get_peft_model(model, LoraConfig(**shared))
    adapted = get_peft_model(model, RoseLoraConfig(**shared, sparsity=SPARSITY, t_init=3, t_final=T_FINAL))
    if arm.name == "random mask":
        pruning.schedules(adapted)["default"].restart(T_FINAL)
        for factor in (f for p in pruning.pruners(adapted) for f in p.trainable()):
            scores = torch.rand_like(factor.parameter)
            factor.state.mask = pruning.MASK_RULES["topk"](scores, 1 - SPARSITY, factor.dim)
    return adapted


def edit_once(model: LlamaForCausalLM, facts: Tensor, which: int, arm: Arm) -> dict[str, float]:
    """Edit fact `which` to another object of the world and measure."""
    before = answers(model, facts)
    edited = facts[which : which + 1].clone()
    edited[0, 2] = SUBJECTS + RELATIONS + (edited[0, 2] - SUBJECTS - RELATIONS + 1 + which) % OBJECTS
    adapted = adapter(copy.deepcopy(model), arm)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=arm.learning_rate)
    least = T_FINAL if arm.name == "RoseLoRA" else 1
    for step in range(1, MOST_STEPS + 1):
        now = loss(adapted, edited)
        now.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= least and now.item() < 0.1:
            break
    after = answers(adapted, facts)
    others = torch.arange(len(facts)) != which
    return {
        "success": float(after[which] == edited[0, 2]),
        "locality": float((after == before)[others].float().mean()),
        "density": density_report(adapted).density,
        "steps": step,
    }


def measure(seeds: tuple[int, ...] = SEEDS, edits: int = EDITS, arms: tuple[Arm, ...] = ARMS) -> dict[Arm, list[dict]]:
    """Means over the edits of each seed, by arm."""
    results: dict[Arm, list[dict]] = {arm: [] for arm in arms}
    for seed in seeds:
        model, facts = world(seed)
        chosen = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed))[:edits].tolist()
        for arm in arms:
            torch.manual_seed(seed)
            rows = [edit_once(model, facts, which, arm) for which in chosen]
            results[arm].append({key: statistics.mean(row[key] for row in rows) for key in rows[0]})
            print(f"seed {seed} {arm.name:12s} {arm.learning_rate:g} {results[arm][-1]}", flush=True)
    return results


def main() -> None:
    results = measure()
    rows = []
    for arm, by_seed in results.items():
        cells = [" / ".join(f"{row[key]:.3f}" for row in by_seed) for key in ("success", "locality")]
        rows.append(
            [arm.name, f"{arm.learning_rate:g}", *cells]
            + [f"{statistics.mean(row[key] for row in by_seed):.3g}" for key in ("density", "steps")]
        )
    table = markdown(["arm", "lr", "success, per seed", "locality, per seed", "density of the update", "steps"], rows)
    note = (
        f"{EDITS} single edits per seed, seeds {', '.join(map(str, SEEDS))}; rank 8, alpha 32, q_proj and v_proj, sparsity "
        f"{SPARSITY}; `python -m benchmarks.memorised_facts`."
    )
    runs = [
        {"arm": arm.name, "learning_rate": arm.learning_rate, "seeds": by_seed} for arm, by_seed in results.items()
    ]
    write(
        "memorised_facts",
        {"command": "python -m benchmarks.memorised_facts", "runs": runs, "table": f"{table}\n\n{note}"},
    )


if __name__ == "__main__":
    main()
