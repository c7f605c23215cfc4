"""The contract, continued: the ways to a tuner, by PEFT, transformers and diffusers, with quantised bases; and what is refused."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
)
from transformers import BitsAndBytesConfig

from tests.tuners.adapted import CLOSE, EACH, LINEAR, MATRIX, SAME, adapted, layers, train
from tests.tuners.contract import TUNERS, config
from tests.tuners.families import FAMILIES, build, loss, output


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
