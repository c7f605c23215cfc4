"""Rounded weights, adapters switched off, gradients and other prompts; the model stays bit for bit as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.unlearning import quantized_copy, without_adapter
from hf_ext.metrics.unlearning import scores as scores_module
from hf_ext.metrics.unlearning.attacks import (
    AttackFailed,
    AttackUnavailable,
    answer_gradients,
    borrowed,
    gradient_norms,
    in_context,
    paraphrased,
    rounded,
    trained_weights,
)
from hf_ext.metrics.unlearning.rows import read_rows
from hf_ext.metrics.unlearning.scores import PromptFormat, RowEncoder
from tests.conftest import make_tiny_llama
from tests.metrics.unlearning.conftest import Snapshot, adapted

# -- Quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding(bits):
    weight = torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None]
    weight[3] = 0
    found = rounded(weight, bits)
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((found - weight).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1))
    assert (found[3] == 0).all()
    torch.testing.assert_close(rounded(found, bits), found)
    torch.testing.assert_close(rounded(weight.T, bits, channel=1), found.T)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_copy(full, bits):
    before = Snapshot(full)
    expected = {name: rounded(m.weight, bits) for name, m in full.named_modules() if isinstance(m, nn.Linear)}
    with quantized_copy(full, bits) as model:
        for name, weight in expected.items():
            assert torch.equal(
                model.get_submodule(name).weight, before.values[f"{name}.weight"] if name == "lm_head" else weight
            )
        assert torch.equal(model.model.embed_tokens.weight, before.values["model.embed_tokens.weight"])
    before.check()


def test_quantized_copy_restores_after_an_error(full):
    before = Snapshot(full)
    with pytest.raises(RuntimeError, match="inside"), quantized_copy(full, 4):
        raise RuntimeError("inside")
    before.check()
    for bits in (1, 9, 4.0):
        with (
            pytest.raises(ValueError, match=f"bits={bits}: give a whole number from 2 to 8"),
            quantized_copy(full, bits),
        ):
            pass


def test_adapters_are_merged_before_rounding(full):
    tuned = adapted(full)
    tuned.base_model.model.lm_head.weight.requires_grad_(True)
    before = Snapshot(tuned)
    layer = tuned.base_model.model.model.layers[0].mlp.down_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    with quantized_copy(tuned, 4):
        torch.testing.assert_close(layer.base_layer.weight, rounded(merged, 4))
        assert layer.merged
    assert not layer.merged
    before.check()
    with pytest.raises(RuntimeError, match="inside"), quantized_copy(tuned, 4):
        raise RuntimeError("inside")
    before.check()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_merging_leaves_what_is_tied_alone(targets):
    """An adapter on the embeddings is none on the output layer that shares their weight, nor the other way round."""
    torch.manual_seed(0)
    model = make_tiny_llama(tie_word_embeddings=True)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3)
    before, ids = Snapshot(tuned), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = tuned(ids).logits
        with quantized_copy(tuned, 8):
            found = tuned(ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    before.check()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(RuntimeError, match="inside"), quantized_copy(tuned, 8):
        raise RuntimeError("inside")
    before.check()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_offloaded_weights_cannot_be_rounded(full):
    cpu_offload(full.eval(), execution_device=torch.device("cpu"))
    with pytest.raises(AttackUnavailable, match="offloaded; load the model without"), quantized_copy(full, 2):
        pass


def test_small_updates_are_rounded_away(full):
    """Why the merged weight is what must be rounded: an adapter kept apart would survive."""
    tuned = adapted(full, scale=1e-6)
    layer = tuned.base_model.model.model.layers[0].mlp.down_proj
    assert layer.get_delta_weight("default").abs().max() > 0
    plain = rounded(layer.base_layer.weight, 4)
    with quantized_copy(tuned, 4):
        torch.testing.assert_close(layer.base_layer.weight, plain, atol=1e-5, rtol=0)


def test_conv1d_and_models_without_linear_layers():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    before = Snapshot(model)
    expected = rounded(model.transformer.h[0].mlp.c_fc.weight, 4, channel=1)
    with quantized_copy(model, 4):
        assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, expected)
    before.check()
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AttackUnavailable, match="load it unquantised"), quantized_copy(model, 4):
        pass
    with pytest.raises(AttackUnavailable, match="add an adapter to train"):
        trained_weights(model)


# -- Adapters ---------------------------------------------------------------------------------------------------------


def test_without_adapter(full, island_tok):
    ids = torch.tensor([island_tok("When was Dusias founded ?")["input_ids"]])
    with torch.no_grad():
        plain = full(ids).logits
        tuned = adapted(full)
        tuned.requires_grad_(False)
        before = Snapshot(tuned)
        adapter = tuned(ids).logits
        with without_adapter(tuned):
            assert torch.equal(tuned(ids).logits, plain)
        assert torch.equal(tuned(ids).logits, adapter) and not torch.equal(adapter, plain)
    before.check()
    with pytest.raises(RuntimeError, match="inside"), without_adapter(tuned):
        raise RuntimeError("inside")
    before.check()


def test_without_injected_adapter(full, island_tok):
    ids = torch.tensor([island_tok("When was Dusias founded ?")["input_ids"]])
    with torch.no_grad():
        plain = full(ids).logits
        full.add_adapter(LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
        before, adapter = Snapshot(full), full(ids).logits
        with without_adapter(full):
            assert torch.equal(full(ids).logits, plain)
        assert torch.equal(full(ids).logits, adapter)
    before.check()
    assert len(trained_weights(full)) == sum("lora_" not in name for name, _ in full.named_parameters())


def test_nothing_to_switch_off(full):
    with pytest.raises(AttackUnavailable, match="has no adapter"), without_adapter(full):
        pass
    tuned = adapted(full)
    tuned.merge_adapter()
    with pytest.raises(AttackUnavailable, match="merged into the weights"), without_adapter(tuned):
        pass


def test_what_is_trained(full):
    names = {id(weight): name for name, weight in full.named_parameters()}
    assert {names[id(weight)] for weight in trained_weights(full)} == set(names.values())
    tuned = adapted(full, modules_to_save=["embed_tokens"])
    names = {id(weight): name for name, weight in tuned.named_parameters()}
    chosen = {names[id(weight)] for weight in trained_weights(tuned)}
    assert not any("lora_" in name for name in chosen)
    # A copy of a whole module is what is deployed: it is trained like any other weight.
    assert any("embed_tokens.modules_to_save" in name for name in chosen)


def test_a_quantised_base_relearns_through_its_adapter(full):
    tuned = adapted(full)
    layer = tuned.base_model.model.model.layers[0].mlp.gate_proj
    layer.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    names = {id(weight): name for name, weight in tuned.named_parameters()}
    assert all("lora_" in names[id(weight)] for weight in trained_weights(tuned))
    with pytest.raises(AttackUnavailable), quantized_copy(tuned, 4):
        pass
    with pytest.raises(AttackUnavailable, match="offloaded"):
        trained_weights(copy.deepcopy(full).to("meta"))


def test_prompt_tuning_has_no_layers_to_merge(full):
    virtual = get_peft_model(full, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    before = Snapshot(virtual)
    with quantized_copy(virtual, 4):
        pass
    with without_adapter(virtual):
        pass
    before.check()


def test_borrowed_gives_back_dtype_and_gradient(full):
    full.lm_head.weight.grad = torch.ones_like(full.lm_head.weight)
    before = Snapshot(full)
    with pytest.raises(RuntimeError), borrowed(full):
        full.lm_head.weight.data = full.lm_head.weight.data.double()
        full.lm_head.weight.grad = torch.zeros_like(full.lm_head.weight)
        full.model.norm.weight.requires_grad_(False)
        raise RuntimeError
    before.check()


# -- Gradients and prompts --------------------------------------------------------------------------------------------


def plain_loss(model, examples):
    """One forward pass over everything, all positions and all rows."""
    ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in examples], batch_first=True)
    mask = pad_sequence([torch.ones(len(p + a)) for p, a in examples], batch_first=True)
    labels = [torch.tensor((-100,) * len(prompt) + answer) for prompt, answer in examples]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_gradients_of_answers_are_those_of_one_pass(full, island_tok, splits, monkeypatch):
    encoder = RowEncoder(island_tok, PromptFormat())
    long = {"prompt": "When was Dusias founded ? " * 18 + "When", "answer": " ".join(["orange", "flag"] * 6)}
    examples = []
    for row in read_rows([*({**row, "perturbed": []} for row in splits["forget"][:6]), long], "rows"):
        prompt, answer, _ = encoder.pair(row, row.answer)
        examples.append((tuple(prompt), tuple(answer)))
    full.requires_grad_(True)
    expected = plain_loss(full.eval(), examples)
    expected.backward()
    gradients = [weight.grad for weight in full.parameters()]
    sizes = []
    full.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2].numel()))
    for piece, batch_size in ((256, 8), (5, 3)):
        monkeypatch.setattr(scores_module, "_PIECE", piece)
        full.zero_grad()
        sizes.clear()
        loss = answer_gradients(ModelRunner(full, island_tok, batch_size), examples, list(full.parameters()))
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        for weight, gradient in zip(full.parameters(), gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-5)
        # Not the more than hundred positions from the shortest prompt to the end of the longest row, in every row.
        assert sum(sizes) < 2 * sum(len(answer) for _, answer in examples) * (1 if piece == 5 else 2)


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_gradient_norms(full, island_tok, splits, p):
    before = Snapshot(full)
    rows = read_rows(splits["forget"][:2], "forget")
    encoder = RowEncoder(island_tok, PromptFormat())
    found = gradient_norms(full, encoder, rows, ModelRunner(full, island_tok, 4), p=p)
    before.check()
    for row, value in zip(rows, found, strict=True):
        prompt = island_tok(row.prompt)["input_ids"]
        ids = torch.tensor([prompt + island_tok(row.answer, add_special_tokens=False)["input_ids"]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        full.zero_grad()
        full(input_ids=ids, labels=labels).loss.backward()
        assert value == pytest.approx(np.mean([w.grad.norm(p).item() for w in full.parameters()]), rel=1e-4)


def test_an_infinite_gradient_fails_as_an_attack(full, island_tok, splits):
    before = Snapshot(full)
    handle = full.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    rows = read_rows(splits["forget"][:2], "forget")
    with pytest.raises(
        AttackFailed, match=r"row 'Dusias-flag': the norm of its gradient is (inf|nan); load the model in"
    ):
        gradient_norms(full, RowEncoder(island_tok, PromptFormat()), rows, ModelRunner(full, island_tok, 4))
    handle.remove()
    before.check()


def test_prompts():
    rows = read_rows(
        [
            {"id": "a", "prompt": "Where ?", "answer": "here", "prompt_paraphrases": ["Which place ?", "What spot ?"]},
            {
                "id": "b",
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Who ?"}],
                "answer": "Ada",
            },
            {"id": "c", "prompt": "When ?", "answer": "now", "context": "It happens now."},
        ],
        "forget",
    )
    first, second, third = in_context(rows)
    assert (first.id, first.prompt) == ("a/context", "Where ? here\nWhere ?")
    assert second.prompt == ({"role": "system", "content": "s"}, {"role": "user", "content": "Who ? Ada\nWho ?"})
    assert third.prompt == "It happens now.\nWhen ?"
    assert [row.answer for row in (first, second, third)] == ["here", "Ada", "now"]
    assert [(row.id, row.prompt) for row in paraphrased(rows)] == [
        ("a/paraphrase-0", "Which place ?"),
        ("a/paraphrase-1", "What spot ?"),
    ]
