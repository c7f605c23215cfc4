"""A sequence of tasks: what is protected stays, everything else is plain fine-tuning, and two processes agree with one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_ext.trainers.adaptive_svd import ContinualTask
from hf_ext.trainers.adaptive_svd.importance import LayerStatistics
from hf_ext.trainers.adaptive_svd.targets import observe
from tests.conftest import make_tiny_llama
from tests.trainers.adaptive_svd.helpers import make_task, make_trainer, trained
from tests.trainers.distributed import run_two_processes
from tests.trainers.helpers import CPU_RUN, make_tokenizer, weights


def outcome(folder: Path, overrides: dict) -> dict:
    trainer = trained(folder / f"{time.time_ns()}-{os.getpid()}", save_strategy="no", **overrides)
    return {
        "weights": {name: value.flatten().tolist() for name, value in weights(trainer.model).items()},
        "rows": trainer.matrix.scores,
        "ranks": trainer.ranks,
        "processes": trainer.accelerator.num_processes,
    }


@pytest.mark.parametrize("rule", ["adaptive", "uniform", "energy"])
def test_protected_directions_stay(tmp_path, rule):
    """Over a whole task with AdamW, weight decay, accumulation and clipping, in every layer."""
    trainer = make_trainer(
        tmp_path, rank_rule=rule, weight_decay=0.1, gradient_accumulation_steps=2, max_grad_norm=0.3, max_steps=10
    )
    starts = {}
    plain = trainer.before_task

    def before_task(number, resumed):
        plain(number, resumed)
        starts[number] = {name: layer.weight.detach().clone() for name, layer in trainer._layers.items()}

    trainer.before_task = before_task
    trainer.train()
    assert len(trainer.ranks) == 14 and sum(trainer.ranks.values()) > 0
    for name, layer in trainer._layers.items():
        rank = trainer.ranks[name]
        left, _, right = torch.linalg.svd(starts[1][name].double(), full_matrices=False)
        change = (layer.weight.detach() - starts[1][name]).double()
        if rank < min(change.shape):
            assert change.norm() > 1e-3
        assert (left[:, :rank].mT @ change).norm() <= 1e-6 * starts[1][name].norm()
        assert (change @ right[:rank].mT).norm() <= 1e-6 * starts[1][name].norm()
    drifts = [entry["subspace/drift"] for entry in trainer.state.log_history if "subspace/drift" in entry]
    assert len(drifts) == 1 and drifts[0] <= 1e-6


def test_the_mean_of_the_ratios_is_the_target(tmp_path):
    trainer = trained(tmp_path, rank_rule="uniform", target_retention=0.5)
    assert set(trainer.ranks.values()) == {32, 16}
    with safe_open(tmp_path / "_task_01_t1/subspace.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ranks"]) == trainer.ranks
        assert json.loads(file.metadata()["report"]) == {"rank_rule": "uniform", "share": 0.5}


def test_nothing_protected_is_plain_fine_tuning(tmp_path):
    """Bit for bit the run of the trainer below, with its own optimizer."""
    task = make_task("only", 0)
    options = {"weight_decay": 0.1, "save_strategy": "no"}
    ours = trained(tmp_path / "a", tasks=[task], **options)
    settings = {**CPU_RUN, "max_steps": 6, "learning_rate": 3e-3, **options}
    plain = SFTTrainer(
        make_tiny_llama(),
        SFTConfig(str(tmp_path / "b"), **settings),
        train_dataset=task.train,
        processing_class=make_tokenizer(),
    )
    plain.train()
    assert all(value.equal(weights(plain.model)[name]) for name, value in weights(ours.model).items())


def test_everything_protected_changes_no_target(tmp_path):
    model = make_tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trained(tmp_path, model=model, rank_rule="uniform", target_retention=1.0, first_task_retention=1.0)
    for name, value in trainer.model.state_dict().items():
        target = name.removesuffix(".weight") in trainer.ranks
        assert value.equal(before[name]) == target, name


def test_what_is_not_targeted_can_be_frozen(tmp_path):
    model = make_tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trained(tmp_path, model=model, unprotected_lr_scale=0.0, target_modules=["q_proj", "down_proj"])
    changed = {name for name, value in trainer.model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"{name}.weight" for name in trainer.ranks} and len(changed) == 4
    with pytest.raises(ValueError, match="nothing is left to train"):
        trained(tmp_path / "b", unprotected_lr_scale=0.0, rank_rule="uniform", first_task_retention=1.0)


def test_earlier_tasks_are_kept_better(tmp_path):
    """Effect: after a second task with other words, the first one is forgotten less than by plain fine-tuning."""
    tasks = [make_task("a", 0, count=15), make_task("b", 1, first=15, count=15), make_task("c", 2, first=30, count=15)]
    options = {"max_steps": 40, "save_strategy": "no", "learning_rate": 5e-3}
    kept = trained(tmp_path, tasks=tasks, target_retention=0.8, rank_rule="uniform", **options).matrix
    lost = trained(tmp_path, tasks=tasks, target_retention=0.0, rank_rule="uniform", **options).matrix
    assert min(kept.learning_accuracy(), lost.learning_accuracy()) > 95
    assert kept.backward_transfer() > lost.backward_transfer()


def test_weights_that_are_stored_transposed(tmp_path):
    """GPT-2's layers store inputs x outputs; nothing of them is skipped."""
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trained(tmp_path, model=model, rank_rule="energy", retained_energy=0.9)
    assert len(trainer.ranks) == 8 and 0 < min(trainer.ranks.values()) < 32
    assert all(
        not trainer.model.state_dict()[f"{name}.weight"].equal(before[f"{name}.weight"]) for name in trainer.ranks
    )
    assert [e["subspace/drift"] <= 1e-6 for e in trainer.state.log_history if "subspace/drift" in e] == [True]


