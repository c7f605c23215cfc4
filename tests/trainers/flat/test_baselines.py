"""The baselines: recorded losses and gradients, their laws, and the edges of their input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.trainers.flat import baselines
from hf_ext.trainers.flat.baselines import DEFAULT_COEFFICIENTS, Head
from tests.oracles import ORACLES
from tests.trainers.flat.test_loss import close, label_log_probs

FOLDER = ORACLES / "unlearning_baselines"
EXPECTED = json.loads((FOLDER / "baseline_losses.json").read_text())
DATA = load_file(FOLDER / "baseline_losses.safetensors")


class Recorded:
    """The recorded batches in float64: logits as leaves, and what the losses take."""

    def __init__(self) -> None:
        self.logits, self.pairs, self.ref_sums = {}, {}, {}
        for side in ("forget", "alternate", "retain"):
            labels = DATA[f"{side}_labels"]
            self.logits[side] = DATA[f"{side}_logits"].double().requires_grad_()
            self.pairs[side] = label_log_probs(self.logits[side], labels)
            log_probs, mask = label_log_probs(DATA[f"{side}_ref_logits"].double(), labels)
            self.ref_sums[side] = (log_probs * mask).sum(-1)

    def rows(self, side: str, mask) -> tuple[torch.Tensor, Head, torch.Tensor, torch.Tensor, Head]:
        """(hidden, head, labels, ref hidden, ref head) of the labels in the mask: logits are the hidden states of a
        head that is the identity."""
        logits, ref_logits = self.logits[side][:, :-1][mask], DATA[f"{side}_ref_logits"].double()[:, :-1][mask]
        head = Head(torch.eye(logits.shape[-1], dtype=torch.float64))
        return logits, head, DATA[f"{side}_labels"][:, 1:][mask], ref_logits, head

    def retain(self, kind: str) -> torch.Tensor:
        if kind == "NLL":
            return baselines.retain_nll(*self.pairs["retain"])
        # The recorded form averages over every position, the last one, prompt and padding included.
        logits, ref_logits = self.logits["retain"].flatten(0, 1), DATA["retain_ref_logits"].double().flatten(0, 1)
        head = Head(torch.eye(logits.shape[-1], dtype=torch.float64))
        return baselines.retain_kl(logits, head, ref_logits, head)


def forget_term(name: str, data: Recorded, args: dict) -> torch.Tensor:
    pair, ref = data.pairs["forget"], data.ref_sums
    match name.split("_")[0]:
        case "GradAscent" | "GradDiff":
            return baselines.gradient_ascent(*pair)
        case "NPO":
            return baselines.npo(*pair, ref["forget"], beta=args["beta"]).mean()
        case "SimNPO":
            return baselines.simnpo(*pair, beta=args["beta"], delta=args["delta"]).mean()
        case "DPO":
            refusals = data.pairs["alternate"]
            return baselines.idk_dpo(*refusals, *pair, ref["alternate"], ref["forget"], beta=args["beta"]).mean()
        case "WGA":
            return baselines.wga(*pair, beta=args["beta"])
        case "SatImp":
            return baselines.satimp(*pair, beta1=args["beta1"], beta2=args["beta2"])
        case "UNDIAL":
            return baselines.undial(*data.rows("forget", pair[1]), beta=args["beta"], chunk_tokens=3)
        case "CEU":
            mask = baselines.without_first(pair[1], args["ignore_first_n_answer_tokens"])
            return baselines.ceu(*data.rows("forget", mask)[:3], chunk_tokens=3)
    raise AssertionError(name)


COMPARED = [name for name in EXPECTED if not name.startswith(("_", "PDU", "RMU", "UNDIAL_reference"))]


@pytest.mark.parametrize("name", COMPARED)
def test_loss_and_gradients_equal_the_recorded_ones(name):
    data, args = Recorded(), EXPECTED[name]["args"]
    loss = args.get("gamma", 1.0) * forget_term(name, data, args)
    if args.get("alpha", 0.0):
        loss = loss + args["alpha"] * data.retain(args.get("retain_loss_type", "NLL"))
    assert loss.item() == pytest.approx(EXPECTED[name]["loss"], rel=0, abs=1e-6)
    loss.backward()
    sides = [side for side in data.logits if f"{name}.grad_{side}_logits" in DATA]
    assert "forget" in sides
    for side in sides:
        gradient = data.logits[side].grad
        gradient = torch.zeros_like(data.logits[side]) if gradient is None else gradient
        close(gradient, DATA[f"{name}.grad_{side}_logits"], 1e-6)


def test_gradient_difference_is_the_sum_of_its_terms():
    data = Recorded()
    loss = baselines.gradient_difference(*data.pairs["forget"], *data.pairs["retain"])
    assert loss.item() == pytest.approx(EXPECTED["GradDiff_NLL"]["loss"], rel=0, abs=1e-6)


def test_the_other_recorded_undial_averages_over_everything_and_lowers_an_unrelated_token():
    data = Recorded()
    everywhere = torch.ones_like(data.pairs["forget"][1])
    hidden, head, labels, *reference = data.rows("forget", everywhere)
    wrapped = labels.where(labels != -100, len(head.weight_VH) - 100)
    loss = baselines.undial(hidden, head, wrapped, *reference)
    assert loss.item() == pytest.approx(EXPECTED["UNDIAL_reference"]["loss"], rel=0, abs=1e-6)
    loss.backward()
    close(data.logits["forget"].grad, DATA["UNDIAL_reference.grad_forget_logits"], 1e-6)


def test_rmu_equals_the_recorded_forget_term():
    activations = DATA["RMU.activations"].double().requires_grad_()
    uniform = DATA["RMU.uniform_vector"].double().flatten()
    target = uniform / uniform.norm() * EXPECTED["RMU"]["args"]["steering_coeff"]
    loss = baselines.activation_distance(activations, target, DATA["forget_labels"] != -100).mean()
    assert loss.item() == pytest.approx(EXPECTED["RMU"]["forget_loss"], rel=0, abs=1e-6)
    loss.backward()
    close(activations.grad, DATA["RMU.grad_forget"], 1e-6)


def test_the_recorded_retain_term_of_rmu_divides_every_row_by_every_length():
    activations, frozen = DATA["RMU.activations"].double(), DATA["RMU.ref_activations"].double()
    mask = DATA["retain_labels"] != -100
    lengths = mask.sum(-1)
    distance = baselines.activation_distance(activations, frozen, mask)
    crossed = ((distance * lengths) / lengths[:, None]).mean()
    assert crossed.item() == pytest.approx(EXPECTED["RMU"]["retain_loss"], rel=0, abs=1e-6)
    assert distance.mean().item() == pytest.approx(1.498986, abs=1e-6)
    plain = torch.stack([(a[m] - f[m]).square().mean() for a, f, m in zip(activations, frozen, mask, strict=True)])
    close(distance, plain, 1e-12)


def test_control_vector():
    vector = baselines.control_vector(64, 6.5, torch.Generator().manual_seed(0))
    assert vector.shape == (64,) and vector.norm().item() == pytest.approx(6.5) and torch.all(vector >= 0)
    torch.testing.assert_close(vector, baselines.control_vector(64, 6.5, torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    assert baselines.control_vector(8).norm().item() == pytest.approx(2.0)


def test_activations_outside_the_mask_do_not_matter():
    activations = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    activations[:, 0] = math.nan
    activations.requires_grad_()
    mask = torch.tensor([[False, True, True]] * 2)
    loss = baselines.activation_distance(activations, torch.ones(4), mask)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert torch.all(activations.grad[:, 0] == 0) and activations.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch have no answer token"):
        baselines.activation_distance(activations, torch.ones(4), mask & torch.tensor([[True], [False]]))


def draw_log_probs(seed: int, rows: int, columns: int):
    """Log-probabilities (B, S-1), a mask with an answer in every row, and reference sums (B,)."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -4 * torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    mask[:, 0] = True
    return log_probs, mask, -8 * torch.rand(rows, generator=generator, dtype=torch.float64)


