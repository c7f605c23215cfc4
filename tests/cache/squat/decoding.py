"""Ways of decoding, and what a `DynamicCache` gives.

Each way takes a model and what makes a cache; it returns new tokens and the caches it filled.
"""

from __future__ import annotations

import copy
import functools

import torch
from transformers import DynamicCache

from tests.cache.squat import models

NEW = 16
WHOLE = dict(residual_length=1024, sink_tokens=0)  # packs nothing
EIGHT = dict(bits=8, group_size=16, residual_length=16)
model_named = functools.cache(models.build)
assistant = functools.cache(models.assistant)


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, models.VOCABULARY, (batch, tokens), generator=generator)


def generate(model, cache, ids, mask=None, tokens=NEW, **options) -> torch.Tensor:
    """The new tokens; sampling draws the same numbers each time."""
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=tokens, do_sample=False, pad_token_id=0, use_cache=True)
    output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **{**settings, **options})
    return output[:, ids.shape[1] :]


def one_call(ids=None, **options):
    def run(model, make):
        cache = make()
        return generate(model, cache, prompt(56) if ids is None else ids, **options), [cache]

    return run


def padded(model, make):
    cache, ids = make(), prompt(56, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    return generate(model, cache, ids * mask, mask), [cache]


def assisted(model, make):
    cache = make()
    return generate(model, cache, prompt(56), assistant_model=assistant()), [cache]


def chat(model, make):
    cache, question = make(), prompt(46)
    answer = generate(model, cache, question, tokens=10)
    longer = torch.cat([question, answer, prompt(15, seed=2)], -1)
    return torch.cat([answer, generate(model, cache, longer, tokens=10)], -1), [cache]


def prefix(model, make):
    common = make()
    with torch.no_grad():
        model(input_ids=prompt(44), past_key_values=common)
    caches = [copy.deepcopy(common) for _ in range(2)]
    questions = [torch.cat([prompt(44), prompt(12, seed=seed)], -1) for seed in (2, 3)]
    return torch.cat([generate(model, *pair, tokens=10) for pair in zip(caches, questions, strict=True)], -1), caches


MODES = {
    "greedy": one_call(),
    "beams": one_call(num_beams=3),
    "sampling": one_call(do_sample=True),
    "return_sequences": one_call(do_sample=True, num_return_sequences=3),
    "padded": padded,
    "prompt_lookup": one_call(prompt(28).repeat(1, 2), prompt_lookup_num_tokens=4),
    "assistant": assisted,
    "chunked_prefill": one_call(prefill_chunk_size=24),
    "chat": chat,
    "prefix": prefix,
}


@functools.cache
def expected(name: str, mode: str) -> torch.Tensor:
    """Tokens with a `DynamicCache` and the attention that the model has by itself."""
    model = model_named(name)
    return MODES[mode](model, lambda: DynamicCache(config=model.config))[0]


def agreement(tokens: torch.Tensor, right: torch.Tensor) -> float:
    assert tokens.shape == right.shape
    return (tokens == right).float().mean().item()


def logits_of(model, cache, steps, mask=None):
    """Logits of passes over `steps`, one after another; `mask` is that of all tokens."""
    found, seen = [], 0
    for ids in steps:
        seen += ids.shape[1]
        own = None if mask is None else mask[:, :seen]
        found.append(model(ids, attention_mask=own, past_key_values=cache).logits)
    return torch.cat(found, 1)


def steps_after(first, count, batch=1):
    return [first, *(prompt(1, batch, seed=20 + step) for step in range(count))]
