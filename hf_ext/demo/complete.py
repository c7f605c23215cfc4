"""Greedy completions; as `python -m hf_ext.demo.complete` in a process of its own, from a saved adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def complete(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> dict[str, str]:
    """Greedy continuations of `new_tokens` tokens, on one line each, in one batch."""
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {prompt: " ".join(text.split()) for prompt, text in zip(prompts, texts, strict=True)}


def main() -> None:
    """Read `{"model", "adapter", "prompts", "new_tokens"}` from standard input, write the completions as JSON."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_ext  # noqa: F401  registers the PEFT types

    job = json.load(sys.stdin)
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapter"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    json.dump(complete(model, tokenizer, job["prompts"], job["new_tokens"]), sys.stdout)


if __name__ == "__main__":
    main()
