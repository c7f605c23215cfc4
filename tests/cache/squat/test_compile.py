"""`torch.compile` of a forward pass with a SQuat cache."""

import warnings

import pytest
import torch

from hf_ext.cache.squat import SQuatCache, squat_attention
from tests.cache.squat.decoding import EIGHT, model_named, prompt


@torch.no_grad()
def test_a_compiled_forward_is_the_same_and_says_so_where_it_cannot_be_whole():
    model = model_named("llama")
    ids, step = prompt(56), prompt(1)
    with squat_attention(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        caches = [SQuatCache(model.config, **{**EIGHT, "bits": 2}) for _ in range(2)]
        compiled = torch.compile(model.forward, backend="eager")
        for tokens in [ids] + [step] * 20:
            right, ours = (
                run(tokens, past_key_values=cache) for run, cache in zip((model, compiled), caches, strict=True)
            )
            assert torch.equal(ours.logits, right.logits)
        torch.compiler.reset()
        whole = torch.compile(model.forward, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a SQuatCache grows; use a StaticCache"):
            whole(ids, past_key_values=SQuatCache(model.config, **EIGHT))
