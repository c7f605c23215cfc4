"""BaFT in models: recorded runs, and positions that stay the same however a text is fed."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_ext import BaftConfig
from hf_ext.tuners.baft import BaftLayer, recorded_weights
from tests.oracles import ORACLES
from tests.tuners.families import DECODER, IDS, build

CLOSE = dict(rtol=1e-4, atol=1e-5)


def adapted(family: str = "llama", **options):
    options = {"r": 4, "init_weights": False, "layers": "all", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(0)
    return get_peft_model(build(family), BaftConfig(**options)).eval()


def edited_tokens(model, **inputs) -> torch.Tensor:
    """At which tokens the first block puts out something else than without the adapter."""
    found = {}
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    hook = blocks[0].register_forward_hook(lambda module, args, output: found.setdefault("hidden", output))
    model(**inputs)
    edited = found.pop("hidden")
    with model.disable_adapter():
        model(
            **{name: value for name, value in inputs.items() if not name.endswith("_mask") or name == "attention_mask"}
        )
    hook.remove()
    return (edited != found["hidden"]).any(-1)


# -- recorded runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(ORACLES / "baft/tiny_llama.safetensors")


@pytest.fixture(params=["last1", "last3"])
def tiny(request, recorded):
    """(positions, the recorded model with its adapter)."""
    settings = json.loads((ORACLES / "baft/tiny_llama_config.json").read_text())
    base = LlamaForCausalLM(LlamaConfig(**settings)).double().eval()
    base.load_state_dict({n[8:]: v for n, v in recorded.items() if n.startswith("weights.")}, strict=False)
    positions = {"last1": "l1", "last3": "l3"}[request.param]
    r = len(recorded["baft.1.b"])
    model = get_peft_model(
        base, BaftConfig(r=r, layers=[1, 2], positions=positions, normalize=False, task_type="CAUSAL_LM")
    )
    model = model.double().eval()
    for layer in model.modules():
        if isinstance(layer, BaftLayer):
            block = layer.name.rpartition(".")[2]
            for key in "RAbUc":
                getattr(layer, f"baft_{key}")["default"].data = recorded[f"baft.{block}.{key}"].clone()
    return request.param, model


@torch.no_grad()
def test_logits_and_hidden_states_of_the_recorded_model(tiny, recorded):
    name, model = tiny
    inputs = {"input_ids": recorded["input_ids"], "attention_mask": recorded["attention_mask"]}
    real = inputs["attention_mask"].bool()
    output = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(output.logits[real], recorded[f"{name}.logits"][real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        output.hidden_states[2][real], recorded[f"{name}.block1_out"][real], rtol=1e-9, atol=1e-9
    )
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits[real], recorded["base_logits"][real], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_continuations_of_the_recorded_model(tiny, recorded, use_cache):
    name, model = tiny
    inputs = {"input_ids": recorded["input_ids"], "attention_mask": recorded["attention_mask"]}
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=use_cache)
    assert torch.equal(model.generate(**inputs, **options)[:, 8:], recorded[f"{name}.greedy"])
    for layer in model.modules():
        if isinstance(layer, BaftLayer):
            layer.positions["default"] = layer.positions["default"]._replace(tail=True)
    assert torch.equal(
        model.generate(**inputs, **options)[:, 8:], recorded[f"{name}.greedy_with_generated_intervened"]
    )


# -- which tokens --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_labels_prompt_masks_and_padding_say_where_prompts_end():
    model = adapted(positions="l1+tail")
    ids = IDS[:, :6]
    labels = ids.clone()
    labels[0, :2], labels[1, :4], labels[2, :] = -100, -100, -100
    expected = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    assert torch.equal(edited_tokens(model, input_ids=ids, labels=labels), expected)
    prompts = (labels == -100).clone()
    assert torch.equal(edited_tokens(model, input_ids=ids, prompt_mask=prompts), expected)
    assert torch.equal(edited_tokens(model, input_ids=ids, intervention_mask=expected), expected)
    for side in ("left", "right"):
        padding = torch.zeros(3, 2, dtype=torch.long)
        join = (lambda x, y: torch.cat([y, x], 1)) if side == "left" else (lambda x, y: torch.cat([x, y], 1))
        inputs = {
            "input_ids": join(ids, padding),
            "attention_mask": join(torch.ones_like(ids), padding),
            "labels": join(labels, padding - 100),
        }
        real = inputs["attention_mask"].bool()
        found = edited_tokens(model, **inputs)
        assert torch.equal(found[real].view(3, 6), expected) and not found[~real].any()


@torch.no_grad()
def test_packed_rows_are_as_the_rows_alone():
    model = adapted(positions="f1+l1+tail")
    rows, labels = IDS[:2, :6], IDS[:2, :6].clone()
    labels[0, :2], labels[1, :4] = -100, -100
    alone = edited_tokens(model, input_ids=rows, labels=labels)
    packed = {"input_ids": rows.reshape(1, -1), "labels": labels.reshape(1, -1)}
    positions = {"position_ids": torch.arange(6).repeat(2)[None]}
    lengths = {"cu_seq_lens_q": torch.tensor([0, 6, 12], dtype=torch.int32), **positions}
    for told in (positions, lengths):
        assert torch.equal(edited_tokens(model, **packed, **told), alone.view(1, -1))


@torch.no_grad()
def test_what_was_not_edited_is_untouched():
    """Bit for bit: other tokens of the edited block, and all earlier tokens of the logits."""
    model = adapted(positions="l2", layers=1)
    with model.disable_adapter():
        before = model(input_ids=IDS).logits
    after = model(input_ids=IDS).logits
    assert torch.equal(after[:, :-2], before[:, :-2]) and not torch.allclose(after[:, -2:], before[:, -2:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reading_in_pieces_is_reading_at_once(family):
    """A cache that is filled in pieces, of fixed or growing size, and prompts in embeddings, give the tokens of one forward pass."""
    model = adapted(family, positions="f2+l3")
    expected = model(input_ids=IDS).logits[:, -1]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    written = model.generate(input_ids=IDS, **options)
    assert torch.equal(written[:, 10], expected.argmax(-1))
    assert torch.equal(model.generate(IDS, **options), written)
    assert torch.equal(model.generate(input_ids=IDS, prefill_chunk_size=4, **options), written)
    assert torch.equal(
        model.generate(input_ids=IDS, cache_implementation="static", disable_compile=True, **options), written
    )
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), written[:, 10:])
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS, past_key_values=cache, use_cache=True)
    step = model(input_ids=written[:, 10:11], past_key_values=cache, use_cache=True).logits[:, -1]
    assert torch.equal(step.argmax(-1), written[:, 11])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["l1", "l1+tail", "f1+tail", "all"])
def test_padded_prompts_with_a_cache_of_fixed_size(positions):
    """Its masks have four dimensions."""
    model = adapted(positions=positions)
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(13) >= 3).long().expand(3, 13)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    written = model.generate(input_ids=IDS, **options)[:, 10:]
    for more in ({"cache_implementation": "static", "disable_compile": True}, {"num_return_sequences": 1}):
        assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options, **more)[:, 13:], written)


@torch.no_grad()
def test_a_conversation_goes_on_with_its_new_tokens_alone():
    """As with all tokens, of which the cache has some."""
    model, found = adapted(positions="f1+l1+tail"), []
    for ids in (IDS, IDS[:, 6:]):
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :6], past_key_values=cache, use_cache=True)
        options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, past_key_values=cache)
        found.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(IDS), **options)[:, -4:])
    assert torch.equal(*found)


@torch.no_grad()
def test_assisted_decoding_writes_what_plain_decoding_does():
    model = adapted(positions="l1+tail")
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    plain = model.generate(input_ids=IDS[:1], **options)
    assert torch.equal(model.generate(input_ids=IDS[:1], assistant_model=build("llama"), **options), plain)
    assert torch.equal(model.generate(input_ids=IDS[:1], prompt_lookup_num_tokens=3, **options), plain)


def test_without_a_task_type_labels_count_too():
    """PEFT's plain class hands a forward pass to the same place as `generate`."""
    model = adapted(positions="l1+tail", task_type=None)
    labels = IDS.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        assert edited_tokens(model, input_ids=IDS, labels=labels)[0].tolist() == [False] * 3 + [True] * 7
    model.train()(input_ids=IDS, labels=labels).loss.backward()


