"""LoR-VP in image models: prompting the pixels without touching them, folding, sizes, rows, and what stays frozen."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_ext import LorVpConfig
from hf_ext.tuners.lorvp import LorVpConvolution, reference
from tests.tuners.lorvp.families import BUILD, CLASSES, FOLDS, SIZE, build, pictures, scores

SCALE = [2.0, 2.5, 4.0]
# Differences of rounding grow on their way through a model.
CLOSE = dict(rtol=1e-4, atol=1e-5)
KINDS = [
    {"r": 2},
    {"r": 2, "prompt": "low_rank_shared"},
    {"prompt": "frame", "width": 4},
    {"prompt": "tile", "width": 5},
    {"prompt": "free"},
]


def adapted(family: str, **options):
    config = LorVpConfig(
        **{"image_size": SIZE, "pixel_scale": SCALE, "head": "none", "init_weights": False, **options}
    )
    return get_peft_model(build(family), config).eval()


def layer_of(model) -> LorVpConvolution:
    (layer,) = [module for module in model.modules() if isinstance(module, LorVpConvolution)]
    return layer


def added(model, adapter: str = "default") -> torch.Tensor:
    return reference.scaled(layer_of(model).prompt(adapter), SCALE)


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.get("prompt", "low_rank"))
def test_equals_prompted_pixels(family, kind):
    model, base, pixels = adapted(family, **kind), build(family), pictures()
    found, expected = scores(model, pixels, family), scores(base, pixels + added(model), family)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, scores(base, pixels, family), rtol=1e-3)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(found.square().sum(), weights)
    theirs = torch.autograd.grad(expected.square().sum(), weights)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("family", BUILD)
@torch.no_grad()
def test_starts_as_the_base_model_and_disables_to_it(family):
    pixels, expected = pictures(), scores(build(family), pictures(), family)
    assert torch.equal(scores(adapted(family, init_weights=True), pixels, family), expected)
    model = adapted(family)
    with model.disable_adapter():
        assert torch.equal(scores(model, pixels, family), expected)


@pytest.mark.parametrize("family", BUILD)
@torch.no_grad()
def test_folds(family, tmp_path):
    model, pixels = adapted(family), pictures(3)
    expected = scores(model, pixels, family)
    if family in FOLDS:
        merged = copy.deepcopy(model).merge_and_unload(fold="positions")
        assert set(merged.state_dict()) == set(build(family).state_dict())
        merged.save_pretrained(tmp_path)
        again = type(build(family)).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(scores(again, pixels, family), expected, **CLOSE)
    else:
        with pytest.raises(ValueError, match="fold"):
            model.merge_and_unload(fold="positions")
        torch.testing.assert_close(scores(model, pixels, family), expected, **CLOSE)
        assert not layer_of(model).merged
        with pytest.warns(UserWarning, match="save the adapter, not the merged model"):
            merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(scores(merged, pixels, family), expected, **CLOSE)
    mapped = model.merge_and_unload(fold="map")
    assert [name for name in mapped.state_dict() if name.endswith("spatial_bias")]
    torch.testing.assert_close(scores(copy.deepcopy(mapped), pixels, family), expected, **CLOSE)
    if family in ("resnet", "convnext"):
        with pytest.raises(ValueError, match="spatial_bias: the prompt was merged for"):
            scores(mapped, pictures(size=2 * SIZE), family)


def test_merging_asks_for_a_way_that_exists():
    with pytest.raises(ValueError, match="fold='absent': choose one of"):
        adapted("vit").merge_and_unload(fold="absent")


@torch.no_grad()
def test_unmerging_is_exact_and_broken_prompts_are_not_merged():
    model, pixels = adapted("vit"), pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = scores(model, pixels, "vit")
    model.merge_adapter()
    layer = layer_of(model)
    layer.lorvp_B["default"].add_(1.0)  # what is merged stays
    assert torch.equal(scores(model, pixels, "vit"), expected)
    layer.lorvp_B["default"].copy_(
        before["base_model.model.vit.embeddings.patch_embeddings.projection.lorvp_B.default"]
    )
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer.lorvp_B["default"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


@torch.no_grad()
def test_the_map_is_kept_until_something_changes():
    model, pixels = adapted("vit"), pictures()
    model.requires_grad_(False)
    layer, calls = layer_of(model), []
    layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    scores(model, pixels, "vit"), scores(model, pixels, "vit")
    assert len(calls) == 3  # the pictures twice, the prompt once
    first = scores(model, pixels, "vit")
    layer.lorvp_A["default"].mul_(2.0)
    assert not torch.allclose(scores(model, pixels, "vit"), first)
    layer.get_base_layer().weight.mul_(2.0)
    torch.testing.assert_close(layer(pixels), layer.get_base_layer()(pixels + added(model)), **CLOSE)
    model.double()
    torch.testing.assert_close(
        layer(pixels.double()), layer.get_base_layer()(pixels.double() + added(model)), rtol=1e-9, atol=1e-9
    )


def test_what_is_trained_is_never_kept():
    """Fused optimizers, which `Trainer` takes by default, write without PyTorch's counting it."""
    model, pixels = adapted("vit", init_weights=True), pictures()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            before = scores(model, pixels, "vit")
        scores(model, pixels, "vit").sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = scores(model, pixels, "vit")
            assert not torch.allclose(after, before)
            torch.testing.assert_close(after, scores(build("vit"), pixels + added(model), "vit"), **CLOSE)


