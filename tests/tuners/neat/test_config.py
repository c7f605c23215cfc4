"""What a configuration accepts, and how it says no."""

import copy
import pickle

import pytest
from peft import PeanutConfig, PeftConfig, PeftType

from hf_ext import NeatConfig


def test_needs_no_arguments_and_survives_json(tmp_path):
    config = NeatConfig(
        r=4, side="auto", depth=1, lora_alpha=2, dropout=0.1, normalize=True, target_modules=["q_proj"]
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, NeatConfig) and loaded == config
    assert (loaded.peft_type, loaded.scaling) == (PeftType.NEAT, 0.5)
    assert NeatConfig().to_dict()["peft_type"] == "NEAT"


def test_copies_and_pickles():
    config = NeatConfig(r=4, rank_pattern={"q_proj": 2})
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 1.5),
        ("depth", -1),
        ("depth", True),
        ("act_fn", "cosine"),
        ("side", "both"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("rank_pattern", {"q_proj": 0}),
        ("layers_pattern", "layers"),
    ],
)
def test_refuses_what_cannot_work(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        NeatConfig(**{field: value})


def test_one_scale():
    assert NeatConfig(r=16, lora_alpha=8).scaling == 0.5
    with pytest.raises(ValueError, match=r"scaling=2.0: lora_alpha=8 sets it to 0.25; give one of the two"):
        NeatConfig(scaling=2.0, lora_alpha=8)
    with pytest.raises(ValueError, match="rank_pattern="):
        NeatConfig(lora_alpha=8, rank_pattern={"q_proj": 2})


def test_the_same_as_peanut():
    peanut = PeanutConfig(r=3, depth=1, act_fn="gelu", scaling=2.0, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config = NeatConfig.from_peanut(peanut)
    assert (config.side, config.normalize, config.peft_type) == ("output", False, PeftType.NEAT)
    assert (config.r, config.depth, config.act_fn, config.scaling) == (3, 1, "gelu", 2.0)
    assert config.target_modules == {"q_proj"} and config.task_type == "CAUSAL_LM"
