"""What a posterior costs: ten draws next to ten forward passes of the adapter, and the adapter that is silent next to one that never had a posterior.

Gemma 3 270M with LoRA, r = 8 on the query and value projections, four rows. Ten draws are one batch of forty rows; what opening the posterior takes, decompositions and
normals of all layers, is counted. The peer runs the four rows ten times, or the forty rows once.

    python -m benchmarks.tfb_cost
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.common import write
from benchmarks.cost import Line, compare, keep_freed_memory, show, table_of_peers, time_line
from hf_ext.demo.model import embedded_model
from hf_ext.tuners.tfb import predict
from hf_ext.tuners.tfb.config import store

NAME, SEED = "tfb_cost", 0
ROWS, DRAWS = 4, 10


class Size(NamedTuple):
    """How much is measured."""

    tokens: int
    repeats: int


FULL, SMALL = Size(64, 5), Size(8, 3)


def adapted() -> Any:
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def reader(model: Any, batch: dict[str, Tensor], times: int) -> Callable[[], None]:
    @torch.no_grad()
    def read() -> None:
        for _ in range(times):
            model(**batch, logits_to_keep=1)

    return read


def measure(size: Size) -> list[dict[str, Any]]:
    ids = torch.randint(3, 200_000, (ROWS, size.tokens), generator=torch.Generator().manual_seed(SEED))
    batch = {"input_ids": ids, "use_cache": False}
    model, fitted = adapted(), adapted()
    store(fitted, "default", {"sigma_q": 0.01, "targets": "all", "rtol": 1e-5})
    sides = {
        "ten draws | ten passes of the adapter": (lambda: predict(fitted, batch, DRAWS), reader(model, batch, DRAWS)),
        "ten draws | one pass of ten times the rows": (
            lambda: predict(fitted, batch, DRAWS),
            reader(model, {**batch, "input_ids": ids.repeat(DRAWS, 1)}, 1),
        ),
        "silent | without a posterior": (reader(fitted, batch, 1), reader(model, batch, 1)),
    }
    results = []
    for name, (ours, peer) in sides.items():
        row = compare(ours, peer, repeats=size.repeats if "ten" in name else 5 * size.repeats)
        show(name, row)
        results.append({"name": name, **row})
    return results


def with_peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with name and peer apart."""
    return [{**row, **dict(zip(("name", "peer"), row["name"].split(" | "), strict=True))} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    return table_of_peers(with_peers(rows), "ms")


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    """Passes that read as much are the same work; of the silent adapter the ratio is that of two equal models."""
    return [
        time_line(
            {**row, "name": f"{ROWS} rows of {size.tokens} tokens, {row['name']}"},
            row["peer"],
            bar=None if row["name"] == "silent" else 1.0,
        )
        for row in with_peers(rows)
    ]


def main() -> None:
    keep_freed_memory()
    results = measure(FULL)
    note = (
        f"{ROWS} rows of {FULL.tokens} tokens, float32, {torch.get_num_threads()} threads; medians of {FULL.repeats} pairs, {5 * FULL.repeats} of the last. "
        "`python -m benchmarks.tfb_cost` repeats it."
    )
    report = {"command": "python -m benchmarks.tfb_cost", "seed": SEED, "results": results}
    write(NAME, report | {"table": f"{table(results)}\n\n{note}"})


if __name__ == "__main__":
    main()
