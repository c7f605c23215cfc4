"""What a posterior costs: ten draws next to ten forward passes of the adapter, and the adapter that is silent next to one that never had a posterior.

Gemma 3 270M with LoRA, r = 8 on the query and value projections, four rows. Ten draws are one batch of forty rows; what opening the posterior takes, decompositions and
normals of all layers, is counted. The peer runs the four rows ten times, or the forty rows once.

    python -m benchmarks.tfb_cost
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.common import markdown, write
from benchmarks.cost import compare, keep_freed_memory, show
from hf_ext.demo.model import embedded_model
from hf_ext.tuners.tfb import predict
from hf_ext.tuners.tfb.config import store

NAME, SEED, REPEATS = "tfb_cost", 0, 5
ROWS, DRAWS, TOKENS = 4, 10, 64


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


def main() -> None:
    keep_freed_memory()
    ids = torch.randint(3, 200_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(SEED))
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
        row = compare(ours, peer, repeats=REPEATS if "ten" in name else 5 * REPEATS)
        show(name, row)
        results.append({"name": name, **row})
    cells = [
        [
            *row["name"].split(" | "),
            f"{1000 * row['seconds']['ours']:.0f} / {1000 * row['seconds']['peer']:.0f}",
            f"{row['time_ratio']:.3f} [{row['time_ratio_min']:.3f}, {row['time_ratio_max']:.3f}]",
            f"{row['peak_mib']['ours']:.0f} / {row['peak_mib']['peer']:.0f}",
        ]
        for row in results
    ]
    head = ["work", "peer", "CPU ms, ours / peer", "ratio [min, max]", "MiB at most, ours / peer"]
    note = (
        f"{ROWS} rows of {TOKENS} tokens, float32, {torch.get_num_threads()} threads; medians of {REPEATS} pairs, {5 * REPEATS} of the last. "
        "`python -m benchmarks.tfb_cost` repeats it."
    )
    table = f"{markdown(head, cells)}\n\n{note}"
    write(NAME, {"command": "python -m benchmarks.tfb_cost", "seed": SEED, "results": results, "table": table})


if __name__ == "__main__":
    main()
