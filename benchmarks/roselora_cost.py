"""What RoseLoRA's pruning adds to a training step of LoRA, and how it grows with the rank.

One optimizer step (forward, backward, AdamW) of Gemma 3 270M with adapters of equal shape on q_proj and v_proj, LoRA and
RoseLoRA in turn in the same process; a ratio is taken within each pair. RoseLoRA is measured while it scores and selects in
every step (the schedule at half way) and after the masks are frozen. The pruning itself is also timed alone.

    python -m benchmarks.roselora_cost
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.common import markdown, write
from benchmarks.cost import Line, with_range
from hf_ext import RoseLoraConfig
from hf_ext.demo.model import embedded_model
from hf_ext.tuners.roselora import pruning

NAME, SEED, TOKENS, ROWS = "roselora_cost", 0, 32, 4
PHASES = {"selecting": 50, "frozen": 90}  # step counter at which the phase is measured, of 100


class Size(NamedTuple):
    """How much is measured."""

    ranks: tuple[int, ...]
    repeats: int


FULL, SMALL = Size((8, 32), 8), Size((8,), 4)


def trainer(model: Any) -> Callable[[], None]:
    """One optimizer step on fixed random tokens."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, 200_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(SEED))
    labels = ids.clone()
    labels[:, :-2] = -100

    def step() -> None:
        # The head is applied to the labelled positions only, so that the vocabulary does not hide the adapters' cost.
        hidden = model.get_base_model().model(input_ids=ids).last_hidden_state[:, -3:-1]
        logits = model.get_base_model().lm_head(hidden)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, -2:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(config: LoraConfig) -> Any:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    return get_peft_model(model, config)


def pruning_alone(model: Any, repeats: int) -> float:
    """Milliseconds of scoring and selecting for all layers, without the rest of the step."""
    factors = [f for p in pruning.pruners(model) for f in p.trainable()]
    for factor in factors:
        factor.parameter.grad = torch.rand_like(factor.parameter)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for factor in factors:
            pruning.score(factor, factor.parameter, factor.parameter.grad)
        pruning.prune(factors)
        times.append(time.perf_counter() - start)
        for factor in factors:
            factor.parameter.grad = torch.rand_like(factor.parameter)
    for factor in factors:
        factor.parameter.grad = None
    return 1000 * statistics.median(times)


def of_rank(rank: int, repeats: int) -> list[dict[str, Any]]:
    shared = dict(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora = trainer(build(LoraConfig(**shared)))
    model = build(RoseLoraConfig(**shared, t_init=10, t_final=80))
    rose = trainer(model)
    schedule = pruning.schedules(model)["default"]
    rows = []
    for phase, step in PHASES.items():
        schedule.restart(step)
        lora(), rose(), rose()
        seconds: dict[str, list[float]] = {"lora": [], "roselora": []}
        for repeat in range(repeats):
            pairs = [("lora", lora), ("roselora", rose)]
            for name, function in reversed(pairs) if repeat % 2 else pairs:
                schedule.restart(step)
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(seconds["roselora"], seconds["lora"], strict=True)]
        rows.append(
            {
                "rank": rank,
                "phase": phase,
                "seconds": {name: statistics.median(values) for name, values in seconds.items()},
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
        if phase == "selecting":
            schedule.restart(step)
            rows[-1]["pruning_ms"] = pruning_alone(model, repeats)
        row = rows[-1]
        print(f"rank {rank:3d} {phase:10s} {row['ratio']:.3f} [{min(ratios):.3f}, {max(ratios):.3f}] {row['seconds']}")
    return rows


def measure(size: Size) -> list[dict[str, Any]]:
    return [row for rank in size.ranks for row in of_rank(rank, size.repeats)]


def table(rows: list[dict[str, Any]]) -> str:
    return markdown(
        ["rank", "phase", "RoseLoRA, s/step", "LoRA, s/step", "ratio [min, max]", "pruning alone, ms"],
        [
            [
                str(r["rank"]),
                r["phase"],
                f"{r['seconds']['roselora']:.3f}",
                f"{r['seconds']['lora']:.3f}",
                with_range(r["ratio"], r["ratio_min"], r["ratio_max"], ".3f"),
                f"{r['pruning_ms']:.1f}" if "pruning_ms" in r else "-",
            ]
            for r in rows
        ],
    )


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    return [
        Line(
            f"step of {ROWS} rows of {TOKENS} tokens, rank {row['rank']}, {row['phase']}",
            "LoRA",
            *(1000 * row["seconds"][side] for side in ("roselora", "lora")),
            "ms",
            *(row[name] for name in ("ratio", "ratio_min", "ratio_max")),
        )
        for row in rows
    ]


def main() -> None:
    rows = measure(FULL)
    note = (
        f"Training step on Gemma 3 270M (float32, CPU, {ROWS}x{TOKENS} tokens, q_proj and v_proj of all 18 layers), medians "
        f"of {FULL.repeats} interleaved pairs; `python -m benchmarks.roselora_cost`. Importance averages cost four bytes per "
        "adapter parameter until `t_final`."
    )
    report = {"command": f"python -m benchmarks.{NAME}", "seed": SEED, "rows": rows}
    write(NAME, report | {"table": f"{table(rows)}\n\n{note}"})


if __name__ == "__main__":
    main()
