"""The effects FLAT promises, small: it keeps what gradient ascent damages, and speaks the refusal if asked to (benchmarks/unlearning/islands.py has them in full)."""

import copy

import pytest

from benchmarks.unlearning.islands import KNOWN, WRONG_SIGN, Arm, Watch, unlearn
from benchmarks.unlearning.world import accuracy, refusal_rate, rows, trained_model


@pytest.fixture(scope="module")
def full():
    """A model that knows every island; a third of the benchmark's training is enough for that."""
    model = trained_model(KNOWN, seed=0, epochs=40)
    assert min(accuracy(model, rows(split)) for split in KNOWN[:3]) > 0.95
    return model


def unlearnt(full, arm: Arm):
    """A plain copy of the model after the training."""
    model = copy.deepcopy(full)
    unlearn(model, arm, 0)
    plain = copy.deepcopy(full)
    plain.load_state_dict(model.state_dict())
    return plain


@pytest.mark.slow
def test_with_retain_data_it_keeps_what_gradient_ascent_damages(full):
    """The same learning rate and steps; FLAT forgets as much."""
    flat = unlearnt(full, Arm("FLAT", {"retain_coef": 1.0}, 2e-4, 128, True))
    ascent = unlearnt(full, Arm("ascent", {"loss_type": "gradient_difference"}, 2e-4, 128, True))
    assert max(accuracy(model, rows("forget")) for model in (flat, ascent)) < 0.25
    assert accuracy(flat, rows("retain")) > max(0.8, accuracy(ascent, rows("retain")) + 0.2)


@pytest.mark.slow
def test_the_geometric_template_is_spoken(full):
    flat = unlearnt(full, Arm("FLAT", {"retain_coef": 1.0, "template_probability": "geometric"}, 2e-4, 128, True))
    assert refusal_rate(flat, rows("forget")) > 0.9
    assert accuracy(flat, rows("retain")) > 0.85


@pytest.mark.slow
def test_the_sign_of_the_authors_code_does_not_forget(full):
    watch, model = Watch(), copy.deepcopy(full)
    unlearn(model, Arm(WRONG_SIGN, {"divergence": "reverse_kl"}, 1e-4, 80), 0, [watch])
    assert min(point["forget"] for point in watch.curve) > 0.9
