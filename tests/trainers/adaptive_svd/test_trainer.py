"""A sequence of tasks: what is protected stays, runs go on where they were killed, and two processes agree with one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_ext.trainers.adaptive_svd import AdaptiveSVDConfig, AdaptiveSVDTrainer, ContinualTask
from hf_ext.trainers.adaptive_svd.importance import LayerStatistics
from hf_ext.trainers.adaptive_svd.targets import find_targets, observe
from tests.conftest import make_tiny_llama
from tests.trainers.adaptive_svd.helpers import OPTIONS, make_task, make_tasks, make_trainer, trained
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


# -- what is protected -----------------------------------------------------------------------------------------------


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
    lost = trained(
        tmp_path, tasks=tasks, target_retention=0.0, rank_rule="uniform", **options | {"minimum_retention": 0}
    ).matrix
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


# -- files and resuming ----------------------------------------------------------------------------------------------


def test_checkpoints_are_plain_and_reload_bit_for_bit(tmp_path):
    model = make_tiny_llama()
    names = set(model.state_dict())
    trainer = trained(tmp_path, model=model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "_task_01_t1")
    assert set(again.state_dict()) == names
    assert all(value.equal(trainer.model.state_dict()[name]) for name, value in again.state_dict().items())
    ids = torch.tensor([[5, 6, 7]])
    assert again(ids).logits.equal(trainer.model.eval()(ids).logits)
    checkpoints = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/checkpoint-*"))
    assert checkpoints == [f"_task_0{t}_t{t}/checkpoint-{n}" for t in range(2) for n in (2, 4, 6)]


@pytest.mark.parametrize("last", ["_task_00_t0/checkpoint-4", "_task_01_t1/checkpoint-2", "_task_01_t1/checkpoint-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_run(tmp_path, last, dtype):
    """From a folder as it is when the process dies after this checkpoint."""
    options = {"weight_decay": 0.1, "rank_rule": "energy"}
    whole = trained(tmp_path, model=make_tiny_llama().to(dtype), **options)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    rows = whole.matrix.scores
    number, step = int(last[6]), int(last[-1])
    cut_back(tmp_path, number, step)
    trainer = make_trainer(tmp_path, model=make_tiny_llama().to(dtype), **options)
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.matrix.scores == rows


def cut_back(folder: Path, number: int, step: int) -> None:
    """Remove everything that was written after a checkpoint."""
    for path in folder.glob("_task_*"):
        task = int(path.name[6:8])
        for checkpoint in path.glob("checkpoint-*"):
            if task > number or (task == number and int(checkpoint.name[11:]) > step):
                shutil.rmtree(checkpoint)
        if task > number:
            shutil.rmtree(path)
        elif task == number:
            (path / "model.safetensors").unlink()
    state = json.loads((folder / "continual_state.json").read_text())
    (folder / "continual_state.json").write_text(json.dumps(state | {"rows": state["rows"][:number]}))


def test_resuming_between_tasks(tmp_path):
    whole = trained(tmp_path)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    shutil.rmtree(tmp_path / "_task_01_t1")
    state = json.loads((tmp_path / "continual_state.json").read_text())
    (tmp_path / "continual_state.json").write_text(json.dumps(state | {"rows": state["rows"][:1]}))
    trainer = make_trainer(tmp_path, model=make_tiny_llama(seed=1))
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())


KILLED = """
import sys
from tests.trainers.adaptive_svd.helpers import make_trainer
trainer = make_trainer(sys.argv[1], max_steps=200, save_steps=5)
trainer.train(resume_from_checkpoint=sys.argv[2] == "resume")
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    def run(folder: Path, mode: str) -> subprocess.Popen:
        root = str(Path(__file__).parents[3])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), mode], env=environment, stdout=subprocess.DEVNULL, cwd=root
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, "new").wait(timeout=300) == 0
    process = run(killed, "new")
    deadline = time.monotonic() + 300
    while not list(killed.glob("_task_01_t1/checkpoint-2*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "_task_01_t1/checkpoint-200").exists()
    assert run(killed, "resume").wait(timeout=300) == 0
    pair = [AutoModelForCausalLM.from_pretrained(folder / "_task_01_t1").state_dict() for folder in (whole, killed)]
    assert all(value.equal(pair[1][name]) for name, value in pair[0].items())
    states = [json.loads((folder / "continual_state.json").read_text()) for folder in (whole, killed)]
    assert states[0] == states[1]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    trained(tmp_path)
    cut_back(tmp_path, 1, 4)
    (tmp_path / "_task_01_t1/checkpoint-4/trainer_state.json").unlink()
    assert make_trainer(tmp_path)._last_checkpoint(1).endswith("checkpoint-2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tasks": list(reversed(make_tasks()))}, "its tasks are"),
        ({"tasks": [make_task("t0", 0), make_task("t1", 2)]}, "its data are"),
        ({"seed": 7}, "its seed are"),
    ],
)
def test_a_run_of_other_tasks_does_not_go_on(tmp_path, change, named):
    trained(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, max_steps=2, **change).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"is of an earlier run: pass resume_from_checkpoint=True"):
        make_trainer(tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="no run to go on with"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a sequence goes on from its folder"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "_task_00_t0/checkpoint-2"))


def test_one_subspace_per_task_is_needed(tmp_path):
    trained(tmp_path)
    cut_back(tmp_path, 1, 2)
    (tmp_path / "_task_01_t1/subspace.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without which the task cannot go on"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


# -- several processes -----------------------------------------------------------------------------------------------


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


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank_rule": "best"}, "rank_rule='best' is unknown: choose one of adaptive, uniform, energy"),
        ({"target_retention": 1.2}, "target_retention=1.2"),
        ({"minimum_retention": -0.1}, "minimum_retention=-0.1"),
        ({"minimum_retention": 0.9}, "minimum_retention=0.9 is above target_retention=0.8"),
        ({"retained_energy": 0.0}, "retained_energy=0.0"),
        ({"importance_rows": 0}, "importance_rows=0"),
        ({"importance_score": "max"}, "importance_score='max'"),
        ({"projection": "left"}, "projection='left'"),
        ({"unprotected_lr_scale": -1.0}, "unprotected_lr_scale=-1.0"),
        ({"optim": "adafactor"}, "only adamw_torch"),
        ({"save_strategy": "steps", "save_only_model": True}, "save_only_model=True"),
    ],
)
def test_bad_settings(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        AdaptiveSVDConfig(str(tmp_path), **{"bf16": False, "use_cpu": True, **options})


@pytest.mark.parametrize(
    ("tasks", "error", "named"),
    [
        ([], ValueError, "tasks is empty"),
        ({"a": make_task("a", 0).train, "b": None}, TypeError, "task 'b': train is a NoneType"),
        ([make_task("a", 0), make_task("a", 1)], ValueError, r"the names \['a'\] occur twice"),
        (["a"], TypeError, "'a' is a str, not a ContinualTask"),
    ],
)
def test_bad_sequences(tmp_path, tasks, error, named):
    with pytest.raises(error, match=named):
        make_trainer(tmp_path, tasks=tasks)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"name": "a/b"}, ValueError, "task 'a/b': use letters"),
        ({"train": Dataset.from_list([])}, ValueError, "task 'a' has no train rows"),
        ({"eval": Dataset.from_list([])}, ValueError, "task 'a' has no eval rows"),
        ({"options": ("w60",)}, ValueError, "at least two different answers"),
        ({"options": ("w61", "w62")}, ValueError, "eval row 0: the completion 'w60' is none of the options"),
        ({"eval": Dataset.from_list([{"text": "w1 w2"}])}, ValueError, "needs the columns `prompt` and `completion`"),
        ({"eval": [{"prompt": "w1", "completion": "w60"}]}, TypeError, "eval is a list"),
    ],
)
def test_bad_tasks(change, error, named):
    task = make_task("a", 0)
    with pytest.raises(error, match=named):
        ContinualTask(**{"name": "a", "train": task.train, "eval": task.eval, "options": OPTIONS, **change})


