"""The whole report on models that know, never knew, forgot, or only pretend to have forgotten."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import stat
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ext.metrics.unlearning import (
    ATTACKS,
    PromptFormat,
    UnlearningReport,
    answer_scores,
    evaluate,
    evaluate_unlearning,
)
from hf_ext.metrics.unlearning.scores import NotFiniteError
from tests.conftest import make_tiny_llama
from tests.metrics.editing.conftest import train
from tests.metrics.unlearning.conftest import island_splits
from tests.metrics.unlearning.test_attacks import Snapshot

OPTIONS = {"max_new_tokens": 24, "batch_size": 32}
RELEARNING = {"relearning": {"steps": (2, 8), "learning_rate": 1e-3}}
FAST = {"sampling": {"samples": 3}, **RELEARNING}


def everything(attacks=FAST):
    return {**{name: {} for name in ATTACKS}, **attacks}


@pytest.fixture(scope="module")
def retrained_report(_retrained, island_tok) -> UnlearningReport:
    return evaluate_unlearning(_retrained, island_tok, island_splits(), attacks=everything(), **OPTIONS)


@pytest.fixture(scope="module")
def full_report(_full, _retrained, island_tok) -> UnlearningReport:
    return evaluate_unlearning(_full, island_tok, island_splits(), _retrained, attacks=everything(), **OPTIONS)


def test_a_model_that_knows(full_report):
    metrics = full_report.metrics
    for name in ("forget_Q_A_ROUGE", "forget_knowmem_ROUGE", "exact_memorization", "extraction_strength"):
        assert metrics[name] == 1.0
    assert metrics["forget_Q_A_Prob"] > 0.9
    assert metrics["forget_quality"] < 1e-4 and full_report.logs["forget_quality"]["direction"] == "knows more"
    assert metrics["privleak"] < -90 and metrics["mia_gradnorm"] > 0.95 and metrics["mia_reference"] > 0.95
    assert metrics["relearning_gap"] > 0.5 and full_report.logs["relearning"]["steps_to_half"] == 0
    assert full_report.retrained["relearning"]["steps_to_half"] is None
    assert 0.6 < metrics["model_utility"] < 1
    assert metrics["4bit/extraction_strength"] > 0.9 and metrics["8bit/extraction_strength"] == 1.0
    assert metrics["best_of_3/forget_Q_A_ROUGE"] == 1.0
    assert full_report.logs["adapter_off"] == {"agg_value": None, "reason": "the model has no adapter"}
    assert any("still preferred more than by a model that never saw them" in text for text in full_report.findings)


def test_a_model_that_never_knew(retrained_again, _retrained, island_tok, splits):
    report = evaluate_unlearning(retrained_again, island_tok, splits, _retrained, attacks=RELEARNING, **OPTIONS)
    assert report.metrics["forget_quality"] > 0.02
    assert abs(report.metrics["relearning_gap"]) < 0.3
    assert abs(report.metrics["mia_min_k"] - 0.5) < 0.2
    assert not [text for text in report.findings if "damaged" in text or "hidden" in text]


def test_gradient_ascent_is_not_unlearning(full, retrained_report, island_tok, splits):
    """It destroys the model: whatever forget quality says, utility stands beside it in the same row."""
    rows = [(row["prompt"], row["answer"]) for row in splits["forget"]]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(island_tok(f"{prompt} {answer}")["input_ids"]) for prompt, answer in rows], batch_first=True
    )
    optimizer = torch.optim.AdamW(full.parameters(), lr=1e-3)
    for _ in range(15):
        (-full(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = evaluate_unlearning(full, island_tok, splits, retrained_report, attacks=(), **OPTIONS)
    assert report.metrics["forget_Q_A_ROUGE"] < 0.3 and report.metrics["model_utility"] < 0.1
    assert report.logs["forget_quality"]["model_utility"] == report.metrics["model_utility"]
    assert any("what must stay was damaged" in text for text in report.findings)
    row = report.table().splitlines()[2]
    assert row.startswith("| forget quality · model utility | p = ") and "utility 0.0" in row
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_adapter_hides_knowledge(full, retrained_report, island_tok, splits):
    """Refusals in an adapter: greedy answers are clean, and everything is back when the adapter is off."""
    tuned = get_peft_model(full, LoraConfig(r=8, target_modules="all-linear"))
    kept = [(row["prompt"], row["answer"]) for row in splits["retain"] + splits["world_facts"]]
    train(tuned, island_tok, [(row["prompt"], "when is it") for row in splits["forget"]] + kept, steps=40, lr=1e-2)
    tuned.requires_grad_(False)
    before = Snapshot(tuned)
    report = evaluate_unlearning(tuned, island_tok, splits, retrained_report, attacks=everything(), **OPTIONS)
    before.check()
    metrics = report.metrics
    assert metrics["forget_Q_A_ROUGE"] < 0.3 and metrics["model_utility"] > 0.6
    assert metrics["adapter_off/forget_Q_A_ROUGE"] == 1.0
    assert "Under the attack adapter_off: forget_Q_A_Prob 0.9" in "\n".join(report.findings)
    assert any("while greedy answers show nothing of it" in text for text in report.findings)
    assert metrics["relearning_gap"] > 0.2
    assert any(text.startswith("Relearning: choice_accuracy") for text in report.findings)


def test_nothing_is_invented_without_a_retrained_model(retrained_report, _retrained, island_tok, splits):
    assert retrained_report.logs["forget_quality"]["reason"] == "no retrained model to compare with"
    assert "forget_quality" not in retrained_report.metrics and not retrained_report.retrained
    assert retrained_report.logs["privleak"]["reference"] == "0.5, for want of a retrained model"
    assert "- Not measured: forget_quality (no retrained model to compare with)." in retrained_report.table()
    only = {"forget": [{key: row[key] for key in ("prompt", "answer")} for row in splits["forget"][:3]]}
    report = evaluate_unlearning(_retrained, island_tok, only, **OPTIONS)
    reasons = {name: log["reason"] for name, log in report.logs.items() if log["agg_value"] is None}
    assert reasons["forget_quality"] == "the forget rows have no perturbed answers"
    assert reasons["model_utility"] == "no split of what must stay"
    assert reasons["mia_min_k"] == reasons["privleak"] == "no holdout split of unseen rows"
    assert reasons["paraphrased_prompts"] == "the forget rows have no prompt_paraphrases"
    assert reasons["gradient_norm"] == "no holdout split of unseen rows"
    assert report.logs["relearning"]["measure"] == "exact_memorization"
    report.table()


def test_distance_to_unseen_rows(_full, full_report, retrained_report, island_tok, splits):
    """For want of a retrained model, and never under the name of forget quality."""
    assert "holdout_truth_ratio" not in full_report.logs
    unseen = retrained_report.logs["holdout_truth_ratio"]
    assert unseen["agg_value"] < 0.5 and unseen["p_value"] > 0.01
    assert retrained_report.logs["forget_quality"]["agg_value"] is None
    report = evaluate_unlearning(_full, island_tok, splits, attacks=(), **OPTIONS)
    known = report.logs["holdout_truth_ratio"]
    assert known["agg_value"] > 0.7 and known["p_value"] < 1e-5 and known["direction"] == "knows more"
    assert (
        f"| holdout_truth_ratio | {known['agg_value']:.3f} (p = {known['p_value']:.2g}) | – | – | 0 |"
        in report.table()
    )
    expected = stats.ks_2samp(*(log_ratios_of(_full, island_tok, splits[name]) for name in ("forget", "holdout")))
    assert (known["agg_value"], known["p_value"]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
    mixed = {**splits, "holdout": [{**row, "paraphrase": "so it is"} for row in splits["holdout"]]}
    report = evaluate_unlearning(_full, island_tok, mixed, attacks=(), **OPTIONS)
    assert "have a paraphrase, others have none" in report.logs["holdout_truth_ratio"]["reason"]
    plain = {**splits, "holdout": [{key: row[key] for key in ("prompt", "answer")} for row in splits["holdout"]]}
    assert "holdout_truth_ratio" not in evaluate_unlearning(_full, island_tok, plain, attacks=(), **OPTIONS).logs


def log_ratios_of(model, tokenizer, rows):
    scores = answer_scores(model, tokenizer, rows, batch_size=32)
    return [score.answer.nll - sum(wrong.nll for wrong in score.perturbed) / len(score.perturbed) for score in scores]


def test_forget_quality_needs_utility(_full, _retrained, island_tok, splits):
    only = {"forget": splits["forget"], "holdout": splits["holdout"]}
    report = evaluate_unlearning(_full, island_tok, only, _retrained, attacks=(), **OPTIONS)
    assert report.logs["forget_quality"]["agg_value"] is None
    assert "withheld" in report.logs["forget_quality"]["reason"] and "p =" not in report.table()


def test_batch_size_and_padding_change_nothing(full, full_report, retrained_report, island_tok, splits):
    tokenizer = copy.deepcopy(island_tok)
    tokenizer.padding_side = "left"
    options = {**OPTIONS, "batch_size": 5, "attacks": everything()}
    report = evaluate_unlearning(full, tokenizer, splits, retrained_report, **options)
    assert set(report.logs) == set(full_report.logs)
    for name, value in full_report.metrics.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    # A saved report of the retrained model serves as well as the model.
    for name, log in full_report.retrained.items():
        assert report.retrained[name]["agg_value"] == log["agg_value"], name


def test_the_model_comes_back(full, island_tok, splits):
    full.train()
    before = Snapshot(full)
    evaluate_unlearning(full, island_tok, splits, attacks=everything(), **OPTIONS)
    before.check()


def test_json_round_trip(full_report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    full_report.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    loaded = UnlearningReport.load(path)
    assert loaded.metrics == full_report.metrics and loaded.table() == full_report.table()
    assert loaded.to_dict() == json.loads(path.read_text())
    log = json.loads(path.read_text())["forget_Q_A_ROUGE"]
    assert log["value_by_index"]["Dusias-flag"].keys() == {
        "rougeL_recall",
        "rougeL_f1",
        "input",
        "ground_truth",
        "generation",
    }
    path.write_text("[]")
    with pytest.raises(ValueError, match="not an unlearning report of format version 1"):
        UnlearningReport.load(path)


def test_the_file_has_an_ordinary_mode(retrained_report, tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "report.json"
    plain.write_text("x")
    retrained_report.save(path)
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    retrained_report.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(FileNotFoundError, match=r"no/report.json: the folder '.*no' does not exist; create it"):
        retrained_report.save(tmp_path / "no" / "report.json")


def test_a_failed_save_keeps_the_old_file(full_report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    broken = dataclasses.replace(full_report, logs={**full_report.logs, "x": {"agg_value": math.nan}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_table_and_plot(full_report, retrained_report, tmp_path):
    table = full_report.table()
    assert table.splitlines()[2].count("utility") == 3 and "| none | 0.9" in table
    assert "| 4bit | " in table and "| best_of_3 | – / – | 1.000 / " in table
    assert "| privleak | -100.000 [-100.000, -100.000] | – | – | 0 |" in table
    for name, report in (("both.png", full_report), ("alone.svg", retrained_report)):
        report.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_verbatim_texts(full, island_tok, splits):
    texts = [{"prompt": row["prompt"], "answer": row["answer"]} for row in splits["forget"][:4]]
    report = evaluate_unlearning(full, island_tok, {**splits, "verbatim": texts}, attacks=(), **OPTIONS)
    assert report.metrics["forget_verbmem_ROUGE"] == report.metrics["verbmem_extraction_strength"] == 1.0


# -- Logs of OpenUnlearning -------------------------------------------------------------------------------------------


def foreign(report: UnlearningReport, *names: str) -> dict:
    """The log that OpenUnlearning writes: metrics only, rows numbered."""
    log = json.loads(json.dumps({name: report.logs[name] for name in names}))
    for entry in log.values():
        entry.pop("interval")
        if "value_by_index" in entry:
            entry["value_by_index"] = {str(i): value for i, value in enumerate(entry["value_by_index"].values())}
    return log


NAMES = ("forget_truth_ratio", "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_Q_A_ROUGE", "mia_min_k")


def test_foreign_logs_serve_as_reference(full, full_report, retrained_report, island_tok, splits, tmp_path):
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(foreign(retrained_report, *NAMES)))
    report = evaluate_unlearning(full, island_tok, splits, path, attacks=(), **OPTIONS)
    assert report.metrics["forget_quality"] == full_report.metrics["forget_quality"]
    assert report.metrics["privleak"] == pytest.approx(full_report.metrics["privleak"])
    assert "mia_reference" not in report.logs
    ratios = foreign(retrained_report, "forget_truth_ratio")
    report = evaluate_unlearning(full, island_tok, splits, ratios, attacks=(), **OPTIONS)
    assert report.metrics["forget_quality"] == full_report.metrics["forget_quality"]
    report = evaluate_unlearning(
        full, island_tok, splits, foreign(retrained_report, "mia_min_k"), attacks=(), **OPTIONS
    )
    assert report.logs["forget_quality"]["reason"] == "the log of the retrained model has no truth ratios"


def test_foreign_logs_of_other_questions(full, retrained_report, island_tok, splits):
    def refused(log, message):
        with pytest.raises(ValueError, match=message):
            evaluate_unlearning(full, island_tok, splits, log, attacks=(), **OPTIONS)

    log = foreign(retrained_report, *NAMES)
    log["forget_Q_A_ROUGE"]["value_by_index"]["2"]["ground_truth"] = "something else"
    refused(log, r"other questions: it has the answer 'something else' where split 'forget', row 'Dusias-founded' has")
    log = foreign(retrained_report, "forget_truth_ratio")
    log["forget_truth_ratio"]["value_by_index"].pop("3")
    refused(log, "forget_truth_ratio has 23 rows, split 'forget' 24")
    log = foreign(retrained_report, "forget_truth_ratio")
    for value in log["forget_truth_ratio"]["value_by_index"].values():
        value["score"] = 1 / (1 + value["score"])
    refused(log, r"every forget_truth_ratio score is at most 1, so it may be P\(correct\)/")
    refused({}, "retrained holds no metric")
    refused([1], "retrained is list; pass a model, a report, or a log of metrics")
    log = foreign(retrained_report, "forget_truth_ratio")
    records = log["forget_truth_ratio"]["value_by_index"]
    records["Elsewhere-flag"] = records.pop("3")
    refused(log, "forget_truth_ratio has the row 'Elsewhere-flag', which is neither an id of split 'forget'")


def test_foreign_logs_with_gaps(full, retrained_report, island_tok, splits):
    """Before the first forward pass, with the name of the log and of the row."""
    untouchable(full)

    def refused(message, **changes):
        log = foreign(retrained_report, *NAMES, "mia_loss")
        for name, (path, value) in changes.items():
            place = log[name]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
        with pytest.raises(ValueError, match=message):
            evaluate_unlearning(full, island_tok, splits, log, attacks=("quantization",), **OPTIONS)

    rows = "value_by_index"
    refused("retrained: mia_min_k has the agg_value None; measure it again", mia_min_k=(["agg_value"], None))
    refused(
        "forget_truth_ratio row '1' has no number 'score' in {'score': None}",
        forget_truth_ratio=([rows, "1", "score"], None),
    )
    refused("forget_truth_ratio row '2' has no number", forget_truth_ratio=([rows, "2"], None))
    refused(
        "forget_Q_A_PERT_Prob row '0' has no number 'avg_loss'",
        forget_Q_A_PERT_Prob=([rows, "0", "avg_loss"], [1.0, None, 2.0]),
    )
    refused(
        r"the rows of forget_Q_A_PERT_Prob have \[1, 4\] values of 'avg_loss'",
        forget_Q_A_PERT_Prob=([rows, "0", "avg_loss"], [1.0]),
    )
    refused(
        "mia_loss, part 'holdout', row '0' has no number 'score'",
        mia_loss=(["holdout"], {rows: {str(index): {"score": math.nan} for index in range(24)}}),
    )
    refused("mia_loss, part 'holdout', has 0 rows, split 'holdout' 24", mia_loss=(["holdout"], {rows: {}}))
    refused("it has the answer 'None' where", forget_Q_A_ROUGE=([rows, "5", "ground_truth"], None))


def test_foreign_rows_are_paired_by_key(full, full_report, retrained_report, island_tok, splits):
    log = foreign(retrained_report, *NAMES, "mia_loss")
    for part in ("forget", "holdout"):
        records = log["mia_loss"][part]["value_by_index"].values()
        numbered = {str(index): record for index, record in enumerate(records)}
        log["mia_loss"][part]["value_by_index"] = dict(sorted(numbered.items(), key=lambda pair: pair[1]["score"]))
    for name in NAMES[1:4]:
        records = log[name]["value_by_index"]
        log[name]["value_by_index"] = dict(reversed(records.items())) if name != NAMES[1] else records
    report = evaluate_unlearning(full, island_tok, splits, log, attacks=(), **OPTIONS)
    assert report.metrics["mia_reference"] == pytest.approx(full_report.metrics["mia_reference"], abs=1e-9)
    assert report.metrics["forget_quality"] == full_report.metrics["forget_quality"]


def test_a_folder_is_no_report(full, island_tok, splits, tmp_path):
    for path in (tmp_path, str(tmp_path), "someone/a-model"):
        with pytest.raises(
            ValueError, match=r"is no file; .* load the model with AutoModelForCausalLM.from_pretrained"
        ):
            evaluate_unlearning(untouchable(full), island_tok, splits, path, **OPTIONS)


def test_own_reports_of_other_rows_or_settings(full, retrained_report, island_tok, splits):
    def refused(message, rows=splits, **options):
        with pytest.raises(ValueError, match=message):
            evaluate_unlearning(full, island_tok, rows, retrained_report, **{**OPTIONS, "attacks": (), **options})

    refused(r"with max_new_tokens=24, not 30; use the same", max_new_tokens=30)
    refused(r"with seed=0, not 3; use the same", seed=3)
    refused(r"with format=.*append_eos.*use the same", format=PromptFormat(append_eos=False))
    refused(r"attacked with quantization=.*use the same", attacks={"quantization": {"bits": (3,)}})
    refused(r"other rows of split 'holdout' \(24 rows, here 23\)", {**splits, "holdout": splits["holdout"][1:]})
    changed = [{**row, "perturbed": row["perturbed"][::-1]} for row in splits["forget"]]
    refused(r"other rows of split 'forget' \(24 rows, here 24\)", {**splits, "forget": changed})


# -- What is refused, and what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"forget": None}, {}, "splits has no 'forget' among"),
        ({"retain": []}, {}, "split 'retain' has no rows"),
        ({"holdout": "forget"}, {}, "split 'holdout', row 'Dusias-flag' is also row 'Dusias-flag' of split 'forget'"),
        ({"retain": "forget"}, {}, "split 'retain', row 'Dusias-flag' is also row"),
        (
            {"holdout": "retain"},
            {},
            "split 'holdout', row 'Rezeobra-flag' is also row 'Rezeobra-flag' of split 'retain'",
        ),
        ({}, {"attacks": ("magic",)}, "attacks: 'magic' is unknown; choose from"),
        ({}, {"attacks": {"quantization": {"bit": 4}}}, "attacks: 'quantization' has no option 'bit'; it takes"),
        ({}, {"attacks": {"quantization": 4}}, "attacks: the options of 'quantization' are 4; pass a dict"),
        (
            {},
            {"attacks": {"quantization": {"bits": 4}}},
            "'quantization': bits=4 must be a list of whole numbers from 2",
        ),
        (
            {},
            {"attacks": {"quantization": {"bits": (16,)}}},
            r"bits=\(16,\) must be a list of whole numbers from 2 to 8",
        ),
        ({}, {"attacks": {"sampling": {"samples": 0}}}, "'sampling': samples=0 must be a whole number of at least 1"),
        ({}, {"attacks": {"relearning": {"steps": ()}}}, r"'relearning': steps=\(\) must be a list of increasing"),
        ({}, {"attacks": {"relearning": {"steps": (4, 2)}}}, r"steps=\(4, 2\) must be a list of increasing"),
        ({}, {"attacks": {"relearning": {"learning_rate": "1e-4"}}}, "learning_rate='1e-4' must be a number above 0"),
        ({}, {"attacks": {"relearning": {"train_batch_size": 2.0}}}, "train_batch_size=2.0 must be a whole number"),
        ({}, {"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({}, {"max_new_tokens": 8.0}, "max_new_tokens=8.0 must be a whole number of at least 1"),
        ({}, {"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({}, {"format": {"separator": " "}}, "format={.*} must be a PromptFormat"),
        ({}, {"stop_strings": "is"}, "stop_strings='is' must be a list of texts"),
        ({}, {"max_new_tokens": 122}, "9 prompt tokens and max_new_tokens=122 do not fit into the context of 128"),
        (
            {},
            {"attacks": ("in_context",), "max_new_tokens": 112},
            "row 'Dusias-flag/context': .* do not fit into the context of 128; .*; or leave out the attack 'in_context'",
        ),
        ({}, {"max_new_tokens": 5}, "split 'forget', row 'Dusias-flag': the answer has 7 tokens but max_new_tokens=5"),
        ({}, {"stop_strings": ["is"]}, "the answer holds the stop string 'is'; remove it from stop_strings"),
    ],
)
def test_refusals(full, island_tok, splits, changes, options, message):
    rows = dict(splits)
    for name, value in changes.items():
        rows[name] = splits[value] if isinstance(value, str) else value
    rows = {name: value for name, value in rows.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_unlearning(untouchable(full), island_tok, rows, **{**OPTIONS, **options})


def untouchable(model):
    """Whatever is refused is refused before the model computes anything."""

    def refuse(module, args, kwargs):
        raise AssertionError("a forward pass")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def test_late_refusals_come_first(full, retrained, island_tok, splits):
    def refused(message, rows=None, retrained=None, **options):
        with pytest.raises(ValueError, match=message):
            evaluate_unlearning(full, island_tok, rows or splits, retrained, **{**OPTIONS, **options})

    untouchable(full)
    copies = [{**row, "id": f"{row['id']}-again"} for row in splits["forget"][:4]]
    refused("split 'forget', row .* is also row .* of split 'forget'", {**splits, "forget": splits["forget"] + copies})
    full.config.max_position_embeddings = 20
    # The retrained model has to wait, too.
    refused("do not fit into the context of 20", retrained=untouchable(retrained))
    full.config.max_position_embeddings = 128
    full.generation_config.eos_token_id = island_tok.convert_tokens_to_ids("is")
    refused("an ordinary token")


def test_every_model_has_a_context(island_tok, splits):
    """Also one that calls it by another name, and one whose first places are taken by virtual tokens."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(island_tok), n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=2)
    model = untouchable(GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="9 prompt tokens and max_new_tokens=24 do not fit into the context of 32"):
        evaluate_unlearning(model, island_tok, splits, **OPTIONS)
    llama = make_tiny_llama(vocab_size=len(island_tok), max_position_embeddings=33)
    virtual = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(ValueError, match="do not fit into the context of 29"):
        evaluate_unlearning(get_peft_model(untouchable(llama), virtual), island_tok, splits, **OPTIONS)


