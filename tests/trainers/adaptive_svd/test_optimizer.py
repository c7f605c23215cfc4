"""AdamW inside a subspace: nothing leaves it, everything inside is reached, and the rest is plain AdamW."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_ext.trainers.adaptive_svd.optimizer import SubspaceAdamW
from hf_ext.trainers.adaptive_svd.subspace import drift, reduce, split_weight
from hf_ext.trainers.adaptive_svd.taps import tap

SHAPES = [(16, 28), (28, 16), (20, 20)]


def make_layer(shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Linear(shape[1], shape[0]).to(dtype)


def make_data(shape, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(64, shape[1], generator=generator).to(dtype),
        torch.randn(64, shape[0], generator=generator).to(dtype),
    )


def fit(layer, optimizer, data, steps, accumulation=1, clip=None):
    """Mean squared error; the loss after the last step."""
    inputs, targets = data
    for _ in range(steps):
        for part in range(accumulation):
            rows = slice(part, None, accumulation)
            ((layer(inputs[rows]) - targets[rows]).float().square().mean() / accumulation).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return float((layer(inputs) - targets).float().detach().square().mean())


def protected(layer, rank, **options):
    subspace = split_weight(layer.weight.float(), rank)
    return subspace, SubspaceAdamW(layer.parameters(), {layer.weight: subspace}, **{"lr": 1e-2, **options})


def leak(before, after, rank):
    """Shares of the change that are inside the protected spaces of outputs and of inputs."""
    left, _, right = torch.linalg.svd(before.double(), full_matrices=False)
    change = (after - before).double()
    return [float(part.norm() / change.norm()) for part in (left[:, :rank].mT @ change, change @ right[:rank].mT)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{"weight_decay": 0.0}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}])
@pytest.mark.parametrize("run", [{}, {"accumulation": 4, "clip": 0.05}])
def test_nothing_leaves_the_subspace(shape, options, run):
    layer = make_layer(shape)
    before = layer.weight.detach().clone()
    subspace, optimizer = protected(layer, 9, **options)
    start = fit(layer, optimizer, make_data(shape), 1)
    end = fit(layer, optimizer, make_data(shape), 150, **run)
    assert end < start - 0.05
    assert max(leak(before, layer.weight.detach(), 9)) <= 1e-6
    assert drift(layer.weight.detach(), subspace) <= 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moments_in_eight_bits_stay_inside_too(decay):
    layers, ends = [make_layer((96, 128)) for _ in range(2)], []
    before = layers[0].weight.detach().clone()
    for layer, eight_bit in zip(layers, ([], [layers[1].weight]), strict=True):
        subspace, optimizer = protected(layer, 40, eight_bit=eight_bit, weight_decay=decay, lr=2e-3)
        ends.append(fit(layer, optimizer, make_data((96, 128)), 60))
        assert max(leak(before, layer.weight.detach(), 40)) <= 1e-6
        assert drift(layer.weight.detach(), subspace) <= 1e-6
    sizes = [value.element_size() for value in optimizer.state[layers[1].weight].values() if value.numel() > 1000]
    assert sizes.count(1) == 2 and not layers[0].weight.equal(layers[1].weight)
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_eight_bits_without_a_subspace_are_bitsandbytes():
    ours, theirs = make_layer((96, 128)), make_layer((96, 128))
    options = {"lr": 1e-3, "weight_decay": 0.1}
    fit(ours, SubspaceAdamW([ours.weight], {}, eight_bit=[ours.weight], **options), make_data((96, 128)), 10)
    fit(theirs, AdamW8bit([theirs.weight], **options), make_data((96, 128)), 10)
    assert ours.weight.equal(theirs.weight)


def test_eight_bit_states_are_saved_as_they_are():
    ends = []
    for stops in (False, True):
        layer = make_layer((96, 128))
        subspace, optimizer = protected(layer, 40, eight_bit=[layer.weight])
        fit(layer, optimizer, make_data((96, 128)), 5)
        if stops:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SubspaceAdamW(layer.parameters(), {layer.weight: subspace}, eight_bit=[layer.weight], lr=1e-2)
            optimizer.load_state_dict(saved)
        fit(layer, optimizer, make_data((96, 128)), 5)
        ends.append(layer.weight.detach().clone())
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_papers_formula_leaves_both_sides(shape):
    layer = make_layer(shape)
    before = layer.weight.detach().clone()
    _, optimizer = protected(layer, 9, joint=True)
    fit(layer, optimizer, make_data(shape), 100)
    assert min(leak(before, layer.weight.detach(), 9)) > 0.05
    left, _, right = torch.linalg.svd(before, full_matrices=False)
    inner = left[:, :9].mT @ (layer.weight.detach() - before) @ right[:9].mT
    assert inner.norm() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_point_of_the_subspace_is_reached(shape):
    """Against least squares over all changes `(I - P_U) D (I - P_V)`, in closed form."""
    layer, (inputs, targets) = make_layer(shape), make_data(shape)
    layer.bias.requires_grad_(False)
    subspace = split_weight(layer.weight, 9)
    left, _, right = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    allowed = torch.eye(shape[0]).double() - left[:, :9] @ left[:, :9].mT
    rows = inputs.double() @ (torch.eye(shape[1]).double() - right[:9].mT @ right[:9])
    missing = (targets - layer(inputs)).detach().double()
    solution = torch.linalg.lstsq(rows, missing @ allowed, driver="gelsd").solution
    best = float((missing - rows @ solution @ allowed).square().mean())
    optimizer = SubspaceAdamW([layer.weight], {layer.weight: subspace}, lr=2e-2)
    fit(layer, optimizer, (inputs, targets), 300)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    assert fit(layer, optimizer, (inputs, targets), 300) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_without_a_subspace_are_plain_adamws(fused):
    plain, ours = make_layer((6, 8)), make_layer((6, 8))
    options = {"lr": 1e-2, "weight_decay": 0.1, "fused": fused}
    fit(plain, AdamWithClip(plain.parameters(), **options), make_data((6, 8)), 20, clip=0.3)
    fit(ours, SubspaceAdamW(ours.parameters(), {}, **options), make_data((6, 8)), 20, clip=0.3)
    assert ours.weight.equal(plain.weight) and ours.bias.equal(plain.bias)


class AdamWithClip(AdamW):
    def clip_grad_norm_(self, max_norm):
        return torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], max_norm)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_protected_is_plain_adamw_and_all_protected_is_frozen(shape):
    """With rank 0 in an orthonormal basis of the outputs AdamW scales other coordinates; with the identity it is equal."""
    frozen = make_layer(shape)
    before = frozen.weight.detach().clone()
    fit(frozen, protected(frozen, min(shape))[1], make_data(shape), 10)
    assert frozen.weight.equal(before)
    plain, free = make_layer(shape), make_layer(shape)
    fit(plain, AdamW(plain.parameters(), lr=1e-2), make_data(shape), 10)
    short = min(shape)
    subspace = replace(split_weight(free.weight, 0), basis_PP=torch.eye(short))
    fit(
        free,
        SubspaceAdamW(free.parameters(), {free.weight: subspace}, lr=1e-2, weight_decay=0.01),
        make_data(shape),
        10,
    )
    # AdamW decays the weight, ours its change.
    assert (free.weight - plain.weight).norm() < 1e-2 * (plain.weight - before).norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_tapped_gradients_are_those_of_the_whole_weight(shape, transposed):
    """In two micro-batches, through a layer whose inputs need no gradient."""
    inputs, targets = make_data(shape)
    layers = []
    for tapped in (False, True):
        layer = make_layer(shape)
        if transposed:
            conv = Conv1D(shape[0], shape[1])
            conv.load_state_dict({"weight": layer.weight.detach().mT.contiguous(), "bias": layer.bias.detach()})
            layer = conv
        subspace, optimizer = protected(layer, 5, weight_decay=0.1)
        if tapped:
            tap(layer, subspace, partial(optimizer.accumulate, layer.weight))
            layer.weight.requires_grad_(False)
        fit(layer, optimizer, (inputs, targets), 3, accumulation=2, clip=0.1)
        assert layer.weight.grad is None
        layers.append(layer)
    torch.testing.assert_close(layers[1].weight, layers[0].weight, rtol=1e-4, atol=1e-5, check_stride=False)
    torch.testing.assert_close(layers[1].bias, layers[0].bias)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_outputs_of_tapped_layers_can_be_changed_in_place(needs_gradient):
    """As models with clipped queries do."""
    found = []
    for tapped in (False, True):
        layer, (inputs, _) = make_layer((12, 18)), make_data((12, 18))
        inputs.requires_grad_(needs_gradient)
        subspace = split_weight(layer.weight, 5)
        if tapped:
            tap(layer, subspace, lambda short, long: found.append(short.mT @ long))
            layer.weight.requires_grad_(False)
        layer(inputs).clamp_(-0.5, 0.5).square().sum().backward()
        if not tapped:
            found.append(reduce(layer.weight.grad, subspace))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_taps_under_gradient_checkpointing(reentrant):
    layer, (inputs, targets) = make_layer((12, 18)), make_data((12, 18))
    subspace = split_weight(layer.weight, 5)
    found = []
    tap(layer, subspace, lambda short, long: found.append(short.mT @ long))
    layer.weight.requires_grad_(False)
    for recomputed in (False, True):
        rows = inputs.clone().requires_grad_()
        outputs = checkpoint(layer, rows, use_reentrant=reentrant) if recomputed else layer(rows)
        (outputs - targets).square().mean().backward()
    with torch.no_grad():
        layer(inputs)
    assert len(found) == 2
    torch.testing.assert_close(found[1], found[0])


def test_the_norm_is_that_of_what_can_change():
    layer = make_layer((12, 18))
    _, optimizer = protected(layer, 5)
    inputs, targets = make_data((12, 18))
    twin = copy.deepcopy(layer)
    (twin(inputs) - targets).square().mean().backward()
    (layer(inputs) - targets).square().mean().backward()
    left, _, right = torch.linalg.svd(twin.weight.detach(), full_matrices=False)
    inside = twin.weight.grad - left[:, :5] @ (left[:, :5].mT @ twin.weight.grad)
    inside = inside - (inside @ right[:5].mT) @ right[:5]
    expected = torch.stack([inside.norm(), twin.bias.grad.norm()]).norm()
    torch.testing.assert_close(optimizer.clip_grad_norm_(1e9), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.clip_grad_norm_(0.01), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.clip_grad_norm_(1e9), torch.tensor(0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_loaded_state_goes_on_bit_for_bit(dtype, weight_decay):
    data = make_data((12, 18), dtype=dtype)
    layer = make_layer((12, 18), dtype=dtype)
    subspace, optimizer = protected(layer, 5, weight_decay=weight_decay)
    fit(layer, optimizer, data, 7)
    again = copy.deepcopy(layer)
    again.weight._backward_hooks = None
    saved = copy.deepcopy(optimizer.state_dict())
    fit(layer, optimizer, data, 5)
    other = SubspaceAdamW(again.parameters(), {again.weight: subspace}, lr=1.0, weight_decay=0.5)
    other.load_state_dict(saved)
    fit(again, other, data, 5)
    assert again.weight.equal(layer.weight) and again.bias.equal(layer.bias)


def test_small_steps_move_bfloat16_weights():
    """Steps of a hundredth of what bfloat16 resolves add up, and stay inside but for the last rounding."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = make_layer((20, 30), dtype=dtype)
        before = layer.weight.detach().clone()
        _, optimizer = protected(layer, 8, lr=1e-5)
        fit(layer, optimizer, make_data((20, 30), dtype=dtype), 300)
        moved[dtype] = float((layer.weight.detach() - before).float().norm())
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.1)
    assert max(leak(before.float(), layer.weight.detach().float(), 8)) < 0.5