def test_evaluations_along_a_training_see_it(tmp_path):
    rows = [{"pixel_values": picture, "labels": number % CLASSES} for number, picture in enumerate(pictures(16))]
    args = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, learning_rate=0.05, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        per_device_train_batch_size=8, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, bf16=False,
    )  # fmt: skip
    model = adapted("resnet", init_weights=True)
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len({first, *losses}) >= 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses[1:]), abs=1e-5)


@torch.no_grad()
def test_a_merged_map_can_be_adapted_and_merged_again():
    pixels = pictures()
    first = adapted("resnet")
    second = added(first).clone()
    with pytest.warns(UserWarning, match="save the adapter"):
        merged = first.merge_and_unload()
    expected = scores(merged, pixels, "resnet")
    again = get_peft_model(merged, LorVpConfig(image_size=SIZE, pixel_scale=SCALE, head="none")).eval()
    torch.testing.assert_close(scores(again, pixels, "resnet"), expected, **CLOSE)
    nn.init.normal_(layer_of(again).lorvp_B["default"])
    both = scores(build("resnet"), pixels + second + added(again), "resnet")
    torch.testing.assert_close(scores(again, pixels, "resnet"), both, **CLOSE)
    torch.testing.assert_close(scores(again.merge_and_unload(fold="map"), pixels, "resnet"), both, **CLOSE)


@torch.no_grad()
def test_folding_where_it_cannot_be_tried():
    """A prompt for pictures of another size than the model's positions."""
    model, pixels = adapted("siglip", image_size=16), pictures(size=16)
    expected = model(pixel_values=pixels, interpolate_pos_encoding=True).logits
    with pytest.raises(ValueError, match=r"no table of positions|cannot be tried"):
        model.merge_and_unload(fold="positions")
    with pytest.warns(UserWarning, match="save the adapter"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values=pixels, interpolate_pos_encoding=True).logits, expected, **CLOSE)


@torch.no_grad()
def test_folds_the_adapter_that_is_merged():
    model = adapted("vit", image_size=2 * SIZE, resize_prompt=True)
    model.add_adapter("second", LorVpConfig(image_size=SIZE, pixel_scale=SCALE, head="none", init_weights=False))
    both = copy.deepcopy(model)
    model.set_adapter("second")
    expected = scores(model.eval(), pictures(), "vit")
    torch.testing.assert_close(scores(model.merge_and_unload(fold="positions"), pictures(), "vit"), expected, **CLOSE)
    with pytest.raises(ValueError, match="for pictures of different sizes"):
        both.merge_and_unload(adapter_names=["default", "second"])


