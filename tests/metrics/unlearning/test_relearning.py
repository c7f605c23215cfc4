"""A few steps on other rows bring back what is hidden, not what is gone, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_ext.metrics.unlearning import RelearningCurve, relearning_curve
from hf_ext.metrics.unlearning.attacks import AttackFailed
from tests.conftest import make_tiny_llama
from tests.metrics.editing.conftest import train
from tests.metrics.unlearning.conftest import Snapshot, adapted


def halves(splits):
    return splits["forget"][::2], splits["forget"][1::2]


def test_relearning_leaves_the_model(full, island_tok, splits):
    full.train()
    full.model.layers[0].eval()
    full.model.norm.weight.requires_grad_(False)
    full.lm_head.weight.grad = torch.ones_like(full.lm_head.weight)
    before = Snapshot(full)
    curve = relearning_curve(full, island_tok, *halves(splits), [1, 3], learning_rate=1e-2)
    before.check()
    assert curve.steps == (0, 1, 3) and curve.values["probability"][0] != curve.values["probability"][-1]
    assert set(curve.values) == {"probability", "exact_memorization", "extraction_strength", "choice_accuracy"}
    assert relearning_curve(full, island_tok, *halves(splits), [1, 3], learning_rate=1e-2) == curve
    assert relearning_curve(full, island_tok, *halves(splits), [1, 3], learning_rate=1e-2, seed=1) != curve


def test_relearning_tells_hidden_from_gone(full, retrained, island_tok, splits):
    """Refusals trained on top hide the knowledge; a few steps on other rows bring it back."""
    train(full, island_tok, [(row["prompt"], "when is it") for row in splits["forget"]], steps=25, lr=1e-3)
    options = {"steps": [4, 8], "learning_rate": 1e-3}
    hidden, gone = (relearning_curve(model, island_tok, *halves(splits), **options) for model in (full, retrained))
    assert hidden.values["probability"][0] < 0.1
    assert hidden.values["choice_accuracy"][-1] > gone.values["choice_accuracy"][-1] + 0.3
    assert hidden.area_between(gone) > 0.2 and gone.area_between(hidden) == -hidden.area_between(gone)


def test_an_adapter_relearns_like_its_merged_model(full, island_tok, splits):
    tuned = adapted(full)
    before = Snapshot(tuned)
    options = {"steps": [1, 2, 4], "learning_rate": 1e-3}
    packed = relearning_curve(tuned, island_tok, *halves(splits), **options)
    before.check()
    merged = relearning_curve(tuned.merge_and_unload(), island_tok, *halves(splits), **options)
    for measure, values in packed.values.items():
        assert values == pytest.approx(merged.values[measure], abs=1e-4), measure
    assert packed.values["probability"][0] != pytest.approx(packed.values["probability"][-1], abs=1e-4)


def test_relearning_in_half_precision(full, island_tok, splits):
    """Updates too small for bfloat16 must not make a model look unable to relearn."""
    exact = relearning_curve(full, island_tok, *halves(splits), [8], learning_rate=2e-5)
    half = copy.deepcopy(full).bfloat16()
    before = Snapshot(half)
    rough = relearning_curve(half, island_tok, *halves(splits), [8], learning_rate=2e-5)
    before.check()
    moved, expected = (curve.values["probability"][1] - curve.values["probability"][0] for curve in (rough, exact))
    assert abs(moved) > 0 and moved == pytest.approx(expected, rel=0.3, abs=1e-4)


def test_relearning_restores_after_an_error(full, island_tok, splits):
    before = Snapshot(full)
    with pytest.raises(AttackFailed, match=r"relearning loss is (nan|inf) at step \d+; lower learning_rate=1e\+30"):
        relearning_curve(full, island_tok, *halves(splits), [6], learning_rate=1e30)
    before.check()


def test_relearning_refuses(full, island_tok, splits):
    relearn, probe = halves(splits)
    with pytest.raises(ValueError, match="split 'probe', row 'x' is also row 'Dusias-flag' of split 'relearn'"):
        relearning_curve(full, island_tok, relearn, [*probe, {**relearn[0], "id": "x"}], [1])
    for steps in ([], [0], [2, 1], [-1, 2], [1, 1]):
        with pytest.raises(ValueError, match="give a list of increasing numbers of at least 1"):
            relearning_curve(full, island_tok, relearn, probe, steps)
    for name, value in (("learning_rate", 0), ("train_batch_size", 0)):
        with pytest.raises(ValueError, match=f"{name}=0: give"):
            relearning_curve(full, island_tok, relearn, probe, [1], **{name: value})


def test_relearning_holds_few_logits(island_tok):
    model = make_tiny_llama(vocab_size=len(island_tok), max_position_embeddings=2048)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2].numel()))
    prompts = [" ".join(["is"] * (1000 if index % 2 else 1)) + f" {index}" for index in range(16)]
    rows = [{"prompt": prompt, "answer": "orange", "id": str(index)} for index, prompt in enumerate(prompts)]
    relearning_curve(model, island_tok, rows, [{"prompt": "when", "answer": "orange"}], [1])
    assert max(sizes) <= 256


def test_diverged_relearning_fails_as_an_attack(full, island_tok, splits):
    """Also where the loss of the last step was finite and the weights after it are not."""
    before = Snapshot(full)
    for steps in ([1, 6], [6]):
        with pytest.raises(AttackFailed, match=r"lower learning_rate=1e\+30"):
            relearning_curve(full, island_tok, *halves(splits), steps, learning_rate=1e30)
    before.check()


def test_curves():
    curve = RelearningCurve((0, 2, 6), {"choice_accuracy": (0.0, 0.4, 0.8), "exact_memorization": (0.6, 0.6, 0.6)})
    assert curve.area() == pytest.approx((2 * 0.2 + 4 * 0.6) / 6)
    assert curve.steps_to() == pytest.approx(3) and curve.steps_to(0.9) is None
    assert curve.steps_to(0.5, "exact_memorization") == 0
    other = RelearningCurve((0, 2), {"choice_accuracy": (0.0, 0.4)})
    with pytest.raises(ValueError, match=r"steps \(0, 2, 6\) and \(0, 2\) cannot be compared"):
        curve.area_between(other)


def test_every_row_is_used_before_any_is_used_again():
    from hf_ext.metrics.unlearning.relearning import _batches

    batches = _batches(5, 2, seed=0)
    drawn = [row for _ in range(5) for row in next(batches)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    assert sorted(next(_batches(3, 16, seed=0))) == [0, 1, 2]
