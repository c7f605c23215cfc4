"""What `BaftTrainer` says no to, and says why."""

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from hf_ext import BaftConfig, BaftTrainer, BaftTrainerConfig, OvertoneConfig
from hf_ext.tuners.baft import edits
from tests.conftest import make_tiny_llama
from tests.trainers.baft.helpers import adapted, base, facts, trainer, unrelated
from tests.trainers.helpers import CPU_RUN, make_tokenizer


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_balance_weight": -1}, "load_balance_weight=-1"),
        ({"locality_weight": float("nan")}, "locality_weight=nan"),
        ({"stop_loss": 0.0}, "stop_loss=0.0"),
        ({"load_balance": "even"}, "load_balance='even'"),
        ({"own_bases": True, "load_balance_weight": 0.1}, "shares no basis vectors"),
        ({"own_bases": True, "weight_decay": 0.1}, "weight_decay=0.1"),
        ({"locality_batch_size": 0}, "locality_batch_size=0"),
        ({"locality_weight": 1.0}, "without a locality_dataset"),
        ({"locality_batch_size": 2}, "without a locality_dataset"),
    ],
)
def test_settings_without_sense(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        trainer(tmp_path, **settings)


def test_models_and_data_that_cannot_be_taught(tmp_path):
    args = BaftTrainerConfig(str(tmp_path), **CPU_RUN)
    shared = dict(train_dataset=facts(), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="teaches one active BaFT adapter"):
        BaftTrainer(get_peft_model(make_tiny_llama(), LoraConfig(task_type="CAUSAL_LM")), args, **shared)
    with pytest.raises(TypeError, match="IterableDataset"):
        BaftTrainer(adapted(), args, train_dataset=facts().to_iterable_dataset(), processing_class=make_tokenizer())
    with pytest.raises(TypeError, match="takes BaftTrainerConfig"):
        BaftTrainer(adapted(), OvertoneConfig(str(tmp_path), **CPU_RUN), **shared)
    with pytest.raises(ValueError, match="gate 'none'"):
        trainer(tmp_path, adapted(gate="none"), locality=unrelated())
    with pytest.raises(ValueError, match="softmax depend on each other"):
        trainer(tmp_path, adapted(gate="softmax"), own_bases=True)
    taught = trainer(tmp_path, own_bases=True, edit_name="mine", max_steps=1)
    taught.train()
    with pytest.raises(ValueError, match="has been taught 'mine' already"):
        taught.train()
    with pytest.raises(ValueError, match="edit_name='mine'"):
        trainer(tmp_path, taught.model, edit_name="mine", own_bases=True)
    with pytest.raises(ValueError, match="belong to earlier edits"):
        trainer(tmp_path, taught.model)
    taught.save_model(str(tmp_path / "saved"))
    frozen = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "saved")
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer(tmp_path, frozen)


@pytest.mark.parametrize("row", [{"text": "w1 w2 w3"}, {"prompt": "", "completion": "w1 w2"}])
def test_rows_without_a_prompt_are_refused(tmp_path, row):
    data = Dataset.from_list([row])
    with pytest.raises(ValueError, match="row 0 has no prompt before its first label"):
        trainer(tmp_path, data=data)
    trainer(tmp_path, adapted(positions="all"), data=data, max_steps=1).train()


def test_other_ways_into_trouble(tmp_path):
    injected = base()
    injected.add_adapter(BaftConfig(r=2, layers=[0]))
    with pytest.raises(ValueError, match="added with add_adapter"):
        trainer(tmp_path, injected)
    with pytest.raises(ValueError, match="locality_dataset: it has no rows"):
        trainer(tmp_path, locality=unrelated().select([]))
    width = injected.config.hidden_size
    r = width // 2 + 1
    full = adapted(r=r)
    trainer(tmp_path, full, own_bases=True, max_steps=1).train()
    with pytest.raises(ValueError, match=rf"r={2 * r}: 'model.layers.0' puts out {width} features"):
        trainer(tmp_path, full, own_bases=True, max_steps=1).train()
    assert full.peft_config["default"].r == r and len(edits(full)) == 1
