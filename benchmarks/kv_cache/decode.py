"""How long one new token takes, and how much a cache weighs: SQuatCache against DynamicCache and QuantizedCache, over context and batch.

One attention layer (8 key-value heads, 4 query heads each, 128 channels) whose cache is filled with random tokens; a step is the cache's update and the attention of
one token. All caches are measured in turn, several times around, and the medians of the rounds are compared, so that other load on the machine hits all of them.
Then whole steps of Gemma 3 270M.

    python -m benchmarks.kv_cache.decode [--contexts 1024 ...] [--batches 1 8] [--threads N]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common import RESULTS, markdown, write
from benchmarks.cost import Line
from hf_ext.cache.squat import SQuatCache, SQuatLayer
from hf_ext.cache.squat.attention import squat_attention_forward
from hf_ext.demo.model import embedded_model
from hf_ext.kernels import native
from hf_ext.metrics.compression import cache_bytes

NAME, HEADS, RATIO, CHANNELS = "kv_cache_decode", 8, 4, 128
MODULE: Any = SimpleNamespace(num_key_value_groups=RATIO, is_causal=True, training=False, layer_idx=0)
SLOW = 4  # times around for what takes long
LARGEST = 65536  # tokens of all sequences together, to fit into memory
FULL_PRECISION, QUANTO = "DynamicCache, float32", "QuantizedCache, quanto 4 bits"
AT_BEST = "sdpa alone, float32, heads as rows"
# Ours and a peer, for the summary; the other packed cache does the same work.
PAIRS = {
    ("SQuatCache, 2 bits", AT_BEST): None,
    ("SQuatCache, 2 bits", FULL_PRECISION): None,
    ("SQuatCache, 4 bits", QUANTO): 1.0,
}


class Size(NamedTuple):
    """How much is measured: tokens in a cache, sequences at once, turns, and all caches of the layer, or those of `PAIRS`."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    every: bool


FULL = Size((1024, 2048, 4096, 8192, 16384, 32768), (1, 8), 20, True)
SMALL = Size((4096,), (1,), 5, False)


class Still:
    """Keys and values that are there already, to time `sdpa` alone, without a cache that grows."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers[layer] = self.layers[layer] or (keys, values)
        return self.layers[layer]  # type: ignore[return-value]


class StillInRows(Still):
    """The same, for `heads_as_rows`."""


def caches(layers: int = 1) -> dict[str, tuple[torch.dtype, Callable[[], Any]]]:
    """Caches of `layers` layers by name, with the dtype of the model."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=HEADS * RATIO,
        num_key_value_heads=HEADS,
        head_dim=CHANNELS,
        hidden_size=HEADS * RATIO * CHANNELS,
        attn_implementation="squat",
    )
    found: dict[str, tuple[torch.dtype, Callable[[], Any]]] = {
        FULL_PRECISION: (torch.float32, lambda: DynamicCache(config=config)),
        "DynamicCache, bfloat16": (torch.bfloat16, lambda: DynamicCache(config=config)),
    }
    for bits in (2, 3, 4, 8):
        found[f"SQuatCache, {bits} bits"] = (torch.float32, lambda bits=bits: SQuatCache(config, bits=bits))
    for backend, module in (("quanto", "optimum.quanto"), ("hqq", "hqq")):
        if importlib.util.find_spec(module.split(".")[0]) is not None:
            found[f"QuantizedCache, {backend} 4 bits"] = (
                torch.float32,
                lambda backend=backend: QuantizedCache(
                    backend,
                    config,
                    nbits=4,
                    axis_key=1 if backend == "hqq" else 0,
                    axis_value=1 if backend == "hqq" else 0,
                ),
            )
    return found


def heads_as_rows(
    module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: None, scaling: float
):
    """`sdpa` with the query heads of a key-value head as its rows, so that no key is repeated: its best form for one new token."""
    rows = query.unflatten(1, (HEADS, RATIO)).flatten(2, 3)
    return torch.nn.functional.scaled_dot_product_attention(rows, keys, values, scale=scaling), None


ATTENTION = {SQuatCache: squat_attention_forward, StillInRows: heads_as_rows}


def step(cache: Any, dtype: torch.dtype, batch: int) -> None:
    """One token through all layers."""
    attention = ATTENTION.get(type(cache), sdpa_attention_forward)
    for layer in range(len(cache.layers)):
        query = torch.randn(batch, HEADS * RATIO, 1, CHANNELS, dtype=dtype)
        new = torch.randn(batch, HEADS, 1, CHANNELS, dtype=dtype)
        attention(MODULE, query, *cache.update(new, new, layer), None, scaling=CHANNELS**-0.5)


def filled(make: Callable[[], Any], dtype: torch.dtype, batch: int, context: int) -> Any:
    """A cache of `context` tokens."""
    cache = make()
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(cache.layers):
        keys, values = (torch.randn(batch, HEADS, context, CHANNELS, generator=generator).to(dtype) for _ in range(2))
        cache.update(keys, values, index)
        if isinstance(layer, SQuatLayer):
            layer.observe(torch.randn(batch, HEADS * RATIO, 256, CHANNELS, generator=generator), None)
            layer.pack()
        del keys, values  # two layers at once would count in the memory
    return cache


Step = Callable[[Any], None]


