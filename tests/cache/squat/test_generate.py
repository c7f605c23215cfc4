"""`generate` with a SQuat cache against `generate` with transformers' own, over models and ways of decoding."""

import copy
import functools
import hashlib
import threading
import warnings

import pytest
import torch
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_ext.cache.squat import SQuatCache, SQuatLayer, squat_attention
from tests.cache.squat import models

NEW = 16
WHOLE = dict(residual_length=1024, sink_tokens=0)  # packs nothing
EIGHT = dict(bits=8, group_size=16, residual_length=16)

model_named = functools.cache(models.build)
assistant = functools.cache(models.assistant)


@pytest.fixture(autouse=True)
def _quiet():
    """Two warnings that most tests here provoke; those that are about a warning look for it themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This model uses the attention")
        warnings.filterwarnings("ignore", message="Nothing of a")
        yield


# -- Ways of decoding: each takes a model and what makes a cache; it returns new tokens and the caches it filled --


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
# transformers: "assisted generation is not supported with stateful models", as linear attention makes Qwen3-Next one.
REFUSED = {("qwen3_next", "prompt_lookup"), ("qwen3_next", "assistant")}
PAIRS = [(name, mode) for name in models.MODELS for mode in MODES if (name, mode) not in REFUSED]
# Nothing of DeepSeek-V3 is packed. bfloat16 rounds activations more coarsely than 8 bits round the cache, which beams
# and draws tell apart; a few modes show that the dtypes fit together.
PACKED_PAIRS = [
    (name, mode)
    for name, mode in PAIRS
    if name != "deepseek_v3" and (name != "llama_bf16" or mode in {"greedy", "padded", "prompt_lookup", "chat"})
]


@functools.cache
def expected(name: str, mode: str) -> torch.Tensor:
    """Tokens with a `DynamicCache` and the attention that the model has by itself."""
    model = model_named(name)
    return MODES[mode](model, lambda: DynamicCache(config=model.config))[0]


def agreement(tokens: torch.Tensor, right: torch.Tensor) -> float:
    assert tokens.shape == right.shape
    return (tokens == right).float().mean().item()


# -- The same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_without_packing_the_tokens_are_the_same(name, mode):
    model = model_named(name)
    with squat_attention(model):
        tokens, caches = MODES[mode](model, lambda: SQuatCache(model.config, **WHOLE))
    assert not any(layer.has_packed for cache in caches for layer in cache.packed_layers)
    assert torch.equal(tokens, expected(name, mode))


@pytest.mark.parametrize(("name", "mode"), PACKED_PAIRS)
def test_with_eight_bits_the_tokens_agree(name, mode):
    model = model_named(name)
    with squat_attention(model):
        tokens, caches = MODES[mode](model, lambda: SQuatCache(model.config, **EIGHT))
    assert all(cache.packed_layers for cache in caches)
    assert all(layer.has_packed for cache in caches for layer in cache.packed_layers)
    assert agreement(tokens, expected(name, mode)) >= 0.99


def test_two_bits_change_tokens():
    """Else these models could not tell a right cache from a wrong one."""
    model = model_named("llama")
    with squat_attention(model):
        tokens, _ = MODES["greedy"](model, lambda: SQuatCache(model.config, **{**EIGHT, "bits": 2}))
    assert agreement(tokens, expected("llama", "greedy")) < 0.9


# Bloom computes its attention itself. DeepSeek-V3 expands what it caches before it attends, and none of it is packed.
@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in {"bloom", "deepseek_v3"}])
def test_decoding_never_dequantises_the_cache(name):
    model = model_named(name)
    with squat_attention(model):
        _, [cache] = MODES["greedy"](model, lambda: SQuatCache(model.config, **EIGHT))
    assert all(layer.has_packed for layer in cache.packed_layers)
    assert [layer.materializations for layer in cache.packed_layers] == [0] * len(cache.packed_layers)


def test_bloom_dequantises_the_cache_at_every_step():
    model = model_named("bloom")
    _, [cache] = MODES["greedy"](model, lambda: SQuatCache(model.config, **EIGHT))
    assert all(layer.materializations >= NEW - 1 for layer in cache.packed_layers)


# -- The attention that is chosen -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_ordinary_attention_warns_once_and_is_right(name):
    model = model_named(name)
    cache = SQuatCache(model.config, **EIGHT)
    with pytest.warns(UserWarning, match=r'set_attn_implementation\("squat"\)') as caught:
        tokens, _ = MODES["greedy"](model, lambda: cache)
    assert len([warning for warning in caught if "SQuatCache" in str(warning.message)]) == 1
    assert all(layer.has_packed and layer.materializations for layer in cache.packed_layers)
    assert agreement(tokens, expected(name, "greedy")) >= 0.99


def test_packed_attention_does_not_warn():
    model = model_named("llama")
    with squat_attention(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        MODES["greedy"](model, lambda: SQuatCache(model.config, **EIGHT))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "options", [{}, dict(cache_implementation="static"), dict(use_cache=False)], ids=["dynamic", "static", "none"]
)
def test_packed_attention_serves_other_caches(name, options):
    model = model_named(name)
    with squat_attention(model):
        assert torch.equal(generate(model, None, prompt(56), **options), expected(name, "greedy"))


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


@torch.no_grad()
def test_keys_that_some_query_reads_are_no_padding():
    """Doge lets each head read a few keys of its own choice, so that most keys are hidden from the last query."""
    torch.manual_seed(0)
    config = DogeConfig(**{**models.COMMON, "num_key_value_heads": 2}, keep_window_size=24)
    model, steps = DogeForCausalLM(config).eval(), steps_after(prompt(60), 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This model computes with its keys")
        right = logits_of(model, DynamicCache(config=config), steps)
        with squat_attention(model):
            ours = logits_of(model, SQuatCache(config, **EIGHT), steps)
    assert (ours - right)[:, 60:].abs().max() < 0.1 * right.std()


@torch.no_grad()
def test_two_documents_that_do_not_see_each_other():
    model, tokens = model_named("llama"), 80
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[40:, :40] = False
    caches = DynamicCache(config=model.config), SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        for cache in caches:
            model(prompt(tokens), attention_mask=mask[None, None], past_key_values=cache)
        right, ours = (model(prompt(1, seed=9), past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(ours, right, atol=0.02, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("padding", [12, 30])
def test_padding_in_a_later_turn_and_its_removal(padding):
    model, turn = model_named("llama"), padding + 4
    steps = [prompt(60, 2), prompt(turn, 2, seed=5)]
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, 60 : 60 + padding] = 0
    caches = DynamicCache(config=model.config), SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        right, ours = (logits_of(model, cache, steps, mask) for cache in caches)
        torch.testing.assert_close(ours[1], right[1], atol=0.02, rtol=0.02)
        for layer in caches[1].packed_layers:
            assert layer.real is not None and not layer.real.all()
        for cache in caches:
            cache.crop(-turn - 18)
        left = caches[0].get_seq_length()
        more = torch.ones(2, left + 40, dtype=torch.long)
        later = []
        for cache in caches:
            rows = [
                model(prompt(1, 2, seed=30 + step), attention_mask=more[:, : left + 1 + step], past_key_values=cache)
                for step in range(40)
            ]
            later.append(torch.cat([row.logits for row in rows], 1))
    torch.testing.assert_close(later[1], later[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast_leaves_the_cache_alone(dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**models.COMMON, "max_position_embeddings": 4096})).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(4)  # queries as large as real ones
    steps = steps_after(prompt(1200), 2)
    cache = SQuatCache(model.config, bits=8)
    with squat_attention(model), torch.autocast("cpu", dtype):
        right, ours = (logits_of(model, each, steps) for each in (DynamicCache(config=model.config), cache))
    assert (ours - right).abs().max() < 0.2 * right.std()
    assert all(layer.subspace.directions.isfinite().all() for layer in cache.packed_layers)


def test_gradients_reach_the_weights_through_whole_tokens():
    model = model_named("llama")
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model), pytest.warns(UserWarning, match="every step dequantises all tokens"):
        model(prompt(56), past_key_values=cache)
        assert not any(
            tensor.requires_grad for layer in cache.packed_layers for tensor in layer.subspace.tensors().values()
        )
        for _ in range(2):
            output = model(prompt(1), past_key_values=cache)
    output.logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_many_drafts_are_read_packed_and_leave_no_trace():
    model = model_named("llama")
    cache = SQuatCache(model.config, **{**EIGHT, "residual_length": 32})
    with squat_attention(model):
        model(prompt(80), past_key_values=cache)
        before = copy.deepcopy(cache)
        ours = model(prompt(30, seed=3), past_key_values=cache).logits
        assert not any(layer.materializations for layer in cache.packed_layers)
        cache.crop(-30)
        one = logits_of(model, before, prompt(30, seed=3).split(1, 1))
    torch.testing.assert_close(ours, one, atol=0.02, rtol=0.02)
    for ours, own in zip(cache.packed_layers, before.packed_layers, strict=True):
        assert torch.equal(ours.subspace.directions, own.subspace.directions)


@torch.no_grad()
def test_a_model_that_reads_its_keys_itself_is_told():
    model = model_named("llama")
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        model(prompt(56), past_key_values=cache)
        with pytest.warns(UserWarning, match="every step dequantises all tokens") as caught:
            for _ in range(3):
                model(prompt(1), past_key_values=cache, output_attentions=True)
    assert len([warning for warning in caught if "dequantises" in str(warning.message)]) == 1


@torch.no_grad()
def test_a_prompt_with_nan_is_no_crash():
    model = model_named("llama")
    embeddings = model.get_input_embeddings()(prompt(56))
    embeddings[:, 20] = float("nan")
    with squat_attention(model):
        assert model(inputs_embeds=embeddings, past_key_values=SQuatCache(model.config, **EIGHT)).logits.isnan().any()


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


@pytest.mark.parametrize("implementation", ["static", "quantized", "dynamic"])
def test_a_cache_and_the_name_of_another_are_refused(implementation):
    model = model_named("llama")
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        generate(model, SQuatCache(model.config, **EIGHT), prompt(20), cache_implementation=implementation)


@torch.no_grad()
def test_sparse_attention_keeps_its_choice_of_keys():
    model = models.sparse()
    right = model(prompt(56)).logits
    with squat_attention(model):
        torch.testing.assert_close(model(prompt(56)).logits, right)


def test_unknown_block_attention_is_refused():
    query = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match='"squat" does not know the blocks that a Linear attends to: use "sdpa"'):
        ALL_ATTENTION_FUNCTIONS["squat"](
            torch.nn.Linear(1, 1), query, query, query, None, block_indices=torch.zeros(1)
        )


def llava() -> LlavaForConditionalGeneration:
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config={**vision, "image_size": 8, "patch_size": 4}, text_config=LlamaConfig(**models.COMMON)
    )
    return LlavaForConditionalGeneration(config)


def implementations(model) -> list[str]:
    config = model.config
    return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]


def test_the_context_restores_every_part():
    model = llava()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    with squat_attention(model):
        assert implementations(model) == ["squat"] * 3
    assert implementations(model) == ["sdpa", "eager", "sdpa"]
    with pytest.raises(KeyError), squat_attention(model):
        raise KeyError
    assert implementations(model) == ["sdpa", "eager", "sdpa"]


def test_the_context_restores_a_part_without_a_model_of_its_own():
    model = llava()
    model.model.vision_tower = None
    with squat_attention(model):
        assert implementations(model)[1] == "squat"
    assert implementations(model) == ["sdpa"] * 3


def test_contexts_nest():
    model = models.build("llama")
    with squat_attention(model), squat_attention(model):
        pass
    assert model.config._attn_implementation == "sdpa"


# -- What is packed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squat_lambda", [0.01, "auto"])
@pytest.mark.parametrize("padding", [16, 32, 96])
def test_padding_of_whole_groups_changes_no_code(squat_lambda, padding):
    model, row = model_named("llama"), prompt(64, seed=2)
    ids = torch.cat([prompt(padding + 64), torch.cat([torch.zeros(1, padding, dtype=torch.long), row], -1)])
    mask = (torch.arange(padding + 64) >= torch.tensor([[0], [padding]])).long()
    settings = dict(bits=2, group_size=16, residual_length=16, sink_tokens=0, squat_lambda=squat_lambda)
    batch, alone = SQuatCache(model.config, **settings), SQuatCache(model.config, **settings)
    with squat_attention(model):
        generate(model, batch, ids, mask, tokens=1)
        generate(model, alone, row, tokens=1)
    for layer, single in zip(batch.packed_layers, alone.packed_layers, strict=True):
        for tokens, right in zip(layer.tokens, single.tokens, strict=True):
            assert right.packed.codes.shape[-2] == 48
            assert torch.equal(tokens.packed.codes[1:, :, padding:], right.packed.codes)


def group_hashes(layer: SQuatLayer) -> list[str]:
    """One for every 16 packed tokens, of keys and values together."""
    hashes = []
    for start in range(0, layer.tokens[0].packed.codes.shape[-2], 16):
        digest = hashlib.sha256()
        for tokens in layer.tokens:
            for part in tokens.packed:
                every = tokens.packed.codes.shape[-2] // part.shape[-2]  # tokens that share an entry
                digest.update(part[..., start // every : (start + 16) // every, :].contiguous().numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


@torch.no_grad()
def test_what_is_packed_never_changes():
    model = model_named("llama")
    cache = SQuatCache(model.config, **{**EIGHT, "bits": 2})
    with squat_attention(model):
        token = model(prompt(56), past_key_values=cache).logits[:, -1:].argmax(-1)
        seen = [group_hashes(layer) for layer in cache.packed_layers]
        for _ in range(200):
            token = model(token, past_key_values=cache).logits.argmax(-1)
            now = [group_hashes(layer) for layer in cache.packed_layers]
            assert all(new[: len(old)] == old for new, old in zip(now, seen, strict=True))
            seen = now
    assert [len(hashes) for hashes in seen] == [(256 - 1 - 4 - 16) // 16] * 2


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_windows_do_not_keep_the_prompt_alive(name):
    model = model_named(name)
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model), torch.no_grad():
        model(prompt(56), past_key_values=cache)
    windows = [layer for layer in cache.layers if layer.is_sliding]
    assert windows
    for layer in windows:
        assert layer.keys.shape[-2] < 56 and layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_latents_are_not_packed():
    config = model_named("deepseek_v3").config
    with pytest.warns(UserWarning, match="Nothing of a 'deepseek_v3' model is packed"):
        cache = SQuatCache(config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2


@pytest.mark.parametrize("family", [Gemma3nTextConfig, Gemma4TextConfig])
def test_shared_layers_are_known(family):
    """Of the layers with full attention 0, 2 and 4, the last reads what layer 2 has cached."""
    cache = SQuatCache(family(**models.SHARING))
    assert {index: layer.shared for index, layer in enumerate(cache.layers) if isinstance(layer, SQuatLayer)} == {
        0: False,
        2: True,
    }
    assert not any(
        layer.shared for layer in SQuatCache(family(**{**models.SHARING, "num_kv_shared_layers": 0})).packed_layers
    )


# -- Two calls at once ------------------------------------------------------------------------------------------------

CLASH = "used by two calls at once"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_interleaved_forward_passes_are_refused(name, tokens):
    model = models.build(name)
    cache = SQuatCache(model.config, **EIGHT)

    def other(*_):
        hook.remove()
        with pytest.raises(RuntimeError, match=CLASH):
            model(prompt(1), past_key_values=cache)

    with squat_attention(model):
        model(prompt(56), past_key_values=cache)
        hook = model.model.layers[0].register_forward_hook(other)
        with pytest.raises(RuntimeError, match=CLASH):
            model(prompt(tokens), past_key_values=cache)


def test_an_interrupted_forward_pass_is_noticed_and_reset_helps():
    model = models.build("llama")
    cache = SQuatCache(model.config, **EIGHT)

    def stop(*_):
        hook.remove()
        raise KeyboardInterrupt

    with squat_attention(model):
        hook = model.model.layers[0].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            generate(model, cache, prompt(30))
        with pytest.raises(RuntimeError, match=r"interrupted.*cache\.reset\(\)"):
            generate(model, cache, prompt(56))
        cache.reset()
        assert torch.equal(generate(model, cache, prompt(56)), expected("llama", "greedy"))


def test_an_update_within_an_update_is_refused(monkeypatch):
    cache = SQuatCache(model_named("llama").config)
    new = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    monkeypatch.setattr(cache.layers[0], "lazy_initialization", lambda *_: cache.update(*new, 0))
    with pytest.raises(RuntimeError, match=CLASH):
        cache.update(*new, 0)
    monkeypatch.undo()
    cache.update(*new, 0)


def test_keys_of_an_earlier_pass_are_refused():
    cache = SQuatCache(model_named("llama").config)
    keys, _ = cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    assert keys.sum().isfinite()
    cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    with pytest.raises(RuntimeError, match=CLASH):
        keys.sum()


def test_two_threads_on_one_cache_are_refused():
    model = models.build("llama")
    cache = SQuatCache(model.config, **EIGHT)
    within, over = threading.Event(), threading.Event()
    errors = {}

    def pause(*_):
        """The first thread waits in the middle of its first pass until the second has given up."""
        if threading.current_thread().name == "first" and not within.is_set():
            within.set()
            over.wait(30)

    def run(ids):
        with pytest.raises(RuntimeError, match=CLASH) as caught:
            generate(model, cache, ids)
        errors[threading.current_thread().name] = caught.value

    model.model.layers[0].register_forward_hook(pause)
    with squat_attention(model):
        threads = [
            threading.Thread(target=run, args=(prompt(length),), name=name)
            for length, name in ((40, "first"), (56, "second"))
        ]
        threads[0].start()
        assert within.wait(30)
        threads[1].start()
        threads[1].join(30)
        over.set()
        threads[0].join(30)
    assert set(errors) == {"first", "second"}


# -- Offloading -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_offloading_needs_an_accelerator():
    with pytest.raises(ValueError, match=r"offloading=True.*leave offloading out"):
        SQuatCache(model_named("llama").config, offloading=True)


def tensors(thing) -> list[torch.Tensor]:
    """All tensors in an object's attributes, at any depth."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    parts = thing if isinstance(thing, tuple) else vars(thing).values() if hasattr(thing, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_offload_and_prefetch_move_everything():
    model, mask = model_named("llama"), torch.ones(2, 56, dtype=torch.long)
    mask[0, :45] = 0  # padding among the tokens that wait, which the layer keeps marks of
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        generate(model, cache, prompt(56, batch=2), mask, tokens=1)
    layer = cache.packed_layers[0]
    before = [tensor.clone() for tensor in tensors(layer)]
    assert len(before) >= 2 * 5 + 1 + 3  # keys and values, marks of padding, the subspace
    layer.offload()
    layer.prefetch()
    assert all(map(torch.equal, tensors(layer), before))
    layer.device = torch.device("meta")
    layer.prefetch()
    assert len(tensors(layer)) == len(before)
    assert all(tensor.is_meta for tensor in tensors(layer))


