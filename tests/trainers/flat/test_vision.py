"""Data with images: TRL's vision collator tokenises them, and the losses read its rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hf_ext.trainers.flat import UnlearnTrainer
from hf_ext.trainers.flat.loss import answer_probability, flat_loss
from tests.trainers.flat.helpers import REFUSALS, make_args, make_retain


def make_processor() -> LlavaProcessor:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4, **{f"w{i}": i + 5 for i in range(94)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    text = LlamaConfig(**shape, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(**shape, image_size=8, patch_size=4, projection_dim=16)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    )


def make_pictures() -> Dataset:
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (8, 8), (i * 40, 0, 0))],
                "prompt": f"<image> w{i} ",
                "completion": f"w{i} w{i + 1}",
            }
            for i in range(4)
        ]
    )


def label_log_probs(model, batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]


def make_trainer(folder, data=None, **overrides) -> UnlearnTrainer:
    kwargs = {name: overrides.pop(name) for name in ("retain_dataset", "eval_dataset") if name in overrides}
    args = make_args(folder, per_device_train_batch_size=2, max_steps=2, **overrides)
    data = make_pictures() if data is None else data
    return UnlearnTrainer(make_model(), args, train_dataset=data, processing_class=make_processor(), **kwargs)


def test_flat_reads_both_halves(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"same": make_pictures()})
    assert trainer.ref_model is None
    assert set(trainer.train_dataset["chosen"]) <= {f"{text}</s>" for text in REFUSALS}
    assert list(trainer.train_dataset["rejected"]) == [f"{text}</s>" for text in make_pictures()["completion"]]
    batch = next(iter(trainer.get_train_dataloader()))
    log_probs = label_log_probs(make_model(), batch)
    mask = batch["completion_mask"][:, 1:].bool()
    truth = flat_loss(
        answer_probability(log_probs[:2], mask[:2]), answer_probability(log_probs[2:], mask[2:]), "kl"
    ).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(truth.item(), rel=1e-5)
    trainer.train()
    assert "eval_same_loss" in trainer.evaluate()


def test_a_loss_without_refusals_runs_the_answers_alone(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="wga")
    rows = list(trainer.train_dataset)[:2]
    batch, whole = trainer.data_collator(rows), trainer.data_collator.collate(rows)
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask", "pixel_values"}
    for name, value in batch.items():
        assert len(value) == 2 and torch.equal(value, whole[name][2:]), name
    mask = batch["completion_mask"][:, 1:].bool()
    answers = [row[m] for row, m in zip(label_log_probs(make_model(), batch), mask, strict=True)]
    truth = torch.stack([(log_p.exp() * log_p).mean() for log_p in answers]).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["wga", "undial", "rmu"])
def test_other_losses_train(tmp_path, name):
    trainer = make_trainer(tmp_path, loss_type=name)
    trainer.train()
    assert trainer.state.global_step == 2


def test_answers_end(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, answer in zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True):
        assert ids[answer][-1] == 2 and (ids[answer] == 2).sum() == 1


def test_the_prompt_may_be_inside_the_answers(tmp_path):
    rows = [
        {
            "images": [Image.new("RGB", (8, 8), (i * 40, 0, 0))],
            "chosen": f"<image> w{i} w80 w81",
            "rejected": f"<image> w{i} w3{i}",
        }
        for i in range(4)
    ]
    trainer = make_trainer(tmp_path, data=Dataset.from_list(rows), template_answers=None)
    assert trainer.train_dataset[1]["prompt"].startswith("<image> w1 ")
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("name", ["flat", "wga"])
def test_new_data_is_evaluated(tmp_path, name):
    trainer = make_trainer(tmp_path, loss_type=name, eval_dataset=make_pictures())
    truth = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(make_pictures())["eval_loss"] == pytest.approx(truth)
    assert trainer.evaluate({"new": make_pictures()})["eval_new_loss"] == pytest.approx(truth)
    assert trainer.predict(make_pictures()).metrics["test_loss"] == pytest.approx(truth)


def test_what_needs_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="retain_dataset: a forget dataset with images"):
        make_trainer(tmp_path, retain_dataset=make_retain())
    with pytest.raises(ValueError, match="loss_type='npo' computes its reference before the training"):
        make_trainer(tmp_path, loss_type="npo")
    with pytest.raises(ValueError, match="data with images take one refusal per prompt"):
        make_trainer(tmp_path, templates_per_example=2)
