"""The whole report on models that know, never knew, forgot, or only pretend to have forgotten."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import stat

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

from hf_ext.metrics.unlearning import UnlearningReport, answer_scores, evaluate, evaluate_unlearning
from hf_ext.metrics.unlearning.scores import NotFiniteError
from tests.metrics.editing.conftest import train
from tests.metrics.unlearning.conftest import OPTIONS, RELEARNING, Snapshot, everything, few


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
    full_report.to_json(path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    loaded = UnlearningReport.from_json(path)
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
        UnlearningReport.from_json(path)


def test_the_file_has_an_ordinary_mode(retrained_report, tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "report.json"
    plain.write_text("x")
    retrained_report.to_json(path)
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    retrained_report.to_json(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(FileNotFoundError, match=r"no/report.json: the folder '.*no' does not exist; create it"):
        retrained_report.to_json(tmp_path / "no" / "report.json")


def test_a_failed_save_keeps_the_old_file(full_report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    broken = dataclasses.replace(full_report, logs={**full_report.logs, "x": {"agg_value": math.nan}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json(path)
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


# -- Attacks that break down ------------------------------------------------------------------------------------------


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


# -- What is found ----------------------------------------------------------------------------------------------------


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
