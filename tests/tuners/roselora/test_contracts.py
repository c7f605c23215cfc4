"""What LoRA users rely on, while RoseLoRA prunes; what holds for every type is in tests/tuners/test_contract.py."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_ext import RoseLoraConfig
from hf_ext.tuners.roselora import SparsePatch, density_report, pruning, relabel_as_lora
from tests.conftest import make_tiny_llama
from tests.tuners import contract
from tests.tuners.roselora.conftest import adapter_weights, batch, make_model, rose_config, train


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 12, 10) / 4)  # (expert, in, out)

    def forward(self, x):
        return torch.einsum("bti,eio->bto", x, self.weights)


class Zoo(nn.Module):
    """One of each layer that LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.conv = nn.Conv1d(16, 24, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.linear = nn.Linear(24, 12, bias=False)
        self.experts = Experts()

    def forward(self, ids):
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.conv2d(x[:, None]).mean(1)
        x, _ = self.attention(x, x, x)
        return self.experts(self.linear(x))


@pytest.mark.parametrize(
    "target",
    [["embedding"], ["conv"], ["conv2d"], ["attention"], ["linear"], ["embedding", "conv", "linear"]],
    ids=str,
)
def test_every_kind_of_layer(target):
    torch.manual_seed(0)
    model = get_peft_model(Zoo(), rose_config(target_modules=target, task_type=None, sparsity=0.75))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(40).view(2, 20)
    for _ in range(8):
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for factor in (f for p in pruning.pruners(model) for f in p.trainable()):
        a_row = factor.parameter.flatten(1) if factor.dim == pruning.ALONG_ROW else factor.parameter.flatten(1).T
        assert ((a_row != 0).sum(1) <= -(-a_row.shape[1] // 4)).all()
    report = density_report(model)
    deltas = [layer.get_delta_weight("default") for layer in pruning.lora_layers(model)]
    assert report.nonzeros == sum(int((d != 0).sum()) for d in deltas)
    assert report.density <= report.bound < 1


def test_expert_weights_as_target_parameters():
    torch.manual_seed(0)
    config = RoseLoraConfig(
        r=2, target_modules=[], target_parameters=["experts.weights"], sparsity=0.75, t_init=2, t_final=6, lora_alpha=4
    )
    model = get_peft_model(Zoo(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        model(torch.arange(40).view(2, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (layer,) = pruning.lora_layers(model)
    delta = layer.get_delta_weight("default")
    assert density_report(model).nonzeros == int((delta != 0).sum())
    assert 0 < (delta != 0).float().mean() < 0.5
    base = Zoo()
    base.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.get_base_model().state_dict().items() if "lora" not in k}
    )
    SparsePatch.from_model(model).apply(base)
    assert torch.equal(base.experts.weights, model.merge_and_unload().experts.weights)


def test_conv1d_of_gpt2(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    config = rose_config(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(base, config)
    train(model)
    assert density_report(model).density < 0.1
    expected = model.eval()(**batch(0)).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(model.merge_and_unload()(**batch(0)).logits, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits, tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")
    model = get_peft_model(base, rose_config())
    train(model)
    assert density_report(model).layers[0].kept_a == 7 / 64
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu"),
        tmp_path / "adapter",
    )
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch(1)).logits, model.eval()(**batch(1)).logits)
    patch = SparsePatch.from_model(model)
    plain = make_tiny_llama()
    with pytest.raises(ValueError, match="strict=False"):
        patch.apply(plain)
    patch.apply(plain, strict=False)
    full = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(plain(**batch(1)).logits, full(**batch(1)).logits)


def test_injected_through_transformers(tmp_path):
    """`add_adapter` leaves no tuner object behind: pruning lives on the layers."""
    model = make_tiny_llama()
    model.add_adapter(rose_config())
    train(model)
    assert density_report(model).layers[0].kept_a == 7 / 64
    expected = model.eval()(**batch(2)).logits
    model.save_pretrained(tmp_path)
    loaded = make_tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded.eval()(**batch(2)).logits, expected)
    loaded.disable_adapters()
    assert torch.equal(loaded(**batch(2)).logits, make_tiny_llama().eval()(**batch(2)).logits)
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert pruning.schedules(loaded)["default"].step == 0


def unet() -> tuple[torch.nn.Module, dict]:
    return contract.FAMILIES["unet"].build(), contract.FAMILIES["unet"].inputs


def diffusion_transformer() -> tuple[SD3Transformer2DModel, dict]:
    model = SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    sample, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 16)
    shared = dict(pooled_projections=torch.randn(1, 16), timestep=torch.tensor([3]))
    return model, dict(hidden_states=sample, encoder_hidden_states=text, **shared)


@pytest.mark.parametrize(
    ("build", "targets"), [(unet, ["to_q", "to_v", "conv1"]), (diffusion_transformer, ["to_q", "to_v"])]
)
def test_diffusers_models(build, targets, tmp_path):
    torch.manual_seed(0)
    model, inputs = build()
    model.add_adapter(rose_config(target_modules=targets, task_type=None))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert density_report(model).density < 0.3
    expected = model.eval()(**inputs).sample
    relabel_as_lora(model)
    model.save_lora_adapter(tmp_path)
    torch.manual_seed(0)
    loaded, _ = build()
    loaded.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    torch.testing.assert_close(loaded.eval()(**inputs).sample, expected)
    model.set_adapters(["default"], weights=[0.5])


def test_auto_class_generation_and_hub_folder(tmp_path):
    base = make_tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), rose_config())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    prompt = batch(4, rows=2)["input_ids"]
    for options in (dict(num_beams=1), dict(num_beams=3)):
        ours = loaded.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, **options)
        merged = model.eval().generate(input_ids=prompt, max_new_tokens=5, do_sample=False, **options)
        assert torch.equal(ours, merged)


def test_mixed_adapter_batches_and_weighted_combination():
    model = make_model()
    train(model)
    model.add_adapter("second", rose_config(init_lora_weights=False))
    model.eval()
    ids = batch(1, rows=2)["input_ids"]
    rows = model(input_ids=ids, adapter_names=["default", "second"]).logits
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        torch.testing.assert_close(rows[row], model(input_ids=ids[row : row + 1]).logits[0])
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    assert model(input_ids=ids).logits.isfinite().all()


def test_hotswap(tmp_path):
    for seed, name in ((0, "one"), (1, "two")):
        model = make_model()
        train(model, first=20 * seed)
        model.save_pretrained(tmp_path / name)
    running = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "one").eval()
    hotswap.hotswap_adapter(running, tmp_path / "two", adapter_name="default")
    fresh = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "two").eval()
    assert torch.equal(running(**batch(0)).logits, fresh(**batch(0)).logits)


def test_other_types_cannot_join_an_ordinary_model():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        make_model().add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_gradient_checkpointing_changes_nothing():
    results = []
    for prepare in (
        lambda m: None,
        lambda m: m.gradient_checkpointing_enable(),
        lambda m: m.enable_input_require_grads(),
    ):
        model = make_model()
        prepare(model)
        train(model.train())
        results.append(adapter_weights(model))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_trained_adapter_can_train_on(tmp_path):
    model = make_model()
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path, is_trainable=True)
    train(loaded)
    assert density_report(loaded).layers[0].kept_a == 7 / 64


def test_saved_config_names_the_type(tmp_path):
    make_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["sparsity"], saved["t_final"]) == ("ROSELORA", 0.9, 6)
