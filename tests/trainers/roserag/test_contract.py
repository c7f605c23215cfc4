"""What a trainer of TRL's has to stand: processes, quantised models, images, experts, and private names that stay."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from hf_ext.trainers.roserag import RoseRAGConfig, RoseRAGTrainer
from hf_ext.trainers.roserag.loss import NATIVE_LOSSES
from tests.trainers.distributed import run_two_processes
from tests.trainers.flat.test_vision import make_model, make_pictures, make_processor
from tests.trainers.helpers import lora, make_tokenizer, quantised_llama
from tests.trainers.roserag.helpers import preference_rows, tiny_policy
from tests.trainers.roserag.test_trainer import PLAIN, logged, trained, weights_of

KEYS = ("loss", "nll_loss", "margins/token", "rewards/margins")


def word_pairs(count: int = 8) -> Dataset:
    """For `make_tokenizer`."""
    rows = [
        {"prompt": f"w{n} w{n + 1} ", "chosen": f"w{n + 2} w{n + 3}", "rejected": f"w{n + 4}"} for n in range(count)
    ]
    return Dataset.from_list(rows)


def outcome(folder: Path, overrides: dict) -> dict:
    options = dict(overrides)
    if options.pop("reference", False):
        options["ref_model"] = tiny_policy()[0]
    trainer = trained(folder, **options)
    result = {key: logged(trainer, key) for key in KEYS if key != "nll_loss" or logged(trainer, key)}
    return result | {"weights": weights_of(trainer).tolist(), "processes": trainer.accelerator.num_processes}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    # Plain gradient descent: Adam would hide a wrong factor in front of the gradient.
    shared = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    runs = [
        shared,
        {**shared, "loss_type": ["margin_dpo"], "reference": True},
        {**shared, "loss_type": ["simpo", "sigmoid"], "loss_weights": [1.0, 0.5], "reference": True},
        {**shared, "gradient_accumulation_steps": 2},
    ]
    pairs = run_two_processes(outcome, tmp_path, [run | {"per_device_train_batch_size": 2} for run in runs])
    for run, pair in zip(runs, pairs, strict=True):
        single = outcome(tmp_path, run)
        assert pair.pop("processes") == 2 and single.pop("processes") == 1 and pair.keys() == single.keys()
        for key in pair:
            assert pair[key] == pytest.approx(single[key], rel=1e-5, abs=1e-6), (run, key)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(tmp_path, bits):
    args = RoseRAGConfig(str(tmp_path / "run"), **{**PLAIN, "max_steps": 12, "learning_rate": 1e-2})
    trainer = RoseRAGTrainer(
        quantised_llama(tmp_path / "base", bits),
        args,
        word_pairs(),
        processing_class=make_tokenizer(),
        peft_config=lora(target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


@pytest.mark.parametrize("column", [None, "gap"])
@pytest.mark.parametrize("loss_type", ["rose_rag", "margin_dpo"])
def test_images(tmp_path, column, loss_type):
    pictures = make_pictures()
    pictures = pictures.rename_column("completion", "chosen").add_column("rejected", ["w9", "w8", "w7", "w6"])
    pictures = pictures.add_column("gap", [0.5, 1.0, 1.5, 2.0])
    args = RoseRAGConfig(
        str(tmp_path),
        **{**PLAIN, "per_device_train_batch_size": 2, "loss_type": [loss_type], "margin_column": column},
        remove_unused_columns=True,
    )
    reference = make_model() if loss_type == "margin_dpo" else None
    trainer = RoseRAGTrainer(make_model(), args, pictures, ref_model=reference, processing_class=make_processor())
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("gamma" in batch) == (column is not None) and "pixel_values" in batch
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert (trainer.ref_model is None) == (loss_type == "rose_rag")


def test_experts_are_balanced(tmp_path):
    _, tokenizer = tiny_policy()
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        pad_token_id=0,
        output_router_logits=True,
    )
    model = Qwen2MoeForCausalLM(config)
    trainer = trained(tmp_path, model=model, max_steps=1, router_aux_loss_coef=0.1)
    (row,) = [row for row in trainer.state.log_history if "aux_loss" in row]
    parts = 0.5 * row["loss/rose_rag"] + row["nll_loss"] + 0.1 * row["aux_loss"]
    assert row["loss"] == pytest.approx(parts, rel=1e-4) and row["aux_loss"] > 0


def test_what_is_private_of_trl_is_where_it_was():
    """`RoseRAGTrainer` lets `_compute_loss` of `DPOTrainer` run on a stand-in for the model."""
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert source.count("outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)") == 1
    for name in ("self.loss_types, self.loss_weights", "if self.precompute_ref_logps:", 'inputs["ref_chosen_logps"]'):
        assert name in source, name
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    assert all(f"'{name}'" in source for name in NATIVE_LOSSES)
    # They make the batch from nothing, so a margin has to be added afterwards.
    for collator in (DataCollatorForPreference, DataCollatorForVisionPreference):
        assert "margin" not in inspect.getsource(collator.torch_call)


class Spy(DPOTrainer):
    calls = 0

    def _compute_loss(self, model, inputs, return_outputs):
        def counted(**kwargs):
            assert kwargs["fused_lm_head"] is True
            Spy.calls += 1
            return model(**kwargs)

        return super()._compute_loss(counted, inputs, return_outputs)


def test_dpo_calls_its_model_once(tmp_path):
    Spy.calls = 0
    trained(tmp_path, Spy, max_steps=2, ref_model=tiny_policy()[0], rows=preference_rows(4))
    assert Spy.calls == 2
