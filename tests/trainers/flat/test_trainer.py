"""The trainers: every loss against its definition, exact accumulation, references, PEFT, quantisation, saving."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import DPOConfig

from hf_ext.trainers.flat import FlatTrainer, UnlearnTrainer, baselines
from hf_ext.trainers.flat.loss import answer_probability, flat_loss, padded_probability
from hf_ext.trainers.flat.methods import METHODS
from tests.conftest import make_tiny_llama
from tests.trainers.flat.helpers import make_args, make_forget, make_preference, make_retain, make_trainer, trained
from tests.trainers.overtone.helpers import column, largest_difference, make_tokenizer, weights

SMALL = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def lora(**overrides) -> LoraConfig:
    settings = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True, task_type="CAUSAL_LM")
    return LoraConfig(**{**settings, **overrides})


def random_adapter(model: PeftModel, seed: int = 3) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def batch_of(trainer) -> dict[str, torch.Tensor]:
    trainer._references_are_due and setattr(
        trainer, "train_dataset", trainer._with_reference_sums(trainer.train_dataset)
    )
    return next(iter(trainer.get_train_dataloader()))


def loss_of(trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch))


def loss_and_gradient(trainer, batch) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = loss_of(trainer, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


# -- the definition of every loss on a plain forward ---------------------------------------------------------------


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
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    now = copy.deepcopy(trainer.model)
    del now.forward

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


FAMILIES = {
    "tied": lambda: make_tiny_llama(tie_word_embeddings=True),
    "cohere_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
    "gemma2_softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_targets_respect_scale_and_cap(tmp_path, family):
    torch.manual_seed(0)
    before = FAMILIES[family]()
    overrides = {"loss_type": "undial", "retain_coef": 1.0, "retain_loss": "kl"}
    trainer = make_trainer(tmp_path, copy.deepcopy(before), overrides=overrides, retain_dataset=make_retain())
    batch = batch_of(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    now = copy.deepcopy(trainer.model)
    del now.forward
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
    trainer.router_aux_loss_coef = 0.0
    assert loss > loss_of(trainer, batch).item() + 0.1


# -- exactness -------------------------------------------------------------------------------------------------------


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


# -- references ------------------------------------------------------------------------------------------------------


def count_forwards(model) -> list[int]:
    calls: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", ["flat", "gradient_ascent", "simnpo", "wga", "satimp", "ceu"])
def test_nothing_but_the_policy_runs(tmp_path, name):
    model = make_tiny_llama()
    calls = count_forwards(model)
    trainer = make_trainer(tmp_path, model, overrides={"loss_type": name, "max_steps": 3})
    assert trainer.ref_model is None and not calls
    trainer.train()
    assert len(calls) == 3


def test_no_reference_is_loaded_for_a_model_by_name(tmp_path, monkeypatch):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    built = []
    start = LlamaForCausalLM.__init__
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda self, *a, **k: built.append(1) or start(self, *a, **k))
    trainer = make_trainer(tmp_path, str(tmp_path / "base"))
    assert trainer.ref_model is None and len(built) == 1
    trainer.train()
    assert len(built) == 1


def test_npo_computes_its_reference_once(tmp_path):
    model = make_tiny_llama()
    calls = count_forwards(model)
    overrides = {"loss_type": "npo", "max_steps": 3, "precompute_ref_batch_size": 8}
    trainer = make_trainer(tmp_path, model, overrides=overrides, eval_dataset=make_forget(4))
    assert trainer.ref_model is None and not calls
    trainer.train()
    # One pass over eight forget rows and one over four rows for evaluation.
    assert len(calls) == 3 + 2
    trainer.train()
    assert len(calls) == 2 * 3 + 2
    fresh = make_tiny_llama()
    stored = trainer.train_dataset[1]
    ids = torch.tensor([stored["prompt_ids"] + stored["forget_ids"]])
    log_p = fresh(ids).logits[0, :-1].log_softmax(-1)
    start = len(stored["prompt_ids"])
    truth = sum(log_p[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    assert stored["ref_forget_logps"] == pytest.approx(truth, rel=1e-5)
    # At the reference, NPO is 2/beta log 2.
    assert column(trainer, "loss")[0] > 0
    first = trained(tmp_path, overrides=overrides)
    assert column(first, "loss")[0] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)


def test_evaluation_sets_need_a_reference_too(tmp_path):
    overrides = {"loss_type": "idk_dpo"}
    trainer = make_trainer(tmp_path, overrides=overrides, eval_dataset={"a": make_forget(4), "b": make_forget(2)})
    before = trainer.evaluate()
    assert before["eval_a_loss"] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)
    assert trainer.evaluate(make_forget(3))["eval_loss"] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_a_loss"] != before["eval_a_loss"]
    with pytest.raises(
        ValueError, match="idk_dpo: the model before unlearning is gone, so this dataset has no reference"
    ):
        trainer.evaluate(make_forget(3))
    adapter = trained(tmp_path, overrides=overrides, peft_config=lora())
    kept = adapter.evaluate(make_forget(4))["eval_loss"]
    again = make_trainer(tmp_path, overrides=overrides, peft_config=lora(), eval_dataset=make_forget(4))
    again.train()
    assert again.evaluate()["eval_loss"] == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("name", ["undial", "rmu"])
def test_frozen_copy_stays(tmp_path, name):
    trainer = make_trainer(tmp_path, overrides={"loss_type": name, "retain_coef": 1.0}, retain_dataset=make_retain())
    before = weights(trainer.ref_model)
    assert largest_difference(before, weights(trainer.model)) == 0
    trainer.train()
    assert largest_difference(before, weights(trainer.ref_model)) == 0
    assert largest_difference(before, weights(trainer.model)) > 0
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_four_ways_to_the_reference_agree(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    overrides = {"loss_type": "undial", "retain_coef": 1.0, "retain_loss": "kl"}
    common = dict(overrides=overrides, retain_dataset=make_retain())
    trainers = [
        make_trainer(tmp_path, make_tiny_llama(), **common),
        make_trainer(tmp_path, str(tmp_path / "base"), **common),
        make_trainer(tmp_path, make_tiny_llama(), ref_model=make_tiny_llama(), **common),
        make_trainer(tmp_path, make_tiny_llama(), peft_config=lora(), **common),
    ]
    assert trainers[3].ref_model is None
    random_adapter(trainers[3].model)
    merged = copy.deepcopy(trainers[3].model).merge_and_unload()
    with torch.no_grad():
        for trainer in trainers[:3]:
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(merged.get_parameter(name))
    losses = [loss_of(trainer, batch_of(trainers[0])).item() for trainer in trainers]
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_unused_references_and_retain_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ref_model: flat does not read a reference"):
        make_trainer(tmp_path, ref_model=make_tiny_llama())
    make_trainer(tmp_path, ref_model=make_tiny_llama(), overrides={"loss_type": "npo"})
    with pytest.raises(
        ValueError, match="retain_dataset has no effect: undial has no retain term with retain_coef=None"
    ):
        make_trainer(tmp_path, retain_dataset=make_retain(), overrides={"loss_type": "undial"})
    with pytest.raises(ValueError, match="gradient ascent with a retain term: give a retain_dataset"):
        make_trainer(tmp_path, overrides={"loss_type": "gradient_difference"})
    with pytest.raises(ValueError, match=r"retain_coef=1\.0 needs a retain_dataset"):
        make_trainer(tmp_path, overrides={"retain_coef": 1.0})
    with pytest.raises(ValueError, match="retain_loss='kl' needs a retain_dataset"):
        make_trainer(tmp_path, overrides={"retain_loss": "kl"})
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the base weights"):
        make_trainer(tmp_path, overrides={"loss_type": "undial"}, peft_config=lora(init_lora_weights="pissa"))
    with pytest.raises(TypeError, match="args is a DPOConfig; UnlearnTrainer takes UnlearnConfig, which has the same"):
        UnlearnTrainer(make_tiny_llama(), DPOConfig(str(tmp_path), use_cpu=True, bf16=False), make_forget())
    with pytest.raises(TypeError, match="args is a UnlearnConfig; FlatTrainer takes FlatConfig, which has the same"):
        FlatTrainer(make_tiny_llama(), make_args(tmp_path), make_forget())


@pytest.mark.parametrize("attribute", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_is_refused_where_the_head_is_read(tmp_path, attribute):
    trainer = make_trainer(tmp_path, overrides={"loss_type": "ceu"})
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=r"loss_type='ceu' .*reads the output layer or a reference outside"):
        trainer._refuse_sharding()
    flat = make_trainer(tmp_path)
    setattr(flat, attribute, True)
    flat._refuse_sharding()


# -- RMU --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_rmu_with_gradient_checkpointing(tmp_path, reentrant):
    overrides = {"loss_type": "rmu", "retain_coef": 1.0, "max_steps": 2, **SGD}
    plain = trained(tmp_path, overrides=overrides, retain_dataset=make_retain())
    options = {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    saved = trained(tmp_path, overrides=overrides | options, retain_dataset=make_retain())
    assert largest_difference(weights(plain.model), weights(saved.model)) < 1e-6


# -- the host's contract ---------------------------------------------------------------------------------------------


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
    names |= {"weight/lambda_e", "weight/lambda_f", "loss/forget", "loss/retain"}
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
    assert column(facts, "forget/top1")[-1] > 0.9
    overrides = {"learning_rate": 3e-3, "max_steps": 80, "template_probability": "geometric"}
    trainer = trained(tmp_path, model=model, overrides=overrides, trainer_class=FlatTrainer)
    assert column(trainer, "probability/forget")[0] > 0.5 > 0.1 > column(trainer, "probability/forget")[-1]
    assert column(trainer, "probability/template")[-1] > 0.5


@pytest.mark.parametrize("name", ["flat", "npo", "undial", "rmu"])
def test_wrapped_model_keeps_exactly_its_adapters(tmp_path, name):
    model = random_adapter(get_peft_model(make_tiny_llama(), lora()))
    model.add_adapter("other", lora())
    names = {key for key, _ in model.named_parameters()}
    before = weights(model)
    trainer = make_trainer(tmp_path, model, overrides={"loss_type": name, "max_steps": 2})
    assert {key for key, _ in trainer.model.named_parameters()} == names
    assert set(trainer.model.peft_config) == {"default", "other"}
    trainer.train()
    changed = {key for key, value in weights(trainer.model).items() if not torch.equal(value, before[key])}
    assert changed and all(".default." in key for key in changed)


@pytest.mark.parametrize("config", [lora(), IA3Config(task_type="CAUSAL_LM"), lora(modules_to_save=["lm_head"])])
def test_adapters_save_load_and_merge(tmp_path, config):
    overrides = {"activation_checkpointing": True}
    trainer = trained(tmp_path, overrides=overrides, peft_config=config, trainer_class=FlatTrainer)
    before = weights(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.save_merged(str(tmp_path / "merged"))
    assert largest_difference(weights(trainer.model), before) == 0
    assert isinstance(trainer.model, PeftModel)
    ids = torch.tensor([[5, 6, 7, 8]])
    truth = trainer.model.eval()(ids).logits
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(ids).logits, truth)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not list((tmp_path / "merged").glob("adapter*"))
    torch.testing.assert_close(merged.eval()(ids).logits, truth, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w1")["input_ids"] == [5]
    trainer.train()


def test_merging_without_an_adapter_and_with_a_prompt(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_merged(str(tmp_path / "whole"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert largest_difference(weights(loaded), weights(trainer.model)) == 0
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    tuned = make_trainer(tmp_path, peft_config=prompt)
    before = weights(tuned.model)
    tuned.train()
    assert largest_difference(weights(tuned.model), before) > 0
    with pytest.raises(ValueError, match="prompt learning adds no weights"):
        tuned.save_merged(str(tmp_path / "prompt"))


@pytest.mark.parametrize("name", ["undial", "rmu"])
def test_prompt_learning_with_hidden_states(tmp_path, name):
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    common = dict(overrides={"loss_type": name, "retain_coef": 1.0}, retain_dataset=make_retain())
    trained(tmp_path, peft_config=prompt, **common)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    make_tiny_llama().save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantisation, dtype=torch.float32, device_map={"": "cpu"}
    )
    overrides = {"max_steps": 6, "loss_type": "undial", "retain_coef": 1.0, "retain_loss": "kl"}
    trainer = trained(tmp_path, model=model, peft_config=lora(), overrides=overrides, retain_dataset=make_retain())
    assert column(trainer, "loss/forget")[-1] < column(trainer, "loss/forget")[0]
    flat = trained(tmp_path, model=trainer.model.unload(), peft_config=lora(), overrides={"max_steps": 2})
    with pytest.raises(ValueError, match="the base is quantised: merging would round"):
        flat.save_merged(str(tmp_path / "merged"))


@pytest.mark.parametrize("options", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("name", ["flat", "undial"])
def test_bfloat16(tmp_path, name, options):
    overrides = {"loss_type": name, "retain_coef": 1.0, "max_steps": 8, "learning_rate": 1e-3}
    exact = trained(tmp_path, overrides=overrides, retain_dataset=make_retain())
    model = make_tiny_llama().to(options.get("dtype", torch.float32))
    overrides["bf16"] = options.get("bf16", False)
    rounded = trained(tmp_path, model=model, overrides=overrides, retain_dataset=make_retain())
    assert column(rounded, "loss") == pytest.approx(column(exact, "loss"), rel=0.02)
    assert column(rounded, "loss")[-1] < column(rounded, "loss")[0]


@pytest.mark.parametrize("name", ["flat", "npo", "rmu"])
def test_resuming_gives_the_same_run(tmp_path, name):
    overrides = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "constant",
        "loss_type": name,
    }
    if name == "flat":
        overrides["templates_per_example"] = 3
    common = dict(overrides=overrides, retain_dataset=make_retain())
    whole = trained(tmp_path / "run", **common)
    resumed = make_trainer(tmp_path / "again", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert largest_difference(weights(whole.model), weights(resumed.model)) < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert largest_difference(weights(whole.model), weights(loaded)) < 1e-6


def test_card_names_the_paper(tmp_path):
    trainer = make_trainer(tmp_path / "run", trainer_class=FlatTrainer)
    trainer.create_model_card("run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2410.11143" in card and "FLAT" in card and "unlearning" in card


def test_epochs_reach_the_collator(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, overrides={"max_steps": 5, "templates_per_example": 2})
    collate = trainer.data_collator.set_epoch
    trainer.data_collator.set_epoch = lambda epoch: (seen.append(epoch), collate(epoch))
    trainer.train()
    assert seen == [0, 1, 2]


def test_adapter_on_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["lm_head"]))


def test_preference_data_trains_and_own_collators_are_used(tmp_path):
    trainer = make_trainer(tmp_path, data=make_preference(), overrides={"template_answers": None})
    calls = []

    def collate(examples):
        calls.append(len(examples))
        return trainer.data_collator(examples)

    other = make_trainer(tmp_path, data=make_preference(), overrides={"template_answers": None}, data_collator=collate)
    trainer.train()
    other.train()
    assert calls and column(other, "loss") == pytest.approx(column(trainer, "loss"), rel=1e-6)


def test_default_arguments_name_the_run_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL trains in bfloat16 unless told otherwise, and transformers asks for a GPU then.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = make_tiny_llama()
    model.config.name_or_path = "someone/tiny"
    data = Dataset.from_list([{"prompt": "w1 ", "completion": "w2"}])
    trainer = FlatTrainer(model, train_dataset=data, processing_class=make_tokenizer())
    assert trainer.args.output_dir == "tiny-FLAT"
