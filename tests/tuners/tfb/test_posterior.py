"""The posterior of an adapter in a model: silent outside, weight samples inside, saved, loaded, and refused where it would be wrong."""

import hashlib
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache

from hf_ext.tuners.roselora import RoseLoraConfig
from hf_ext.tuners.tfb import bayesianize, load_bayesian, posterior, predict, sample_weights
from hf_ext.tuners.tfb.reference import output_std
from tests.conftest import make_tiny_llama

IDS = torch.randint(3, 99, (4, 7), generator=torch.Generator().manual_seed(0))
SIGMA = 0.05


def adapted(config=None, **more):
    """A tiny Llama whose adapter does something."""
    config = config or LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **more
    )
    model = get_peft_model(make_tiny_llama(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def test_outside_and_without_noise_nothing_changes():
    model = adapted()
    before = logits(model)
    with posterior(model, 3, sigma=0.0) as opened:
        assert torch.equal(logits(model, opened.expand(IDS)), before.repeat(3, 1, 1))
    with posterior(model, 3, sigma=SIGMA) as opened:
        assert not torch.allclose(logits(model, opened.expand(IDS)), before.repeat(3, 1, 1), atol=1e-3)
    assert torch.equal(logits(model), before)
    assert not any(layer.lora_variant for layer in model.modules() if hasattr(layer, "lora_variant"))


def test_an_error_inside_leaves_nothing_behind():
    model = adapted()
    before = logits(model)
    with pytest.raises(KeyError), posterior(model, 2, sigma=SIGMA):
        raise KeyError
    assert torch.equal(logits(model), before)


def test_samples_are_those_of_runs_of_their_own_and_of_materialised_adapters():
    model = adapted()
    bayesianize(model, [{"input_ids": IDS}], tolerance=0.3)
    together = predict(model, {"input_ids": IDS}, 4).logits
    parts = predict(model, {"input_ids": IDS}, 4, samples_at_once=1).logits
    torch.testing.assert_close(parts, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(predict(model, {"input_ids": IDS}, 6).logits[:4], together, rtol=0, atol=1e-6)
    for k in (0, 3):
        model.set_adapter(sample_weights(model, k, adapter_name="default"))
        torch.testing.assert_close(logits(model)[:, -1], together[k], rtol=0, atol=1e-6)
    model.set_adapter("default")
    assert not torch.allclose(
        predict(model, {"input_ids": IDS}, 4, seed=1, adapter_name="default").logits, together, atol=1e-3
    )


def test_a_draw_is_an_ordinary_adapter(tmp_path):
    model = adapted()
    bayesianize(model, [{"input_ids": IDS}], tolerance=0.3)
    name = sample_weights(model, 2, "drawn")
    expected = predict(model, {"input_ids": IDS}, 3).logits[2]
    model.save_pretrained(tmp_path, selected_adapters=[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / name)
    torch.testing.assert_close(logits(loaded.merge_and_unload())[:, -1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["coherent", "flipout", "local"])
def test_each_sampler_has_the_standard_deviation_of_the_formula(sampler):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 9)

        def forward(self, x):
            return self.linear(x)

    torch.manual_seed(0)
    model = get_peft_model(One(), LoraConfig(r=3, lora_alpha=6, target_modules=["linear"]))
    layer = model.base_model.model.linear
    nn.init.normal_(layer.lora_B["default"].weight)
    model.eval()
    # Flipout draws once for all rows of a call, and signs for each.
    x, (calls, rows) = torch.randn(1, 12), (3000, 4) if sampler == "flipout" else (1, 20000)
    with torch.no_grad(), posterior(model, rows, sigma=SIGMA, sampler=sampler) as opened:
        y = torch.cat([model(opened.expand(x)) for _ in range(calls)])
    expected = output_std(x, layer.lora_B["default"].weight.detach(), SIGMA, 2.0)[0]
    torch.testing.assert_close(y.double().std(0), expected, rtol=0.04, atol=0)
    torch.testing.assert_close(y.mean(0), model(x)[0].detach(), rtol=0, atol=4 * float(expected.max()) / calls**0.5)


def test_a_sample_is_one_adapter_for_all_tokens():
    """Coherent noise is linear in the input; that of the other samplers is drawn for each token."""
    model = adapted()
    twice = IDS[:, :1].repeat(1, 2)
    zeros = torch.zeros(4, 2, dtype=torch.long)  # the same position, so that both tokens compute the same

    def differs(sampler):
        with posterior(model, 2, sigma=SIGMA, sampler=sampler) as opened:
            mask = torch.eye(2)[None, None].expand(8, 1, 2, 2) == 1
            out = logits(model, opened.expand(twice), position_ids=opened.expand(zeros), attention_mask=mask)
        return float((out[:, 0] - out[:, 1]).abs().max())

    assert differs("coherent") < 1e-5 < 1e-3 < min(differs("flipout"), differs("local"))


def test_a_cache_belongs_to_its_sample():
    model = adapted()
    with posterior(model, 3, sigma=SIGMA) as opened:
        ids = opened.expand(IDS)
        full = logits(model, ids)
        cache = DynamicCache()
        logits(model, ids[:, :5], past_key_values=cache, use_cache=True)
        rest = logits(model, ids[:, 5:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(rest, full[:, 5:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_every_draw_generates_what_its_adapter_does(options):
    model = adapted()
    bayesianize(model, [{"input_ids": IDS}], tolerance=0.5)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **options}
    with posterior(model, 3) as opened:
        together = model.generate(
            **opened.expand({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}), **settings
        )
    for k, expected in enumerate(together.chunk(3)):
        model.set_adapter(sample_weights(model, k, adapter_name="default"))
        found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings)
        assert torch.equal(found, expected)


def test_stock_peft_loads_the_mean_and_ours_the_posterior(tmp_path):
    model = adapted()
    before = logits(model)
    model.save_pretrained(tmp_path / "plain")
    found = bayesianize(model, [{"input_ids": IDS}], tolerance=0.3, anchor_id="some rows")
    model.save_pretrained(tmp_path / "drawn")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "drawn")]
    assert hashlib.sha256(files[0]).digest() == hashlib.sha256(files[1]).digest()
    with pytest.warns(UserWarning, match="bayesian_lora"):
        stock = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "drawn").eval()
    assert torch.equal(logits(stock), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = load_bayesian(make_tiny_llama(), tmp_path / "drawn").eval()
    stored = ours.peft_config["default"].bayesian_lora
    assert (
        stored["sigma_q"] == found.sigma_q and stored["anchor"]["id"] == "some rows" and stored["anchor"]["size"] == 4
    )
    assert torch.equal(predict(ours, {"input_ids": IDS}, 3).logits, predict(model, {"input_ids": IDS}, 3).logits)
    ours.save_pretrained(tmp_path / "again")
    assert load_bayesian(make_tiny_llama(), tmp_path / "again").peft_config["default"].bayesian_lora == stored
    with pytest.raises(ValueError, match="has no bayesian_lora"):
        load_bayesian(make_tiny_llama(), tmp_path / "plain")


def test_roselora(tmp_path):
    model = adapted(
        RoseLoraConfig(r=4, t_init=2, t_final=4, sparsity=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    bayesianize(model, [{"input_ids": IDS}], tolerance=0.3)
    expected = predict(model, {"input_ids": IDS}, 3).logits
    model.save_pretrained(tmp_path)
    ours = load_bayesian(make_tiny_llama(), tmp_path).eval()
    assert torch.equal(predict(ours, {"input_ids": IDS}, 3).logits, expected)
    ours.set_adapter(sample_weights(ours, 1))
    torch.testing.assert_close(logits(ours)[:, -1], expected[1], rtol=0, atol=1e-6)


def test_layers_are_chosen():
    model = adapted()
    last = bayesianize(model, [{"input_ids": IDS}], tolerance=0.5, targets="last")
    assert last.layers == ("model.layers.1.mlp.down_proj",)
    some = bayesianize(model, [{"input_ids": IDS}], tolerance=0.5, targets=r".*q_proj")
    assert len(some.layers) == 2 and all(name.endswith("q_proj") for name in some.layers)


def test_bfloat16_and_a_layer_without_update():
    model = adapted().to(torch.bfloat16)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.zero_()
    found = predict(model, {"input_ids": IDS}, 3, sigma=SIGMA)
    assert found.logits.isfinite().all() and float(found.mutual_information.max()) > 0


def refused(model, says, **options):
    with pytest.raises(ValueError) as error:
        predict(model, {"input_ids": IDS}, 3, **{"sigma": SIGMA, **options})
    assert says in str(error.value)


def test_what_would_be_wrong_is_refused():
    refused(adapted(), "no posterior is stored with it", sigma=None)
    refused(adapted().train(), "call model.eval() first")
    refused(adapted(), "sampler='other'", sampler="other")
    refused(adapted(), "adapter_name='other': the model has ['default']", adapter_name="other")
    refused(adapted(), "it matches none of the 4 LoRA layers", targets="nothing")
    refused(adapted(use_dora=True), "is LoRA of another kind (DoraLinearVariant)")
    refused(adapted(), "belong to one pass", sampler="local", samples_at_once=1)
    embeddings = adapted(LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    refused(embeddings, "is a LoRA layer of type Embedding")
    refused(adapted().get_base_model(), "give a PeftModel")
    other = adapted()
    other.add_adapter("other", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    refused(other, "call model.set_adapter('other') first", adapter_name="other")
    with posterior(other, 2, sigma=SIGMA):
        refused(other, "a posterior is open already")
    merged = adapted()
    merged.merge_adapter()
    refused(merged, "'model.layers.0.self_attn.q_proj' is merged")


def test_rows_that_cannot_be_told_apart_are_refused():
    model = adapted()
    with posterior(model, 3, sigma=SIGMA), pytest.raises(ValueError, match="a batch of 4 rows for n_samples=3"):
        logits(model)
    # Inside a model that gives a layer other rows than it has.
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0][:3],))
    with (
        posterior(model, 3, sigma=SIGMA) as opened,
        pytest.raises(ValueError, match=r"q_proj': it gets 3 rows while the model computes 12"),
    ):
        logits(model, opened.expand(IDS))


def test_merging_while_it_is_open_is_refused():
    model = adapted()
    with posterior(model, 2, sigma=SIGMA), pytest.raises(ValueError, match="a posterior is open"):
        model.merge_adapter()
    model.merge_adapter()
