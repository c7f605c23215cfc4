"""The contract: what users of LoRA rely on holds for every tuner of ours, in every family of models."""

import contextlib
import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig

from tests.tuners.contract import TUNERS, Tuner, config
from tests.tuners.families import FAMILIES, GENERATING, IDS, build, loss, output

MATRIX = [pytest.param(tuner, family, id=f"{tuner.name}-{family}") for tuner in TUNERS for family in tuner.families]
EACH = [pytest.param(tuner, id=tuner.name) for tuner in TUNERS]
LINEAR = [pytest.param(tuner, id=tuner.name) for tuner in TUNERS if tuner.linear]
DECODERS = [p for p in MATRIX if p.values[1] in GENERATING]
CLOSE = dict(rtol=1e-4, atol=1e-5)
# Tensors that are read from a file lie at other addresses, which changes the last bit of products.
SAME = dict(rtol=1e-5, atol=1e-5)


def adapted(tuner: Tuner, family: str, **options):
    return get_peft_model(build(family), config(tuner, family, **options)).eval()


def layers(model) -> dict[str, BaseTunerLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def trainable(model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def own(model) -> dict[str, nn.Parameter]:
    """Without the classifier that PEFT saves with an adapter."""
    return {name: p for name, p in trainable(model).items() if "modules_to_save" not in name}


def train(model, family: str, steps: int = 3, rate: float = 1e-2) -> list[float]:
    model.train()
    optimizer, losses = torch.optim.SGD(trainable(model).values(), lr=rate), []
    for _ in range(steps):
        now = loss(model, family)
        now.backward()
        losses.append(float(now))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


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


# -- ways in -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", LINEAR)
def test_targets_by_name_expression_and_all(tuner):
    def names(**options) -> set[str]:
        model = get_peft_model(build("llama"), tuner.config(True, task_type="CAUSAL_LM", **options))
        return {name.removeprefix("base_model.model.model.layers.") for name in layers(model)}

    both = {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert names(target_modules=["q_proj"]) == both
    assert names(target_modules=r".*\.1\..*q_proj") == {"1.self_attn.q_proj"}
    assert names(target_modules=["q_proj"], layers_to_transform=0) == {"0.self_attn.q_proj"}
    assert names(target_modules=["q_proj"], exclude_modules=r".*\.0\..*") == {"1.self_attn.q_proj"}
    linear = names(target_modules="all-linear")
    assert len(linear) == 2 * 7 and both <= linear
    assert names() >= both  # the model's defaults
    with pytest.raises(ValueError, match="not found in the base model"):
        names(target_modules=["absent"])


@pytest.mark.parametrize("tuner", LINEAR)
@pytest.mark.parametrize(("kind", "family"), [("convolution", "vit"), ("convolution", "unet"), ("embedding", "llama")])
def test_other_kinds_of_layers(tuner, kind, family):
    name = getattr(FAMILIES[family], kind)
    if kind not in tuner.layers:
        with pytest.raises(ValueError, match=f"{name}.*type"):
            adapted(tuner, family, target_modules=[name])
        return
    model = adapted(tuner, family, target_modules=[name])
    with torch.no_grad():
        expected = output(model, family)
        assert not torch.allclose(expected, output(build(family), family))
    losses = train(copy.deepcopy(model), family, steps=2)
    assert losses[1] != losses[0]
    with torch.no_grad():
        torch.testing.assert_close(output(model.merge_and_unload(), family), expected, **CLOSE)


@pytest.mark.parametrize("tuner", EACH)
@torch.no_grad()
def test_auto_classes(tuner, tmp_path):
    classes = {
        "llama": AutoPeftModelForCausalLM,
        "t5": AutoPeftModelForSeq2SeqLM,
        "bert": AutoPeftModelForSequenceClassification,
        "vit": AutoPeftModel,
    }
    for family, auto in classes.items():
        if family not in tuner.families:
            continue
        base = build(family)
        base.save_pretrained(tmp_path / family / "base")
        base.name_or_path = str(tmp_path / family / "base")
        model = get_peft_model(base, config(tuner, family)).eval()
        expected = output(model, family)
        model.save_pretrained(tmp_path / family / "adapter")
        loaded = auto.from_pretrained(tmp_path / family / "adapter").eval()
        torch.testing.assert_close(output(loaded, family), expected, **SAME)


@pytest.mark.parametrize(("tuner", "family"), [p for p in MATRIX if p.values[1] not in ("unet", "bert")])
def test_injected_through_transformers(tuner, family, tmp_path):
    """`add_adapter` leaves no tuner behind: the layers work alone."""
    model = build(family)
    plain = output(model, family).detach()
    model.add_adapter(config(tuner, family))
    train(model, family)
    expected = output(model, family).detach()
    model.save_pretrained(tmp_path)
    loaded = build(family)
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(output(loaded.eval(), family), expected, **SAME)
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    loaded.set_adapter("again")
    torch.testing.assert_close(output(loaded, family), expected, **SAME)
    loaded.disable_adapters()
    torch.testing.assert_close(output(loaded, family), plain, **SAME)
    loaded.enable_adapters()
    loaded.delete_adapter("again")
    loaded.set_adapter("default")
    torch.testing.assert_close(output(loaded, family), expected, **SAME)


@pytest.mark.parametrize("tuner", [p for p in EACH if "unet" in p.values[0].families])
def test_injected_through_diffusers(tuner):
    model = build("unet")
    plain = output(model, "unet").detach()
    model.add_adapter(config(tuner, "unet"))
    whole = output(model, "unet").detach()
    assert not torch.allclose(whole, plain)
    model.set_adapters(["default"], weights=[0.0])
    torch.testing.assert_close(output(model, "unet"), plain)
    model.set_adapters(["default"], weights=[1.0])
    torch.testing.assert_close(output(model, "unet"), whole)
    model.fuse_lora()
    torch.testing.assert_close(output(model, "unet"), whole, **CLOSE)
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(output(model, "unet"), plain, **CLOSE)


@pytest.mark.parametrize("tuner", EACH)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(tuner, bits, tmp_path):
    family = tuner.families[0]
    build(family).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[FAMILIES[family].head],
    )

    def base():
        kind = type(build(family))
        return kind.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")

    model = get_peft_model(base(), config(tuner, family))
    before = loss(model, family).item()
    train(model, family, steps=5, rate=0.05)
    assert loss(model, family).item() < before
    with torch.no_grad():
        expected = output(model, family)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        assert torch.equal(output(loaded, family), expected)
        if tuner.merges:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # merging rounds anew
                merged = output(model.merge_and_unload(), family)
            assert (merged - expected).norm() < (0.4 if bits == 4 else 0.1) * expected.norm()


@pytest.mark.parametrize("tuner", EACH)
def test_modules_to_save_and_status(tuner, tmp_path):
    family = tuner.families[0]
    model = adapted(tuner, family, modules_to_save=[FAMILIES[family].head])
    train(model, family)
    expected = output(model, family).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(output(loaded, family), expected)
    status = model.get_model_status()
    # PEFT counts the head that is saved.
    assert (status.enabled, status.active_adapters, status.num_adapter_layers) == (
        True,
        ["default"],
        len(layers(model)) + 1,
    )
    assert status.peft_types == {"default": model.peft_config["default"].peft_type.value}
    assert all(row.enabled and row.available_adapters == ["default"] for row in model.get_layer_status())


# -- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [pytest.param(r, id=f"{tuner.name}-{r.situation[:20]}") for tuner in TUNERS for r in tuner.refusals],
)
def test_refusals(refusal):
    with pytest.raises((ValueError, NotImplementedError), match=refusal.error):
        refusal.attempt()


def test_every_refusal_is_on_the_page_and_no_other():
    page = (Path(__file__).parents[2] / "docs/TUNERS.md").read_text()
    table = page.split("## What is refused")[1]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    wanted = [f"| {tuner.name} | {r.situation} | {r.reason} |" for tuner in TUNERS for r in tuner.refusals]
    assert rows == wanted