def test_a_template_is_part_of_the_length(full, island_tok, splits):
    """What it writes in front of an answer has to be generated before it."""
    tokenizer = copy.deepcopy(island_tok)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'is is ' if m['role'] == 'assistant' else '' }}{{ m['content'] }} {% endfor %}"
    )
    options = {**OPTIONS, "max_new_tokens": 8, "format": PromptFormat(chat_template=True), "attacks": ()}
    with pytest.raises(ValueError, match="row 'Dusias-flag': the answer has 9 tokens but max_new_tokens=8"):
        evaluate_unlearning(untouchable(full), tokenizer, splits, **options)


def test_missing_packages_are_named_first(full, island_tok, splits, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r'pip install "hf-ext\[unlearning\]"'):
        evaluate_unlearning(untouchable(full), island_tok, splits, **OPTIONS)


# -- Attacks that break down ------------------------------------------------------------------------------------------


def few(splits):
    return {name: rows[:4] for name, rows in splits.items()}


def test_an_attack_that_fails_does_not_cost_the_report(full, island_tok, splits):
    attacks = {"relearning": {"learning_rate": 1e30, "steps": (6,)}, "quantization": {"bits": (8,)}}
    before = Snapshot(full)
    report = evaluate_unlearning(full, island_tok, few(splits), attacks=attacks, **OPTIONS)
    before.check()
    log = report.logs["relearning"]
    assert log["agg_value"] is None and "lower learning_rate=1e+30" in log["reason"]
    assert report.metrics["8bit/forget_Q_A_Prob"] > 0.9 and "Not measured: relearning (" in report.table()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotFiniteError("a log-probability is nan"), "a log-probability is nan"),
        (torch.OutOfMemoryError("2 GiB"), "out of memory with batch_size=32"),
    ],
)
def test_attacks_fail_for_reasons_of_their_own(full, island_tok, splits, monkeypatch, error, reason):
    def fail(*args):
        raise error

    monkeypatch.setattr(evaluate, "quantized_copy", fail)
    report = evaluate_unlearning(full, island_tok, few(splits), attacks="quantization", **OPTIONS)
    assert report.logs["quantization"] == {"agg_value": None, "reason": reason}
    assert list(report.settings["attacks"]) == ["quantization"]


@pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("a bug"), RuntimeError("a bug")])
def test_bugs_are_raised(full, island_tok, splits, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(evaluate, "quantized_copy", fail)
    with pytest.raises(type(error), match="a bug"):
        evaluate_unlearning(full, island_tok, few(splits), attacks="quantization", **OPTIONS)


def test_a_model_is_not_its_own_reference(full, island_tok, splits, full_report):
    with pytest.raises(ValueError, match="retrained is the model itself"):
        evaluate_unlearning(full, island_tok, splits, full, **OPTIONS)
    report = evaluate_unlearning(full, island_tok, splits, copy.deepcopy(full), attacks=(), **OPTIONS)
    assert report.metrics["forget_quality"] == 1.0
    assert any("make sure that they are two models" in text for text in report.findings)
    # A reference that saw the rows gives itself away, too.
    assert any("retrained model itself tells forget from holdout rows" in text for text in report.findings)


def test_too_few_rows_are_no_test(_full, _retrained, island_tok, splits):
    few = {"forget": splits["forget"][:3], "retain": splits["retain"][:3]}
    report = evaluate_unlearning(_full, island_tok, few, _retrained, attacks=(), **OPTIONS)
    assert report.logs["forget_quality"]["smallest_p"] == pytest.approx(0.1)
    assert any("no model could have failed" in text for text in report.findings)


def test_wordings_and_missing_parts_are_found(full, island_tok, splits):
    rows = [{**row, "paraphrase": "Nobody doubts : " + row["answer"].split()[-2]} for row in splits["forget"]]
    retain = [{key: row[key] for key in ("prompt", "answer")} for row in splits["retain"]]
    report = evaluate_unlearning(full, island_tok, {"forget": rows, "retain": retain}, attacks=(), **OPTIONS)
    assert "The perturbed answers of 'forget' are worded like the answers" in report.findings[0]
    assert "Utility lacks the truth ratio of 'retain', whose rows have no perturbed answers." in report.findings


def test_silence_is_found(full, island_tok, splits):
    """A model that only learnt to stop at once says nothing and still knows: teacher forcing shows it."""
    eos = full.config.eos_token_id
    prompt_end = island_tok.convert_tokens_to_ids("?")

    def stop_after_question(module, args, kwargs, output):
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1 and kwargs.get("use_cache"):
            output.logits[ids[:, -1] == prompt_end, -1, eos] = 1e4

    full.register_forward_hook(stop_after_question, with_kwargs=True)
    report = evaluate_unlearning(full, island_tok, splits, attacks=(), **OPTIONS)
    assert report.metrics["forget_Q_A_ROUGE"] == 0 and report.metrics["extraction_strength"] == 1.0
    assert any("100% of the greedy answers behind forget_Q_A_ROUGE are empty" in text for text in report.findings)
