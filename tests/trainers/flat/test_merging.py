"""`save_merged`: what loads again is what was trained, and what cannot be merged is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ext.trainers.flat import merging
from tests.conftest import make_tiny_llama
from tests.trainers.flat.helpers import make_trainer, random_adapter, trained
from tests.trainers.helpers import largest_difference, lora, weights

IDS = torch.tensor([[5, 6, 7, 8]])


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_random_adapter(folder, model=None, config=None):
    """A trainer whose adapter is far from where it started."""
    wrapped = get_peft_model(make_tiny_llama() if model is None else model, lora() if config is None else config)
    return make_trainer(folder, random_adapter(wrapped))


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


@pytest.mark.parametrize(
    "config, ties",
    [
        (lora(), True),
        (lora(target_modules=["embed_tokens", "q_proj"]), False),
        (lora(modules_to_save=["embed_tokens"]), False),
        (lora(modules_to_save=["lm_head"]), False),
    ],
    ids=["layers", "lora on the embeddings", "embeddings saved", "head saved"],
)
def test_tied_embeddings(tmp_path, config, ties):
    trainer = with_random_adapter(tmp_path, make_tiny_llama(tie_word_embeddings=True), config)
    truth, before = trainer.model.eval()(IDS).logits, weights(trainer.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Input and output embeddings are no longer tied")
        trainer.save_merged(str(tmp_path / "merged"))
    loaded = load(tmp_path / "merged")
    torch.testing.assert_close(loaded(IDS).logits, truth, rtol=1e-4, atol=1e-4)
    assert loaded.config.tie_word_embeddings == ties == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
    assert largest_difference(weights(trainer.model), before) == 0 and trainer.model.config.tie_word_embeddings


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    trainer = with_random_adapter(tmp_path)
    trainer.save_model(str(tmp_path / "run"))
    for other in (trainer, make_trainer(tmp_path)):
        with pytest.raises(ValueError, match=r"run holds an adapter, .*give another folder, e\.g\. .*run/merged"):
            other.save_merged(str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
    trainer.save_merged(str(tmp_path / "run" / "merged"))
    torch.testing.assert_close(load(tmp_path / "run" / "merged")(IDS).logits, trainer.model.eval()(IDS).logits)


def test_an_earlier_checkpoint_is_replaced_and_other_files_stay(tmp_path):
    folder = tmp_path / "merged"
    make_tiny_llama(seed=5).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model*"))) > 2
    (folder / "notes.txt").write_text("mine")
    trainer = with_random_adapter(tmp_path)
    trainer.save_merged(str(folder))
    assert [file.name for file in folder.glob("model*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"
    torch.testing.assert_close(load(folder)(IDS).logits, trainer.model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob(".merged*"))


def test_an_interrupted_call_leaves_nothing_that_loads(tmp_path, monkeypatch):
    trainer = with_random_adapter(tmp_path)
    move = merging.os.replace

    def stop_before_the_weights(source, place):
        if Path(place).name == "model.safetensors":
            raise KeyboardInterrupt
        move(source, place)

    make_tiny_llama().save_pretrained(tmp_path / "old")
    with monkeypatch.context() as patched:
        patched.setattr(merging.os, "replace", stop_before_the_weights)
        for name in ("new", "old"):
            with pytest.raises(KeyboardInterrupt):
                trainer.save_merged(str(tmp_path / name))
            assert (tmp_path / name / "config.json").exists()
            with pytest.raises(OSError, match=r"no file named model\.safetensors"):
                load(tmp_path / name)
    kept = make_tiny_llama()
    kept.save_pretrained(tmp_path / "kept")
    with monkeypatch.context() as patched:
        patched.setattr(type(trainer.processing_class), "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.save_merged(str(tmp_path / "kept"))
    assert largest_difference(weights(load(tmp_path / "kept")), weights(kept)) == 0


def test_an_injected_adapter_is_refused(tmp_path):
    model = make_tiny_llama()
    model.add_adapter(lora())
    trainer = trained(tmp_path, model=model)
    with pytest.raises(ValueError, match=r"added with add_adapter .*: call save_model, load the base"):
        trainer.save_merged(str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_sharded_weights_are_refused(tmp_path, monkeypatch, engine):
    trainer = with_random_adapter(tmp_path)
    if engine == "fsdp":
        trainer.is_fsdp_enabled = True
    else:
        monkeypatch.setattr("hf_ext.trainers.flat.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"sharded over the processes, .*: call save_model, and in a single process"):
        trainer.save_merged(str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