def timed(built: dict[str, Any], steps: dict[str, Step], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of every step, and bytes, per cache; the caches take turns."""
    times: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(rounds + 1):
        for name, cache in built.items():
            if name.startswith("Quantized") and turn > SLOW:
                continue
            started = time.perf_counter()
            steps[name](cache)
            if turn:  # the first is a warm-up
                times[name].append((time.perf_counter() - started) * 1e3)
    return {
        name: {
            "ms": statistics.median(values),
            "min_ms": min(values),
            "turns_ms": values,
            "bytes": cache_bytes(built[name]),
        }
        for name, values in times.items()
    }


def layer_steps(context: int, batch: int, size: Size) -> dict[str, dict[str, Any]]:
    """One attention layer."""
    alone = {"sdpa alone, float32": Still, AT_BEST: StillInRows}
    kinds = {**{name: (torch.float32, make) for name, make in alone.items()}, **caches()}
    if not size.every:
        chosen = {name for pair in PAIRS for name in pair}
        kinds = {name: kind for name, kind in kinds.items() if name in chosen}
    built = {name: filled(make, dtype, batch, context) for name, (dtype, make) in kinds.items()}
    return timed(
        built,
        {name: lambda cache, dtype=dtype: step(cache, dtype, batch) for name, (dtype, _) in kinds.items()},
        size.rounds,
    )


def model_steps(model: PreTrainedModel, context: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Whole steps of a model, batch 1, its caches filled with random tokens."""
    config = model.config
    token = torch.tensor([[5]])

    def full(cache: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        for index in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
            cache.update(keys, values, index)
            if isinstance(layer := cache.layers[index], SQuatLayer):
                layer.observe(
                    torch.randn(1, config.num_attention_heads, 256, config.head_dim, generator=generator), None
                )
                layer.pack()
        return cache

    def run(implementation: str) -> Step:
        def one(cache: Any) -> None:
            model.set_attn_implementation(implementation)
            model(token, past_key_values=cache)

        return one

    model.set_attn_implementation("squat")
    built: dict[str, Any] = {FULL_PRECISION: full(DynamicCache(config=config))}
    built.update({f"SQuatCache, {bits} bits": full(SQuatCache(config, bits=bits)) for bits in (2, 4)})
    return timed(built, {name: run("squat" if name.startswith("SQuat") else "sdpa") for name in built}, rounds)


def table(results: list[dict[str, Any]]) -> str:
    """Milliseconds over context, a table for the layer at each batch size and one for the model; then the sizes."""
    parts = []
    for what, batch in dict.fromkeys((row["what"], row["batch"]) for row in results):
        chosen = [row for row in results if (row["what"], row["batch"]) == (what, batch)]
        parts.append(pivot(f"ms per step, {what}, batch {batch}", chosen, lambda value: f"{value['ms']:.2f}"))
    layer = [row for row in results if (row["what"], row["batch"]) == ("layer", 1)]
    parts.append(pivot("MiB, layer, batch 1", layer, lambda value: f"{value['bytes'] / 2**20:.1f}"))
    return "\n\n".join(parts)


def pivot(title: str, rows: list[dict[str, Any]], show: Callable[[dict[str, float]], str]) -> str:
    """Caches downwards, contexts to the right."""
    head = [title, *(f"{row['context']:,}" for row in rows)]
    return markdown(head, [[name, *(show(row["caches"][name]) for row in rows)] for name in rows[0]["caches"]])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of a layer over context, batch 1."""
    import matplotlib.pyplot as plt

    rows = [row for row in results if row["what"] == "layer" and row["batch"] == 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in rows[0]["caches"]:
        shown = [row for row in rows if name in row["caches"]]
        contexts = [row["context"] for row in shown]
        left.plot(contexts, [row["caches"][name]["ms"] for row in shown], marker="o", label=name)
        right.plot(contexts, [row["caches"][name]["bytes"] / 2**20 for row in shown], marker="o")
    for axes, title in ((left, "one step of one layer, ms"), (right, "cache of one layer, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def measure(size: Size) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []

    def add(what: str, batch: int, context: int, measured: dict[str, dict[str, Any]]) -> None:
        results.append({"what": what, "batch": batch, "context": context, "caches": measured})
        found = {name: f"{v['ms']:.2f} ms, {v['bytes'] / 2**20:.1f} MiB" for name, v in measured.items()}
        print(what, batch, context, found, flush=True)

    with torch.no_grad():
        for batch in size.batches:
            for context in size.contexts:
                if batch * context <= LARGEST:
                    add("layer", batch, context, layer_steps(context, batch, size))
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
        for context in size.contexts:
            add("Gemma 3 270M", 1, context, model_steps(model, context, size.rounds))
    return results


def lines(results: list[dict[str, Any]], size: Size) -> list[Line]:
    """Those of `PAIRS` that were measured: `QuantizedCache` needs a library of its own."""
    found = []
    for row in results:
        for (ours, peer), bar in PAIRS.items():
            if {ours, peer} <= row["caches"].keys():
                left, right = (row["caches"][name] for name in (ours, peer))
                # QuantizedCache makes fewer turns.
                ratios = [a / b for a, b in zip(left["turns_ms"], right["turns_ms"], strict=False)]
                spread = statistics.median(ratios), min(ratios), max(ratios)
                what = f"{row['what']}: a token after {row['context']:,}, {ours}"
                found.append(Line(what, peer, left["ms"], right["ms"], "ms", *spread, bar))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=FULL.contexts)
    parser.add_argument("--batches", type=int, nargs="+", default=FULL.batches)
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(Size(options.contexts, options.batches, options.rounds, True))
    note = (
        f"Layer: {HEADS} key-value heads, {RATIO} query heads each, {CHANNELS} channels, random tokens. Model: whole step, float32, whose three full-attention layers are packed. "
        f"Medians of {options.rounds} turns ({SLOW} for QuantizedCache), {options.threads} CPU thread(s), kernels: {native.status()}. `python -m benchmarks.kv_cache.decode` repeats it."
    )
    command = "python -m benchmarks.kv_cache.decode"
    report = {"command": command, "threads": options.threads, "results": results}
    write(NAME, report | {"table": f"{table(results)}\n\n{note}"})
    plot(results, RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
