"""A cache in a file goes on where it was, in another process too, and files that do not fit are refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hf_ext.cache.squat import SQuatCache

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_hidden_layers=2,
)
SETTINGS = dict(bits=4, group_size=8, residual_length=8, sink_tokens=2, subspace_dim=4)


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def gemma3():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
    )
    return Gemma3ForCausalLM(config).eval()


def qwen3_next():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return Qwen3NextForCausalLM(config).eval()


def prefilled(model, count=40):
    model.set_attn_implementation("squat")
    cache = SQuatCache(model.config, **SETTINGS)
    ids = torch.randint(3, 64, (2, count), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache, ids, mask


def continued(model, cache, ids, mask):
    more = torch.cat([ids, ids[:, 5:6]], 1)
    longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
    return model.generate(
        more, attention_mask=longer, past_key_values=cache, max_new_tokens=30, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("build", [llama, gemma3, qwen3_next])
def test_a_loaded_cache_continues_the_same(build, tmp_path):
    model = build()
    cache, ids, mask = prefilled(model)
    path = cache.save(tmp_path / "prefix.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["prefix.safetensors"]
    loaded = SQuatCache.load(path, model.config)
    assert loaded.settings == cache.settings and loaded.get_seq_length() == 40 and loaded.nbytes == cache.nbytes
    assert torch.equal(continued(model, loaded, ids, mask), continued(model, cache, ids, mask))


def test_a_cache_that_was_never_packed_keeps_its_queries(tmp_path):
    model = llama()
    cache, ids, mask = prefilled(model, 12)
    assert not cache.layers[0].has_packed and cache.layers[0].subspace.held_out is not None
    loaded = SQuatCache.load(cache.save(tmp_path / "x"), model.config)
    assert torch.equal(continued(model, loaded, ids, mask), continued(model, cache, ids, mask))


def test_another_process(tmp_path):
    model = llama()
    cache, ids, mask = prefilled(model)
    cache.save(tmp_path / "prefix")
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": ids, "mask": mask}, tmp_path / "inputs")
    script = """if True:
        import json, sys, torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        from hf_ext.cache.squat import SQuatCache
        from tests.cache.squat.test_state import continued
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder + "/model", attn_implementation="squat")
        inputs = load_file(folder + "/inputs")
        print(json.dumps(continued(model, SQuatCache.load(folder + "/prefix", model.config), inputs["ids"], inputs["mask"]).tolist()))
    """
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == continued(model, cache, ids, mask).tolist()


def test_files_that_do_not_fit(tmp_path):
    model = llama()
    path = prefilled(model)[0].save(tmp_path / "prefix")
    for changes, message in (
        (dict(num_hidden_layers=3), r"layers \['SQuatLayer', 'SQuatLayer'\] in the file and"),
        (dict(num_key_value_heads=2), r".*per layer \[\[2, 1, 16\], \[2, 1, 16\]\] in the file and \[\[2, 2, 16\]"),
        (dict(head_dim=8), r".*per layer .* in the file and \[\[2, 1, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"belongs to another model: {message}"):
            SQuatCache.load(path, llama(**changes).config)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text").write_text("no tensors")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            SQuatCache.load(tmp_path / name, model.config)
    save_file({"x": torch.ones(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"is no saved SQuatCache: its format is None"):
        SQuatCache.load(tmp_path / "weights", model.config)
    with pytest.raises(FileNotFoundError):
        SQuatCache.load(tmp_path / "absent", model.config)


def test_a_file_says_what_it_is(tmp_path):
    path = prefilled(llama())[0].save(tmp_path / "prefix")
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["hf_ext"])
    assert told["settings"]["bits"] == 4 and told["model"]["model_type"] == "llama"


def test_the_same_cache_gives_the_same_bytes(tmp_path):
    """So that publishing it again commits nothing."""
    cache = prefilled(llama())[0]
    assert len({cache.save(tmp_path / str(number)).read_bytes() for number in range(4)}) == 1
