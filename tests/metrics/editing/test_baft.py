"""The evaluator tells an adapter that depends on it where the prompts end."""

from peft import get_peft_model

from hf_ext import BaftConfig
from hf_ext.metrics.editing import KnowledgeEditingEvaluator
from tests.trainers.baft.helpers import FACTS, adapted, trainer
from tests.trainers.helpers import make_tokenizer

RECORDS = [
    {
        "prompt": prompt,
        "target_new": answer,
        "locality": {"other": [{"prompt": "w70 w71", "ground_truth": ["w72 w73"]}]},
    }
    for prompt, answer in FACTS
]


def test_facts_that_are_generated_are_scored_as_learnt(tmp_path):
    taught = trainer(tmp_path, stop_loss=0.1, num_train_epochs=100)
    taught.train()
    options = dict(protocols=("teacher_forced_token", "generate_contains"), max_new_tokens=3)
    found = {}
    for name in (None, "prompt_mask"):
        evaluator = KnowledgeEditingEvaluator(
            taught.model, make_tokenizer(), RECORDS, prompt_mask_argument=name, **options
        )
        found[name] = evaluator.evaluate().metrics
    assert found["prompt_mask"]["reliability/teacher_forced_token"] == 1.0
    assert found["prompt_mask"]["reliability/generate_contains"] == 1.0
    # Without the mask, the last token of an answer would count as that of its prompt.
    assert found[None]["reliability/teacher_forced_token"] < 1.0


def test_an_untaught_adapter_changes_nothing():
    model = get_peft_model(adapted().unload(), BaftConfig(r=2, task_type="CAUSAL_LM"))
    evaluator = KnowledgeEditingEvaluator(
        model, make_tokenizer(), RECORDS, prompt_mask_argument="prompt_mask", max_new_tokens=3
    )
    assert evaluator.evaluate().metrics["locality/teacher_forced_token"] == 1.0
