"""What packing costs in quality: perplexity and token agreement of Gemma 3 270M on real text, against the full cache.

The text is Python's own language reference as it ships with every interpreter (`pydoc_data.topics`). Each window has a prompt, which fills the cache, and a
continuation, which is predicted from it step by step. Attention over the prompt itself is exact for every cache, so it is computed once, and each cache
is filled with the recorded keys, values and queries. Settings that have been measured are kept in the results file, so they can be measured in several runs.

    python -m benchmarks.kv_cache.quality [--windows 40] [--only 2bit-guarded ...]
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import RESULTS, markdown, write
from hf_ext.cache.squat import SQuatCache, SQuatLayer
from hf_ext.demo.model import embedded_model
from hf_ext.metrics.compression import LogitComparison

NAME, PROMPT, CONTINUATION, STEP = "kv_cache_quality", 1024, 512, 16
KINDS = {
    "plain": dict(subspace_dim=0),
    "fixed": dict(squat_lambda=1e-3, block_size=64, order="index"),
    "guarded": dict(),
}
SETTINGS = {f"{bits}bit-{kind}": dict(bits=bits, **options) for bits in (2, 3, 4) for kind, options in KINDS.items()}
SETTINGS["k4v2-guarded"] = dict(key_bits=4, value_bits=2)
SETTINGS["2bit-g64-guarded"] = dict(bits=2, group_size=64, residual_length=64)


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


def continuation(model: PreTrainedModel, cache: SQuatCache, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits `(1, STEP, V)` after each few tokens of the continuation over the packed cache; the last of them predicts nothing."""
    for step in ids[:, PROMPT:].split(STEP, 1):
        yield model(step, past_key_values=cache).logits


def bits(model: PreTrainedModel, cache: SQuatCache) -> float:
    """Bits per number in the packed layers, whole tokens and what is known of the queries included."""
    layers = cache.packed_layers
    numbers = sum(
        2 * math.prod(layer.tokens[0].recent.shape[:2]) * layer.get_seq_length() * layer.tokens[0].recent.shape[-1]
        for layer in layers
    )
    half = sum(tokens.first.nbytes + tokens.recent.nbytes for layer in layers for tokens in layer.tokens) // 2
    return 8 * (cache.nbytes - half) / numbers  # as in a 16-bit model; this one is in float32


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
    sums = {name: LogitComparison() for name in options.only}
    sizes, increases = {}, {name: [] for name in options.only}
    with torch.no_grad():
        for index, ids in enumerate(windows(tokenizer, options.windows).split(1)):
            recorded = prefill(model, ids[:, :PROMPT])
            labels = ids[:, PROMPT + 1 :].split(STEP, 1)
            full = list(continuation(model, replay(model, recorded, dict(residual_length=4096)), ids))
            for name, comparison in sums.items():
                cache, own = replay(model, recorded, SETTINGS[name]), LogitComparison()
                sizes[name] = bits(model, cache)
                for logits, truth, label in zip(continuation(model, cache, ids), full, labels, strict=True):
                    for counter in (own, comparison):
                        counter.update(logits[:, : label.shape[1]], truth[:, : label.shape[1]], label)
                increases[name].append(own.result()["perplexity_increase"])
            print(index + 1, {name: round(c.result()["kl_divergence"], 4) for name, c in sums.items()}, flush=True)
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["settings"] if path.exists() else {}
    for name, comparison in sums.items():
        spread = statistics.stdev(increases[name]) / len(increases[name]) ** 0.5 if options.windows > 1 else math.nan
        known[name] = {
            **comparison.result(),
            "standard_error": spread,
            "bits": sizes[name],
            "arguments": SETTINGS[name],
        }
    known = {name: known[name] for name in SETTINGS if name in known}
    write(NAME, {"command": "python -m benchmarks.kv_cache.quality", "settings": known, "table": table(known)})
    print(table(known))


if __name__ == "__main__":
    main()
