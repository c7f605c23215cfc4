"""The search for the size of the noise on a model: criteria, labels, what is stored and told, bases in few bits, and bad input."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_ext.tuners.tfb import bayesianize, posterior, predict
from hf_ext.tuners.tfb.fit import flips
from tests.tuners.tfb.test_posterior import IDS, adapted


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.outer(torch.relu(self.inner(x)))


def classifier(seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(Classifier(), LoraConfig(r=4, lora_alpha=4, target_modules=["inner", "outer"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


ROWS = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
BATCHES = list(ROWS.split(50))
LABELS = torch.randint(4, (200,), generator=torch.Generator().manual_seed(1))


def test_the_largest_noise_that_flips_few_predictions():
    model = classifier()
    found = bayesianize(model, BATCHES, tolerance=0.05)
    assert found.search.bounded and found.criterion == "flips"

    def share(sigma):
        parts = [predict(model, batch, 10, sigma=sigma).mean_probs.argmax(1) for batch in BATCHES]
        return float((torch.cat(parts) != found.alone.mean_probs.argmax(1)).double().mean())

    assert share(found.sigma_q) <= 0.05
    smallest = min(trial.sigma for trial in found.search.trials if not trial.accepted)
    assert share(smallest) > 0.05 and smallest <= found.sigma_q * 1.05
    again = bayesianize(classifier(), BATCHES, tolerance=0.05)
    assert again.search == found.search
    assert bayesianize(model, BATCHES, tolerance=0.2).sigma_q > found.sigma_q


@pytest.mark.parametrize(("criterion", "tolerance"), [("nll_absolute", 0.05), ("nll_relative", None)])
def test_the_change_of_the_loss(criterion, tolerance):
    model = classifier()
    found = bayesianize(model, BATCHES, labels=LABELS, criterion=criterion, tolerance=tolerance)
    drawn = torch.cat([predict(model, batch, 10).mean_probs for batch in BATCHES]).double()
    loss, alone = (nn.functional.nll_loss(p.log(), LABELS) for p in (drawn, found.alone.mean_probs.double()))
    change = float((loss - alone).abs() / (alone if criterion == "nll_relative" else 1))
    assert 0.4 * found.tolerance < change <= found.tolerance


def test_an_own_criterion_and_labels_of_the_batches():
    model, seen = classifier(), []

    def own(alone, drawn, labels):
        seen.append(labels)
        return flips(alone, drawn, labels)

    one = bayesianize(model, BATCHES, criterion=own, tolerance=0.05, labels=LABELS)
    assert torch.equal(seen[0], LABELS) and one.sigma_q == bayesianize(model, BATCHES, tolerance=0.05).sigma_q
    seen.clear()
    bayesianize(model, BATCHES, criterion=own, tolerance=0.05)
    assert torch.equal(seen[0], one.alone.mean_probs.argmax(1))


def test_the_search_of_the_authors():
    model = classifier()
    theirs = bayesianize(
        model, BATCHES, tolerance=0.05, sigma_bracket=(0.001, 1.0), max_iters=6, reference_compat=True
    )
    sizes = [trial.sigma for trial in theirs.search.trials if not trial.accepted]
    assert theirs.sigma_q == min(sizes) and theirs.search.trials[0].sigma == pytest.approx(0.5005)


def test_what_is_stored_can_be_written_and_drawn(tmp_path):
    model = classifier()
    found = bayesianize(model, BATCHES, tolerance=0.05, targets="last")
    stored = model.peft_config["default"].bayesian_lora
    assert json.loads(json.dumps(stored)) == stored and stored["targets"] == "last"
    assert len(stored["trace"]) == len(found.search.trials) and stored["anchor"]["size"] == 200
    assert "| sigma | change | accepted |" in found.table()
    found.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_bracket_that_is_too_small_or_too_large_is_told():
    model = classifier()
    with pytest.warns(UserWarning, match="Raise sigma_bracket"):
        bayesianize(model, BATCHES, tolerance=0.5, sigma_bracket=(1e-5, 1e-4))
    assert model.peft_config["default"].bayesian_lora["sigma_q"] == pytest.approx(1e-4)
    model = classifier()
    with pytest.warns(UserWarning, match="nothing is stored"):
        found = bayesianize(model, BATCHES, tolerance=1e-3, sigma_bracket=(1, 2))
    assert found.sigma_q == 0 and type(model.peft_config["default"]) is LoraConfig


def test_a_language_model_that_chooses_among_tokens():
    model = adapted()
    mask = torch.ones_like(IDS)
    mask[0, :3], mask[1, 4:] = 0, 0  # padding on either side
    batch = {"input_ids": IDS, "attention_mask": mask}
    found = bayesianize(model, [batch], classes=[5, 6, 7], tolerance=0.3)
    assert found.alone.logits.shape == (1, 4, 3)
    prediction = predict(model, batch, 5, classes=[5, 6, 7])
    assert prediction.logits.shape == (5, 4, 3)
    with torch.no_grad():
        alone = model(**batch).logits
    places = [6, 3, 6, 6]
    torch.testing.assert_close(found.alone.logits[0], alone[range(4), places][:, [5, 6, 7]])


def test_uncertainty_adds_up():
    prediction = predict(classifier(), ROWS, 7, sigma=0.5)
    total, inner, shared = prediction.entropy, prediction.expected_entropy, prediction.mutual_information
    torch.testing.assert_close(inner + shared, total)
    assert (shared >= 0).all() and (total <= torch.tensor(4.0).log() + 1e-6).all()
    torch.testing.assert_close(prediction.mean_probs, prediction.probs.mean(0))
    torch.testing.assert_close(prediction.mean_probs.sum(1), torch.ones(200))
    assert prediction.std.shape == (200, 4) and 0 < float(prediction.disagreement.mean()) < 1
    alone = predict(classifier(), ROWS, 1, sigma=0.5)
    assert not alone.mutual_information.any() and not alone.disagreement.any() and not alone.std.any()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits, tmp_path):
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["score"])
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=quantised)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    bayesianize(model, [{"input_ids": IDS, "labels": torch.tensor([0, 1, 2, 0])}], tolerance=0.4)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)
    together, apart = (predict(model, {"input_ids": IDS}, 3, samples_at_once=count).logits for count in (3, 1))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert float((together - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"criterion": "accuracy"}, "criterion='accuracy': choose one of 'flips'"),
        ({"criterion": "nll_absolute"}, "tolerance=None: give the largest change of 'nll_absolute'"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"sigma_bracket": (1.0, 0.1)}, "sigma_bracket=(1.0, 0.1)"),
        ({"max_iters": 0}, "max_iters=0"),
        ({"anchor": []}, "anchor: it has no batches"),
        ({"labels": LABELS[1:]}, "labels of shape (199,)"),
        ({"labels": LABELS + 1}, "and there are 4 classes from 0"),
        ({"criterion": lambda *_: float("nan"), "tolerance": 1.0}, "criterion: it is nan at sigma=0.0001"),
        ({"adapter_name": "other"}, "adapter_name='other'"),
    ],
)
def test_bad_input_is_named(options, says):
    model = classifier()
    with pytest.raises(ValueError) as error:
        bayesianize(model, **{"anchor": BATCHES, **options})
    assert says in str(error.value)
    with torch.no_grad(), posterior(model, 1, sigma=0.0):
        assert not any(layer.lora_variant for layer in (model.base_model.model.inner, model.base_model.model.outer))
