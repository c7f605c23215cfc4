"""What BaFT costs: its step next to that with an orthogonal parametrisation, as LoReFT's code keeps its basis, and a model with it next to others.

The first rows are one edited block alone: forward and backward of the update of the hidden states, with the same gate; the peer's basis is
`torch.nn.utils.parametrizations.orthogonal`. The others are Gemma 3 270M with the default adapter: a step of forward, backward and AdamW on one row, of which the output layer
reads four tokens, next to LoRA; and passes of one token with a cache of 64, as in generation, next to the model without an adapter.

    python -m benchmarks.baft_cost
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.common import markdown, write
from benchmarks.cost import Line, both, compare, keep_freed_memory, show, time_line, time_ratio
from hf_ext import BaftConfig
from hf_ext.demo.model import embedded_model
from hf_ext.tuners.baft.reference import intervene, orthonormal_basis

NAME, SEED = "baft_cost", 0
RANK, TOKENS, CACHED, PASSES = 12, 20, 64, 5


class Size(NamedTuple):
    """How much is measured: blocks of these widths, and, if there are any `steps` on so many tokens, a model."""

    widths: tuple[int, ...]
    steps: tuple[int, ...]
    repeats: int


FULL, SMALL = Size((640, 4096), (64, 512), 5), Size((640, 4096), (64,), 3)


class Parametrised(nn.Module):
    """The update with a basis that PyTorch keeps orthonormal, `(D, K)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rotate = nn.Linear(RANK, width, bias=False)
        nn.init.orthogonal_(rotate.weight)
        self.rotate = orthogonal(rotate)
        self.targets, self.gate = nn.Linear(width, RANK), nn.Linear(width, RANK)

    def forward(self, hidden: Tensor) -> Tensor:
        basis_DK = self.rotate.weight
        return (torch.sigmoid(self.gate(hidden)) * (self.targets(hidden) - hidden @ basis_DK)) @ basis_DK.mT


class Factorised(nn.Module):
    """Ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.free = nn.Parameter(orthonormal_basis(torch.randn(RANK, width)))
        self.targets, self.gate = nn.Linear(width, RANK), nn.Linear(width, RANK)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = lambda h: torch.sigmoid(self.gate(h))  # noqa: E731
        return intervene(hidden, self.free, self.targets.weight, self.targets.bias, gate)[0]


def stepper(layer: nn.Module, width: int) -> Callable[[], None]:
    hidden = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(SEED))

    def step() -> None:
        layer(hidden).square().sum().backward()
        layer.zero_grad()

    return step


def layer(width: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    ours, peer = Factorised(width), Parametrised(width)
    row = compare(stepper(ours, width), stepper(peer, width), repeats=repeats)
    kept = {
        name: sum(t.nbytes for t in each.state_dict().values()) / 2**20
        for name, each in (("ours", ours), ("peer", peer))
    }
    name = f"block of width {width}, {RANK} basis vectors, {TOKENS} tokens: step"
    show(name, row)
    return {"name": name, "peer": "orthogonal parametrisation", "kept_mib": kept, **row}


def build(config: PeftConfig | None) -> Any:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    return model if config is None else get_peft_model(model, config).eval()


def trainer(model: Any, tokens: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(3, 200_000, (1, tokens), generator=torch.Generator().manual_seed(SEED))
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    extra = {"intervention_labels": labels} if isinstance(model.peft_config["default"], BaftConfig) else {}

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=5, **extra).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[0, -4:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(tokens: int, repeats: int) -> dict[str, Any]:
    shared = dict(task_type="CAUSAL_LM")
    ours, peer = build(BaftConfig(**shared)), build(LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **shared))
    row = compare(trainer(ours, tokens), trainer(peer, tokens), repeats=repeats)
    name = f"270M: step on {tokens} tokens"
    show(name, row)
    gc.collect()
    return {"name": name, "peer": "LoRA, r = 8 on q and v", **row}


def reader(model: Any) -> Callable[[], None]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    token = torch.tensor([[5]])
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(input_ids=torch.arange(3, 3 + CACHED)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def read() -> None:
        for _ in range(PASSES):
            base(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-PASSES)

    return read


def generation(repeats: int) -> dict[str, Any]:
    row = compare(reader(build(BaftConfig(task_type="CAUSAL_LM"))), reader(build(None)), repeats=5 * repeats)
    name = f"270M: {PASSES} tokens generated"
    show(name, row)
    return {"name": name, "peer": "no adapter", **row}


def measure(size: Size) -> list[dict[str, Any]]:
    results = [layer(width, size.repeats) for width in size.widths]
    if size.steps:
        results += [*(training(tokens, size.repeats) for tokens in size.steps), generation(size.repeats)]
    return results


def cells(row: dict[str, Any]) -> list[str]:
    kept = row.get("kept_mib")
    return [
        row["name"],
        row["peer"],
        both(row["seconds"], ".1f", 1000),
        time_ratio(row, ".2g"),
        both(kept, ".1f") if kept else "",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    head = ["work", "peer", "CPU ms, ours / peer", "ratio [min, max]", "MiB kept, ours / peer"]
    return markdown(head, [cells(row) for row in rows])


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    """The parametrised block computes the same; LoRA and no adapter do not."""
    return [time_line(row, row["peer"], bar=1.0 if "kept_mib" in row else None) for row in rows]


def main() -> None:
    keep_freed_memory()
    results = measure(FULL)
    note = (
        f"Medians of {FULL.repeats} pairs ({5 * FULL.repeats} of generation), float32, {torch.get_num_threads()} threads. What is kept are parameters and buffers of the block's adapter. "
        "`python -m benchmarks.baft_cost` repeats it."
    )
    report = {"command": "python -m benchmarks.baft_cost", "seed": SEED, "results": results}
    write(NAME, report | {"table": f"{table(results)}\n\n{note}"})


if __name__ == "__main__":
    main()
