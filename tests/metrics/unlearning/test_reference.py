"""What a model is compared with: logs of OpenUnlearning, own reports, never the model itself."""

from __future__ import annotations

import copy
import json
import math

import pytest

from hf_ext.metrics.unlearning import PromptFormat, UnlearningReport, evaluate_unlearning
from tests.metrics.unlearning.conftest import OPTIONS, untouchable


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


def test_a_model_is_not_its_own_reference(full, island_tok, splits):
    with pytest.raises(ValueError, match="retrained is the model itself"):
        evaluate_unlearning(full, island_tok, splits, full, **OPTIONS)
    report = evaluate_unlearning(full, island_tok, splits, copy.deepcopy(full), attacks=(), **OPTIONS)
    assert report.metrics["forget_quality"] == 1.0
    assert any("make sure that they are two models" in text for text in report.findings)
    # A reference that saw the rows gives itself away, too.
    assert any("retrained model itself tells forget from holdout rows" in text for text in report.findings)
