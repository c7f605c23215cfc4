"""What a configuration accepts, and how it says no."""

import copy
import pickle

import pytest
from peft import LoraConfig, PeftConfig, PeftType

from hf_ext import RoseLoraConfig


def test_needs_no_arguments_and_survives_json(tmp_path):
    config = RoseLoraConfig(sparsity=0.9, t_init=3, t_final=20, target_modules=["q_proj"], value_clip=0.5)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RoseLoraConfig)
    assert loaded == config
    assert loaded.peft_type is PeftType.ROSELORA
    assert RoseLoraConfig().to_dict()["peft_type"] == "ROSELORA"


def test_copies_and_pickles():
    config = RoseLoraConfig(r=4)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsity", 1.0),
        ("sparsity", -0.1),
        ("sparsity", "0.9"),
        ("beta", 1.0),
        ("beta", -0.5),
        ("t_init", -1),
        ("t_init", 1.5),
        ("t_final", 1.01),
        ("t_final", None),
        ("total_step", 0),
        ("total_step", 0.5),
        ("value_clip", 0.0),
        ("value_clip", -3e-3),
        ("mask_rule", "threshold"),
        ("prune_interval", 0),
        ("use_dora", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [(0, 2)]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "mica"),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        RoseLoraConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_limits_must_be_in_order():
    with pytest.raises(ValueError, match=r"t_init=20.*t_final=10"):
        RoseLoraConfig(t_init=20, t_final=10)
    with pytest.raises(ValueError, match=r"t_init=0.8"):
        RoseLoraConfig(t_init=0.8, t_final=0.8)
    with pytest.raises(ValueError, match=r"t_final=5 is not after t_init=0.5"):
        RoseLoraConfig(t_init=0.5, t_final=5).schedule(total_step=100)


def test_a_start_before_the_second_step_is_raised():
    with pytest.warns(UserWarning, match="t_init=0.*raised to 2"):
        config = RoseLoraConfig(t_init=0, t_final=5)
    assert config.schedule() == (2, 5)


def test_fractions_need_a_total():
    with pytest.raises(ValueError, match=r"t_init=0.1 is a fraction.*total_step"):
        RoseLoraConfig().schedule()
    assert RoseLoraConfig().schedule(total_step=50) == (5, 40)
    assert RoseLoraConfig(total_step=100).schedule(total_step=50) == (10, 80)
    assert RoseLoraConfig().schedule(total_step=1) == (2, 3)
    assert RoseLoraConfig(t_init=2, t_final=0.5).schedule(10) == (2, 5)


def test_to_lora_config_drops_our_fields_only():
    config = RoseLoraConfig(
        r=3, lora_alpha=5, target_modules=["a"], use_rslora=True, rank_pattern={"a": 2}, bias="all"
    )
    lora = config.to_lora_config()
    assert type(lora) is LoraConfig
    assert lora.peft_type is PeftType.LORA
    ours, theirs = config.to_dict(), lora.to_dict()
    assert all(theirs[key] == ours[key] for key in theirs if key != "peft_type")
    assert set(ours) - set(theirs) == {
        "sparsity", "beta", "t_init", "t_final", "total_step", "value_clip", "mask_rule", "prune_interval", "freeze_mask",
    }  # fmt: skip
