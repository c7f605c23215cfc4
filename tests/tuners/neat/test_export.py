"""Adapters leave as stock types with the same outputs, and PEFT's own type runs on our layers."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from peft.tuners.peanut import Linear as PeanutLinear
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ext import NeatConfig, accelerate_peanut
from hf_ext.tuners.neat import NeatLayer, save_as_lora, save_as_peanut
from tests.conftest import make_tiny_llama
from tests.tuners.neat.conftest import make_model

IDS = torch.arange(3, 23).view(2, 10)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
torch.save(model(torch.arange(3, 23).view(2, 10)).logits.detach(), sys.argv[3])
assert "hf_ext" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["LORA", "PEANUT"])
def test_stock_peft_reads_an_export_without_us(kind, tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    side = {"side": "output"} if kind == "PEANUT" else {"rank_pattern": {r"layers\.1\..*q_proj": 2}}
    model = make_model(depth=1, scaling=0.5, normalize=True, modules_to_save=["lm_head"], **side)
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight, std=0.1)
    {"LORA": save_as_lora, "PEANUT": save_as_peanut}[kind](model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == kind
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    folders = [str(tmp_path / name) for name in ("base", "adapter", "logits.pt")]
    subprocess.run([sys.executable, "-c", WITHOUT_US, *folders], check=True, timeout=120)
    torch.testing.assert_close(torch.load(folders[2]), logits(model), rtol=1e-4, atol=1e-5)


def test_lora_export_of_convolutions_and_gpt2(tmp_path):
    class Net(nn.Sequential):
        def forward(self, x, **_):
            return super().forward(x)

    base = Net(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = get_peft_model(base, NeatConfig(r=2, target_modules=["0", "2"], side="auto", init_weights=False))
    x = torch.randn(2, 3, 5, 5)
    expected = model.eval()(x)
    save_as_lora(model, tmp_path / "conv")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "conv")
    torch.testing.assert_close(loaded(x), expected)

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=32))

    model = get_peft_model(gpt2(), NeatConfig(r=2, target_modules=["c_attn", "c_fc"], init_weights=False))
    save_as_lora(model, tmp_path / "gpt2")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "gpt2")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_what_peanut_cannot_express_is_refused(tmp_path):
    for options, message in (
        ({}, "side='input' on Linear: use save_as_lora"),
        ({"side": "output", "act_fn": "sin"}, "act_fn='sin'"),
        ({"side": "output", "rank_pattern": {"q_proj": 2}}, "rank_pattern="),
    ):
        with pytest.raises(ValueError, match=message):
            save_as_peanut(make_model(**options), tmp_path)
    lora = get_peft_model(make_tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for save in (save_as_lora, save_as_peanut):
        with pytest.raises(ValueError, match="adapter_name='default' is not a NEAT adapter; the model has"):
            save(lora, tmp_path)
    assert not list(tmp_path.iterdir())


def peanut_model(**options):
    config = PeanutConfig(r=4, depth=1, target_modules=["q_proj", "up_proj"], init_weights=False, **options)
    return get_peft_model(make_tiny_llama(), config)


def test_our_layers_under_an_adapter_of_peanut(tmp_path):
    model = peanut_model()
    expected, parameters = logits(model), [p for p in model.parameters() if p.requires_grad]
    assert accelerate_peanut(model) == 4
    assert accelerate_peanut(model) == 0
    assert not any(type(module) is PeanutLinear for module in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert all(p is q for p, q in zip(parameters, [p for p in model.parameters() if p.requires_grad], strict=True))
    gradients = []
    for other in (model, peanut_model()):
        other(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in other.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEANUT"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_tiny_llama(), tmp_path)), expected)
    model.add_adapter("second", PeanutConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False))
    model.set_adapter("second")
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, NeatLayer)
    assert not torch.allclose(logits(model), expected)


def test_merged_layers_of_peanut_are_left_alone():
    model = peanut_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj: \['default'\] are merged; call unmerge_adapter\(\) first"):
        accelerate_peanut(model)
    assert sum(type(module) is PeanutLinear for module in model.modules()) == 4


def test_checkpoints_are_those_of_peanut_but_for_the_name(tmp_path):
    model = make_model(side="output", depth=1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "PEANUT"}))
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    assert type(loaded.peft_config["default"]) is PeanutConfig
    torch.testing.assert_close(logits(loaded), logits(model))
