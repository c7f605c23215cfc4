"""The baselines: recorded losses and gradients, the chunked ones against their definition, memory and bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

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


def make_head(tokens=11, hidden=7, vocab=53, dtype=torch.float64, bias=True, scale=1.0, cap=None, seed=0):
    """Hidden states, head and labels, then those states and head of a reference; every second label is the arg-max."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    sides = []
    for _ in range(2):
        head = Head(draw(vocab, hidden), draw(vocab) if bias else None, scale, cap)
        sides += [draw(tokens, hidden), head]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[::2] = direct_logits(*sides[:2]).argmax(-1)[::2]
    return sides[0], sides[1], labels, sides[2], sides[3]


def direct_logits(hidden, head):
    z = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def direct_undial(hidden, head, labels, ref_hidden, ref_head):
    onehot = torch.nn.functional.one_hot(labels, len(head.weight_VH))
    target = (direct_logits(ref_hidden, ref_head).detach() - 10 * onehot).softmax(-1)
    return torch.nn.functional.cross_entropy(direct_logits(hidden, head), target)


def direct_ceu(hidden, head, labels, ref_hidden, ref_head):
    logits = direct_logits(hidden, head)
    onehot = torch.nn.functional.one_hot(labels, len(head.weight_VH)).bool()
    target = logits.detach().masked_fill(onehot, -math.inf).softmax(-1)
    return torch.nn.functional.cross_entropy(logits, target)


def direct_kl(hidden, head, labels, ref_hidden, ref_head):
    log_p, log_q = direct_logits(hidden, head).log_softmax(-1), direct_logits(ref_hidden, ref_head).log_softmax(-1)
    return torch.nn.functional.kl_div(log_p, log_q.detach(), reduction="batchmean", log_target=True)


METHODS = {
    "undial": (baselines.undial, direct_undial),
    "ceu": (lambda hidden, head, labels, *_, **more: baselines.ceu(hidden, head, labels, **more), direct_ceu),
    "kl": (lambda hidden, head, labels, *ref, **more: baselines.retain_kl(hidden, head, *ref, **more), direct_kl),
}
every_method = pytest.mark.parametrize("method", METHODS)


def compare(method, inputs, trained, tolerance, **more):
    """Chunked against direct: loss and gradients, the largest deviation relative to the largest entry."""
    chunked, direct = METHODS[method]
    hidden, head = inputs[:2]
    leaves = {"hidden": hidden, "weight": head.weight_VH, "bias": head.bias_V}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    expected = direct(*inputs)
    found = chunked(*inputs, **more)
    assert found.dtype == expected.dtype and abs(found.item() - expected.item()) <= tolerance * abs(expected.item())
    factor = 3.0  # an upstream gradient other than 1
    pairs = zip(
        torch.autograd.grad(factor * found, wanted), torch.autograd.grad(factor * expected, wanted), strict=True
    )
    for gradient, truth in pairs:
        assert gradient.dtype == truth.dtype
        assert (gradient - truth).abs().max() <= tolerance * truth.abs().max()


@every_method
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 11, 100])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("weight",), ("hidden", "bias")])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_chunked_equals_the_definition(method, chunk_tokens, trained, dtype, tolerance):
    compare(method, make_head(dtype=dtype), trained, tolerance, chunk_tokens=chunk_tokens)


@every_method
@pytest.mark.parametrize("scale, cap", [(0.5, None), (1.3, 4.0)])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_scaled_and_capped_logits(method, scale, cap, trained):
    compare(method, make_head(bias=False, scale=scale, cap=cap), trained, 1e-12, chunk_tokens=4)


@every_method
@pytest.mark.parametrize("tokens, vocab", [(1, 2), (3, 2), (130, 31), (2, 40_000)])
def test_odd_shapes(method, tokens, vocab):
    compare(method, make_head(tokens, 5, vocab), ("hidden", "weight"), 1e-11)


