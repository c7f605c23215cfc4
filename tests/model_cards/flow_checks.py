"""Everything that `publish` takes, from the first commit to what the code of its card loads. Run by `test_publish.py`, see `tests.hub.fixtures`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import HfApi, ModelCard, PyTorchModelHubMixin
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_ext import RoseLoraConfig, SQuatCache
from hf_ext.model_cards import publish
from hf_ext.model_cards.markers import BEGIN
from hf_ext.model_cards.running import code_of
from tests.conftest import make_tiny_llama
from tests.hub.fixtures import put_card
from tests.model_cards.tiny import BASE, tiny_tokenizer

TOKENS = torch.arange(3, 11)[None]
LM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False}
ONE_STEP = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}


def language_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE)


def adapted(config: LoraConfig) -> PeftModel:
    return get_peft_model(language_model(), config).eval()


def trained(trainer: Trainer) -> Trainer:
    trainer.train()
    trainer.model.eval()
    return trainer


def by_trl(folder: Path) -> Trainer:
    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}] * 2)
    arguments, tokenizer = SFTConfig(str(folder), **ONE_STEP), tiny_tokenizer()
    config = LoraConfig(**LM)
    return trained(
        SFTTrainer(language_model(), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    )


def by_transformers(folder: Path) -> Trainer:
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    return trained(Trainer(adapted(LoraConfig(**LM)), TrainingArguments(str(folder), **ONE_STEP), train_dataset=rows))


def pictures() -> DDPMPipeline:
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, **channels, **blocks)
    return DDPMPipeline(unet.eval(), DDPMScheduler(num_train_timesteps=10))


def prompt_read() -> SQuatCache:
    model = language_model()
    cache = SQuatCache(model.config, bits=4, group_size=8, residual_length=8)
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache)
    return cache


def logits(model: Any) -> torch.Tensor:
    return (model.model if isinstance(model, Trainer) else model).eval()(TOKENS).logits


def picture(pipeline: DDPMPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipeline(num_inference_steps=2, generator=generator, output_type="np").images)


def continuation(cache: SQuatCache) -> torch.Tensor:
    return language_model()(TOKENS, past_key_values=copy.deepcopy(cache)).logits


@dataclass(frozen=True)
class Flow:
    """Something to publish.

    Attributes:
        make: makes it in a folder of its own.
        library, task: what the Hub is told.
        base: whether it has a base model.
        loaded: what the code of the card calls it.
        answer: the same before and after.
        rounding: by which it may differ all the same.
    """

    make: Callable[[Path], Any]
    library: str = "peft"
    task: str | None = "text-generation"
    base: bool = True
    loaded: str = "model"
    answer: Callable[[Any], torch.Tensor] = logits
    rounding: float = 0.0


FLOWS = {
    "lora": Flow(lambda folder: adapted(LoraConfig(**LM))),
    "roselora": Flow(lambda folder: adapted(RoseLoraConfig(**LM, total_step=10))),
    "trl": Flow(by_trl),
    "trainer": Flow(by_transformers),
    "model": Flow(lambda folder: language_model(), "transformers"),
    # Nothing tells the task of a pipeline that is not ours; convolutions round by where their weights lie in memory.
    "pipeline": Flow(lambda folder: pictures(), "diffusers", None, False, "pipeline", picture, 1e-6),
    # No pipeline of transformers can load it, so it has no task.
    "cache": Flow(lambda folder: prompt_read(), "transformers", None, loaded="cache", answer=continuation),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow(hub, name, tmp_path):
    flow, repo_id = FLOWS[name], f"user/flow-{name}"
    make_tiny_llama().push_to_hub(BASE)
    thing = flow.make(tmp_path)
    told = {"license": "mit", "datasets": "user/facts", "metrics": {"accuracy": 0.5}, "evaluated_on": "user/probe"}

    def published() -> int:
        publish(thing, repo_id, base_model=BASE if flow.base else None, run_snippet=False, **told)
        return len(hub.repos["models", repo_id].history())

    assert published() == 2  # with the one that created the repository
    remote = HfApi().model_info(repo_id)
    assert (remote.library_name, remote.pipeline_tag) == (flow.library, flow.task)
    data = remote.card_data
    assert (data.license, data.datasets, data.base_model) == ("mit", ["user/facts"], BASE if flow.base else None)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.5, "user/probe")

    scope: dict[str, Any] = {}
    exec(code_of(ModelCard.load(repo_id).text), scope)
    answered = flow.answer(scope[flow.loaded])
    torch.testing.assert_close(answered, flow.answer(thing), rtol=0, atol=flow.rounding)

    assert published() == 2
    card = ModelCard.load(repo_id)
    card.text = f"{card.text.replace(BEGIN, f'Read me first.{BEGIN}')}\nThanks to all.\n"
    put_card(card, repo_id)
    assert published() == 3
    found = ModelCard.load(repo_id).text
    assert f"Read me first.{BEGIN}" in found and found.endswith("\nThanks to all.\n")


def test_models_of_no_library_are_refused(hub):
    class Own(torch.nn.Linear, PyTorchModelHubMixin):
        pass

    with pytest.raises(ValueError, match="model_or_trainer is a Own; give a PeftModel, a transformers model"):
        publish(Own(2, 2), "user/own")
    assert hub.requests == []
