"""What OVERTONE relies on inside TRL, transformers and accelerate: these fail first when upstream changes it."""

from __future__ import annotations

import inspect
import re

import torch
from transformers import Trainer
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, maybe_gather_lm_head_ctx

from hf_ext._compat import fused_lm_head_output, gathered_lm_head
from hf_ext.registry import OVERTONE
from hf_ext.trainers.overtone import OvertoneTrainer
from tests.conftest import make_tiny_llama
from tests.trainers.overtone.helpers import make_trainer


def test_fused_output_has_the_fields_we_fill():
    assert fused_lm_head_output() is FusedCausalLMOutput
    fields = {"loss", "log_probs", "entropy", "is_top1", "label_mask", "aux_loss"}
    assert fields <= set(FusedCausalLMOutput.__dataclass_fields__)


def test_patched_forward_takes_the_arguments_we_pass_on():
    model = make_tiny_llama()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    names = vars(model)["forward"].__func__.__code__.co_varnames
    assert {"fused_lm_head", "labels", "shift_labels", "num_items_in_batch"} <= set(names)
    source = inspect.getsource(add_fused_lm_head)
    # The scale factors that `logit_transform` knows are the ones that TRL knows.
    found = set(re.findall(r'getattr\(text_config, "(\w+)"', source))
    known = {"final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"}
    assert found - {"output_router_logits", "router_aux_loss_coef"} == known


def test_sft_compute_loss_negates_log_probs_and_normalises_itself():
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "model(**inputs, fused_lm_head=True)" in source
    assert "per_token_loss = -outputs.log_probs" in source
    assert "num_items_in_batch" in source and "aux_loss" in source
    assert SFTTrainer.loss_is_scaled_for_ga is None


def test_sft_prepares_data_with_nothing_but_the_end_token_of_its_tokenizer():
    signature = inspect.signature(SFTTrainer._prepare_dataset)
    expected = ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert list(signature.parameters) == expected
    assert signature == inspect.signature(SFTTrainer._prepare_dataset)
    assert set(re.findall(r"self\._tokenizer\.(\w+)", inspect.getsource(SFTTrainer._prepare_dataset))) == {"eos_token"}


def test_trainer_calls_the_hook_between_backward_and_update():
    source = inspect.getsource(Trainer._run_epoch)
    clip, hook, step = (
        source.index(text) for text in ("_clip_grad_norm(", "on_pre_optimizer_step(", "self.optimizer.step()")
    )
    assert clip < hook < step


def test_constructor_keeps_the_order_of_sft():
    ours, theirs = (list(inspect.signature(cls.__init__).parameters) for cls in (OvertoneTrainer, SFTTrainer))
    assert ours[:-1] == theirs[: len(ours) - 1]


def test_gathering_is_a_null_context_without_deepspeed():
    parameter = torch.nn.Parameter(torch.ones(2))
    with gathered_lm_head(parameter, None):
        assert parameter.sum() == 2
    assert callable(maybe_gather_lm_head_ctx)


def test_card_data_comes_from_the_registry(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer._name == OVERTONE.name and OVERTONE.slug in trainer._tag_names
    assert trainer._paper == {"title": OVERTONE.paper_title, "id": OVERTONE.arxiv, "citation": OVERTONE.citation}
    assert OVERTONE.slug in trainer.model.model_tags
