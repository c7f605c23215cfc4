"""Laws of the evaluator on a model that really knows the facts it is asked about."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from hf_ext.metrics.editing import EditRecord, KnowledgeEditingEvaluator
from tests.metrics.editing.conftest import PEOPLE, edited_facts, train

ALL = ("teacher_forced_token", "teacher_forced_exact", "generate_exact", "generate_contains", "generate_judge")
TEXTS = ["Ada lives in Lomak", "the home of Bo is Lomak", "Cy likes milk"]


def judge(prompt: str, answer: str, prediction: str) -> bool:
    return answer == prediction


def make(model, tokenizer, records, **options):
    options = {"protocols": ALL, "judge": judge, "max_new_tokens": 6, "drift_texts": TEXTS, **options}
    return KnowledgeEditingEvaluator(model, tokenizer, records, **options)


def test_unedited_model_keeps_everything(world_model, word_tok, records):
    evaluator = make(world_model, word_tok, records)
    metrics = evaluator.evaluate(evaluator.predict()).metrics
    for protocol in ALL:
        assert metrics[f"locality/{protocol}"] == 1.0
        assert metrics[f"reliability/{protocol}"] == metrics[f"before/reliability/{protocol}"]
    assert metrics["reliability/generate_exact"] == 0.0
    assert metrics["drift/text_kl"] == 0.0
    assert metrics["drift/locality_kl"] == 0.0


def test_model_that_gives_every_new_answer_scores_one(world_model, oracle_model, word_tok, records):
    before = make(world_model, word_tok, records).predict()
    report = make(oracle_model, word_tok, records).evaluate(before)
    for section in ("reliability", "generality", "portability", "portability:inverse"):
        for protocol in ALL:
            assert report.metrics[f"{section}/{protocol}"] == 1.0, (section, protocol)
    assert report.metrics["drift/text_kl"] > 0.01
    texts = report.records[0]["texts"]
    assert texts[0]["prediction"] == records[0].target_new and texts[0]["before"] == records[0].ground_truth


def partly_edited(world_model, word_tok):
    train(world_model, word_tok, edited_facts()[:7], steps=6)
    return world_model


def test_order_of_protocols_holds(world_model, word_tok, records):
    evaluator = make(world_model, word_tok, records)
    before = evaluator.predict()
    report = make(partly_edited(world_model, word_tok), word_tok, records).evaluate(before)
    for measurement in report.measurements:
        if measurement.stage != "final" or not measurement.protocol.startswith(("teacher", "generate")):
            continue
        place = measurement.place
        assert report.metrics[f"{place}/teacher_forced_token"] >= report.metrics[f"{place}/teacher_forced_exact"]
        assert report.metrics[f"{place}/generate_contains"] >= report.metrics[f"{place}/generate_exact"]
        assert measurement.low <= measurement.value <= measurement.high
    assert 0 < report.metrics["locality/teacher_forced_token"] < 1
    # Half-written answers: some tokens right, not all.
    assert report.metrics["reliability/teacher_forced_token"] > report.metrics["reliability/teacher_forced_exact"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batching_and_padding_change_nothing(world_model, word_tok, records, batch_size, padding_side):
    reference = make(world_model, word_tok, records)
    before = reference.predict()
    edited = partly_edited(world_model, word_tok)
    expected = reference.evaluate(before)
    tokenizer = copy.deepcopy(word_tok)
    tokenizer.padding_side = padding_side
    report = make(edited, tokenizer, records, batch_size=batch_size).evaluate(before)
    for name, value in expected.metrics.items():
        assert report.metrics[name] == pytest.approx(value, abs=1e-5), name
    assert [row["texts"] for row in report.records] == [row["texts"] for row in expected.records]


def test_order_of_records_changes_nothing(world_model, word_tok, records):
    before = make(world_model, word_tok, records).predict()
    backwards_before = make(world_model, word_tok, records[::-1]).predict()
    edited = partly_edited(world_model, word_tok)
    forwards = make(edited, word_tok, records).evaluate(before).metrics
    backwards = make(edited, word_tok, records[::-1]).evaluate(backwards_before).metrics
    assert forwards == pytest.approx(backwards, abs=1e-6)


def test_pad_equal_to_eos_changes_nothing(world_model, word_tok, records):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tok.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.pad_token = "<eos>"
    expected, found = (
        make(world_model, tok, records, drift_texts=None).predict(drift=False) for tok in (word_tok, tokenizer)
    )
    assert (found.forced, found.generated) == (expected.forced, expected.generated)


def test_adapter_route_equals_cached_route(world_model, word_tok, records):
    peft_model = get_peft_model(world_model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    evaluator = make(peft_model, word_tok, records)
    cached = evaluator.predict()
    train(peft_model, word_tok, edited_facts(), steps=15, lr=2e-2)
    by_cache, by_adapter = evaluator.evaluate(cached), evaluator.evaluate()
    assert by_cache.metrics == by_adapter.metrics
    assert by_cache.metrics["drift/text_kl"] > 1e-3
    assert by_cache.records == by_adapter.records


def test_virtual_tokens_do_not_shift_the_answer(world_model, word_tok, records):
    from peft import PromptTuningConfig, TaskType

    options = {"protocols": ("teacher_forced_token", "generate_exact"), "judge": None}
    expected = make(world_model, word_tok, records, **options).predict()
    tuned = get_peft_model(world_model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5))
    evaluator = make(tuned, word_tok, records, **options)
    with tuned.disable_adapter():
        off = evaluator.predict()
        assert (off.forced, off.generated) == (expected.forced, expected.generated)
    on = evaluator.predict()
    # What is read at the answer's positions is what the model writes: the first tokens agree.
    for probe, text in on.generated.items():
        first = word_tok.decode(on.forced[probe][0][0][:1], skip_special_tokens=True)
        assert text.startswith(first), probe


def test_alias_policies(world_model, word_tok):
    row = {"prompt": "Ada likes", "target_new": "milk"}
    groups = [[["tea", "milk"]], [["tea", "Lomak"], ["milk"]], [["milk"], ["milk"]]]
    row["portability"] = {"p": [{"prompt": "Ada likes", "ground_truth": answers} for answers in groups]}
    scores = {}
    for policy in ("first", "any_alias", "all_groups"):
        evaluator = make(world_model, word_tok, [row], answer_policy=policy)
        report = evaluator.evaluate(evaluator.predict())
        scores[policy] = report.records[0]["scores"]["final"]
        assert all(m.answer_policy == policy for m in report.measurements if m.section == "portability")
    for protocol in ALL:
        assert scores["first"][protocol]["portability"]["p"] == [0, 0, 1]
        assert scores["any_alias"][protocol]["portability"]["p"] == [1, 1, 1]
        assert scores["all_groups"][protocol]["portability"]["p"] == [1, 0, 1]


def test_drift_top_k_is_a_close_lower_bound(world_model, word_tok, records):
    exact, coarse, full = (make(world_model, word_tok, records, drift_top_k=k) for k in (None, 8, len(word_tok)))
    references = [evaluator.predict() for evaluator in (exact, coarse, full)]
    partly_edited(world_model, word_tok)
    exact_kl, coarse_kl, full_kl = (
        evaluator.evaluate(reference).metrics["drift/text_kl"]
        for evaluator, reference in zip((exact, coarse, full), references, strict=True)
    )
    assert 0.5 * exact_kl < coarse_kl <= exact_kl * 1.001
    assert full_kl == pytest.approx(exact_kl, rel=1e-3)


def test_drift_equals_the_definition(world_model, oracle_model, word_tok, records):
    evaluator = make(world_model, word_tok, records, drift_texts=TEXTS[:1])
    before = evaluator.predict()
    measured = make(oracle_model, word_tok, records, drift_texts=TEXTS[:1]).evaluate(before).metrics["drift/text_kl"]
    ids = word_tok(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        log_p, log_q = (m(**ids).logits[0, :-1].double().log_softmax(-1) for m in (world_model, oracle_model))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert measured == pytest.approx(float(expected), rel=1e-2)


def test_long_drift_texts_are_scored_in_windows(world_model, word_tok, records):
    long = " ".join(["Ada likes milk"] * 60)
    evaluator = make(world_model, word_tok, records, drift_texts=[long, TEXTS[0]])
    report = evaluator.evaluate(evaluator.predict())
    # 180 words in windows of 127 after BOS: every word of a window is predicted, from BOS on.
    assert report.drift["text_kl"]["weights"] == [180, 4]
    assert report.metrics["drift/text_kl"] == 0


def test_fluency_reports_both_stages(world_model, word_tok, records):
    evaluator = make(world_model, word_tok, records, fluency_tokens=12)
    metrics = evaluator.evaluate(evaluator.predict()).metrics
    assert metrics["fluency/ngram_entropy"] == metrics["before/fluency/ngram_entropy"] >= 0


def test_training_mode_is_given_back(world_model, word_tok, records):
    world_model.train()
    world_model.model.norm.eval()
    make(world_model, word_tok, records).predict()
    assert world_model.training and not world_model.model.norm.training


def test_sampling_configuration_of_the_model_is_ignored(world_model, word_tok, records):
    expected = make(world_model, word_tok, records).predict().generated
    world_model.generation_config.do_sample = True
    world_model.generation_config.temperature = 5.0
    world_model.generation_config.repetition_penalty = 3.0
    assert make(world_model, word_tok, records).predict().generated == expected


def test_stop_string_inside_an_answer_does_not_end_it(world_model, word_tok):
    row = {"prompt": "Ada lives in", "target_new": "Port Rorek Bay"}
    evaluator = make(world_model, word_tok, [row], stop_strings=("Rorek", "Lomak"))
    report = evaluator.evaluate(evaluator.predict())
    assert report.metrics["reliability/generate_exact"] == 1.0


def test_prompt_mask_reaches_the_model(world_model, word_tok, records):
    masks = []

    class Masked(type(world_model)):
        def forward(self, input_ids, attention_mask=None, logits_to_keep=0, read_mask=None, **kwargs):
            if read_mask is not None:
                masks.append((read_mask, attention_mask))
            return super().forward(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **kwargs)

    world_model.__class__ = Masked
    make(world_model, word_tok, records[:1], prompt_mask_argument="read_mask", batch_size=2).predict()
    assert masks and all(read.dtype == torch.bool and read.shape == mask.shape for read, mask in masks)
    assert all((read <= mask.bool()).all() and read.any(dim=1).all() for read, mask in masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ("token_em",)}, "protocols="),
        ({"protocols": ()}, "protocols="),
        ({"answer_policy": "best"}, "answer_policy="),
        ({"judge": None}, "generate_judge"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2}, "raise max_new_tokens"),
        ({"max_new_tokens": 200}, "do not fit into the context of 128"),
        ({"fluency_tokens": 126}, "do not fit into the context of 128"),
        ({"stop_strings": ("",)}, "empty string"),
        ({"separator": "\n"}, "separator="),
        ({"drift_texts": [""]}, "drift_texts"),
    ],
)
def test_refuses_settings_that_cannot_work(world_model, word_tok, records, options, message):
    with pytest.raises(ValueError, match=message):
        make(world_model, word_tok, records, **{"stop_strings": (".", "\n"), **options})


def test_refuses_a_missing_or_foreign_reference(world_model, word_tok, records):
    evaluator = make(world_model, word_tok, records)
    with pytest.raises(ValueError, match="needs a PeftModel"):
        evaluator.evaluate()
    with pytest.raises(ValueError, match="other records or settings"):
        evaluator.evaluate(make(world_model, word_tok, records, separator="").predict())
    with pytest.raises(ValueError, match="lacks the records"):
        evaluator.evaluate(evaluator.predict([records[0].id]))
    with pytest.raises(ValueError, match="no reference for drift"):
        evaluator.evaluate(evaluator.predict(drift=False))
    with pytest.raises(ValueError, match="not among"):
        evaluator.predict(["nobody"])


def test_refuses_a_reference_on_other_texts(world_model, word_tok, records):
    with pytest.raises(ValueError, match="other records or settings"):
        make(world_model, word_tok, records).evaluate(make(world_model, word_tok, records, drift_texts=None).predict())


def test_first_policy_asks_the_judge_once(world_model, word_tok, records):
    asked = []
    row = {"prompt": "Ada likes", "target_new": "milk"}
    row["portability"] = {"p": [{"prompt": "Bo likes", "ground_truth": [["tea", "milk"], ["Lomak"]]}]}
    options = {"answer_policy": "first", "judge": lambda *question: asked.append(question) or 1}
    evaluator = make(world_model, word_tok, [row], **options)
    evaluator.evaluate(evaluator.predict())
    assert {answer for prompt, answer, _ in asked if prompt == "Bo likes"} == {"tea"}


def test_the_head_sees_only_the_positions_it_needs(world_model, word_tok, records):
    rows = []
    world_model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:2].numel()))
    options = {"protocols": ("teacher_forced_token",), "judge": None, "drift_texts": None, "locality_drift": False}
    evaluator = make(world_model, word_tok, records, batch_size=1, **options)
    evaluator.predict()
    distinct = {pair for groups in evaluator._pairs.values() for group in groups for pair in group}
    assert sum(rows) == sum(len(answer) for _, answer in distinct)
    # A batch shares the union of its rows' positions: more than the answers, less than everything.
    rows.clear()
    make(world_model, word_tok, records, batch_size=8, **options).predict()
    assert sum(rows) < sum(len(prompt) + len(answer) for prompt, answer in distinct)


def test_quantised_model(world_model, word_tok, records, tmp_path):
    world_model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    evaluator = make(model, word_tok, records)
    metrics = evaluator.evaluate(evaluator.predict()).metrics
    assert metrics["locality/generate_exact"] == 1.0 and metrics["drift/text_kl"] < 1e-6


def test_refuses_a_judge_out_of_range(world_model, word_tok, records):
    evaluator = make(world_model, word_tok, records, judge=lambda prompt, answer, prediction: 7)
    with pytest.raises(ValueError, match="judge returned 7"):
        evaluator.evaluate(evaluator.predict())


def test_refuses_a_prompt_longer_than_the_context(world_model, word_tok):
    record = EditRecord(prompt=" ".join(PEOPLE * 20), target_new="tea")
    with pytest.raises(ValueError, match="do not fit into the context"):
        make(world_model, word_tok, [record], protocols=("teacher_forced_token",), judge=None)


def test_chat_template_wraps_locality_too(world_model, word_tok, records):
    tokenizer = copy.deepcopy(word_tok)
    tokenizer.chat_template = "{% for m in messages %}<bos> the {{ m['content'] }} {% endfor %}is "
    evaluator = make(world_model, tokenizer, records, chat_template=True)
    ids = evaluator._encoder.pair("Ada lives in", "Lomak")
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["<bos>", "the", "Ada", "lives", "in", "is"]
    assert tokenizer.convert_ids_to_tokens(ids[1]) == ["Lomak"]
    assert evaluator.evaluate(evaluator.predict()).metrics["locality/generate_exact"] == 1.0


def test_records_may_be_dataclasses_dicts_or_a_dataset(world_model, word_tok, records):
    from datasets import Dataset

    rows = [record.to_dict() for record in records]
    for source in (records, rows, Dataset.from_list(rows)):
        assert make(world_model, word_tok, source).records == records
    assert dataclasses.is_dataclass(records[0])