batches = st.builds(draw_log_probs, st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 8))
PER_EXAMPLE = {
    "npo": lambda log_probs, mask, ref: baselines.npo(log_probs, mask, ref),
    "simnpo": lambda log_probs, mask, ref: baselines.simnpo(log_probs, mask, delta=0.3),
    "idk_dpo": lambda log_probs, mask, ref: baselines.idk_dpo(log_probs, mask, 2 * log_probs, mask, ref, ref / 2),
}
PER_TOKEN = {
    "retain_nll": baselines.retain_nll,
    "gradient_ascent": baselines.gradient_ascent,
    "wga": baselines.wga,
    "satimp": baselines.satimp,
}


@settings(max_examples=30, deadline=None)
@given(batches, st.integers(1, 3))
def test_padding_and_parts_of_a_batch_change_nothing(batch, padding):
    log_probs, mask, ref = batch
    wide = torch.nn.functional.pad(log_probs, (0, padding), value=math.nan)
    wide_mask = torch.nn.functional.pad(mask, (0, padding))
    for function in PER_EXAMPLE.values():
        whole = function(log_probs, mask, ref)
        close(function(wide, wide_mask, ref), whole, 1e-12)
        rows = [function(log_probs[i : i + 1], mask[i : i + 1], ref[i : i + 1]) for i in range(len(ref))]
        close(torch.cat(rows), whole, 1e-12)
    for function in PER_TOKEN.values():
        whole = function(log_probs, mask)
        close(function(wide, wide_mask), whole, 1e-12)
        rows = [function(log_probs[i : i + 1], mask[i : i + 1], num_items=mask.sum()) for i in range(len(ref))]
        close(torch.stack(rows).sum(), whole, 1e-12)


