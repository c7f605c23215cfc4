"""What is trained: every loss against its definition, exact accumulation, RMU's layer, and the log."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_ext.trainers.flat import FlatTrainer, baselines
from hf_ext.trainers.flat.loss import answer_probability, flat_loss, padded_probability
from hf_ext.trainers.flat.methods import METHODS
from tests.conftest import make_tiny_llama
from tests.trainers.flat.helpers import batch_of, loss_of, make_forget, make_retain, make_trainer, trained
from tests.trainers.helpers import FAMILIES, SMALL, column, largest_difference, lora, weights

SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def loss_and_gradient(trainer, batch) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = loss_of(trainer, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


class Plain:
    """Logits, labels and masks of one group, from an ordinary forward of an unpatched float64 model."""

    def __init__(self, model, batch, part: slice, layer: int) -> None:
        ids, mask = batch["input_ids"][part], batch["attention_mask"][part]
        self.answer = batch["completion_mask"][part].bool()
        self.mask, self.labels = self.answer[:, 1:], ids[:, 1:]
        out = type(model).forward(model, input_ids=ids, attention_mask=mask, output_hidden_states=True)
        self.hidden = out.hidden_states[-1][:, :-1]
        self.activations = out.hidden_states[layer + 1]
        self.log_p = out.logits[:, :-1].log_softmax(-1)
        self.log_probs = self.log_p.gather(-1, self.labels[..., None])[..., 0]

    def mean(self, loss_BT: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over examples of the mean over answer tokens."""
        mask = self.mask if mask is None else mask
        return ((loss_BT * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

    @property
    def sums(self) -> torch.Tensor:
        return (self.log_probs * self.mask).sum(-1)


def moved_and_copied(model):
    """Move the weights away from the reference, and copy the model without the patch of its forward."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    now = copy.deepcopy(model)
    del now.forward
    return now


def forget_definition(name: str, now: dict[str, Plain], before: dict[str, Plain], control) -> torch.Tensor:
    forget = now["forget"]
    match name:
        case "flat":
            p = [answer_probability(now[group].log_probs, now[group].mask) for group in ("template", "forget")]
            return flat_loss(*p, "kl").mean()
        case "gradient_ascent" | "gradient_difference":
            return forget.mean(forget.log_probs)
        case "npo":
            return baselines.npo(forget.log_probs, forget.mask, before["forget"].sums).mean()
        case "simnpo":
            return baselines.simnpo(forget.log_probs, forget.mask).mean()
        case "idk_dpo":
            idk = now["template"]
            pairs = (idk.log_probs, idk.mask, forget.log_probs, forget.mask)
            return baselines.idk_dpo(*pairs, before["template"].sums, before["forget"].sums).mean()
        case "wga":
            return forget.mean(forget.log_probs.exp().detach() * forget.log_probs)
        case "satimp":
            p = forget.log_probs.exp().detach()
            return forget.mean(p**5 * (1 - p) * forget.log_probs)
        case "undial":
            target = before["forget"].log_p.scatter_add(
                -1, forget.labels[..., None], torch.full_like(forget.log_probs, -10)[..., None]
            )
            return forget.mean(-(target.softmax(-1) * forget.log_p).sum(-1))
        case "ceu":
            target = forget.log_p.detach().scatter(-1, forget.labels[..., None], -torch.inf).softmax(-1)
            later = forget.mask & (forget.mask.cumsum(-1) > 1)
            return forget.mean(-(target * forget.log_p).sum(-1), later)
        case "rmu":
            squared = (forget.activations - control).square().mean(-1)
            return ((squared * forget.answer).sum(-1) / forget.answer.sum(-1)).mean()
    raise AssertionError(name)


def retain_definition(kind: str, now: Plain, before: Plain) -> torch.Tensor:
    if kind == "nll":
        return -now.mean(now.log_probs)
    if kind == "kl":
        return now.mean((before.log_p.exp() * (before.log_p - now.log_p)).sum(-1))
    squared = (now.activations - before.activations).square().mean(-1)
    return ((squared * now.answer).sum(-1) / now.answer.sum(-1)).mean()


@pytest.mark.parametrize(
    "name, retain_loss", [(n, k) for n in METHODS for k in ("nll", "kl") if (n, k) != ("rmu", "kl")]
)
def test_loss_and_gradient_are_the_definition(tmp_path, name, retain_loss):
    before = make_tiny_llama().double()
    overrides = {"loss_type": name, "retain_coef": 0.7, "forget_coef": 1.3, "retain_loss": retain_loss}
    trainer = make_trainer(tmp_path, copy.deepcopy(before), overrides=overrides, retain_dataset=make_retain())
    batch = batch_of(trainer)
    now = moved_and_copied(trainer.model)

    groups = trainer.data_collator.groups
    parts = {group: slice(i * 4, i * 4 + 4) for i, group in enumerate(groups)}
    plain = {group: Plain(now, batch, part, 0) for group, part in parts.items()}
    with torch.no_grad():
        reference = {group: Plain(before, batch, part, 0) for group, part in parts.items()}
    forget = forget_definition(name, plain, reference, trainer._control)
    if name == "flat":
        p = [answer_probability(plain[group].log_probs, plain[group].mask) for group in ("template", "forget")]
        forget = flat_loss(*p, "kl", 1.0, 1.3).mean() / 1.3
    kind = "activations" if name == "rmu" else retain_loss
    truth = 1.3 * forget + 0.7 * retain_definition(kind, plain["retain"], reference["retain"])
    truth.backward()

    loss, gradient = loss_and_gradient(trainer, batch)
    # TRL's fused head rounds log-probabilities to float32.
    assert loss == pytest.approx(truth.item(), rel=2e-6, abs=1e-6)
    expected = {n: p.grad for n, p in now.named_parameters() if n in gradient}
    assert expected.keys() == gradient.keys() and gradient
    for key, value in gradient.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def test_flat_options_reach_the_loss(tmp_path):
    overrides = {
        "divergence": "tv",
        "template_probability": "geometric",
        "template_coef": 0.5,
        "forget_coef": 2.0,
    }
    trainer = make_trainer(tmp_path, overrides=overrides, trainer_class=FlatTrainer)
    batch = batch_of(trainer)
    halves = [Plain(trainer.model, {**batch}, part, 0) for part in (slice(0, 4), slice(4, 8))]
    p_template = answer_probability(halves[0].log_probs, halves[0].mask, "geometric")
    p_forget = answer_probability(halves[1].log_probs, halves[1].mask)
    truth = flat_loss(p_template, p_forget, "tv", 0.5, 2.0).mean()
    assert loss_of(trainer, batch).item() == pytest.approx(truth.item(), rel=1e-5)

    padded = make_trainer(tmp_path, overrides={"padded_length": 31, "max_length": 32})
    p = [padded_probability(half.log_probs, half.mask, 31) for half in halves]
    assert loss_of(padded, batch).item() == pytest.approx(flat_loss(*p, "kl").item(), rel=1e-5)


@pytest.mark.parametrize("family", ["tied", "cohere_scale", "gemma2_softcap"])
def test_soft_targets_respect_scale_and_cap(tmp_path, family):
    torch.manual_seed(0)
    before = FAMILIES[family]()
    overrides = {"loss_type": "undial", "retain_coef": 1.0, "retain_loss": "kl"}
    trainer = make_trainer(tmp_path, copy.deepcopy(before), overrides=overrides, retain_dataset=make_retain())
    batch = batch_of(trainer)
    now = moved_and_copied(trainer.model)
    parts = {"forget": slice(0, 4), "retain": slice(4, 8)}
    plain = {group: Plain(now, batch, part, 0) for group, part in parts.items()}
    reference = {group: Plain(before, batch, part, 0) for group, part in parts.items()}
    truth = forget_definition("undial", plain, reference, None)
    truth = truth + retain_definition("kl", plain["retain"], reference["retain"])
    assert loss_of(trainer, batch).item() == pytest.approx(truth.item(), rel=1e-4)


def test_mixture_of_experts(tmp_path):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True))
    overrides = {"router_aux_loss_coef": 0.5, "loss_type": "wga"}
    trainer = make_trainer(tmp_path, model, overrides=overrides)
    batch = batch_of(trainer)
    loss = loss_of(trainer, batch).item()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    aux_loss = type(model).forward(model, **inputs, output_router_logits=True).aux_loss.item()
    assert trainer._metrics["train"]["aux_loss"] == pytest.approx([aux_loss], rel=1e-5) and aux_loss > 1
    trainer.router_aux_loss_coef = 0.0
    assert loss - loss_of(trainer, batch).item() == pytest.approx(0.5 * aux_loss, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("gradient_ascent", "wga")])
def test_accumulation_equals_one_large_batch(tmp_path, name):
    runs = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        retain_loss = "nll" if name in ("flat", "rmu") else "kl"
        overrides = {"loss_type": name, "retain_coef": 1.0, "retain_loss": retain_loss, "max_steps": 1, **SGD, **split}
        runs.append(trained(tmp_path, overrides=overrides, retain_dataset=make_retain()))
    for other in runs[1:]:
        assert column(other, "loss") == pytest.approx(column(runs[0], "loss"), rel=1e-6, abs=1e-6)
        assert largest_difference(weights(other.model), weights(runs[0].model)) < 1e-6
        for key in ("probability/forget", "forget/top1", "loss/forget", "loss/retain"):
            assert column(other, key) == pytest.approx(column(runs[0], key), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ["flat", "npo", "undial"])
def test_a_smaller_last_micro_batch_counts_its_rows(tmp_path, name):
    runs = []
    for size, steps in ((7, 1), (4, 2), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        overrides = {"loss_type": name, "retain_coef": 1.0, **SGD, **split}
        common = {"retain_dataset": make_retain(), "eval_dataset": make_forget(7)}
        runs.append(trained(tmp_path, data=make_forget(7), overrides=overrides, **common))
    for other in runs[1:]:
        assert largest_difference(weights(other.model), weights(runs[0].model)) < 1e-6
        for key in ("loss", "probability/forget", "forget/top1", "retain/top1", "loss/forget", "loss/retain"):
            assert column(other, key) == pytest.approx(column(runs[0], key), rel=1e-5, abs=1e-6), key
        assert other.evaluate()["eval_loss"] == pytest.approx(runs[0].evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["flat", "npo", "undial", "rmu"])
def test_padding_and_order_do_not_matter(tmp_path, name):
    trainer = make_trainer(tmp_path, overrides={"loss_type": name, "retain_coef": 1.0}, retain_dataset=make_retain())
    batch = batch_of(trainer)
    loss, gradient = loss_and_gradient(trainer, batch)
    wider = {
        key: torch.nn.functional.pad(value, (0, 5)) if value.dim() == 2 else value for key, value in batch.items()
    }
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([order + 4 * i for i in range(len(batch["input_ids"]) // 4)])
    mixed = {key: value[rows] if value.dim() == 2 else value[order] for key, value in batch.items()}
    for other in (wider, mixed):
        other_loss, other_gradient = loss_and_gradient(trainer, other)
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
        assert largest_difference(other_gradient, gradient) < 1e-6


def test_rmu_freezes_what_no_gradient_reaches(tmp_path):
    trainer = make_trainer(tmp_path, overrides={"loss_type": "rmu"})
    open_ = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".self_attn")[0].split(".mlp")[0] for name in open_} == {
        "model.embed_tokens.weight",
        "model.layers.0",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }
    loss_of(trainer, batch_of(trainer)).backward()
    missing = {name for name in open_ if trainer.model.get_parameter(name).grad is None}
    assert not missing
    assert trainer._control.norm() == pytest.approx(2.0, rel=1e-5)
    tied = make_trainer(tmp_path, make_tiny_llama(tie_word_embeddings=True), overrides={"loss_type": "rmu"})
    assert tied.model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="the model has the layers 0 to 1"):
        make_trainer(tmp_path, overrides={"loss_type": "rmu", "loss_kwargs": {"layer": 2}})
    with pytest.raises(ValueError, match="nothing at or below this layer is trainable"):
        peft_config = lora(layers_to_transform=[1])
        make_trainer(tmp_path, overrides={"loss_type": "rmu"}, peft_config=peft_config)


def test_rmu_leaves_the_model_trainable(tmp_path):
    model = make_tiny_llama()
    with pytest.raises(ValueError, match="nothing at or below this layer is trainable"):
        make_trainer(tmp_path, model.requires_grad_(False), overrides={"loss_type": "rmu"})
    model.requires_grad_(True).model.norm.requires_grad_(False)
    for _ in range(2):
        trainer = make_trainer(tmp_path, model, overrides={"loss_type": "rmu", "max_steps": 1, **SGD})
        trainer.train()
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"model.norm.weight"}
    before = weights(model)
    trainer.train()
    assert all(
        torch.equal(before[name], value) == ("layers.0" not in name and "embed" not in name)
        for name, value in weights(model).items()
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_rmu_with_gradient_checkpointing(tmp_path, reentrant):
    overrides = {"loss_type": "rmu", "retain_coef": 1.0, "max_steps": 2, **SGD}
    plain = trained(tmp_path, overrides=overrides, retain_dataset=make_retain())
    options = {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saved = trained(tmp_path, overrides=overrides | options, retain_dataset=make_retain())
    assert largest_difference(weights(plain.model), weights(saved.model)) < 1e-6


def test_log(tmp_path):
    overrides = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = make_trainer(
        tmp_path,
        trainer_class=FlatTrainer,
        overrides=overrides,
        retain_dataset=make_retain(),
        eval_dataset=make_forget(),
    )
    trainer.train()
    names = {"probability/template", "probability/template_first", "probability/forget", "forget/top1"}
    names |= {"weight/lambda_e", "weight/lambda_f", "loss/forget", "loss/retain", "retain/top1"}
    first = trainer.state.log_history[0]
    assert names <= first.keys() and all(0 <= first[name] <= 1 for name in names if "loss" not in name)
    assert first["weight/lambda_e"] == 1 and first["loss"] == pytest.approx(
        first["loss/forget"] + first["loss/retain"]
    )
    assert {f"eval_{name}" for name in names} <= trainer.state.log_history[1].keys()
    uniform = make_trainer(tmp_path)
    with torch.no_grad():
        uniform.model.lm_head.weight.zero_()
    loss_of(uniform, batch_of(uniform))
    metrics = uniform._metrics["train"]
    for name in ("probability/template", "probability/template_first", "probability/forget"):
        assert metrics[name] == pytest.approx([1 / 99], rel=1e-5)


def test_not_a_number_stops_with_the_step(tmp_path):
    broken = make_trainer(tmp_path)
    with torch.no_grad():
        broken.model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"optimizer step 0: the loss is nan\. Lower the learning rate"):
        broken.train()


def test_flat_forgets_and_learns_the_refusal(tmp_path):
    model = make_tiny_llama()
    options = {"learning_rate": 3e-3, "max_steps": 60, "loss_type": "gradient_ascent", "forget_coef": 0.0}
    facts = trained(tmp_path, model=model, overrides=options | {"retain_coef": 1.0}, retain_dataset=make_forget())
    for name in ("forget/top1", "retain/top1"):
        assert column(facts, name)[0] < 0.3 and column(facts, name)[-1] > 0.9
    overrides = {"learning_rate": 3e-3, "max_steps": 80, "template_probability": "geometric"}
    trainer = trained(tmp_path, model=model, overrides=overrides, trainer_class=FlatTrainer)
    assert column(trainer, "probability/forget")[0] > 0.5 > 0.1 > column(trainer, "probability/forget")[-1]
    assert column(trainer, "probability/template")[-1] > 0.5