def test_blocks_are_found_beside_experts():
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    )
    adapter = get_peft_model(model, BaftConfig(r=2, task_type="CAUSAL_LM")).peft_config["default"]
    assert adapter.target_modules == {"model.layers.1"} and adapter.layers == [1]


# -- other properties ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_without_any_edit_still_has_gradients():
    """In data parallel training, a rank may have no token that is edited."""
    model = adapted(init_weights=True).train()
    with torch.enable_grad():
        nothing = torch.zeros_like(IDS, dtype=torch.bool)
        model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS, intervention_mask=nothing).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "mlp", "none"])
def test_gates(gate, tmp_path):
    model = adapted(gate=gate, init_weights=True)
    layer = next(module for module in model.modules() if isinstance(module, BaftLayer))
    with layer.calls.recording() as found, torch.no_grad():
        model(input_ids=IDS)
    start = {
        "sigmoid": torch.sigmoid(torch.tensor(-2.0)),
        "softmax": 0.25,
        "mlp": torch.sigmoid(torch.tensor(-2.0)),
        "none": 1.0,
    }
    assert [(each.block, each.adapter) for each in found] == [(f"model.layers.{n}", "default") for n in (0, 1)]
    for each in found:
        torch.testing.assert_close(each.weights, torch.full((3, 4), float(start[gate])))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parts = {"sigmoid": "RAbUc", "softmax": "RAbUc", "mlp": "RAbUcV", "none": "RAb"}[gate]
    assert {name.rpartition(".")[2] for name in saved} == {
        *(f"baft_{part}" for part in parts),
        "baft_usage",
        "baft_state",
    }
    assert all(tensor.numel() <= 4 * 64 for tensor in saved.values())
    with torch.no_grad():
        torch.testing.assert_close(
            PeftModel.from_pretrained(build("llama"), tmp_path).eval()(input_ids=IDS).logits, expected, **CLOSE
        )