@settings(max_examples=30, deadline=None)
@given(batches)
def test_limits_that_connect_the_methods(batch):
    log_probs, mask, ref = batch
    log_probs.requires_grad_()
    nll = baselines.sequence_nll(log_probs, mask)

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), log_probs, retain_graph=True)[0]

    # As beta tends to 0, NPO tends to gradient ascent on the sum of each answer and SimNPO to that on its mean.
    close(gradient(baselines.npo(log_probs, mask, ref, beta=1e-7)), gradient(-nll), 1e-5)
    close(gradient(baselines.simnpo(log_probs, mask, beta=1e-7)), gradient(-nll / mask.sum(-1)), 1e-5)
    # At the reference both margins are zero.
    at_reference = -nll.detach()
    expected = torch.full_like(ref, 20 * math.log(2))
    close(baselines.npo(log_probs, mask, at_reference), expected, 1e-12)
    close(baselines.idk_dpo(log_probs, mask, log_probs, mask, at_reference, at_reference), expected, 1e-12)
    close(baselines.wga(log_probs, mask, beta=0), baselines.gradient_ascent(log_probs, mask), 1e-12)
    close(baselines.satimp(log_probs, mask, beta2=0), baselines.wga(log_probs, mask, beta=5), 1e-12)


def test_certain_tokens_have_a_finite_weight():
    # Rounding can put a log-probability slightly above zero.
    log_probs = torch.tensor([[0.0, 1e-7, -1e-12, -80.0]], requires_grad=True)
    loss = baselines.satimp(log_probs, torch.ones(1, 4, dtype=torch.bool), beta2=0.5)
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()


def test_a_batch_without_answer_tokens_is_a_differentiable_zero():
    log_probs, mask = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    for function in PER_TOKEN.values():
        loss = function(log_probs, mask)
        loss.backward()
        assert loss.item() == 0 and torch.all(log_probs.grad == 0)
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    for head in (Head(weight), Head(weight.detach())):
        loss = baselines.ceu(hidden, head, labels)
        loss.backward()
        assert loss.item() == 0 and hidden.grad.shape == (0, 4)
    assert torch.all(weight.grad == 0)


def test_first_answer_tokens_are_left_out():
    mask = torch.tensor([[False, True, True, True], [False, False, False, True], [True, False, True, False]])
    expected = torch.tensor([[False, False, True, True], [False] * 4, [False, False, True, False]])
    assert torch.equal(baselines.without_first(mask), expected)
    assert torch.equal(baselines.without_first(mask, 0), mask)


def test_every_method_has_coefficients():
    assert all(hasattr(baselines, name) for name in DEFAULT_COEFFICIENTS if name != "rmu")
    assert all(gamma > 0 and alpha >= 0 for gamma, alpha in DEFAULT_COEFFICIENTS.values())