class Stream:
    """An accelerator's stream, where there is none."""

    def wait_stream(self, other): ...
    def __enter__(self): ...
    def __exit__(self, *_): ...


@pytest.mark.parametrize(
    ("name", "order", "log"),
    [
        (
            "llama",
            [0, 1, 0],
            ["fetch 1", "update 0", "offload 0", "fetch 0", "update 1", "offload 1", "fetch 1", "update 0"],
        ),
        # Layer 1 slides, and others read what layer 2 holds: both stay.
        (
            "gemma3n",
            [0, 1, 2, 0],
            ["fetch 2", "update 0", "offload 0", "fetch 2", "update 1", "fetch 0", "update 2", "fetch 2", "update 0"],
        ),
    ],
)
def test_a_layer_is_offloaded_at_the_next_update(monkeypatch, name, order, log):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Stream", Stream)
    cache = SQuatCache(model_named(name).config, offloading=True)
    done = []
    for index, layer in enumerate(cache.layers):
        monkeypatch.setattr(layer, "offload", lambda index=index: done.append(f"offload {index}"))
        monkeypatch.setattr(layer, "prefetch", lambda index=index: done.append(f"fetch {index}"))
        monkeypatch.setattr(layer, "update", lambda *_, index=index: done.append(f"update {index}"))
    elsewhere = torch.empty(1, 2, 1, 16, device="meta")
    for index in order:
        cache.update(elsewhere, elsewhere, index)
    assert done == log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", ["llama", "gemma3n"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "padded"])
def test_offloading_changes_no_token(name, mode):
    model = models.build(name).to(torch.accelerator.current_accelerator())
    with squat_attention(model):
        right, _ = MODES[mode](model, lambda: SQuatCache(model.config, **EIGHT))
        tokens, [cache] = MODES[mode](model, lambda: SQuatCache(model.config, **EIGHT, offloading=True))
    assert cache.packed_layers[0].tokens[0].recent.device.type == "cpu"
    assert torch.equal(tokens, right)
