"""The layer: nothing of the size of the weight, features that are kept no longer than they are true, merging, kinds of layers."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeanutConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_ext import NeatConfig
from hf_ext.tuners.neat import NeatLayer
from tests.conftest import make_tiny_llama
from tests.tuners.neat.conftest import make_layer, make_model, neat_config


def neat_layers(model) -> list[NeatLayer]:
    return [module for module in model.modules() if isinstance(module, NeatLayer)]


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that anything computes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("side", ["input", "output"])
def test_nothing_of_the_size_of_the_weight_is_computed_or_saved(side):
    base = nn.Linear(256, 384, dtype=torch.bfloat16).requires_grad_(False)
    layer = make_layer(base, side=side, depth=1)
    # As PEFT does: adapters in float32 on a base in bfloat16.
    for name, module in layer.named_children():
        if name != "base_layer":
            module.float()
    x = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    largest = LargestTensor()
    with largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).float().sum().backward()
    held = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), x]}
    # LoRA would save its input in float32 and r numbers a row.
    lora = 3 * 256 * 4 + 3 * 4 * 4
    assert sum(size for pointer, size in saved.items() if pointer not in held) <= lora + (256 + 384) * 4 * 12
    # The cast of the weight goes through in pieces; at this size there is one.
    assert largest.entries == 256 * 384
    assert all(p.grad is not None for name, p in layer.named_parameters() if "peanut" in name)


def test_float32_weights_are_not_copied():
    layer = make_layer(nn.Linear(256, 384).requires_grad_(False))
    largest = LargestTensor()
    with largest:
        layer(torch.randn(3, 256)).sum().backward()
    assert largest.entries < 256 * 384 / 10


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_weight_that_is_converted_in_pieces_gives_the_same(rows, monkeypatch):
    torch.manual_seed(0)
    layer = make_layer(nn.Linear(48, 64, dtype=torch.bfloat16).requires_grad_(False), act_fn="gelu")
    layer.peanut_A.float(), layer.peanut_B.float()
    x = torch.randn(5, 48)

    def run():
        layer.zero_grad()
        out = layer(x.bfloat16())
        out.float().square().sum().backward()
        return out, layer.peanut_A["default"].weight.grad

    whole = run()
    monkeypatch.setattr("hf_ext.tuners.neat.product._CHUNK", rows * 48)
    torch.testing.assert_close(run(), whole)


# -- what is kept ------------------------------------------------------------------------------------------------------


def evaluate(layer, x):
    with torch.no_grad():
        return layer(x)


CHANGES = {
    "a step": lambda layer: torch.optim.SGD(layer.peanut_A.parameters(), lr=1.0).step(),
    "a fused step, which is not counted": lambda layer: (
        layer(torch.ones(4, 12)).sum().backward(),
        torch.optim.SGD(layer.peanut_A.parameters(), lr=1.0, fused=True).step(),
    ),
    "loading": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "an edit of the weight": lambda layer: (layer.base_layer.weight.data.mul_(2), layer.invalidate()),
    "a counted edit of the weight": lambda layer: nn.init.ones_(layer.base_layer.weight),
    "another weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.ones(20, 12))),
    "half and back": lambda layer: layer.half().float(),
    "merging and back": lambda layer: (layer.merge(), layer.unmerge()),
    "hidden layers": lambda layer: nn.init.ones_(layer.peanut_encoders["default"][0].weight),
    "another activation": lambda layer: layer.update_layer("default", 4, NeatConfig(r=4, depth=1, init_weights=False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_features_follow_every_change(change):
    layer, x = make_layer(depth=1), torch.randn(4, 12)
    layer(x).sum().backward()
    layer.eval()
    before = evaluate(layer, x)
    assert torch.equal(evaluate(layer, x), before)
    CHANGES[change](layer)
    after = evaluate(layer, x)
    layer.invalidate()
    assert torch.equal(after, evaluate(layer, x))
    if "back" not in change:
        assert not torch.allclose(after, before)


def test_features_are_computed_once_while_nothing_changes(monkeypatch):
    layer, x, calls = make_layer().eval(), torch.randn(4, 12), []
    original = NeatLayer._computed_factors
    monkeypatch.setattr(NeatLayer, "_computed_factors", lambda self, name: calls.append(name) or original(self, name))
    for _ in range(3):
        evaluate(layer, x)
        with torch.inference_mode():
            layer(x)
    assert calls == ["default"]
    layer(x).sum().backward()  # needs a gradient: computed, and what was kept may not be true after the step
    evaluate(layer, x)
    assert calls == ["default"] * 3
    layer.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    assert len(calls) == 3


def test_what_is_kept_is_not_rounded_by_autocast():
    layer, x = make_layer().eval(), torch.randn(4, 12)
    expected = evaluate(layer, x)
    layer.invalidate()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(evaluate(layer, x).float(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(evaluate(layer, x), expected)


def test_copies_and_pickles_leave_the_kept_features_behind():
    layer, x = make_layer().eval(), torch.randn(4, 12)
    out = evaluate(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._kept == {} and layer._kept
        assert torch.equal(evaluate(other, x), out)
    assert not any("kept" in key for key in layer.state_dict())


def test_models_made_in_inference_mode_work():
    with torch.inference_mode():
        layer = make_layer()
        x = torch.randn(2, 12)
        assert torch.equal(layer(x), layer(x))


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
def test_adapters_merge_one_after_another_as_together(side):
    layer, x = make_layer(side=side).double(), torch.randn(4, 12).double()
    layer.update_layer("second", 3, NeatConfig(r=3, depth=1, side=side, init_weights=False))
    layer.double().set_adapter(["default", "second"])
    weight, expected = layer.weight.detach().clone(), evaluate(layer, x)
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    torch.testing.assert_close(evaluate(layer, x), expected, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(evaluate(layer, x), expected, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge()


def test_merging_keeps_no_copy_of_the_weight():
    layer = make_layer(nn.Linear(256, 384))
    layer.merge()
    kept = [t for pair in layer._merged_factors.values() for t in pair]
    assert sum(t.numel() for t in kept) == 4 * (256 + 384)


def test_a_broken_adapter_is_not_merged():
    layer = make_layer()
    nn.init.constant_(layer.peanut_B["default"].weight, float("nan"))
    before = layer.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_scaling_by_hand():
    layer, x = make_layer(scaling=2.0).eval(), torch.randn(4, 12)
    whole, base = evaluate(layer, x), layer.base_layer(x).detach()
    layer.scale_layer(0.5)
    layer.scale_layer(0.5)
    torch.testing.assert_close(evaluate(layer, x) - base, (whole - base) / 4)
    layer.unscale_layer(0.5)
    torch.testing.assert_close(evaluate(layer, x) - base, (whole - base) / 2)
    layer.unscale_layer()
    torch.testing.assert_close(evaluate(layer, x), whole)
    layer.set_scale("default", 3.0)
    torch.testing.assert_close(evaluate(layer, x) - base, 3 * (whole - base))
    layer.set_scale("absent", 3.0)


# -- kinds of layers ---------------------------------------------------------------------------------------------------


LAYERS = {
    "linear": (nn.Linear(6, 10, bias=False), (3, 6)),
    "conv1d of gpt2": (Conv1D(10, 6), (3, 6)),
    "conv1d": (nn.Conv1d(6, 10, 3, padding=1, stride=2), (3, 6, 9)),
    "conv2d": (nn.Conv2d(6, 10, (3, 2), padding="same", dilation=2), (3, 6, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("side", ["input", "output", "auto"])
@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers(kind, side):
    base, shape = LAYERS[kind]
    layer, x = make_layer(copy.deepcopy(base), side=side, depth=1).double(), torch.randn(*shape).double()
    expected = evaluate(layer, x)
    assert not torch.allclose(expected, layer.base_layer(x))
    assert layer.get_delta_weight("default").shape == base.weight.shape
    assert torch.autograd.gradcheck(lambda w: _with(layer, w, x), layer.peanut_A["default"].weight)
    layer.merge()
    torch.testing.assert_close(evaluate(layer, x), expected, rtol=1e-10, atol=1e-12)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, base.weight.double(), rtol=1e-12, atol=1e-12)


def _with(layer, weight, x):
    return torch.func.functional_call(layer, {"peanut_A.default.weight": weight}, (x,))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(5, 4), "'layer' is a layer of type Embedding: NEAT supports nn.Linear"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2 and padding_mode='zeros': NEAT supports groups=1"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ],
)
def test_layers_that_are_not_supported_are_named(module, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.ModuleDict({"layer": module}), NeatConfig(target_modules=["layer"]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("side", ["input", "output"])
def test_quantised_base(bits, side, tmp_path):
    make_tiny_llama().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    model = get_peft_model(base, neat_config(side=side, depth=1, normalize=True))
    ids = torch.arange(3, 23).view(2, 10)
    for layer in neat_layers(model):
        weight = layer.get_base_weight()
        exact = make_layer(nn.Linear(*weight.mT.shape, bias=False), side=side, depth=1, normalize=True)
        state = {k: v for k, v in layer.state_dict().items() if k.startswith("peanut_")}
        exact.load_state_dict({**state, "base_layer.weight": weight.float()})
        torch.testing.assert_close(layer.get_delta_weight("default"), exact.get_delta_weight("default"))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters()[0] > 0
    deltas = [layer.get_delta_weight("default") for layer in neat_layers(model)]
    wanted = [layer.get_base_weight() + delta for layer, delta in zip(neat_layers(model), deltas, strict=True)]
    model.merge_adapter()
    # Still that of the weight as it was, which the rounded one does not give back.
    torch.testing.assert_close([layer.get_delta_weight("default") for layer in neat_layers(model)], deltas)
    for layer, weight in zip(neat_layers(model), wanted, strict=True):
        # Rounded anew to so few bits.
        assert (layer.get_base_weight() - weight).norm() < (0.2 if bits == 4 else 0.02) * weight.norm()
    model.unmerge_adapter()
    assert model.eval()(ids).logits.isfinite().all()


def test_a_weight_that_is_elsewhere_is_multiplied_by_its_layer():
    """Offloaded and partitioned weights are there only while their layer computes."""
    layer, x = make_layer(act_fn="gelu"), torch.randn(3, 12)
    expected = evaluate(layer, x)

    class Away(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.elsewhere, self.bias)

    base = Away(12, 20)
    base.elsewhere, base.bias = layer.weight.detach(), layer.bias
    base.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    layer.base_layer = base
    torch.testing.assert_close(evaluate(layer, x), expected)
    layer(x).sum().backward()
    assert layer.peanut_A["default"].weight.grad.any()
    with pytest.raises(ValueError, match="side='output' reads the columns of a weight, which Away does not give"):
        layer.update_layer("other", 2, NeatConfig(r=2, side="output"))


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_a_fresh_adapter_changes_nothing(normalize):
    base, ids = make_tiny_llama(), torch.arange(3, 13)[None]
    expected = base(ids).logits
    model = get_peft_model(base, neat_config(init_weights=True, normalize=normalize, depth=1))
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("side", ["input", "output"])
def test_normalised_features_have_the_size_of_the_random_factor_of_lora(side):
    layer = make_layer(nn.Linear(200, 300), side=side, normalize=True, r=8, init_weights=True)
    down, up = layer.thin_factors("default")
    lora = get_peft_model(nn.Sequential(nn.Linear(200, 300)), LoraConfig(r=8, target_modules=["0"]))
    random = lora.base_model.model[0].lora_A["default"].weight
    if side == "input":
        assert float(up.square().mean().sqrt()) == pytest.approx((3 * 8) ** -0.5, rel=1e-4)
    else:
        assert float(down.square().mean().sqrt()) == pytest.approx(float(random.square().mean().sqrt()), rel=0.05)


def test_auto_takes_the_smaller_side():
    base = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 8))
    model = get_peft_model(base, NeatConfig(r=2, side="auto", target_modules=["0", "1"]))
    wide, tall = neat_layers(model)
    assert (wide.side["default"], tall.side["default"]) == ("input", "output")
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 2 * 8


def test_ranks_by_layer_and_dropout():
    model = make_model(rank_pattern={r"layers\.1\..*q_proj": 2}, dropout=0.5)
    assert [layer.r["default"] for layer in neat_layers(model)] == [4, 4, 2, 4]
    ids = torch.arange(3, 13)[None]
    first, second = model.train()(ids).logits, model(ids).logits
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


def test_peanut_with_equal_parameters_gives_equal_outputs():
    ids = torch.arange(3, 13)[None]
    shared = dict(r=4, depth=2, target_modules=["q_proj", "down_proj"], init_weights=False, scaling=0.5)
    peanut = get_peft_model(make_tiny_llama(), PeanutConfig(**shared))
    ours = get_peft_model(make_tiny_llama(), NeatConfig(**shared, side="output", normalize=False))
    assert set(ours.state_dict()) == set(peanut.state_dict())
    ours.load_state_dict(peanut.state_dict())
    torch.testing.assert_close(ours(ids).logits, peanut(ids).logits)