@torch.no_grad()
def test_a_normalised_gate_does_not_see_how_large_states_are():
    for normalize in (True, False):
        model = adapted(layers=[0], normalize=normalize)
        (layer,) = (module for module in model.modules() if isinstance(module, BaftLayer))
        hidden, found = torch.randn(5, 64), []
        for scale in (1.0, 100.0):
            with recorded_weights(model) as weights:
                layer._moved("default", scale * hidden)
            found.append(weights[0].edited())
        assert torch.allclose(*found, atol=1e-5) is normalize


@torch.no_grad()
def test_two_adapters_at_once_follow_each_other():
    model = adapted(layers=[0], positions="all")
    torch.manual_seed(1)
    second = BaftConfig(r=2, layers=[0], positions="l1", init_weights=False, gate="none", task_type="CAUSAL_LM")
    model.add_adapter("second", second)
    (layer,) = (module for module in model.modules() if isinstance(module, BaftLayer))
    found = {}
    block = model.get_submodule("base_model.model.model.layers.0")
    model.base_model.set_adapter(["default", "second"])
    with model.disable_adapter():
        hook = block.register_forward_hook(lambda module, args, output: found.setdefault("plain", output))
        model(input_ids=IDS)
        hook.remove()
    hook = block.register_forward_hook(lambda module, args, output: found.setdefault("both", output))
    model(input_ids=IDS)
    hook.remove()
    last = layer._moved("second", layer._moved("default", found["plain"][:, -1]))
    torch.testing.assert_close(found["both"][:, -1], last, **CLOSE)
    torch.testing.assert_close(found["both"][:, :-1], layer._moved("default", found["plain"][:, :-1]), **CLOSE)


@torch.no_grad()
def test_editing_is_scored_at_the_tokens_that_generation_edits():
    """With the prompt mask, the evaluator's teacher-forced predictions are those of greedy decoding."""
    model = adapted(positions="l1+tail", init_weights=False)
    written = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    prompts = torch.arange(14).expand(3, 14) < 10
    forced = model(input_ids=written, prompt_mask=prompts).logits.argmax(-1)
    assert torch.equal(forced[:, 9:13], written[:, 10:])


