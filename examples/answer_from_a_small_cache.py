"""Read a long text once, keep its cache small, and answer several questions from copies of it.

The text is a part of Python's language reference, about 4,000 tokens. Shows the cache's size against full precision, and that it goes on where it was after a trip
through a file.
"""

from __future__ import annotations

import copy
import pydoc_data.topics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_ext import SQuatCache
from hf_ext.demo.model import embedded_model
from hf_ext.metrics.compression import cache_bytes

TOPICS = ("for", "while", "with", "try", "if", "assert")
QUESTIONS = (
    "\n\nQ: Which statement inserts debugging assertions?\nA: the statement",
    "\n\nExample of a loop over a range:\n\n   for i in",
)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), attn_implementation="squat")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS)
    prefix = tokenizer(text, return_tensors="pt")

    cache = SQuatCache(model.config, bits=3)
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (cache, full):
            model(**prefix, past_key_values=each, logits_to_keep=1)
    packed, whole = cache.nbytes, sum(layer.keys.nbytes * 2 for layer in full.layers if not layer.is_sliding)
    print(
        f"{prefix.input_ids.shape[1]} tokens: {packed / 2**20:.2f} MiB instead of {whole / 2**20:.2f} in full attention layers,"
    )
    print(f"{cache_bytes(cache) / 2**20:.2f} instead of {cache_bytes(full) / 2**20:.2f} altogether")

    with tempfile.TemporaryDirectory() as folder:
        cache = SQuatCache.load(cache.save(Path(folder) / "prefix.safetensors"), model.config)
    for question in QUESTIONS:
        inputs = tokenizer(text + question, return_tensors="pt")
        print(question.strip())
        for name, each in (("packed", cache), ("full", full)):
            output = model.generate(**inputs, past_key_values=copy.deepcopy(each), max_new_tokens=8, do_sample=False)
            print(f"  {name}: {tokenizer.decode(output[0, inputs.input_ids.shape[1] :])!r}")


if __name__ == "__main__":
    main()