def test_another_basis_of_the_free_directions_protects_the_same():
    """The protected directions count, whatever signs their vectors have."""
    layer = make_layer((14, 14))
    subspace = split_weight(layer.weight, 6)
    signs = torch.randint(0, 2, (14,)) * 2.0 - 1
    flipped = replace(subspace, basis_PP=subspace.basis_PP * signs)
    twin = copy.deepcopy(layer)
    fit(layer, SubspaceAdamW(layer.parameters(), {layer.weight: subspace}, lr=1e-2), make_data((14, 14)), 10)
    fit(twin, SubspaceAdamW(twin.parameters(), {twin.weight: flipped}, lr=1e-2), make_data((14, 14)), 10)
    torch.testing.assert_close(twin.weight, layer.weight, rtol=1e-4, atol=1e-6)


def test_a_closure_and_a_step_without_gradients():
    layer = make_layer((4, 6))
    before = copy.deepcopy(layer.state_dict())
    subspace, optimizer = protected(layer, 2)
    optimizer.step()
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 6)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(
        float(torch.nn.functional.linear(torch.ones(1, 6), before["weight"], before["bias"]).sum())
    )
    assert not layer.weight.equal(before["weight"]) and drift(layer.weight.detach(), subspace) < 1e-6


@pytest.mark.parametrize("saved", [{"rank": 4}, {"rank": 2, "joint": True}])
def test_a_state_of_another_subspace_is_refused(saved):
    layer = make_layer((6, 8))
    _, other = protected(layer, **saved)
    fit(layer, other, make_data((6, 8)), 1)
    with pytest.raises(ValueError, match=r"its subspace needs \(4, 8\)"):
        protected(layer, 2)[1].load_state_dict(other.state_dict())


def test_bad_input():
    layer = make_layer((4, 6))
    subspace = split_weight(layer.weight, 2)
    with pytest.raises(ValueError, match="not among the parameters"):
        SubspaceAdamW([layer.bias], {layer.weight: subspace})
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        SubspaceAdamW(layer.parameters(), {layer.weight: subspace}, amsgrad=True)