@every_method
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_autocast_multiplies_in_low_precision(method, trained):
    # Wide enough that the weight is converted in slices.
    inputs = make_head(6, 16, 40_000, torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(method, inputs, trained, 2e-2, chunk_tokens=4)


@every_method
def test_the_mean_is_over_num_items(method):
    inputs, (chunked, _) = make_head(), METHODS[method]
    whole = chunked(*inputs)
    hidden, head, labels, ref_hidden, ref_head = inputs
    parts = [
        chunked(hidden[part], head, labels[part], ref_hidden[part], ref_head, num_items=11)
        for part in (slice(0, 4), slice(4, 11))
    ]
    close(sum(parts), whole, 1e-12)


@every_method
@pytest.mark.parametrize("train_head", [False, True])
def test_the_reference_is_constant(method, train_head):
    inputs, (chunked, _) = make_head(), METHODS[method]
    inputs[1].weight_VH.requires_grad_(train_head)
    inputs[1].bias_V.requires_grad_(train_head)
    chunked(*inputs).backward()
    assert inputs[0].grad is not None and (inputs[1].weight_VH.grad is not None) == train_head
    assert all(leaf.grad is None for leaf in (inputs[3], inputs[4].weight_VH, inputs[4].bias_V))
    with torch.no_grad():
        assert not chunked(*inputs).requires_grad


@every_method
def test_a_second_derivative_is_refused(method):
    inputs, (chunked, _) = make_head(), METHODS[method]
    (gradient,) = torch.autograd.grad(chunked(*inputs).square(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_kl_to_itself_is_exactly_zero():
    hidden, head, *_ = make_head(dtype=torch.float32)
    loss = baselines.retain_kl(hidden, head, hidden.detach(), head)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, hidden)[0].abs().max() == 0


def test_ceu_stays_finite_for_a_memorised_token():
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = baselines.ceu(hidden, Head(torch.eye(3)[:, :2]), torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(200) and hidden.grad.isfinite().all() and hidden.grad[0, 0] == 1


@pytest.mark.parametrize("bad", [53, -1, -100])
def test_a_bad_label_is_named(bad):
    hidden, head, labels, ref_hidden, ref_head = make_head()
    labels[2] = bad
    with pytest.raises(IndexError, match=f"label {bad} is outside the vocabulary of 53 tokens"):
        baselines.undial(hidden, head, labels, ref_hidden, ref_head)
    with pytest.raises(IndexError, match=f"label {bad} is outside the vocabulary of 53 tokens"):
        baselines.ceu(hidden, head, labels)


def allocated_peak(function) -> int:
    """Largest number of bytes that torch's CPU allocator held above the start while `function` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        function()
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@every_method
@pytest.mark.parametrize("train_head", [False, True])
def test_memory_does_not_grow_with_the_number_of_tokens(method, train_head):
    vocab, width = 20_000, 4
    weight, ref_weight = torch.randn(vocab, width).requires_grad_(train_head), torch.randn(vocab, width)

    def step(tokens: int) -> None:
        hidden = torch.randn(tokens, width, requires_grad=True)
        inputs = hidden, Head(weight), torch.arange(tokens), torch.randn(tokens, width), Head(ref_weight)
        METHODS[method][0](*inputs, chunk_tokens=8).backward()
        weight.grad = None

    row = vocab * 4
    few, many = (allocated_peak(lambda tokens=tokens: step(tokens)) for tokens in (16, 128))
    gradient = 2 * width * row if train_head else 0
    # Six buffers of one chunk, and one row for everything that is not as wide as the vocabulary.
    assert few < (6 * 8 + 1) * row + gradient and many < few + row


def test_every_method_has_coefficients():
    assert all(hasattr(baselines, name) for name in DEFAULT_COEFFICIENTS if name != "rmu")
    assert all(gamma > 0 and alpha >= 0 for gamma, alpha in DEFAULT_COEFFICIENTS.values())
