"""`BaftTrainer`: facts are learnt at the right tokens, apart from each other and from the rest, and can be taken back."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_ext import BaftConfig, BaftTrainer, BaftTrainerConfig, OvertoneConfig, OvertoneTrainer
from hf_ext.trainers.baft import BaftMixin, BaftSettings
from hf_ext.tuners.baft import edits, recorded_weights, restore, rollback
from hf_ext.tuners.baft.ledger import layers_of
from hf_ext.tuners.baft.reference import gate_penalty, load_balance, unevenness
from tests.conftest import make_tiny_llama
from tests.trainers.baft.helpers import FACTS, adapted, answers, base, facts, right, trainer, unrelated
from tests.trainers.distributed import run_two_processes
from tests.trainers.helpers import CPU_RUN, column, make_tokenizer, quantised_llama

ENOUGH = {"stop_loss": 0.1, "num_train_epochs": 100}


def own(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# -- an edit -------------------------------------------------------------------------------------------------------------


def test_facts_are_learnt_saved_and_loaded(tmp_path):
    taught = trainer(tmp_path, **ENOUGH, logging_steps=5)
    taught.train()
    assert answers(taught.model) == right()
    (entry,) = edits(taught.model)
    assert (entry.name, entry.facts, entry.bases, entry.steps) == ("edit-1", 4, None, taught.state.global_step)
    assert entry.loss < 0.1 and entry.steps < 100
    taught.save_model()
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert answers(loaded) == right() and edits(loaded) == [entry]
    (layer,), (kept,) = layers_of(loaded), layers_of(taught.model)
    assert torch.equal(layer.baft_usage["default"], kept.baft_usage["default"])
    torch.testing.assert_close(layer.baft_usage["default"], torch.tensor(entry.weights[layer.name]))


def test_edited_are_the_last_token_of_the_prompt_and_the_answer(tmp_path):
    """The labels reach the adapter, though TRL's output layer takes them out of the model's call."""
    run = trainer(tmp_path, data=facts(1), max_steps=1)
    with recorded_weights(run.model) as found:
        run.train()
    # Two words of prompt, three of answer and an end: the last of the prompt and all after it.
    assert {tuple(each.weights.shape) for each in found} == {(5, 4)}


def test_the_model_can_be_given_by_its_name(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    args = BaftTrainerConfig(str(tmp_path / "edited"), max_steps=1, **CPU_RUN)
    run = BaftTrainer(str(tmp_path / "base"), args, train_dataset=facts())
    run.train()
    assert isinstance(run.model.peft_config["default"], BaftConfig) and run.model.peft_config["default"].layers == [1]


def test_conversations_are_edited_too(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} {% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    rows = [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": a}]}
        for p, a in FACTS
    ]
    args = BaftTrainerConfig(str(tmp_path), max_steps=2, **CPU_RUN)
    run = BaftTrainer(adapted(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    before = own(run.model)
    run.train()
    assert any(not torch.equal(p, before[name]) for name, p in own(run.model).items())


def test_accumulation_checkpointing_and_evaluation_change_nothing(tmp_path):
    """Facts of different lengths, in one batch, in two, and with blocks computed twice."""
    results = []
    for settings in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"eval_strategy": "steps", "eval_steps": 1},
    ):
        # A generator with a fixed order: all rows are in every step.
        run = trainer(tmp_path, **{"max_steps": 3, "stop_loss": None, **settings}, eval_dataset=facts())
        run.train()
        results.append(own(run.model))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-4, atol=2e-5)


def test_it_is_sft_trainer_where_there_is_nothing_to_balance(tmp_path):
    run = trainer(tmp_path / "ours", max_steps=3, stop_loss=None)
    run.train()
    model = adapted()
    settings = {**CPU_RUN, "learning_rate": 0.05, "max_steps": 3, "lr_scheduler_type": "constant"}
    args = SFTConfig(str(tmp_path / "trl"), **settings)
    SFTTrainer(model, args, train_dataset=facts(), processing_class=make_tokenizer()).train()
    torch.testing.assert_close(own(run.model), own(model), rtol=1e-4, atol=1e-5)


def test_other_losses_can_be_mixed_in(tmp_path):
    class OvertoneBaftTrainer(BaftMixin, OvertoneTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.baft_setup(BaftSettings(edit_name="mixed"))

    args = OvertoneConfig(str(tmp_path), max_steps=2, **CPU_RUN)
    run = OvertoneBaftTrainer(adapted(), args, train_dataset=facts(), processing_class=make_tokenizer())
    run.train()
    assert [edit.name for edit in edits(run.model)] == ["mixed"]
    assert column(run, "overtone/nll") and column(run, "baft/weight")


# -- apart from the rest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["overlap", "variation"])
def test_losses_on_the_weights(tmp_path, form):
    """What is added to the loss and its gradient are those of the reference functions."""
    model = adapted(init_weights=False)
    (layer,) = layers_of(model)
    layer.baft_usage["default"] = torch.tensor([0.5, 0.1, 0.2, 0.9])
    run = trainer(
        tmp_path,
        model,
        locality=unrelated(),
        load_balance_weight=0.7,
        load_balance=form,
        locality_weight=3.0,
        locality_batch_size=8,
        max_steps=1,
    )
    batch = next(iter(run.get_train_dataloader()))
    model.train()
    run.current_gradient_accumulation_steps = 1
    gradients = []
    for weights in ((0.7, 3.0), (0.0, 0.0)):
        alpha, beta = weights
        run._settings = replace(run._settings, load_balance_weight=alpha, locality_weight=beta)
        loss = run.compute_loss(model, dict(batch))
        gradients.append((loss.detach(), torch.autograd.grad(loss, layer.baft_U["default"])[0]))
    with recorded_weights(model) as found:
        model(**batch)
        unrelated_batch = run.data_collator(
            list(run._prepare_dataset(unrelated(), make_tokenizer(), run.args, False, None, "again"))
        )
        model(**unrelated_batch)
    weights, others = (each.weights for each in found)
    past = layer.baft_usage["default"]
    balance = load_balance(past, weights.mean(0)) if form == "overlap" else unevenness(past + weights.mean(0))
    extra = 0.7 * balance + 3.0 * gate_penalty(others)
    (wanted,) = torch.autograd.grad(extra, layer.baft_U["default"])
    torch.testing.assert_close(gradients[0][0] - gradients[1][0], extra.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[0][1] - gradients[1][1], wanted, rtol=1e-3, atol=1e-5)


def test_locality_keeps_weights_small_elsewhere(tmp_path):
    found = []
    for weight in (0.0, 20.0):
        run = trainer(tmp_path, locality=unrelated(), locality_weight=weight, **ENOUGH)
        run.train()
        batch = run.data_collator(
            list(run._prepare_dataset(unrelated(), make_tokenizer(), run.args, False, None, "x"))
        )
        with recorded_weights(run.model) as weights, torch.no_grad():
            run.model(**batch)
        found.append(float(weights[0].weights.square().mean()))
        assert column(run, "baft/locality")
    assert found[1] < 0.5 * found[0]


def test_later_edits_turn_to_other_basis_vectors(tmp_path):
    """With the overlap weighed heavily, the second edit's weights fall where the first one's do not."""
    overlaps = []
    for alpha in (0.0, 20.0):
        model = adapted(gate_bias=0.0)
        (layer,) = layers_of(model)
        layer.baft_usage["default"] = torch.tensor([4.0, 4.0, 0.0, 0.0])
        run = trainer(tmp_path, model, load_balance_weight=alpha, max_steps=30, stop_loss=None)
        run.train()
        (weights,) = edits(model)[0].weights.values()
        overlaps.append((weights[0] + weights[1]) / sum(weights))
        assert bool(column(run, "baft/load_balance")) == bool(alpha)
    assert overlaps[1] < overlaps[0] - 0.1


# -- the ledger ----------------------------------------------------------------------------------------------------------


def test_edits_with_own_basis_vectors_are_taken_back_alone(tmp_path):
    model = adapted()
    plain = answers(model)
    for number in range(3):
        run = trainer(tmp_path, model, facts(number), own_bases=True, edit_name=f"fact {number}", **ENOUGH)
        before = own(model)
        run.train()
        for name, p in own(model).items():
            assert torch.equal(p[: 4 * number], before[name][: 4 * number]), name
    assert answers(model, 0, 1, 2) == right(0, 1, 2)
    ledger = edits(model)
    assert [edit.bases for edit in ledger] == [(0, 4), (4, 8), (8, 12)] and model.peft_config["default"].r == 12
    rollback(model, "fact 1")
    assert answers(model, 0, 2) == right(0, 2) and answers(model, 1) != right(1)
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "saved")
    assert answers(loaded, 0, 1, 2) == answers(model, 0, 1, 2)
    assert [edit.closed for edit in edits(loaded)] == [False, True, False]
    restore(loaded, "fact 1")
    assert answers(loaded, 0, 1, 2) == right(0, 1, 2)
    for number in range(3):
        rollback(loaded, f"fact {number}")
    assert answers(loaded) == plain


def test_shared_edits_add_up_and_cannot_be_taken_back_alone(tmp_path):
    model = adapted()
    for number in range(2):
        trainer(tmp_path, model, facts(number), max_steps=3).train()
    first, second = edits(model)
    assert (first.name, second.name, second.bases) == ("edit-1", "edit-2", None)
    (layer,) = layers_of(model)
    both = torch.tensor(first.weights[layer.name]) + torch.tensor(second.weights[layer.name])
    torch.testing.assert_close(layer.baft_usage["default"], both)
    with pytest.raises(ValueError, match="shares its basis vectors"):
        rollback(model, "edit-1")
    with pytest.raises(ValueError, match=r"no such edit; it has \['edit-1', 'edit-2'\]"):
        rollback(model, "edit-9")
    with pytest.raises(ValueError, match="no BaFT adapter of this name"):
        edits(model, "other")


def test_a_resumed_edit_is_the_edit(tmp_path):
    settings = {"max_steps": 6, "stop_loss": None, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    again = trainer(tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    torch.testing.assert_close(own(again.model), own(whole.model), rtol=1e-5, atol=1e-6)
    assert edits(again.model)[0].weights.keys() == edits(whole.model)[0].weights.keys()


# -- other machines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_adapters_in_float32(tmp_path, bits):
    """TRL would round them to bfloat16."""
    base = quantised_llama(tmp_path / "base", bits)
    args = BaftTrainerConfig(str(tmp_path), max_steps=2, **CPU_RUN)
    fresh = BaftTrainer(base, args, train_dataset=facts(), processing_class=make_tokenizer())
    assert {p.dtype for p in own(fresh.model).values()} == {torch.float32}
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        with fresh.model.disable_adapter():
            plain = fresh.model(input_ids=ids).logits
        torch.testing.assert_close(fresh.model(input_ids=ids).logits, plain, rtol=0, atol=1e-5)
    fresh.train()
    taught = own(fresh.model)
    BaftTrainer(fresh.model, args, train_dataset=facts(), processing_class=make_tokenizer())
    assert all(torch.equal(p, taught[name]) for name, p in own(fresh.model).items())


def one_edit(folder, run) -> dict:
    """Two facts per process; the process without a fact of its own in the last batch has nothing to edit but the padding."""
    taught = trainer(
        folder,
        per_device_train_batch_size=run["rows"],
        max_steps=3,
        stop_loss=None,
        locality=unrelated(),
        locality_weight=0.0,
    )
    taught.train()
    (edit,) = edits(taught.model)
    return {
        "weights": edit.weights,
        "loss": edit.loss,
        "own": {name: p.tolist() for name, p in own(taught.model).items()},
    }


@pytest.mark.slow
def test_two_processes_teach_what_one_does(tmp_path):
    (found,) = run_two_processes(one_edit, tmp_path, [{"rows": 2}])
    alone = one_edit(tmp_path, {"rows": 4})
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    for name, value in alone["own"].items():
        torch.testing.assert_close(torch.tensor(found["own"][name]), torch.tensor(value), rtol=1e-4, atol=1e-5)
    for name, weights in alone["weights"].items():
        assert found["weights"][name] == pytest.approx(weights, rel=1e-3)


# -- what must not go wrong unseen ---------------------------------------------------------------------------------------


def test_new_basis_vectors_point_elsewhere(tmp_path):
    """Trainers set one seed after another; the basis stays well conditioned all the same."""
    model = adapted()
    for number in range(4):
        trainer(tmp_path, model, facts(number), own_bases=True, max_steps=1, learning_rate=1e-4).train()
    (layer,) = layers_of(model)
    singular = torch.linalg.svdvals(layer.baft_R["default"].detach())
    assert len(singular) == 16 and singular[0] / singular[-1] < 1.5


class Broken(Exception):
    pass


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Broken


def test_an_edit_that_fails_leaves_nothing(tmp_path):
    model = adapted()
    trainer(tmp_path, model, facts(0), own_bases=True, **ENOUGH).train()
    (layer,), said = layers_of(model), answers(model)
    before = {key: value.clone() for key, value in layer.tensors("default").items()}
    for _ in range(2):
        run = trainer(tmp_path, model, facts(1), own_bases=True)
        run.add_callback(Breaks())
        with pytest.raises(Broken):
            run.train()
    assert [edit.name for edit in edits(model)] == ["edit-1"] and model.peft_config["default"].r == 4
    assert all(torch.equal(value, before[key]) for key, value in layer.tensors("default").items())
    assert answers(model) == said
    trainer(tmp_path, model, facts(1), own_bases=True, **ENOUGH).train()
    assert answers(model, 0, 1) == right(0, 1) and [edit.bases for edit in edits(model)] == [(0, 4), (4, 8)]


def test_a_checkpoint_says_what_is_being_taught(tmp_path):
    trainer(tmp_path, own_bases=True, max_steps=2, save_strategy="steps", save_steps=1, edit_name="half").train()
    loaded = PeftModel.from_pretrained(base(), tmp_path / "checkpoint-1", is_trainable=True)
    (edit,) = edits(loaded)
    assert (edit.name, edit.bases, edit.steps, edit.loss, edit.weights) == ("half", (0, 4), 0, None, {})
    trainer(tmp_path, loaded, own_bases=True, max_steps=1).train()
    assert edits(loaded)[1].bases == (4, 8)
    rollback(loaded, "half")


def test_adapters_made_with_one_configuration_have_ledgers_of_their_own(tmp_path):
    config = BaftConfig(r=4, layers=[0], task_type="CAUSAL_LM")
    models = [get_peft_model(base(), config) for _ in range(2)]
    for number in range(2):
        trainer(tmp_path, models[0], facts(number), own_bases=True, max_steps=1).train()
    assert edits(models[1]) == [] and models[1].peft_config["default"].r == config.r == 4


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
def test_adapters_may_sit_at_different_blocks(tmp_path, gate):
    model = adapted(layers=[0, 1])
    model.add_adapter("second", BaftConfig(r=2, layers=[1], gate=gate, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    trainer(tmp_path, model, max_steps=1).train()
    assert list(edits(model, "second")[0].weights) == ["model.layers.1"] and edits(model) == []


def test_what_was_learnt_before_the_first_edit_is_not_its_own(tmp_path):
    model = adapted()
    args = SFTConfig(str(tmp_path), max_steps=1, **CPU_RUN)
    SFTTrainer(model, args, train_dataset=facts(), processing_class=make_tokenizer()).train()
    trainer(tmp_path, model, own_bases=True, max_steps=1).train()
    assert edits(model)[0].bases == (4, 8)


def test_a_collator_of_other_libraries(tmp_path):
    """Columns that the model does not read are dropped in the last pass, too."""
    args = BaftTrainerConfig(str(tmp_path), max_steps=1, **CPU_RUN)
    shared = dict(train_dataset=facts(), locality_dataset=unrelated(), processing_class=make_tokenizer())
    run = BaftTrainer(adapted(), args, data_collator=DataCollatorForSeq2Seq(make_tokenizer()), **shared)
    run.train()
    assert edits(run.model)


def test_plain_text_is_protected_at_every_token(tmp_path):
    text = Dataset.from_list([{"text": "w60 w61 w62 w63"}, {"text": "w64 w65"}])
    run = trainer(tmp_path, adapted(positions="l1"), locality=text, locality_batch_size=2, max_steps=1)
    with recorded_weights(run.model) as found:
        run.train()
    # Six words and two ends; the edit itself is at one token of each fact.
    assert len(found[1].edited()) == 8 and len(found[0].edited()) == 4
