"""Logs of metrics, {"agg_value", "value_by_index", ...} as OpenUnlearning writes them, made from scores and texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_ext.metrics.statistics import bootstrap_interval
from hf_ext.metrics.unlearning import measures
from hf_ext.metrics.unlearning.measures import Floats
from hf_ext.metrics.unlearning.relearning import RelearningCurve
from hf_ext.metrics.unlearning.rows import Row
from hf_ext.metrics.unlearning.scores import AnswerScores

Log = dict[str, Any]
Logs = dict[str, Log]


def log_of(values: Iterable[float], ids: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Log:
    """Mean of one value per row, its bootstrap interval, and a record per row."""
    found = [float(value) for value in values]
    return {
        "agg_value": math.fsum(found) / len(found),
        "interval": list(bootstrap_interval(found)),
        "value_by_index": dict(zip(ids, records, strict=True)),
    }


def scored(values: Iterable[float], ids: Sequence[str]) -> Log:
    """`log_of` values that are their own records, under `score`."""
    found = [float(value) for value in values]
    return log_of(found, ids, [{"score": value} for value in found])


def missing(reason: str) -> Log:
    """What could not be measured, and why."""
    return {"agg_value": None, "reason": reason}


def probabilities(ids: Sequence[str], nll: Iterable[float]) -> Log:
    """exp(−NLL) per row."""
    found = [float(value) for value in nll]
    values = measures.probability(found).tolist()
    records = [{"prob": prob, "avg_loss": loss} for prob, loss in zip(values, found, strict=True)]
    return log_of(values, ids, records)


def rouge(rows: Sequence[Row], texts: Sequence[str], score: str) -> Log:
    """ROUGE-L of generated texts; `score` (`"rougeL_recall"` or `"rougeL_f1"`) is the one that is averaged."""
    records: list[dict[str, Any]] = []
    for row, text in zip(rows, texts, strict=True):
        found = measures.rouge_l(text, row.answer)
        record = {"rougeL_recall": found.recall, "rougeL_f1": found.f1}
        records.append({**record, "input": row.prompt_text, "ground_truth": row.answer, "generation": text})
    return log_of([record[score] for record in records], [row.id for row in rows], records)


def reread(log: Log, score: str) -> Log:
    """The same ROUGE-L records with another score averaged."""
    records = log["value_by_index"]
    return log_of([record[score] for record in records.values()], list(records), list(records.values()))


def memorised(ids: Sequence[str], scores: Sequence[AnswerScores]) -> Logs:
    """Exact memorisation and extraction strength, without what closes the answer."""
    hits = [score.answer.content.hits for score in scores]
    return {
        "exact_memorization": scored([measures.exact_memorisation(row) for row in hits], ids),
        "extraction_strength": scored([measures.extraction_strength(row) for row in hits], ids),
    }


def losses(scores: Sequence[AnswerScores]) -> tuple[Floats, Floats]:
    """NLLs of the right answers [n] and of the wrong ones [n, k]."""
    wrong = np.array([[other.nll for other in score.perturbed] for score in scores])
    return np.array([score.correct_nll for score in scores]), wrong


def holdout_distance(rows: Mapping[str, Sequence[Row]], scores: Mapping[str, Sequence[AnswerScores]]) -> Logs:
    """Kolmogorov-Smirnov distance between the truth ratios that one model gives forgotten and unseen rows, if both can.

    It says less than forget quality: the rows differ, and a model that never saw either may find one kind easier.
    """
    splits = ("forget", "holdout")
    if "holdout" not in rows or not all(rows[split][0].perturbed for split in splits):
        return {}
    if len({row.paraphrase is None for split in splits for row in rows[split]}) > 1:
        return {"holdout_truth_ratio": missing("some rows of forget and holdout have a paraphrase, others have none")}
    found = measures.forget_quality(*(measures.log_truth_ratio(*losses(scores[split])) for split in splits))
    direction = {"over-unlearned": "knows less"}.get(found.direction, found.direction)
    return {
        "holdout_truth_ratio": {
            "agg_value": found.statistic,
            "p_value": found.p_value,
            "smallest_p": found.smallest_p,
            "direction": direction,
        }
    }


def attack_scores(row: Row, score: AnswerScores) -> tuple[float, float, float, float]:
    """Loss, zlib, Min-K% and Min-K%++ of one row."""
    answer, content = score.answer, score.answer.content
    # The splits of membership are scored with moments.
    assert content.mean is not None and content.variance is not None
    return (
        answer.nll,
        measures.zlib_score(answer.nll, row.answer),
        measures.min_k(content.log_probs),
        measures.min_k_plus_plus(content.log_probs, content.mean, content.variance),
    )


def auc_log(scores: Mapping[str, Sequence[float]], ids: Mapping[str, Sequence[str]], seed: int) -> Log:
    """AUC of a membership attack from its scores of the splits `forget` and `holdout`."""
    samples = [scores["forget"], scores["holdout"]]
    value = measures.auc(*samples)
    parts = {split: scored(values, ids[split]) for split, values in scores.items()}
    interval = list(measures.auc_interval(*samples, seed=seed))
    return {"agg_value": value, "auc": value, "interval": interval, **parts}


def utility_log(names: Sequence[str], columns: Sequence[Floats], seed: int) -> Log:
    """Model utility of the components `names`; `columns` has one array [rows, components] per split."""
    if not names:
        return missing("no split of what must stay")
    means = np.concatenate([column.mean(axis=0) for column in columns]).tolist()
    return {
        "agg_value": measures.model_utility(means),
        "interval": list(measures.utility_interval(columns, seed=seed)),
        "components": dict(zip(names, means, strict=True)),
    }


def row_values(log: Log) -> Floats:
    """The value of each row that `agg_value` is the mean of."""
    keys = ("score", "prob", "rougeL_recall")
    return np.array([next(record[key] for key in keys if key in record) for record in log["value_by_index"].values()])


def curve_of(log: Log | None) -> RelearningCurve | None:
    """The curve behind a relearning log; None where there is none."""
    points = list((log or {}).get("value_by_index", {}).values())
    if not points:
        return None
    values = {name: tuple(point[name] for point in points) for name in points[0] if name != "steps"}
    return RelearningCurve(tuple(point["steps"] for point in points), values)


def without_rows(log: Log) -> Log:
    """The log without what it holds per row."""
    return {name: value for name, value in log.items() if name not in ("value_by_index", "forget", "holdout")}


def log_ratios(logs: Logs) -> Floats:
    """log R per forget row: from the losses if they are logged, else from the ratios; empty without either."""
    correct, wrong, ratios = (
        logs.get(name, {}).get("value_by_index", {}).values()
        for name in ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio")
    )
    if correct and wrong:
        return measures.log_truth_ratio([record["avg_loss"] for record in correct], [r["avg_loss"] for r in wrong])
    scores = np.array([record["score"] for record in ratios], dtype=np.float64)
    return np.log(np.maximum(scores, np.finfo(np.float64).tiny))
