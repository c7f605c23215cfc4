"""Text with uncertainty: what the draws say about every token is what they would have done by themselves."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from hf_ext.tuners.tfb import generate_with_uncertainty, posterior, predict
from tests.tuners.tfb.test_posterior import IDS, SIGMA, adapted

MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
INPUTS = {"input_ids": IDS.masked_fill(MASK == 0, 0), "attention_mask": MASK}
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def test_agreement_is_what_the_draws_write_by_themselves():
    model = adapted()
    found = generate_with_uncertainty(model, INPUTS, 8, sigma=0.15, **SETTINGS)
    assert torch.equal(found.sequences, model.generate(**INPUTS, **SETTINGS))
    with posterior(model, 8, sigma=0.15) as opened:
        written = model.generate(**opened.expand(INPUTS), **SETTINGS).view(8, 4, -1)
    width = min(written.shape[2], found.sequences.shape[1])
    same = (written[:, :, :width] == found.sequences[None, :, :width]).all(2).float().mean(0)
    assert torch.equal(same, found.agreement) and 0 < float(same.mean()) < 1


def test_entropies_are_those_of_the_predictions():
    model = adapted()
    found = generate_with_uncertainty(model, INPUTS, 5, sigma=SIGMA, **SETTINGS)
    expected = predict(model, {"input_ids": IDS[1:2]}, 5, sigma=SIGMA)
    torch.testing.assert_close(found.entropy[1, 0], expected.entropy[0])
    torch.testing.assert_close(found.mutual_information[1, 0], expected.mutual_information[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.log_probs[1, 0], expected.log_mean_probs[0, found.sequences[1, 7]])
    # The first row is padded in the batch, and alone it is not.
    alone = generate_with_uncertainty(model, {"input_ids": IDS[:1, 3:]}, 5, sigma=SIGMA, **SETTINGS)
    torch.testing.assert_close(alone.entropy[0], found.entropy[0], rtol=0, atol=1e-5)
    per_row = found.per_sequence()
    assert set(per_row) == {"log_prob", "entropy", "mutual_information", "agreement"}
    torch.testing.assert_close(per_row["entropy"], found.entropy.mean(1))


def test_nothing_is_counted_after_the_end():
    model = adapted()
    third = int(model.generate(**INPUTS, **SETTINGS)[1, 9])
    found = generate_with_uncertainty(model, INPUTS, 3, sigma=SIGMA, eos_token_id=third, **SETTINGS)
    length = int(found.mask[1].sum())
    assert length <= 3 and found.sequences[1, 7 + length - 1] == third
    assert not found.entropy[1, length:].any() and found.entropy[1, :length].all()


def test_what_it_is_not_for_is_refused():
    model = adapted()
    for options in ({"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            generate_with_uncertainty(model, INPUTS, 2, sigma=SIGMA, **SETTINGS, **options)
    with pytest.raises(ValueError, match="pad on the left"):
        right = {**INPUTS, "attention_mask": INPUTS["attention_mask"].flip(1)}
        generate_with_uncertainty(model, right, 2, sigma=SIGMA, **SETTINGS)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    t5 = get_peft_model(t5, LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM")).eval()
    with pytest.raises(ValueError, match="encoder-decoder"):
        generate_with_uncertainty(t5, INPUTS, 2, sigma=SIGMA)