def test_options_without_room(tmp_path):
    rows = [{"prompt": " ".join(f"w{i}" for i in range(20)) + " ", "completion": "w60"}]
    long = ContinualTask("long", make_task("a", 0).train, Dataset.from_list(rows), OPTIONS)
    with pytest.raises(ValueError, match=r"max_length=12 leaves no room for an answer in 3 of 3 pairs"):
        make_trainer(tmp_path, tasks=[long], max_length=12).train()


def test_models_that_do_not_go_with_subspaces(tmp_path):
    with pytest.raises(ValueError, match=r"has adapters.*merge_and_unload"):
        make_trainer(tmp_path, model=get_peft_model(make_tiny_llama(), LoraConfig(task_type="CAUSAL_LM")))
    options = {"processing_class": make_tokenizer()}
    args = AdaptiveSVDConfig(str(tmp_path), **CPU_RUN)
    for name, value in (("peft_config", LoraConfig()), ("optimizer_cls_and_kwargs", (torch.optim.SGD, {}))):
        with pytest.raises(ValueError, match=f"{name} does not go with subspaces"):
            AdaptiveSVDTrainer(make_tiny_llama(), args, make_tasks(), **{name: value}, **options)
    with pytest.raises(ValueError, match="train_dataset has no place"):
        AdaptiveSVDTrainer(make_tiny_llama(), args, make_tasks(), train_dataset=make_task("a", 0).train, **options)
    with pytest.raises(TypeError, match="args is a SFTConfig"):
        AdaptiveSVDTrainer(make_tiny_llama(), SFTConfig(str(tmp_path), **CPU_RUN), make_tasks(), **options)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (["q_proj", "c_attn"], "no module is called 'c_attn'; known are down_proj, gate_proj"),
        ("model.*nothing", "fits no module"),
        (["input_layernorm"], "is a LlamaRMSNorm; name linear layers alone"),
    ],
)
def test_unknown_layers(wanted, named):
    with pytest.raises(ValueError, match=named):
        find_targets(make_tiny_llama(), wanted)


