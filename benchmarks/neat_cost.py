"""What a step and an evaluation of NEAT cost next to PEFT's PEANUT, the same method, and to LoRA, on Gemma 3 270M.

Adapters of rank 32, PEFT's default, on all linear layers of the blocks, in float32; a step is forward, backward and AdamW on one row, of which the
output layer reads four tokens, so that the vocabulary does not hide what the adapters cost. One side trains nothing: gradients of activations alone. NEAT and PEANUT run with equal
parameters (`side="output"`), and give equal outputs. Evaluation is a forward pass of one token, for which NEAT keeps what it computed
from the weights. Memory is what a step needs at most above the one that trains nothing. PEANUT makes and frees matrices of the size of the weights,
which costs more where malloc returns them to the system, as glibc's does; training is measured both ways.

    python -m benchmarks.neat_cost
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeanutConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.common import markdown, write
from benchmarks.cost import Line, allocated_peak, both, compare, keep_freed_memory, show, time_line, time_ratio
from hf_ext import NeatConfig
from hf_ext.demo.model import embedded_model

NAME, SEED, RANK, PASSES = "neat_cost", 0, 32, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Size(NamedTuple):
    """How much is measured: steps on rows of so many tokens, and with `every` also those that train nothing, and those with freed memory kept."""

    tokens: tuple[int, ...]
    repeats: int
    every: bool


FULL, SMALL = Size((128, 512), 7, True), Size((64,), 3, False)


def build(config: PeftConfig | None) -> Any:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    if config is None:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model
    return get_peft_model(model, config)


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, 200_000, (1, tokens), generator=torch.Generator().manual_seed(SEED))


def trainer(model: Any, tokens: int) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)]
    optimizer, row = torch.optim.AdamW(parameters, lr=1e-4, fused=True), ids(tokens)
    base = model.get_base_model() if isinstance(model, PeftModel) else model

    def step() -> None:
        hidden = base.model(input_ids=row, use_cache=False).last_hidden_state[:, -5:-1]
        torch.nn.functional.cross_entropy(base.lm_head(hidden).flatten(0, 1), row[0, -4:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reader(model: Any) -> Callable[[], None]:
    base, row = model.get_base_model(), ids(1)

    @torch.no_grad()
    def read() -> None:
        for _ in range(PASSES):
            base.model(input_ids=row, use_cache=False)

    return read


def sides(peer: str) -> tuple[Any, Any]:
    """Ours and the peer."""
    shared = dict(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    if peer == "PEANUT":
        return build(NeatConfig(**shared, side="output", normalize=False)), build(PeanutConfig(**shared))
    return build(NeatConfig(**shared)), build(LoraConfig(**shared, lora_alpha=RANK))


def training(peer: str, size: Size, note: str = "") -> list[dict[str, Any]]:
    ours, theirs = sides(peer)
    floor, rows = build(None), []
    for tokens in size.tokens:
        row = compare(trainer(ours, tokens), trainer(theirs, tokens), repeats=size.repeats)
        nothing = allocated_peak(trainer(floor, tokens))
        row["extra_mib"] = {side: row["peak_mib"][side] - nothing for side in ("ours", "peer")}
        rows.append({"name": f"step on {tokens} tokens{note}, against {peer}", **row})
        show(rows[-1]["name"], row)
    gc.collect()
    return rows


def frozen(size: Size) -> list[dict[str, Any]]:
    """What nothing goes below."""
    _, theirs = sides("PEANUT")
    floor, rows = build(None), []
    for tokens in size.tokens:
        row = compare(trainer(floor, tokens), trainer(theirs, tokens), repeats=size.repeats)
        rows.append({"name": f"nothing trained, {tokens} tokens, against PEANUT", **row})
        show(rows[-1]["name"], row)
    gc.collect()
    return rows


def reading(peer: str, size: Size) -> dict[str, Any]:
    ours, theirs = sides(peer)
    row = compare(reader(ours.eval()), reader(theirs.eval()), repeats=3 * size.repeats)
    show(peer, row)
    return {"name": f"one token, against {peer}", **row}


def measure(size: Size) -> list[dict[str, Any]]:
    results = [*training("PEANUT", size), *training("LoRA", size)]
    if size.every:
        results += frozen(size)
    results += [reading(peer, size) for peer in ("PEANUT", "LoRA")]
    if size.every:
        keep_freed_memory()
        results += training("PEANUT", size, ", freed memory kept")
    return results


def cells(row: dict[str, Any]) -> list[str]:
    extra = row.get("extra_mib")
    return [
        row["name"],
        both(row["seconds"], ".0f", 1000),
        time_ratio(row, ".2f"),
        both(extra, ".0f") if extra else "",
        f"{extra['ours'] / extra['peer']:.2f}" if extra else "",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    head = ["work", "CPU ms, ours / peer", "ratio [min, max]", "extra MiB, ours / peer", "ratio"]
    return markdown(head, [cells(row) for row in rows])


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    """PEANUT is the same method, LoRA is not."""
    found = []
    for row in rows:
        work, _, peer = row["name"].rpartition(", against ")
        found.append(time_line({**row, "name": work}, peer, bar=1.0 if peer == "PEANUT" else None))
    return found


def main() -> None:
    results = measure(FULL)
    note = (
        f"Gemma 3 270M in float32, rank {RANK}, all linear layers of the blocks. Medians of {FULL.repeats} pairs, {3 * FULL.repeats} for one token, which is {PASSES} passes; "
        f"{torch.get_num_threads()} threads. Extra memory: above a step that trains nothing. `python -m benchmarks.neat_cost` repeats it."
    )
    report = {"command": "python -m benchmarks.neat_cost", "seed": SEED, "results": results}
    write(NAME, report | {"table": f"{table(results)}\n\n{note}"})


if __name__ == "__main__":
    main()