def test_prompts_are_computed_wide_under_autocast():
    model = adapted("vit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_of(model)._scaled_prompt("default").dtype == torch.float32


def test_models_that_pad_by_themselves_say_so():
    config = MobileNetV2Config(image_size=SIZE, num_labels=CLASSES)
    model = get_peft_model(MobileNetV2ForImageClassification(config), LorVpConfig(pixel_scale=SCALE))
    with pytest.raises(ValueError, match="the model pads them in a way that LoR-VP does not know"):
        model(pixel_values=pictures())


@torch.no_grad()
def test_pictures_of_another_size():
    model = adapted("resnet")
    with pytest.raises(
        ValueError,
        match="for pictures of 32 x 32 pixels, and these have 64 x 48: resize them, or set resize_prompt=True",
    ):
        model(pixel_values=torch.zeros(1, 3, 64, 48))
    model = adapted("resnet", resize_prompt=True)
    pixels = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    expected = scores(build("resnet"), pixels + reference.resized(added(model), 64, 48), "resnet")
    for _ in range(2):
        torch.testing.assert_close(scores(model, pixels, "resnet"), expected, **CLOSE)
        scores(model, pictures(), "resnet")


@torch.no_grad()
def test_a_prompt_for_each_row(tmp_path):
    model = adapted("vit")
    torch.manual_seed(3)
    model.add_adapter(
        "second", LorVpConfig(prompt="free", image_size=SIZE, pixel_scale=SCALE, head="none", init_weights=False)
    )
    model.eval()
    pixels, names = pictures(4), ["second", "__base__", "default", "second"]
    found = scores(model, pixels, "vit", adapter_names=names)
    for row, name in enumerate(names):
        own = pixels[row : row + 1] + (0 if name == "__base__" else added(model, name))
        torch.testing.assert_close(found[row], scores(build("vit"), own, "vit")[0], **CLOSE)
    for wrong, message in ((["absent"] * 4, "absent"), (["default"] * 3, "3 names for 4 rows")):
        with pytest.raises(ValueError, match=message):
            scores(model, pixels, "vit", adapter_names=wrong)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        scores(model, pixels, "vit", adapter_names=names)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="they are for inference"):
        scores(model.train(), pixels, "vit", adapter_names=names)


@torch.no_grad()
def test_a_prompt_and_a_classifier_for_each_row():
    model = adapted("vit", head="linear")
    model.add_adapter("second", LorVpConfig(image_size=SIZE, pixel_scale=SCALE, init_weights=False))
    for name in ("default", "second"):
        nn.init.normal_(model.base_model.model.classifier.modules_to_save[name].weight)
    model.eval()
    pixels, names = pictures(3), ["second", "default", "__base__"]
    found = scores(model, pixels, "vit", adapter_names=names)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        model.eval()
        torch.testing.assert_close(found[row], scores(model, pixels, "vit")[row], **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(found[2], scores(model, pixels, "vit")[2], **CLOSE)


# -- what stays frozen --------------------------------------------------------------------------------------------------


def _trained(model, steps: int = 3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        model.train()  # as `Trainer` does
        model(pixel_values=pictures(4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _frozen_state(model) -> dict[str, torch.Tensor]:
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lorvp_" not in name and "classifier" not in name
    }


@pytest.mark.parametrize("injected", [False, True])
def test_statistics_stay(injected, tmp_path):
    base = build("resnet")
    before = {name: value.clone() for name, value in _frozen_state(base).items()}
    if injected:
        model = base
        model.add_adapter(LorVpConfig(image_size=SIZE, pixel_scale=SCALE))
    else:
        model = get_peft_model(base, LorVpConfig(image_size=SIZE, pixel_scale=SCALE))
    _trained(model)
    after = _frozen_state(model)
    assert set(after) == set(before) and all(torch.equal(after[name], value) for name, value in before.items())
    model.save_pretrained(tmp_path)
    loaded = build("resnet")
    loaded.load_adapter(str(tmp_path))
    torch.testing.assert_close(scores(loaded.eval(), pictures(), "resnet"), scores(model, pictures(), "resnet"))


def test_statistics_move_if_asked():
    model = _trained(
        get_peft_model(build("resnet"), LorVpConfig(image_size=SIZE, pixel_scale=SCALE, freeze_norm=False))
    )
    before, after = _frozen_state(build("resnet")), _frozen_state(model)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)


def test_dropout_rests_and_checkpointing_works():
    model = build("vit")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model = get_peft_model(model, LorVpConfig(image_size=SIZE, pixel_scale=SCALE, init_weights=False))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(pixel_values=pictures(4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert blocks and all(block.training for block in blocks)  # else nothing would be checkpointed


def test_compiles_while_training():
    torch._dynamo.reset()
    model = adapted("resnet")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for mode in (True, False):
        model.train(mode)
        torch.testing.assert_close(compiled(pixel_values=pictures()).logits, model(pixel_values=pictures()).logits)
    torch._dynamo.reset()


def test_loads_in_a_base_of_another_number_of_classes(tmp_path):
    """The classifier is saved with the prompt, so that the base's own does not matter."""
    build("vit").save_pretrained(tmp_path / "base")
    options = dict(num_labels=3, ignore_mismatched_sizes=True)
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base", **options)
    model = get_peft_model(base, LorVpConfig(pixel_scale=SCALE, init_weights=False)).eval()
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    expected = scores(model, pictures(), "vit")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "base", **options)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(scores(loaded, pictures(), "vit"), expected, **CLOSE)
    assert expected.shape[-1] == 3 != CLASSES