@torch.no_grad()
def test_unload_after_a_copy_removes_the_hooks_of_the_copy_alone():
    model = adapted()
    twin = copy.deepcopy(model)
    expected = model(input_ids=IDS).logits
    base = twin.unload()
    assert torch.equal(base(input_ids=IDS).logits, build("llama")(input_ids=IDS).logits)
    assert not any(isinstance(module, BaftLayer) for module in base.modules())
    assert torch.equal(model(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_weights_of_a_compiled_model_are_those_of_the_edited_tokens():
    model, found = adapted(), []
    torch._dynamo.reset()
    for each in (model, torch.compile(model, backend="eager")):
        with recorded_weights(model) as weights:
            each(input_ids=IDS)
        found.append([recorded.edited() for recorded in weights])
    torch._dynamo.reset()
    torch.testing.assert_close(*found)


def test_narrow_adapters_that_are_loaded_for_use_are_frozen(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = build("llama").to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.bfloat16, False)}


def test_no_tensor_of_a_pass_is_kept():
    model = adapted().train()
    loss = model(input_ids=IDS, labels=IDS).loss
    copy.deepcopy(model)
    loss.backward()


@torch.no_grad()
def test_new_basis_vectors_leave_the_old_ones_as_they_are():
    for gate in ("sigmoid", "mlp", "none"):
        model = adapted(gate=gate)
        expected = model(input_ids=IDS).logits
        for layer in model.modules():
            if isinstance(layer, BaftLayer):
                layer.grow("default", BaftConfig(r=4, gate=gate), 3)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, **CLOSE)
    model.train()
    with torch.enable_grad():
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        if "baft_A" in name:
            assert not p.grad[:4].any() and p.grad[4:].any()


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"r": 65}, "r=65"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": [0, 2]}, r"layers=\[0, 2\].*2 blocks.*there is no 2"),
        ({"layers": -1}, "layers=-1"),
        ({"layers": "some"}, "layers='some'"),
        ({"positions": "x1"}, "positions='x1'"),
        ({"positions": ""}, "positions=''"),
        ({"gate": "tanh"}, "gate='tanh'"),
        ({"gate": "none", "gate_bias": -1.0}, "gate_bias=-1.0"),
        ({"layers": 0, "target_modules": ["model.layers.1"]}, "name different blocks"),
        ({"layers": None, "target_modules": ["absent"]}, "absent.*not found"),
        (
            {"layers": None, "target_modules": ["q_proj"]},
            r"q_proj' is no block of the model.*'model.layers.0' to 'model.layers.1'",
        ),
        ({"positions": None}, "positions=None"),
        ({"target_modules": "all-linear"}, "BaFT edits what blocks put out"),
    ],
)
def test_settings_that_cannot_be(options, named):
    with pytest.raises(ValueError, match=named):
        adapted(**options)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"intervention_mask": torch.ones(3, 9, dtype=torch.bool)}, r"intervention_mask of shape \(3, 9\)"),
        ({"intervention_mask": torch.ones(3, 10)}, "intervention_mask.*float32"),
        ({"prompt_mask": torch.ones(1, 10, dtype=torch.bool)}, r"prompt_mask of shape \(1, 10\)"),
        ({"attention_mask": torch.ones(3, 9)}, r"attention_mask of shape \(3, 9\)"),
        ({"attention_mask": torch.ones(3, 1, 10, 10)}, "attention_mask.*two dimensions"),
    ],
)
def test_masks_that_do_not_fit(inputs, named):
    with pytest.raises(ValueError, match=named):
        adapted()(input_ids=IDS, **inputs)


def test_parts_of_the_model_cannot_be_called_alone():
    model = adapted()
    with pytest.raises(ValueError, match="call the model itself"):
        model.get_base_model().model(input_ids=IDS)
    model(input_ids=IDS)


def test_merging_says_why_not():
    for method in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            getattr(adapted(), method)()
