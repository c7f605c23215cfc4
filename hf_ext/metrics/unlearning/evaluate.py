"""`evaluate_unlearning`: is it forgotten, is the rest intact, and does it come back?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext._lazy import optional_import
from hf_ext.metrics.editing.checks import context_length
from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.unlearning import measures
from hf_ext.metrics.unlearning.attacks import (
    AttackFailed,
    AttackUnavailable,
    Model,
    gradient_norms,
    in_context,
    paraphrased,
    quantized_copy,
    without_adapter,
)
from hf_ext.metrics.unlearning.compare import compare, findings_of, wording_findings
from hf_ext.metrics.unlearning.generation import check_end_tokens, greedy_answers, sampled_answers
from hf_ext.metrics.unlearning.logs import (
    Log,
    Logs,
    attack_scores,
    auc_log,
    holdout_distance,
    log_of,
    log_ratios,
    losses,
    memorised,
    missing,
    probabilities,
    reread,
    rouge,
    row_values,
    scored,
    utility_log,
    without_rows,
)
from hf_ext.metrics.unlearning.measures import Floats
from hf_ext.metrics.unlearning.options import ATTACKS, check_arguments, read_attacks
from hf_ext.metrics.unlearning.reference import read_reference
from hf_ext.metrics.unlearning.relearning import relearning_curve
from hf_ext.metrics.unlearning.report import UnlearningReport
from hf_ext.metrics.unlearning.rows import Row, digest, read_rows, refuse_overlap
from hf_ext.metrics.unlearning.scores import (
    AnswerScores,
    NotFiniteError,
    PromptFormat,
    RowEncoder,
    encoded_answers,
    score_rows,
)

# Splits with a role of their own; every other one holds knowledge that must stay.
_SPECIAL = ("forget", "holdout", "verbatim")
_PREFIXES = {"real_authors": "ra", "world_facts": "wf"}


def evaluate_unlearning(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Iterable[Mapping[str, Any] | Row]],
    retrained: Model | UnlearningReport | Mapping[str, Any] | str | Path | None = None,
    *,
    attacks: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = tuple(ATTACKS),
    batch_size: int = 8,
    seed: int = 0,
    max_new_tokens: int = 128,
    stop_strings: Sequence[str] = (),
    format: PromptFormat | None = None,
) -> UnlearningReport:
    """Measures forgetting, utility, memorisation and privacy of an unlearned model, and attacks it.

    Everything that is given is checked before the first forward pass. An attack that breaks down is reported as not
    measured, with the reason, and does not cost the rest.

    Args:
        model: causal language model, plain or with adapters; left bit for bit as it is.
        tokenizer: its tokenizer.
        splits: name -> rows, dicts with `prompt` and `answer` and optionally `id`, `paraphrase`, `perturbed` (wrong
            answers), `prompt_paraphrases` and `context`. `"forget"` is required; `"holdout"` holds rows of the same
            kind that no model has seen; `"verbatim"` holds prefixes and continuations of forgotten texts; every other
            split (`"retain"`, `"real_authors"`, `"world_facts"`, …) holds what must stay.
        retrained: a model trained without the forget rows, a report of one, or a log file of OpenUnlearning for the
            same questions. Without it there is no forget quality.
        attacks: a name or names from `ATTACKS`, or names with options, e.g. `{"quantization": {"bits": (4,)}}`. All by
            default.
        batch_size: sequences per forward pass; changes speed only.
        seed: of sampling and of the relearning attack.
        max_new_tokens: length limit of greedy answers; must hold every answer.
        stop_strings: answers end there, e.g. `"\\n"` for few-shot prompts.
        format: how prompt and answer are joined.

    Raises:
        ValueError: broken rows, rows shared between splits, rows or answers that do not fit, an unknown attack or
            option, results of a retrained model for other questions or settings, or log-probabilities that are not
            finite.
    """
    check_arguments(batch_size, seed, max_new_tokens, stop_strings, format)
    chosen = read_attacks(attacks)
    rows = _read_splits(splits)
    optional_import("rouge_score.rouge_scorer", "unlearning")
    if "holdout" in rows:
        optional_import("scipy.stats", "unlearning")
    settings = {
        "format": asdict(format or PromptFormat()),
        "max_new_tokens": max_new_tokens,
        "stop_strings": list(stop_strings),
        "seed": seed,
        "attacks": json.loads(json.dumps(chosen)),
        "rows": {name: {"rows": len(items), "digest": digest(items)} for name, items in rows.items()},
    }
    if retrained is model:
        raise ValueError("retrained is the model itself; pass a model trained without the forget rows, or None.")
    evaluation = _Evaluation(model, tokenizer, rows, settings, batch_size)
    reference: Logs = {}
    if isinstance(retrained, (PreTrainedModel, PeftModel)):
        reference = _Evaluation(retrained, tokenizer, rows, settings, batch_size).logs()
    elif retrained is not None:
        saved = retrained.to_dict() if isinstance(retrained, UnlearningReport) else retrained
        reference = read_reference(saved, rows, settings)
    logs = evaluation.logs()
    if log_ratios(reference).size:
        # A comparison with rows of other contents is for want of the one with a model.
        logs.pop("holdout_truth_ratio", None)
    logs |= compare(logs, reference, settings)
    logs = {name: logs[name] for name in ("forget_quality", "model_utility", *logs)}
    kept = ("forget_truth_ratio", "relearning")
    brief = {name: log if name in kept else without_rows(log) for name, log in reference.items()}
    return UnlearningReport(settings, logs, brief, [*wording_findings(rows), *findings_of(logs, reference)])


def _read_splits(splits: Mapping[str, Iterable[Mapping[str, Any] | Row]]) -> dict[str, list[Row]]:
    if "forget" not in splits:
        raise ValueError(f"splits has no 'forget' among {sorted(splits)}; name the split that was unlearned so.")
    rows = {name: read_rows(items, name) for name, items in splits.items()}
    for name, items in rows.items():
        # Texts to be reproduced verbatim are another view of the rows to forget.
        if name not in ("forget", "verbatim"):
            refuse_overlap(items, name, rows["forget"], "forget")
        if name not in ("forget", "holdout") and "holdout" in rows:
            refuse_overlap(rows["holdout"], "holdout", items, name)
    return rows


class _Evaluation:
    """All measurements of one model; the retrained model goes through the same ones."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, list[Row]],
        settings: Mapping[str, Any],
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.rows, self.settings = model, tokenizer, rows, settings
        self.format = PromptFormat(**settings["format"])
        self.runner = ModelRunner(model, tokenizer, batch_size)
        self.encoder = RowEncoder(tokenizer, self.format, rows["forget"][0].answer)
        # Attack -> the forget rows as it asks them.
        self.asked = {
            "paraphrased_prompts": paraphrased(rows["forget"]),
            "in_context": in_context(rows["forget"], self.format.separator),
        }
        check_end_tokens(self.runner)
        self._check_rows()

    def logs(self) -> Logs:
        attacked = ("forget", "holdout") if "holdout" in self.rows else ()
        scores = score_rows(self.runner, self.encoder, self.rows, moments=attacked)
        logs = self._forgetting(self.rows["forget"], scores["forget"])
        if "verbatim" in self.rows:
            logs |= self._verbatim(scores["verbatim"])
        logs |= self._keeping({name: scores[name] for name in self.rows if name not in _SPECIAL})
        logs |= self._membership(scores)
        logs |= holdout_distance(self.rows, scores)
        attacks: dict[str, Callable[..., Logs]] = {
            "adapter_off": self._adapter_off,
            "quantization": self._quantization,
            "paraphrased_prompts": self._paraphrased_prompts,
            "in_context": self._in_context,
            "sampling": self._sampling,
            "relearning": self._relearning,
            "gradient_norm": self._gradient_norm,
        }
        for attack, options in self.settings["attacks"].items():
            try:
                logs |= attacks[attack](**options)
            except (AttackUnavailable, AttackFailed, NotFiniteError) as error:
                logs[attack] = missing(str(error))
            except torch.OutOfMemoryError:
                logs[attack] = missing(f"out of memory with batch_size={self.runner.batch_size}")
        return logs

    # -- What is forgotten, what is kept ------------------------------------------------------------------------------

    def _forgetting(self, rows: Sequence[Row], scores: Sequence[AnswerScores], prefix: str = "") -> Logs:
        ids = [row.id for row in rows]
        texts = self._texts(rows)
        logs = {
            "forget_Q_A_Prob": probabilities(ids, [score.answer.nll for score in scores]),
            "forget_Q_A_ROUGE": rouge(rows, texts, "rougeL_recall"),
            "forget_knowmem_ROUGE": rouge(rows, texts, "rougeL_f1"),
            **memorised(ids, scores),
        }
        if scores[0].perturbed:
            correct, wrong = losses(scores)
            ratios = measures.log_truth_ratio(correct, wrong)
            # e^700 is about the largest number of a JSON file; the test reads the losses, which do not overflow.
            records = [{"score": math.exp(min(700.0, max(-700.0, ratio)))} for ratio in ratios]
            logs["forget_truth_ratio"] = log_of(measures.truth_ratio_closeness(ratios), ids, records)
            logs["forget_truth_ratio_knowledge"] = scored(measures.truth_ratio_knowledge(ratios), ids)
            logs["forget_choice_accuracy"] = scored(measures.choice_hits(correct, wrong), ids)
            logs["forget_Q_A_PARA_Prob"] = probabilities(ids, correct)
            logs["forget_Q_A_PERT_Prob"] = log_of(
                measures.probability(wrong).mean(axis=1),
                ids,
                [{"prob": measures.probability(row).tolist(), "avg_loss": row.tolist()} for row in wrong],
            )
        return {prefix + name: log for name, log in logs.items()}

    def _verbatim(self, scores: Sequence[AnswerScores]) -> Logs:
        rows = self.rows["verbatim"]
        spoken = rouge(rows, self._texts(rows), "rougeL_f1")
        found = memorised([row.id for row in rows], scores)
        return {"forget_verbmem_ROUGE": spoken, **{f"verbmem_{name}": log for name, log in found.items()}}

    def _keeping(self, scores: Mapping[str, Sequence[AnswerScores]]) -> Logs:
        logs: Logs = {}
        columns: list[Floats] = []
        names: list[str] = []
        for split, split_scores in scores.items():
            rows, prefix = self.rows[split], _PREFIXES.get(split, split)
            ids = [row.id for row in rows]
            found = {f"{prefix}_Q_A_Prob": probabilities(ids, [score.answer.nll for score in split_scores])}
            if split_scores[0].perturbed:
                correct, wrong = losses(split_scores)
                if split != "retain":  # TOFU's rule: general knowledge is judged as a choice between options
                    gold = [score.answer.nll for score in split_scores]
                    values = measures.probability_with_options(gold, wrong)
                    found = {
                        f"{prefix}_Q_A_Prob_normalised": log_of(values, ids, [{"prob": v} for v in values.tolist()])
                    }
                ratio = measures.truth_ratio_utility(measures.log_truth_ratio(correct, wrong))
                found[f"{prefix}_Truth_Ratio"] = scored(ratio, ids)
            found[f"{prefix}_Q_A_ROUGE"] = rouge(rows, self._texts(rows), "rougeL_recall")
            logs |= found
            names += found
            columns.append(np.stack([row_values(log) for log in found.values()], axis=1))
            logs[f"{prefix}_knowmem_ROUGE"] = reread(logs[f"{prefix}_Q_A_ROUGE"], "rougeL_f1")
        logs["model_utility"] = utility_log(names, columns, self.settings["seed"])
        return logs

    def _membership(self, scores: Mapping[str, Sequence[AnswerScores]]) -> Logs:
        names = ("loss", "zlib", "min_k", "min_k_plus_plus")
        if "holdout" not in self.rows:
            return {f"mia_{name}": missing("no holdout split of unseen rows") for name in names}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        for split in ("forget", "holdout"):
            for name, values in zip(
                names, zip(*map(attack_scores, self.rows[split], scores[split]), strict=True), strict=True
            ):
                found[name][split] = list(values)
        return {f"mia_{name}": self._auc(values) for name, values in found.items()}

    def _auc(self, scores: Mapping[str, Sequence[float]]) -> Log:
        return auc_log(
            scores, {split: [row.id for row in self.rows[split]] for split in scores}, self.settings["seed"]
        )

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        limit, stops = self.settings["max_new_tokens"], self.settings["stop_strings"]
        return greedy_answers(self.runner, self.encoder, rows, limit, stops)

    # -- Checks before the first forward pass -------------------------------------------------------------------------

    def _check_rows(self) -> None:
        for split, rows in self.rows.items():
            for row in rows:
                self._check_row(row, split, generated=split != "holdout")
        for attack, rows in self.asked.items():
            if attack in self.settings["attacks"]:
                for row in rows:
                    try:
                        self._check_row(row, "forget", generated=True)
                    except ValueError as error:
                        raise ValueError(f"{error} Or leave out the attack {attack!r}.") from error
        if "relearning" in self.settings["attacks"]:
            relearn, probe = self._halves()
            refuse_overlap(probe, "forget", relearn, "forget")

    def _check_row(self, row: Row, split: str, generated: bool) -> None:
        """Refuses what the context cannot hold, and answers that greedy decoding could not give in full."""
        limit, stops = self.settings["max_new_tokens"], self.settings["stop_strings"]
        where = f"split {split!r}, row {row.id!r}"
        context = context_length(self.model, self.tokenizer)
        (prompt, answer), closing = encoded_answers(self.encoder, row, split, context)[0]
        if not generated:
            return
        asked = len(self.encoder.prompt(row))
        # What a template writes in front of an answer has to be generated, too.
        length = len(prompt) + len(answer) - closing - asked
        inside = [stop for stop in stops if stop in row.answer]
        if inside:
            raise ValueError(f"{where}: the answer holds the stop string {inside[0]!r}; remove it from stop_strings.")
        if length > limit:
            raise ValueError(
                f"{where}: the answer has {length} tokens but max_new_tokens={limit}, so that its end would look "
                "forgotten; raise max_new_tokens or shorten the answer."
            )
        if asked + limit > context:
            raise ValueError(
                f"{where}: {asked} prompt tokens and max_new_tokens={limit} do not fit into the context of {context}; "
                "lower max_new_tokens or shorten the row."
            )

    def _halves(self) -> tuple[list[Row], list[Row]]:
        """The forget rows that are learnt again, and those that are asked about."""
        rows = self.rows["forget"]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.settings["seed"])).tolist()
        half = len(rows) // 2
        return [rows[index] for index in order[:half]], [rows[index] for index in order[half:]]

    # -- Attacks ------------------------------------------------------------------------------------------------------

    def _forgetting_in(
        self, prefix: str, state: AbstractContextManager[Any], rows: Sequence[Row] | None = None
    ) -> Logs:
        rows = self.rows["forget"] if rows is None else rows
        with state:
            scores = score_rows(self.runner, self.encoder, {"forget": rows})["forget"]
            return self._forgetting(rows, scores, prefix)

    def _adapter_off(self) -> Logs:
        return self._forgetting_in("adapter_off/", without_adapter(self.model))

    def _quantization(self, bits: Sequence[int]) -> Logs:
        logs: Logs = {}
        for width in bits:
            logs |= self._forgetting_in(f"{width}bit/", quantized_copy(self.model, width))
        return logs

    def _paraphrased_prompts(self) -> Logs:
        rows = self.asked["paraphrased_prompts"]
        if not rows:
            raise AttackUnavailable("the forget rows have no prompt_paraphrases")
        return self._forgetting_in("paraphrased_prompts/", nullcontext(), rows)

    def _in_context(self) -> Logs:
        return self._forgetting_in("in_context/", nullcontext(), self.asked["in_context"])

    def _sampling(self, samples: int) -> Logs:
        rows, settings = self.rows["forget"], self.settings
        limit, stops = settings["max_new_tokens"], settings["stop_strings"]
        drawn = sampled_answers(self.runner, self.encoder, rows, samples, limit, stops, seed=settings["seed"])
        best = []
        for row, texts in zip(rows, drawn, strict=True):
            recalls = [measures.rouge_l(text, row.answer).recall for text in texts]
            best.append(texts[int(np.argmax(recalls))])
        return {f"best_of_{samples}/forget_Q_A_ROUGE": rouge(rows, best, "rougeL_recall")}

    def _relearning(self, **options: Any) -> Logs:
        relearn, probe = self._halves()
        if not relearn:
            raise AttackUnavailable("needs two forget rows or more")
        curve = relearning_curve(
            self.model,
            self.tokenizer,
            relearn,
            probe,
            batch_size=self.runner.batch_size,
            seed=self.settings["seed"],
            format=self.format,
            **options,
        )
        points = {
            str(step): {"steps": step, **{name: values[index] for name, values in curve.values.items()}}
            for index, step in enumerate(curve.steps)
        }
        log = {"agg_value": curve.area(), "steps_to_half": curve.steps_to(), "measure": curve.measure}
        return {"relearning": {**log, "value_by_index": points}}

    def _gradient_norm(self) -> Logs:
        if "holdout" not in self.rows:
            raise AttackUnavailable("no holdout split of unseen rows")
        norms = {
            split: gradient_norms(self.model, self.encoder, self.rows[split], self.runner).tolist()
            for split in ("forget", "holdout")
        }
        return {"mia_gradnorm": self._auc(norms)}
