"""The contract: what users of LoRA rely on holds for every tuner of ours, in every family of models."""

import contextlib
import copy
import pickle

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn

from tests.tuners.adapted import CLOSE, DECODERS, MATRIX, SAME, adapted, layers, own, train, trainable
from tests.tuners.contract import config
from tests.tuners.families import FAMILIES, IDS, build, loss, output

# -- in every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
@torch.no_grad()
def test_starts_as_the_base_model(tuner, family):
    expected = output(build(family), family)
    fresh = output(adapted(tuner, family, identity=True), family)
    torch.testing.assert_close(fresh, expected, rtol=0, atol=tuner.rounding)
    assert not torch.allclose(output(adapted(tuner, family), family), expected)


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
def test_training_changes_the_adapter_alone(tuner, family):
    model = adapted(tuner, family, identity=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, family)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= set(trainable(model))
    assert {name.split(".default")[0].rpartition(".")[0] for name in changed & set(own(model))} == set(layers(model))


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
@torch.no_grad()
def test_saves_and_loads_bit_for_bit(tuner, family, tmp_path):
    model = adapted(tuner, family)
    expected = output(model, family)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == model.peft_config["default"].peft_type
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(build(family), tmp_path, **options).eval()
        found = {name.replace(".other", ".default"): value for name, value in loaded.state_dict().items()}
        assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
        torch.testing.assert_close(output(loaded, family), expected, **SAME)
        assert not trainable(loaded)
    trainable_again = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert set(trainable(trainable_again)) == set(trainable(model))


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
@torch.no_grad()
def test_several_adapters(tuner, family):
    model = adapted(tuner, family)
    plain, first = output(build(family), family), output(model, family)
    torch.manual_seed(1)
    model.add_adapter("second", config(tuner, family, r=2))
    assert torch.equal(output(model, family), first)
    model.set_adapter("second")
    model.eval()
    second = output(model, family)
    assert not torch.allclose(second, first)
    assert all(".second" in name for name in trainable(model))
    with model.disable_adapter():
        assert torch.equal(output(model, family), plain)
    assert torch.equal(output(model, family), second)
    model.set_adapter("default")
    assert torch.equal(output(model, family), first)
    model.delete_adapter("second")
    assert torch.equal(output(model, family), first)
    assert not any(".second" in name for name in model.state_dict())
    assert torch.equal(output(model.unload(), family), plain)


@pytest.mark.parametrize(("tuner", "family"), [p for p in MATRIX if p.values[0].merges])
@torch.no_grad()
def test_merges_and_takes_back(tuner, family):
    model = adapted(tuner, family)
    plain, expected = output(build(family), family), output(model, family)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(output(model, family), expected, **CLOSE)
        model.unmerge_adapter()
        torch.testing.assert_close(output(model, family), expected, **CLOSE)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(output(model, family), plain, **CLOSE)
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    torch.testing.assert_close(output(merged, family), expected, **CLOSE)