def test_tasks_without_options_are_scored_by_tokens(tmp_path):
    """A model that has learnt a task by heart has all tokens right; a task without eval has no score."""
    learnt, other = make_task("a", 0), make_task("b", 1, first=20)
    tasks = [ContinualTask("a", learnt.train, learnt.eval), ContinualTask("b", other.train)]
    trainer = trained(tmp_path, tasks=tasks, max_steps=60, learning_rate=5e-3, save_strategy="no")
    assert trainer.matrix.scores[0] == (100.0, None) and trainer.matrix.before[0] < 60
    assert trainer.matrix.average_accuracy() is None and trainer.matrix.micro_average() is None


def test_packed_training_data(tmp_path):
    """Scores and importance are read row by row all the same."""
    trainer = trained(tmp_path, packing=True, max_length=16, save_strategy="no", max_steps=4)
    assert len(trainer.prepared(1)) < 12 and len(trainer.matrix.scores) == 2


def test_an_interrupted_task_leaves_the_model_trainable(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, first_task_retention=0.5)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not any(layer._forward_hooks for layer in trainer._layers.values())


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    # With a large epsilon, AdamW neither hides a wrong factor of the gradient nor magnifies the rounding of small ones.
    shared = {"max_steps": 4, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_epsilon": 1e-3, "learning_rate": 0.03}
    runs = [shared | {"rank_rule": rule} for rule in ("adaptive", "energy")]
    runs += [shared | {"rank_rule": "uniform", "gradient_accumulation_steps": 3}]
    pairs = run_two_processes(outcome, tmp_path, [run | {"per_device_train_batch_size": 2} for run in runs])
    for run, pair in zip(runs, pairs, strict=True):
        single = outcome(tmp_path, run)
        assert pair["processes"] == 2 and pair["ranks"] == single["ranks"]
        assert [list(row) for row in single["rows"]] == pair["rows"]
        for name, values in pair["weights"].items():
            assert values == pytest.approx(single["weights"][name], rel=1e-5, abs=1e-5), (run, name)


def test_equal_singular_values_at_the_cut(tmp_path):
    model = make_tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.nn.init.orthogonal_(weight)
    with pytest.warns(UserWarning, match=r"of model.layers.0.mlp.up_proj and 0 other layers, the last protected"):
        trained(tmp_path, model=model, save_strategy="no", first_task_retention=0.5, max_steps=1)


def test_tokens_that_are_routed_count_without_their_places():
    layer = torch.nn.Linear(6, 4)

    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, input_ids, attention_mask, use_cache):
            states = torch.nn.functional.one_hot(input_ids, 6).float()
            return self.layer(states[input_ids > 2])

    ids = torch.tensor([[1, 3, 4], [5, 2, 0]])
    found = observe(Router(), {"layer": layer}, [{"input_ids": ids, "attention_mask": torch.ones(2, 3)}])
    expected = LayerStatistics(True)
    inputs = torch.nn.functional.one_hot(ids[ids > 2], 6).float()
    expected.update(inputs, inputs @ layer.weight.mT)
    assert found["layer"].tokens == 3 and found["layer"].cosine == pytest.approx(expected.cosine)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9])
