"""OVERTONE in a small world: twelve edits one after another, in a model that knows an invented world by heart.

A four-layer Llama (hidden size 128, words as tokens) is trained on the world's sentences. Each arm then edits one fact after
another by full training of one weight (`down_proj` of the third layer, Adam), each fact until the arm's own criterion says
that it is learnt, at most 60 steps. Afterwards: reliability is the share of edited facts recited word for word, locality
the share of unchanged answers of other people in the same relation, and drift KL(before || after) on 400 other facts.

    python -m benchmarks.overtone_world
"""

from __future__ import annotations

import copy
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import markdown, write
from hf_ext.trainers.overtone import OvertoneSettings, overtone_from_logits

DATA = Path(__file__).parent / "data"
SEEDS, EDITS, MOST_STEPS, PRETRAINING_STEPS, FACTS = (0, 1, 2), 12, 60, 1800, 400
RATES = (3e-3, 5e-3)


class Arm(NamedTuple):
    """`settings` None is cross-entropy; `stop` is the mean loss that ends an edit, 0 for never."""

    name: str
    settings: OvertoneSettings | None
    stop: float


ARMS = (
    Arm("cross-entropy, no stop", None, 0.0),
    Arm("cross-entropy, stop at 0.01", None, 0.01),
    Arm("clipped cross-entropy", OvertoneSettings(mix_lambda=1.0, clip_epsilon=0.05, n_sigma=1.0), 0.0),
    Arm("OVERTONE, λ = 0.1", OvertoneSettings(mix_lambda=0.1, clip_epsilon=0.05, n_sigma=1.0), 0.0),
    Arm("OVERTONE, λ = 0.5 (default)", OvertoneSettings(), 0.0),
)


class World(NamedTuple):
    model: LlamaForCausalLM
    words: dict[str, int]
    facts: list[dict[str, Any]]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def encode(words: dict[str, int], pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Right-padded token ids [B, T] and labels [B, T] on the answers, of (prompt, answer) pairs."""
    sequences = [([words[w] for w in p.split()], [words[w] for w in a.split()]) for p, a in pairs]
    length = max(len(p) + len(a) for p, a in sequences)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def build(seed: int) -> World:
    """The trained model, its vocabulary and the facts it recites."""
    corpus = rows("synthkb_corpus")
    text = " ".join(f"{r['prompt']} {r['completion']}" for r in [*corpus, *_answers_of_edits()])
    words = {word: i for i, word in enumerate(["<pad>", *sorted(set(text.split()))])}
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
    ids, labels = encode(words, [(r["prompt"], r["completion"]) for r in corpus])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        chosen = torch.randint(len(ids), (96,))
        logits = model(input_ids=ids[chosen]).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), labels[chosen][:, 1:].flatten()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    facts = [r for r in corpus if r["kind"] == "fact"]
    recall = recited(model, words, [(r["prompt"], r["completion"]) for r in facts]).float().mean()
    print(f"seed {seed}: recites {recall:.1%} of {len(facts)} facts", flush=True)
    return World(model.requires_grad_(False), words, facts)


def _answers_of_edits() -> list[dict[str, str]]:
    return [{"prompt": r["prompt"], "completion": r["target_new"]} for r in rows("synthkb_edits")]


@torch.no_grad()
def recited(model: nn.Module, words: dict[str, int], pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Whether each answer is the most likely one word for word: bool [B]."""
    ids, labels = encode(words, pairs)
    right = model(input_ids=ids).logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | (labels[:, 1:] == -100)).all(1)


@torch.no_grad()
def log_probs(model: nn.Module, words: dict[str, int], pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Log-probabilities [tokens, V] at the answer tokens."""
    ids, labels = encode(words, pairs)
    return model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100].log_softmax(-1)


def edit(model: nn.Module, words: dict[str, int], record: dict[str, Any], arm: Arm, rate: float) -> int:
    """Train one fact in; returns the number of steps."""
    weight = model.model.layers[2].mlp.down_proj.weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=rate)
    ids, labels = encode(words, [(record["prompt"], record["target_new"])])
    for step in range(1, MOST_STEPS + 1):
        logits, targets = model(input_ids=ids).logits[0, :-1], labels[0, 1:]
        if arm.settings is None:
            loss = nn.functional.cross_entropy(logits, targets)
            done = loss.item() < arm.stop
        else:
            losses = overtone_from_logits(logits, targets, arm.settings)
            loss = losses.loss.sum() / (targets != -100).sum()
            done = not bool(losses.active.any())
        if done:
            return step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return MOST_STEPS


def measure(world: World, arm: Arm, rate: float, seed: int) -> dict[str, float]:
    """All edits of a seed with one arm."""
    records = random.Random(seed).sample(rows("synthkb_edits"), EDITS)
    prompts = {r["prompt"] for r in records} | {p for r in records for p in r["rephrase"]}
    others = [f for f in world.facts if f["prompt"] not in prompts]
    drift_pairs = [(f["prompt"], f["completion"]) for f in random.Random(seed).sample(others, FACTS)]
    near = [q for r in records for q in r["locality"]["same_relation"] if q["prompt"] not in prompts]
    near_pairs = [(q["prompt"], q["ground_truth"][0]) for q in near]
    model = copy.deepcopy(world.model)
    before, kept = log_probs(model, world.words, drift_pairs), recited(model, world.words, near_pairs)
    steps = [edit(model, world.words, record, arm, rate) for record in records]
    after = log_probs(model, world.words, drift_pairs)
    edited = recited(model, world.words, [(r["prompt"], r["target_new"]) for r in records])
    return {
        "reliability": edited.float().mean().item(),
        "locality": recited(model, world.words, near_pairs)[kept].float().mean().item(),
        "drift": nn.functional.kl_div(after, before, reduction="batchmean", log_target=True).item(),
        "steps": statistics.mean(steps),
    }


def main() -> None:
    runs = []
    for seed in SEEDS:
        world = build(seed)
        for rate in RATES:
            for arm in ARMS:
                runs.append({"arm": arm.name, "learning_rate": rate, "seed": seed, **measure(world, arm, rate, seed)})
                print(runs[-1], flush=True)
    table_rows = []
    for rate in RATES:
        for arm in ARMS:
            mine = [r for r in runs if (r["arm"], r["learning_rate"]) == (arm.name, rate)]
            cells = [" / ".join(f"{r[key]:.2f}" for r in mine) for key in ("reliability", "locality", "drift")]
            table_rows.append([arm.name, f"{rate:g}", *cells, f"{statistics.mean(r['steps'] for r in mine):.0f}"])
    table = markdown(["loss", "lr", "reliability", "locality", "KL drift", "steps per edit"], table_rows)
    note = f"{EDITS} sequential edits, seeds {' / '.join(map(str, SEEDS))}; `python -m benchmarks.overtone_world`."
    write(
        "overtone_world",
        {"command": "python -m benchmarks.overtone_world", "runs": runs, "table": f"{table}\n\n{note}"},
    )


if __name__ == "__main__":
    main()