def test_layers_that_would_not_be_trained():
    """TRL multiplies with the weight of the output layer and never calls it."""
    with pytest.raises(ValueError, match="lm_head is the output layer"):
        find_targets(make_tiny_llama(), ["lm_head"])
    model = make_tiny_llama()
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj is frozen"):
        find_targets(model, ["up_proj"])


def test_a_layer_that_nothing_passes(tmp_path):
    model = make_tiny_llama()
    model.model.layers[0].mlp.spare = torch.nn.Linear(4, 6, bias=False)
    with pytest.raises(ValueError, match=r"no token passes model.layers.0.mlp.spare"):
        make_trainer(tmp_path, model=model, save_strategy="no").train()
    with pytest.warns(UserWarning, match=r"no gradient reached model.layers.0.mlp.spare and 0 other layers"):
        trained(tmp_path, model=model, save_strategy="no", rank_rule="uniform")


def test_eight_bit_moments_resume_to_the_same_weights(tmp_path):
    options = {"optim": "adamw_bnb_8bit", "first_task_retention": 0.5, "weight_decay": 0.1}

    def model():
        return make_tiny_llama(hidden_size=64, intermediate_size=160)

    whole = trained(tmp_path, model=model(), **options)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    cut_back(tmp_path, 1, 2)
    trainer = make_trainer(tmp_path, model=model(), **options)
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())
    states = trainer._subspace_optimizer().state
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    assert states[weight]["state1"].dtype == torch.uint8 and "exp_avg" in states[trainer.model.lm_head.weight]


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
    found = observe(Router(), {"layer": layer}, [{"input_ids": ids, "attention_mask": torch.ones(2, 3)}], moment=True)
    expected = LayerStatistics(True, moment=True)
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


def test_tied_and_stacked_weights():
    with pytest.raises(ValueError, match="lm_head is tied to another module"):
        find_targets(make_tiny_llama(tie_word_embeddings=True), ["lm_head"])
    model = make_tiny_llama()
    model.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts \(2, 3, 4\) is no matrix"):
        find_targets(model, None)
    assert len(find_targets(model, r".*mlp\.\w+_proj")) == 6