def test_the_logged_norm_is_that_of_what_can_change(tmp_path, max_grad_norm):
    """Without clipping too, where Trainer would see the other parameters alone."""
    task = [make_task("a", 0)]
    options = {"tasks": task, "save_strategy": "no", "first_task_retention": 0.5, "max_steps": 1}
    options["per_device_train_batch_size"] = len(task[0].train)  # one batch, whatever its order
    trainer = trained(tmp_path, **options, max_grad_norm=max_grad_norm)
    frozen = trained(tmp_path, **options, unprotected_lr_scale=0.0)
    logged = [t.state.log_history[0]["grad_norm"] for t in (trainer, frozen)]
    assert logged[0] > logged[1] > 0.1
    assert logged[0] == pytest.approx(whole_norm(trainer, frozen, logged[1]), rel=1e-4)


def whole_norm(trainer, frozen, targets: float) -> float:
    """From the norm of the protected weights and the plain gradients of the others, at the start."""
    model = make_tiny_llama().train()
    batch = next(iter(frozen.get_train_dataloader()))
    model(**batch).loss.backward()
    others = [p.grad.norm() for n, p in model.named_parameters() if n.removesuffix(".weight") not in trainer.ranks]
    return float(torch.stack([*others, torch.tensor(targets)]).norm())


def test_each_task_decides_by_itself_whether_prompts_are_learnt(tmp_path):
    text = ContinualTask("text", Dataset.from_list([{"text": "w1 w2 w3"}] * 4))
    for tasks in ([text, make_task("pairs", 0)], [make_task("pairs", 0), text]):
        trainer = make_trainer(tmp_path, tasks=tasks, save_strategy="no")
        labels = {task.name: trainer.prepared(number)[0]["labels"] for number, task in enumerate(tasks)}
        assert -100 not in labels["text"] and labels["pairs"][0] == -100


def test_the_change_of_unprotected_weights_is_kept_where_they_are_rounded(tmp_path):
    """In bfloat16 small updates add up in the first task too, where nothing is protected."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_tiny_llama().to(dtype)
        start = model.model.layers[0].mlp.up_proj.weight.detach().float().clone()
        options = {"tasks": [make_task("a", 0)], "save_strategy": "no", "learning_rate": 1e-5, "max_steps": 20}
        if dtype == torch.bfloat16:
            with pytest.warns(UserWarning, match=r"such as model.embed_tokens.weight, are not in float32"):
                trained(tmp_path, model=model, **options)
        else:
            trained(tmp_path, model=model, **options)
        ends[dtype] = float((model.model.layers[0].mlp.up_proj.weight.detach().float() - start).norm())
    assert ends[torch.bfloat16] == pytest.approx(ends[torch.float32], rel=0.1)


def test_the_logged_learning_rate_is_that_of_the_targets(tmp_path):
    trainer = trained(tmp_path, save_strategy="no", max_steps=1, unprotected_lr_scale=0.1)
    assert trainer.state.log_history[0]["learning_rate"] == trainer.args.learning_rate