@pytest.mark.parametrize(("tuner", "family"), DECODERS)
@torch.no_grad()
def test_an_adapter_for_each_row(tuner, family):
    model = adapted(tuner, family)
    torch.manual_seed(1)
    model.add_adapter("second", config(tuner, family, r=2))
    model.eval()
    names, ids = ["second", "__base__", "default"], IDS
    found = model(input_ids=ids, adapter_names=names).logits
    written = model.generate(input_ids=ids, adapter_names=names, num_beams=2, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        alone = model.disable_adapter() if name == "__base__" else contextlib.nullcontext(model.set_adapter(name))
        with alone:
            model.eval()
            torch.testing.assert_close(found[row], model(input_ids=ids[row : row + 1]).logits[0], **CLOSE)
            own = model.generate(input_ids=ids[row : row + 1], num_beams=2, max_new_tokens=4, do_sample=False)[0]
            assert torch.equal(written[row][: len(own)], own)
    model.set_adapter("default")
    torch.testing.assert_close(model.eval()(input_ids=ids).logits[2], found[2], **CLOSE)
    with pytest.raises(ValueError, match="absent"):
        model(input_ids=ids, adapter_names=["absent"] * 3)
    with pytest.raises(ValueError, match=r"same as the number of inputs|adapter_names=\[\]: give one for each row"):
        model(input_ids=ids, adapter_names=[])
    with pytest.raises(ValueError, match=r"same as the number of inputs|2 names for 3 rows"):
        model(input_ids=ids, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="adapter_names"):
        model.train()(input_ids=ids, adapter_names=names)


@pytest.mark.parametrize(("tuner", "family"), [p for p in MATRIX if p.values[1] in ("bert", "vit")])
@torch.no_grad()
def test_an_adapter_and_a_head_for_each_row(tuner, family):
    options = {"modules_to_save": ["classifier"], "task_type": None}
    model = adapted(tuner, family, **options)
    torch.manual_seed(1)
    model.add_adapter("second", config(tuner, family, **options))
    heads = dict(model.named_modules())["base_model.model.classifier"].modules_to_save
    for head in heads.values():
        nn.init.normal_(head.weight)
    model.eval()
    names = ["second", "__base__", "default"]
    found = model(**FAMILIES[family].inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model.disable_adapter() if name == "__base__" else contextlib.nullcontext(model.set_adapter(name))
        with alone:
            torch.testing.assert_close(found[row], output(model.eval(), family)[row], **CLOSE)


@pytest.mark.parametrize(("tuner", "family"), [p for p in MATRIX if p.values[0].merges])
@torch.no_grad()
def test_two_adapters_at_once_and_merged(tuner, family):
    # Without a task: PEFT would save the classifier, of which only one can be active.
    model = adapted(tuner, family, task_type=None)
    torch.manual_seed(1)
    model.add_adapter("second", config(tuner, family, r=2, task_type=None))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    both = output(model, family)
    merged = copy.deepcopy(model)
    merged.merge_adapter(["default"])
    merged.merge_adapter(["second"])
    torch.testing.assert_close(output(merged, family), both, **CLOSE)
    torch.testing.assert_close(output(model.merge_and_unload(), family), both, **CLOSE)


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
@torch.no_grad()
def test_copies_and_pickles(tuner, family):
    model = adapted(tuner, family)
    expected = output(model, family)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, family), expected)
        for p in own(other).values():
            nn.init.zeros_(p)
    assert torch.equal(output(model, family), expected)


@pytest.mark.parametrize(("tuner", "family"), [p for p in MATRIX if p.values[1] not in ("unet", "resnet")])
def test_gradient_checkpointing_changes_nothing(tuner, family):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(tuner, family).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads() if family != "vit" else None
        torch.manual_seed(0)
        loss(model, family).backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert all(grad is not None for grad in gradients[0].values())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tuner, family, dtype):
    """A base in half precision has adapters in float32, unless it is asked not to."""
    base = build(family).to(dtype)
    model = get_peft_model(base, config(tuner, family))
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    whole = adapted(tuner, family)
    whole.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    inputs = FAMILIES[family].inputs
    halved = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        found = model.eval()(**halved)[0 if family == "unet" else "logits"].float()
        torch.testing.assert_close(found, output(whole.eval(), family), rtol=0.05, atol=0.1)
    narrow = get_peft_model(build(family).to(dtype), config(tuner, family), autocast_adapter_dtype=False)
    assert {p.dtype for p in own(narrow).values()} == {dtype}
    assert narrow.eval()(**halved)[0 if family == "unet" else "logits"].isfinite().all()


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tuner, family, dtype):
    model = adapted(tuner, family)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(model, family)
    found.float().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trainable(model).values())
    torch.testing.assert_close(found.detach().float(), loss(model, family).detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("tuner", "family"), MATRIX)
def test_compiles_without_graph_breaks(tuner, family):
    torch._dynamo.reset()
    model = adapted(tuner, family)
    inputs = dict(FAMILIES[family].inputs)
    if family != "t5":  # which makes the decoder's inputs of them
        inputs.pop("labels", None)  # the loss of transformers logs a warning, which breaks a graph
    compiled = torch.compile(model, fullgraph=family not in ("t5", "unet"), backend="eager")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found, expected = (m(**inputs)[0 if family == "unet" else "logits"] for m in (compiled, model))
            torch.testing.assert_close(found, expected, **CLOSE)
    torch._dynamo.reset()


# -- generation ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuner", "family"), DECODERS)
@torch.no_grad()
def test_generates_alike_with_and_without_cache_beams_and_padding(tuner, family):
    model = adapted(tuner, family)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    cached = model.generate(input_ids=IDS, **options)
    assert torch.equal(model.generate(input_ids=IDS, use_cache=False, **options), cached)
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(13) >= 3).long().expand(3, 13)
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 3:], cached)
    beams = model.generate(input_ids=IDS, num_beams=3, **options)
    assert beams.shape == cached.shape
    alone = model.generate(input_ids=IDS[:1], num_beams=3, **options)
    assert torch.equal(alone, beams[:1])
    if tuner.merges:
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(merged.generate(input_ids=IDS, num_beams=3, **options), beams)
