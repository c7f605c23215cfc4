"""What packing costs in quality: perplexity and token agreement of Gemma 3 270M on real text, against the full cache.

The text is Python's own language reference as it ships with every interpreter (`pydoc_data.topics`). Each window has a prompt, which fills the cache, and a
continuation, which is predicted from it step by step. Attention over the prompt itself is exact for every cache, so it is computed once, and each cache
is filled with the recorded keys, values and queries. Settings that have been measured are kept in the results file, so they can be measured in several runs.

    python -m benchmarks.kv_cache.quality [--windows 40] [--only "default, 2 bits" ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pydoc_data.topics
import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import RESULTS, markdown, write
from hf_ext.cache.squat import SQuatCache, SQuatLayer
from hf_ext.demo.model import embedded_model
from hf_ext.metrics.compression import LogitComparison

NAME, PROMPT, CONTINUATION, STEP = "kv_cache_quality", 1024, 512, 16
TOGETHER = 4  # windows at a time
PAPER = dict(squat_lambda=1e-3, block_size=64, order="index", clip_ratio=1.0)  # the authors' settings
SETTINGS = {
    f"{kind}, {bits} bits": dict(bits=bits, **options)
    for bits in (2, 3, 4)
    for kind, options in {
        "KIVI": dict(subspace_dim=0, clip_ratio=1.0),
        "SQuat, fixed lambda": PAPER,
        "SQuat, guarded": dict(clip_ratio=1.0),
    }.items()
}
SETTINGS |= {
    "KIVI with clipping, 2 bits": dict(bits=2, subspace_dim=0),
    "default, 2 bits": dict(bits=2),
    "default, 3 bits": dict(bits=3),
    "default, 2 bits, group_size=32": dict(bits=2, group_size=32, residual_length=32),
    "default, keys 4 bits, values 2": dict(key_bits=4, value_bits=2),
    "default, keys 2 bits, values 4": dict(key_bits=2, value_bits=4),
}


class Recorder(SQuatLayer):
    """Never packs, and keeps the queries of the prompt."""

    def observe(self, query, real):
        self.query = query

    def pack(self):
        pass


def windows(tokenizer: Any, count: int) -> torch.Tensor:
    """`(count, PROMPT + CONTINUATION)` token ids."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    size = PROMPT + CONTINUATION - 1
    start = ids[:1].expand(count, 1)  # every window begins as the tokenizer begins a text
    return torch.cat([start, ids[1 : 1 + count * size].view(count, size)], 1)


def prefill(model: PreTrainedModel, prompt: torch.Tensor) -> SQuatCache:
    cache = SQuatCache(model.config)
    cache.layers = [Recorder(cache.settings) if isinstance(layer, SQuatLayer) else layer for layer in cache.layers]
    model(prompt, past_key_values=cache, logits_to_keep=1)
    return cache


def replay(model: PreTrainedModel, recorded: SQuatCache, settings: dict[str, Any]) -> SQuatCache:
    """A cache with these settings after the recorded prompt."""
    cache = SQuatCache(model.config, **settings)
    for layer, past in zip(cache.layers, recorded.layers, strict=True):
        keys, values = past.keys, past.values
        if isinstance(past, Recorder):
            layer.update(keys, values)
            layer.observe(past.query, None)
            layer.pack()
        else:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, past.cumulative_length
    return cache


def compare(
    model: PreTrainedModel, recorded: SQuatCache, caches: dict[str, SQuatCache], ids: torch.Tensor
) -> dict[str, list[LogitComparison]]:
    """The continuation's predictions over each cache against those over the full one, a comparison for every window of `ids`."""
    full = replay(model, recorded, dict(residual_length=4096))
    comparisons = {name: [LogitComparison() for _ in ids] for name in caches}
    steps, labels = ids[:, PROMPT:-1].split(STEP, 1), ids[:, PROMPT + 1 :].split(STEP, 1)
    for step, label in zip(steps, labels, strict=True):
        truth = model(step, past_key_values=full).logits
        for name, cache in caches.items():
            logits = model(step, past_key_values=cache).logits
            for row, comparison in enumerate(comparisons[name]):
                comparison.update(logits[row], truth[row], label[row])
    return comparisons


def bits(model: PreTrainedModel, cache: SQuatCache) -> float:
    """Bits per number in the packed layers, whole tokens and what is known of the queries included."""
    layers = cache.packed_layers
    numbers = sum(
        2 * math.prod(layer.tokens[0].recent.shape[:2]) * layer.get_seq_length() * layer.tokens[0].recent.shape[-1]
        for layer in layers
    )
    half = sum(tokens.first.nbytes + tokens.recent.nbytes for layer in layers for tokens in layer.tokens) // 2
    return 8 * (cache.nbytes - half) / numbers  # as in a 16-bit model; this one is in float32


def pooled(comparisons: list[LogitComparison]) -> LogitComparison:
    """All windows as one."""
    return LogitComparison(*map(sum, zip(*map(dataclasses.astuple, comparisons), strict=True)))


def table(results: dict[str, dict[str, float]]) -> str:
    """One row per setting."""
    rows = [
        [
            name,
            f"{row['bits']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_increase']:+.3f} ± {row['standard_error']:.3f}",
            f"{row['token_agreement']:.1%}",
            f"{row['kl_divergence']:.4f}",
        ]
        for name, row in results.items()
    ]
    any_row = next(iter(results.values()))
    note = (
        f"Gemma 3 270M (float32), {any_row['tokens']:,} predicted tokens of Python's language reference, each window {PROMPT} tokens of prompt and {CONTINUATION} of continuation; "
        f"perplexity with the full cache {any_row['reference_perplexity']:.3f}. The increase is given with the standard error over windows. Three of the model's 18 layers have full "
        "attention and are packed. `python -m benchmarks.kv_cache.quality` repeats it."
    )
    head = ["setting", "bits per number", "perplexity", "increase", "same token", "KL from full, nats"]
    return f"{markdown(head, rows)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = AutoModelForCausalLM.from_pretrained(
        embedded_model(), dtype=torch.float32, attn_implementation="squat"
    ).eval()
    windows_of: dict[str, list[LogitComparison]] = {name: [] for name in options.only}
    sizes: dict[str, float] = {}
    with torch.no_grad():
        for ids in windows(tokenizer, options.windows).split(TOGETHER):
            recorded = prefill(model, ids[:, :PROMPT])
            caches = {name: replay(model, recorded, SETTINGS[name]) for name in options.only}
            sizes = {name: bits(model, cache) for name, cache in caches.items()}
            for name, comparisons in compare(model, recorded, caches, ids).items():
                windows_of[name] += comparisons
            for name, comparisons in windows_of.items():
                print(len(comparisons), name, pooled(comparisons).result(), flush=True)
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["settings"] if path.exists() else {}
    for name, comparisons in windows_of.items():
        increases = [comparison.result()["perplexity_increase"] for comparison in comparisons]
        known[name] = {
            **pooled(comparisons).result(),
            "standard_error": statistics.stdev(increases) / len(increases) ** 0.5 if len(increases) > 1 else math.nan,
            "bits": sizes[name],
            "arguments": SETTINGS[name],
        }
    known = {name: known[name] for name in SETTINGS if name in known}
    write(NAME, {"command": "python -m benchmarks.kv_cache.quality", "settings": known, "table": table(known)})
    print(table(known))


if __name__ == "__main__":
    main()
