"""Settings, tasks, models and layers that adaptive SVD does not take, each with its reason."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig

from hf_ext.trainers.adaptive_svd import AdaptiveSVDConfig, AdaptiveSVDTrainer, ContinualTask
from hf_ext.trainers.adaptive_svd.targets import find_targets
from tests.conftest import make_tiny_llama
from tests.trainers.adaptive_svd.helpers import OPTIONS, make_task, make_tasks, make_trainer, trained
from tests.trainers.helpers import CPU_RUN, make_tokenizer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank_rule": "best"}, "rank_rule='best' is unknown: choose one of energy, adaptive, uniform"),
        ({"target_retention": 1.2}, "target_retention=1.2"),
        ({"minimum_retention": -0.1}, "minimum_retention=-0.1"),
        ({"rank_rule": "adaptive", "minimum_retention": 0.9}, "minimum_retention=0.9 is above target_retention=0.8"),
        (
            {"target_retention": 0.5},
            "target_retention=0.5 has no effect with rank_rule='energy': .* 'adaptive' or 'uniform'",
        ),
        (
            {"rank_rule": "uniform", "minimum_retention": 0.2},
            "minimum_retention=0.2 has no effect with rank_rule='uniform'",
        ),
        (
            {"rank_rule": "adaptive", "retained_energy": 0.9},
            "retained_energy=0.9 has no effect with rank_rule='adaptive'",
        ),
        ({"retained_energy": 0.0}, "retained_energy=0.0"),
        ({"importance_rows": 0}, "importance_rows=0"),
        ({"importance_score": "max"}, "importance_score='max'"),
        ({"projection": "left"}, "projection='left'"),
        ({"unprotected_lr_scale": -1.0}, "unprotected_lr_scale=-1.0"),
        ({"optim": "adafactor"}, "optim='adafactor': inside a subspace only adamw_torch"),
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
        (["a"], TypeError, "'a' is a str; give a ContinualTask"),
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


def test_options_that_would_be_cut(tmp_path):
    """To a beginning that they share, so that every one of them would be the most probable."""
    options = tuple(f"w60 {last}" for last in OPTIONS)
    rows = Dataset.from_list([{"prompt": "w1 w2 ", "completion": option} for option in options])
    task = ContinualTask("cut", make_task("a", 0).train, rows, options)
    with pytest.raises(ValueError, match=r"max_length=3 leaves no room for an answer in 9 of 9 pairs"):
        make_trainer(tmp_path, tasks=[task], max_length=3).train()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' has no place in a sequence"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True starts again inside a task"),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, "hub_strategy='all_checkpoints' would let"),
    ],
)
def test_options_without_meaning_for_a_sequence(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, **options)


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


def test_tied_and_stacked_weights():
    with pytest.raises(ValueError, match="lm_head is tied to another module"):
        find_targets(make_tiny_llama(tie_word_embeddings=True), ["lm_head"])
    model = make_tiny_llama()
    model.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts \(2, 3, 4\) is no matrix"):
        find_targets(model, None)
    assert len(find_targets(model, r".*mlp\.\w+_proj")) == 6
