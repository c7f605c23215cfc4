"""Pruning while training: the invariants of the method under real optimizers."""

import copy
import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_ext.tuners.roselora import density_report, pruning
from hf_ext.tuners.roselora.reference import keep_count
from tests.conftest import make_tiny_llama
from tests.tuners.roselora.conftest import adapter_weights, batch, make_model, rose_config, train


def lines(weights):
    """Every factor as a matrix whose rows are lines."""
    return {name: w if "lora_A" in name else w.T for name, w in weights.items()}


@pytest.mark.parametrize("freeze_mask", [True, False])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_after_t_final_every_line_has_its_share(optimizer_cls, freeze_mask):
    model = make_model(freeze_mask=freeze_mask)
    train(model, optimizer=optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    for name, matrix in lines(adapter_weights(model)).items():
        assert ((matrix != 0).sum(1) == keep_count(matrix.shape[1], 0.1)).all(), name
    report = model.base_model.density()
    assert report.density <= report.bound <= 4 * (7 / 64) ** 2 + 1e-9 + 4 * (7 / 64) * (4 / 32)


def test_density_never_grows():
    model = make_model()
    seen = []
    train(model, steps=10, after_step=lambda _: seen.append(model.base_model.density().density))
    assert seen[0] == seen[1] == 1.0
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.06


@pytest.mark.parametrize("config", [{"sparsity": 0.0}, {"t_init": 50, "t_final": 60}])
def test_dense_phase_is_lora_bit_for_bit(config):
    rose = make_model(**config)
    lora = get_peft_model(make_tiny_llama(), rose_config(**config).to_lora_config())
    for model in (rose, lora):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.any():
                torch.nn.init.normal_(parameter)
        train(model)
    ours, theirs = adapter_weights(rose), adapter_weights(lora)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_value_clip_bounds_the_update():
    clip, alpha, rank = 2e-3, 8, 4
    model = make_model(value_clip=clip, lora_alpha=alpha, r=rank)
    train(model)
    for layer in pruning.lora_layers(model):
        assert layer.get_delta_weight("default").abs().max() <= alpha * clip**2 * (1 + 1e-5)


def test_frozen_entries_stay_zero_and_the_optimizer_is_untouched():
    model = make_model()
    optimizer = train(model, steps=6)
    dead = {name: w == 0 for name, w in adapter_weights(model).items()}
    keys = {frozenset(state) for state in optimizer.state.values()}
    train(model, steps=4, first=6, optimizer=optimizer)
    assert all((w[dead[name]] == 0).all() for name, w in adapter_weights(model).items())
    assert keys == {frozenset({"step", "exp_avg", "exp_avg_sq"})} == {frozenset(s) for s in optimizer.state.values()}
    assert all(
        line.importance is None
        for p in pruning.pruners(model)
        for s in p.adapters.values()
        for line in s.lines.values()
    )


def test_frozen_masks_equal_recomputed_ones():
    """The reason freezing is the default: after t_final the choice does not change any more."""
    frozen, free = make_model(), make_model(freeze_mask=False)
    train(frozen, steps=14)
    train(free, steps=14)
    a, b = adapter_weights(frozen), adapter_weights(free)
    assert all(torch.equal(a[name] == 0, b[name] == 0) for name in a)


def test_accumulated_micro_batches_equal_one_batch():
    results = []
    for pieces in (1, 4):
        model = make_model().double()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(8):
            data = batch(step)
            for chunk in data["input_ids"].chunk(pieces):
                (model(input_ids=chunk, labels=chunk).loss / pieces).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(adapter_weights(model))
    for name, one in results[0].items():
        assert torch.equal(one == 0, results[1][name] == 0), name
        torch.testing.assert_close(one, results[1][name])


def test_prune_interval_skips_steps_but_not_the_end():
    model = make_model(prune_interval=3)
    zeros = []
    train(model, steps=8, after_step=lambda _: zeros.append((1 - density_report(model).layers[0].kept_a) > 0))
    assert zeros[:2] == [False, False]
    assert zeros[2] and all(zeros[5:])


def test_two_optimizers_on_one_adapter_count_one_step():
    model = make_model()
    a = [p for n, p in model.named_parameters() if "lora_A" in n]
    b = [p for n, p in model.named_parameters() if "lora_B" in n]
    optimizers = [torch.optim.AdamW(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2)]
    for step in range(5):
        model(**batch(step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert pruning.schedules(model)["default"].step == 5


def test_masks_hold_when_a_step_has_no_gradient():
    """A loss that is already satisfied sets gradients to None; the schedule goes on all the same."""
    model = make_model()
    optimizer = train(model, steps=4)
    for _ in range(4):
        optimizer.step()
    assert pruning.schedules(model)["default"].step == 8
    assert all((m != 0).sum(1).max() <= keep_count(m.shape[1], 0.1) for m in lines(adapter_weights(model)).values())


def test_only_active_trainable_adapters_are_pruned():
    model = make_model()
    model.add_adapter("other", rose_config(sparsity=0.5))
    model.add_adapter("ref", rose_config(inference_mode=True, init_lora_weights=False))
    model.set_adapter("default")
    others = adapter_weights(model, "other") | adapter_weights(model, "ref")
    train(model)
    after = adapter_weights(model, "other") | adapter_weights(model, "ref")
    assert all(torch.equal(others[name], after[name]) for name in others)
    model.set_adapter("other")
    train(model)
    schedules = pruning.schedules(model)
    assert (schedules["default"].step, schedules["other"].step, schedules["ref"].step) == (8, 8, 0)
    assert density_report(model, "other").layers[0].kept_a == 0.5
    assert density_report(model, "default").layers[0].kept_a == 7 / 64


def test_other_optimizers_are_left_alone_and_deleting_the_adapter_removes_the_hooks():
    model = make_model()
    other = torch.nn.Linear(4, 4)
    other(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert pruning.schedules(model)["default"].step == 0
    gc.collect()  # layers of earlier tests
    model.delete_adapter("default")
    assert not pruning._HANDLES
    model.add_adapter("again", rose_config())
    assert len(pruning._HANDLES) == 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_pruned_on_their_own(duplicate):
    model = make_model()
    train(model, steps=3)
    twin = duplicate(model)
    train(twin, steps=5, first=3)
    assert pruning.schedules(twin)["default"].step == 8
    assert pruning.schedules(model)["default"].step == 3
    assert density_report(twin).layers[0].kept_a == 7 / 64
    assert density_report(model).layers[0].kept_a > 0.4


def test_fractional_limits_without_a_total_say_so():
    model = make_model(t_init=0.1, t_final=0.8)
    with pytest.raises(ValueError, match="total_step"):
        train(model, steps=1)
    timed = make_model(t_init=0.25, t_final=0.75, total_step=8)
    train(timed)
    assert density_report(timed).layers[0].kept_a == 7 / 64


class _Descent:
    """An optimizer that torch's step hooks do not know."""

    def __init__(self, parameters, lr=0.5):
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            parameter.add_(parameter.grad, alpha=-self.lr)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None


def test_manual_calls_prune_where_no_hook_fires():
    """Same masks as the hooks give: the weights left by the previous call are those of the forward pass."""
    manual, hooked = make_model(), make_model()
    train(
        manual,
        optimizer=_Descent(p for p in manual.parameters() if p.requires_grad),
        after_step=manual.base_model.update_and_allocate,
    )
    train(hooked, optimizer=torch.optim.SGD([p for p in hooked.parameters() if p.requires_grad], lr=0.5))
    ours, theirs = adapter_weights(manual), adapter_weights(hooked)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_manual_calls_beside_the_hooks_change_nothing():
    both, hooked = make_model(), make_model()
    train(both, after_step=both.base_model.update_and_allocate)
    train(hooked)
    ours, theirs = adapter_weights(both), adapter_weights(hooked)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merge_touches_only_the_support_and_unmerge_restores():
    model = make_model()
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    train(model)
    supports = {
        name: layer.get_delta_weight("default") != 0
        for name, layer in model.named_modules()
        if isinstance(layer, pruning.LoraLayer)
    }
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            changed = parameter != before[name]
            assert changed.any()
            assert not (changed & ~supports[name.removesuffix(".base_layer.weight")]).any()
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)


def test_bf16_adapters():
    """QLoRA recipes train adapters in bf16; scores stay in float32."""
    model = get_peft_model(make_tiny_llama().to(torch.bfloat16), rose_config(), autocast_adapter_dtype=False)
    optimizer = train(model, steps=4)
    states = [line for p in pruning.pruners(model) for s in p.adapters.values() for line in s.lines.values()]
    assert {line.importance.dtype for line in states} == {torch.float32}
    train(model, steps=4, first=4, optimizer=optimizer)
    assert {w.dtype for w in adapter_weights(model).values()} == {torch.bfloat16}
    assert density_report(model).layers[0].kept_a <= 7 / 64


def test_an_overflown_step_is_harmless():
    """A fused optimizer is called even when the loss scaler found infinities; the averages must survive it."""
    model = make_model(freeze_mask=False)
    optimizer = train(model, steps=3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf")) if parameter.requires_grad else None

    def drop_gradients(opt, args, kwargs):
        opt.zero_grad()

    optimizer.register_step_pre_hook(drop_gradients)
    # torch runs the global hooks first: they see the infinities, the optimizer does not.
    optimizer.step()
    states = [line for p in pruning.pruners(model) for s in p.adapters.values() for line in s.lines.values()]
    assert all(line.importance.isfinite().all() for line in states)
    assert all(p.isfinite().all() for p in model.parameters())


def test_plain_lora_models_carry_no_state():
    model = get_peft_model(make_tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert pruning.schedules(model) == {}
    train(model, steps=2)
    assert density_report(model).density == 1.0
