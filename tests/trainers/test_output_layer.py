"""What is read of a forward: the answers, and nothing where there is none."""

from __future__ import annotations

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from hf_ext.trainers.output_layer import AnswersOnly, score_answers
from tests.conftest import make_tiny_llama

IDS = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(0))
ANSWER = torch.zeros(3, 9, dtype=torch.bool)
ANSWER[0, 4:], ANSWER[1, 8:], ANSWER[2, 1:5] = True, True, True


def headed_model(*outputs):
    model = make_tiny_llama().train()
    add_fused_lm_head(model, outputs=outputs or ("log_probs", "is_top1"))
    return model


@pytest.mark.parametrize("prompt", [None, PromptTuningConfig])
@pytest.mark.parametrize("answer", [ANSWER, ANSWER & False])
def test_everything_a_trainer_reads_is_that_of_the_stock_head(prompt, answer):
    """With gradients; in a batch without answers too."""
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = []
    for narrow in (False, True):
        base = headed_model(*names)
        torch.manual_seed(0)
        model = base if prompt is None else get_peft_model(base, prompt(task_type="CAUSAL_LM", num_virtual_tokens=4))
        called = AnswersOnly(model, base) if narrow else model
        inputs = {"input_ids": IDS, "labels": IDS.masked_fill(~answer, -100)}
        outputs = called(**inputs, fused_lm_head=True, num_items_in_batch=7)
        outputs.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        values = {name: outputs[name][:, -8:] for name in (*names, "label_mask")}
        found.append((outputs.loss, values, gradients))
        # Without the fused head, or without labels, it is the model itself.
        torch.testing.assert_close(called(input_ids=IDS).logits, model(input_ids=IDS).logits)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("prompt", [None, PromptTuningConfig, PrefixTuningConfig])
def test_scores_are_those_of_the_stock_head(prompt):
    base = headed_model()
    config = prompt and prompt(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = base if config is None else get_peft_model(base, config)
    labels = IDS.masked_fill(~ANSWER, -100)
    expected = model(input_ids=IDS, labels=labels, fused_lm_head=True)
    found = score_answers(model, base, {"input_ids": IDS}, ANSWER)
    torch.testing.assert_close(found.log_probs, expected.log_probs[:, -8:])
    assert found.is_top1.equal(expected.is_top1[:, -8:])
    assert (found.log_probs != 0).equal(ANSWER[:, 1:])


def test_positions_without_an_answer_cost_and_spoil_nothing():
    """Hidden states that are not finite there would spoil the gradient of an output layer that projects them."""
    model = headed_model()
    predicting = torch.nn.functional.pad(ANSWER[:, 1:], (0, 1))

    def spoil(module, args, output):
        output.last_hidden_state = output.last_hidden_state.masked_fill(~predicting[..., None], torch.nan)

    model.base_model.register_forward_hook(spoil)
    score_answers(model, model, {"input_ids": IDS}, ANSWER).log_probs.sum().backward()
    assert bool(model.lm_head.weight.grad.isfinite().all())


def test_nothing_stays_on_the_model():
    model = headed_model()
    score_answers(model, model, {"input_ids": IDS}, ANSWER)
    assert model(input_ids=IDS).logits.shape == (3, 9, 99)
    with pytest.raises(IndexError):
        score_answers(model, model, {"input_ids": IDS + 99}, ANSWER)
    assert model(input_ids=IDS).logits.shape == (3, 9, 99)
