"""Answers that share a prompt have the scores of pairs read in full, whatever the cache of the model looks like."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    MistralConfig,
)
from trl.trainer.utils import add_fused_lm_head

from hf_ext.trainers import task_sequence
from hf_ext.trainers.output_layer import score_answers
from hf_ext.trainers.shared_prefix import can_share_prefix, common_prefix, score_groups
from hf_ext.trainers.tasks import ContinualTask
from tests.conftest import make_tiny_llama
from tests.trainers.adaptive_svd.helpers import make_trainer

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "llama": None,
    "gemma3": Gemma3TextConfig(**WIDE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "mistral": MistralConfig(**WIDE, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}


def headed(name: str):
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = make_tiny_llama() if config is None else AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    return model.eval()


def padded(groups):
    """(ids, mask, answer) of prompts and their answers."""
    rows = [(prompt, answer) for prompt, answers in groups for answer in answers]
    ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(p) + len(a), dtype=torch.long) for p, a in rows], batch_first=True)
    begins = torch.tensor([len(prompt) for prompt, _ in rows])[:, None]
    return ids, mask, (torch.arange(ids.shape[1]) >= begins) & mask.bool()


GROUPS = [
    ([1, 5, 6, 7, 8, 9, 10, 11], [[20], [21, 22, 23], [20, 24]]),
    ([1, 5], [[30, 31], [32], [33, 34, 35, 36]]),
    ([4], [[40], [41], [42]]),
]


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1], GROUPS[2:]], ids=["several", "one", "single-token prompt"])
def test_scores_are_those_of_pairs_read_in_full(name, groups, lora):
    base = headed(name)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)) if lora else base
    assert can_share_prefix(model, base)
    ids, mask, answer = padded(groups)
    whole = score_answers(model, base, {"input_ids": ids, "attention_mask": mask, "use_cache": False}, answer)
    found, where = score_groups(model, base, ids, mask, answer, 3)
    torch.testing.assert_close(found.log_probs.sum(-1), whole.log_probs.sum(-1), atol=2e-5, rtol=1e-5)
    assert found.is_top1.sum(-1).equal(whole.is_top1.sum(-1))
    assert (found.log_probs != 0).equal(where) and where.sum(-1).equal(answer.sum(-1))


@torch.no_grad()
def test_the_prompt_is_read_once():
    model, (ids, mask, answer) = headed("llama"), padded(GROUPS)
    read = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    score_groups(model, model, ids, mask, answer, 3)
    assert read == [(3, 7), (9, 5)]


def test_rows_may_part_before_the_answer():
    """As when a tokenizer merges the end of the prompt with the answer."""
    ids = torch.tensor([[[1, 5, 6, 9], [1, 5, 7, 9]]])
    answer = torch.tensor([[[False, False, False, True]] * 2])
    assert common_prefix(ids, answer).tolist() == [2]
    assert common_prefix(ids[:, :1], answer[:, :1]).tolist() == [3]


def test_caches_that_cannot_be_continued_anywhere_are_left_alone():
    for config in (BloomConfig(**SMALL), MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)):
        model = AutoModelForCausalLM.from_config(config)
        assert not can_share_prefix(model, model)
    base = headed("llama")
    prompted = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert not can_share_prefix(prompted, base)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_trainer_scores_options_as_before(tmp_path, monkeypatch, batch_size):
    """Prompts of different lengths, whatever the size of a batch."""
    rows = [{"prompt": " ".join(f"w{n}" for n in range(length)), "completion": " w60"} for length in (1, 2, 5, 9, 14)]
    task = ContinualTask("t", Dataset.from_list(rows), Dataset.from_list(rows), (" w60", " w61", " w62 w63"))
    trainer = make_trainer(tmp_path, [task], per_device_eval_batch_size=batch_size)
    data, right = trainer._read_choices(task)
    found, _ = trainer._read(data, right.shape[1])
    monkeypatch.setattr(task_sequence, "can_share_prefix", lambda model, base: False)
    expected, _ = trainer._read(data, right.shape[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(found) == 15
