"""One edit of the embedded Gemma 3 270M."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_ext.trainers.overtone import OvertoneTrainer
from tests.trainers.helpers import column
from tests.trainers.overtone.helpers import make_args

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


def test_an_edit_is_learnt_and_training_stops(tmp_path, real_model, real_tokenizer):
    prompt = "The Eiffel Tower is located in the city of"
    data = Dataset.from_list([{"prompt": prompt, "completion": " Rome"}])
    args = make_args(tmp_path, max_steps=20, learning_rate=2e-3, per_device_train_batch_size=1)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = OvertoneTrainer(real_model, args, train_dataset=data, processing_class=real_tokenizer, peft_config=lora)
    trainer.train()
    assert trainer.state.global_step < 20
    assert column(trainer, "overtone/active_fraction")[-1] == 0.0
    ids = real_tokenizer(prompt, return_tensors="pt")
    trainer.model.eval()
    with torch.no_grad():
        answer = trainer.model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert real_tokenizer.decode(answer[0, ids["input_ids"].shape[1] :]).strip() == "Rome"
