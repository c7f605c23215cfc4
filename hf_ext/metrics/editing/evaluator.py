"""`KnowledgeEditingEvaluator`: measures what an edit did to a causal language model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext.metrics.editing import scoring
from hf_ext.metrics.editing.checks import check_settings, context_length
from hf_ext.metrics.editing.drift import DriftReference, drift_reference, measure_drift, windows
from hf_ext.metrics.editing.encoding import PromptEncoder
from hf_ext.metrics.editing.inference import ModelRunner, ScoredSequence
from hf_ext.metrics.editing.probes import Probe, probes_of
from hf_ext.metrics.editing.protocols import (
    GENERATED,
    TEACHER_FORCED,
    Judge,
    Tokens,
    answer_text,
    considered_answers,
    open_stops,
    score_answer,
    score_tokens,
    score_unchanged,
)
from hf_ext.metrics.editing.records import EditRecord, load_edits
from hf_ext.metrics.editing.report import BEFORE, FINAL, EditingReport


@dataclass
class Predictions:
    """What a model answers; `KnowledgeEditingEvaluator.predict` makes it, `evaluate` takes it as the state before editing.

    Attributes:
        fingerprint: identifies records and settings, so that predictions of another evaluator are refused.
        records: ids of the records that were answered.
        forced: probe -> most likely tokens, per answer group and alias, with the answer fed in.
        generated: probe -> greedy continuation.
        fluency: record id -> long greedy continuation of the edit prompt.
        drift: log-probabilities on the drift texts and locality prompts; None if they were not asked for.
    """

    fingerprint: str
    records: tuple[str, ...]
    forced: dict[Probe, list[list[Tokens]]] = field(default_factory=dict)
    generated: dict[Probe, str] = field(default_factory=dict)
    fluency: dict[str, str] = field(default_factory=dict)
    drift: DriftReference | None = None


class KnowledgeEditingEvaluator:
    """Measures reliability, generality, portability, locality, fluency and drift of knowledge edits.

    Args:
        model: causal language model, plain, quantised, dispatched over devices, or a `PeftModel`. It is used as it is at
            each call, so the same evaluator serves before and after the edit.
        tokenizer: its tokenizer.
        records: edit records, or anything `load_edits` reads.
        protocols: how one answer is judged; each gives its own numbers.
            `"teacher_forced_token"`: share of answer tokens that are the most likely ones when the answer before them is fed
            in (the common protocol of the literature; optimistic). `"teacher_forced_exact"`: all of them.
            `"generate_exact"`: greedy decoding up to a stop string, EOS or `max_new_tokens`, then equality after
            normalisation. `"generate_contains"`: the same text contains the answer. `"generate_judge"`: `judge` decides.
        answer_policy: `"any_alias"`, `"first"` (EasyEdit) or `"all_groups"`; see `scoring.reduce_answers`.
        separator: text between prompt and answer.
        add_special_tokens: put BOS in front where the tokenizer has one.
        chat_template: wrap every prompt, those of locality too, as a user turn.
        max_new_tokens: length limit of decoding.
        stop_strings: decoding ends at the first of them. One that occurs inside an accepted answer ("J. R. R. Tolkien")
            does not end the answer it occurs in.
        batch_size: sequences per forward pass; changes speed and memory only.
        drift_texts: held-out texts on which the KL divergence from the model before is measured; None measures none.
        locality_drift: measure the same on the token that follows each locality prompt.
        drift_top_k: keep only the k likeliest tokens of the model before and sum up the rest: a lower bound of the
            divergence for (6·k) instead of (2·vocabulary) bytes a position.
        fluency_tokens: length of the continuation whose n-gram entropy is reported (100 in the literature); None for none.
        judge: `judge(prompt, answer, prediction)` -> truth value or score in [0, 1], for `"generate_judge"`.
        prompt_mask_argument: keyword under which the model takes a bool mask [B, T] of prompt tokens in teacher-forced
            passes, for adapters that act on the prompt only.

    Raises:
        ValueError: an argument is unknown or out of range, an answer is longer than `max_new_tokens`, or a prompt with its
            answer does not fit into the context.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        records: str | Path | Iterable[Any],
        *,
        protocols: Sequence[str] = ("teacher_forced_token", "generate_exact"),
        answer_policy: str = "any_alias",
        separator: str = " ",
        add_special_tokens: bool = True,
        chat_template: bool = False,
        max_new_tokens: int = 32,
        stop_strings: Sequence[str] = (".", "\n"),
        batch_size: int = 8,
        drift_texts: Sequence[str] | None = None,
        locality_drift: bool = True,
        drift_top_k: int | None = None,
        fluency_tokens: int | None = None,
        judge: Judge | None = None,
        prompt_mask_argument: str | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "protocols": list(protocols),
            "answer_policy": answer_policy,
            "separator": separator,
            "add_special_tokens": add_special_tokens,
            "chat_template": chat_template,
            "max_new_tokens": max_new_tokens,
            "stop_strings": list(stop_strings),
            "drift_texts": None if drift_texts is None else _digest(list(drift_texts)),
            "locality_drift": locality_drift,
            "drift_top_k": drift_top_k,
            "fluency_tokens": fluency_tokens,
        }
        check_settings(self.settings, batch_size, judge)
        self.records: list[EditRecord] = load_edits(records)
        self.judge = judge
        self._runner = ModelRunner(model, tokenizer, batch_size, prompt_mask_argument)
        self._encoder = PromptEncoder(
            tokenizer,
            separator=separator,
            add_special_tokens=add_special_tokens,
            chat_template=chat_template,
            sample=self.records[0].prompt,
        )
        self._probes: dict[str, list[Probe]] = {record.id: probes_of([record]) for record in self.records}
        self._pairs = {probe: self._encode(probe) for probes in self._probes.values() for probe in probes}
        texts = [windows(self._encoder.text(text), len(self._encoder.prefix)) for text in drift_texts or ()]
        self._texts = [pieces for pieces in texts if pieces]
        if drift_texts and not self._texts:
            raise ValueError(
                f"drift_texts={list(drift_texts)!r:.80} holds no text of two tokens or more; pass whole sentences."
            )
        self._check_lengths()
        self._fingerprint = _digest([self.settings, [record.to_dict() for record in self.records]])

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model under evaluation."""
        return self._runner.model

    def predict(self, records: Sequence[str] | None = None, *, drift: bool = True) -> Predictions:
        """What the model answers now.

        Called on the untouched model, the result is the reference for locality and drift. It holds, on the CPU, 2 bytes per
        vocabulary entry for each token of the drift texts and each locality prompt (see `drift_top_k`).

        Args:
            records: ids to answer; all if omitted.
            drift: also store the distributions that drift is measured against.
        """
        probes = self._chosen(records)
        with self._runner.evaluating():
            predictions = self._answers(probes)
            if drift:
                sequences = self._drift_sequences(self._locality_prompts(probes))
                predictions.drift = drift_reference(self._runner, sequences, self.settings["drift_top_k"])
        return predictions

    def evaluate(
        self, before: Predictions | None = None, *, records: Sequence[str] | None = None, drift: bool = True
    ) -> EditingReport:
        """Scores the model as it is now against its state before the edit.

        Args:
            before: `predict()` of the untouched model. May be omitted if the edit is an adapter (a `PeftModel`): the model
                with its adapters disabled is then the reference.
            records: ids to evaluate; all if omitted.
            drift: measure drift (if the evaluator was given something to measure it on).

        Raises:
            ValueError: no reference for a model without adapters, or a reference of other records or settings.
        """
        probes = self._chosen(records)
        before = self._reference(before, list(probes), drift)
        with self._runner.evaluating():
            after = self._answers(probes)
            report = EditingReport(
                {**self.settings, "setting": "as_is"}, [self._row(record, before, after) for record in probes]
            )
            if before.drift is not None and drift:
                self._add_drift(report, probes, before.drift)
        return report

    def _answers(self, chosen: dict[str, list[Probe]]) -> Predictions:
        """Runs every protocol's model calls once per distinct input."""
        probes = [probe for items in chosen.values() for probe in items]
        predictions = Predictions(self._fingerprint, tuple(chosen))
        if set(self.settings["protocols"]) & set(TEACHER_FORCED):
            predictions.forced = self._forced(probes)
        if set(self.settings["protocols"]) & set(GENERATED):
            predictions.generated = self._generated(probes)
        if self.settings["fluency_tokens"] is not None:
            prompts = [self._encoder.prompt(chosen[record][0].prompt) for record in chosen]
            texts = self._runner.generate(prompts, self.settings["fluency_tokens"])
            predictions.fluency = dict(zip(chosen, texts, strict=True))
        return predictions

    def _forced(self, probes: Sequence[Probe]) -> dict[Probe, list[list[Tokens]]]:
        pairs = [pair for probe in probes for group in self._pairs[probe] for pair in group]
        distinct = list(dict.fromkeys(pairs))
        sequences = [ScoredSequence(prompt + answer, len(prompt), len(prompt)) for prompt, answer in distinct]
        predicted = dict(zip(distinct, self._runner.predicted_tokens(sequences), strict=True))
        return {probe: [[predicted[pair] for pair in group] for group in self._pairs[probe]] for probe in probes}

    def _generated(self, probes: Sequence[Probe]) -> dict[Probe, str]:
        stops = {probe: open_stops(probe, self.settings["stop_strings"]) for probe in probes}
        texts: dict[tuple[str, tuple[str, ...]], str] = {}
        for stop_set in dict.fromkeys(stops.values()):
            prompts = list(dict.fromkeys(probe.prompt for probe in probes if stops[probe] == stop_set))
            ids = [self._encoder.prompt(prompt) for prompt in prompts]
            outputs = self._runner.generate(ids, self.settings["max_new_tokens"], stop_set)
            texts |= {(prompt, stop_set): output for prompt, output in zip(prompts, outputs, strict=True)}
        return {probe: texts[probe.prompt, stops[probe]] for probe in probes}

    def _row(self, record_id: str, before: Predictions, after: Predictions) -> dict[str, Any]:
        """One record's scores and texts as JSON-able values."""
        row: dict[str, Any] = {"id": record_id, "scores": {FINAL: {}, BEFORE: {}}, "texts": []}
        probes = self._probes[record_id]
        for protocol in self.settings["protocols"]:
            for stage, predictions in ((FINAL, after), (BEFORE, before)):
                # The model before the edit agrees with itself: its locality says nothing.
                scored = [probe for probe in probes if stage == FINAL or probe.section != "locality"]
                kinds: dict[str, dict[str, list[float]]] = {}
                for probe in scored:
                    score = self._score(probe, protocol, predictions, before)
                    kinds.setdefault(probe.section, {}).setdefault(probe.key, []).append(score)
                row["scores"][stage][protocol] = kinds
        for probe in probes if after.generated else ():
            row["texts"].append(self._shown(probe, before, after))
        if after.fluency:
            pair = ((FINAL, after), (BEFORE, before))
            row["fluency"] = {stage: scoring.ngram_entropy(p.fluency[record_id].split()) for stage, p in pair}
        return row

    def _score(self, probe: Probe, protocol: str, after: Predictions, before: Predictions) -> float:
        stops, policy = self.settings["stop_strings"], self.settings["answer_policy"]
        if protocol in TEACHER_FORCED:
            if probe.section == "locality":
                return score_tokens(protocol, after.forced[probe][0][0], before.forced[probe][0][0])
            scores = [
                [score_tokens(protocol, tokens, answer) for tokens, (_, answer) in zip(group, pairs, strict=True)]
                for group, pairs in zip(after.forced[probe], self._pairs[probe], strict=True)
            ]
            return scoring.reduce_answers(scores, policy)
        if probe.section == "locality":
            old, new = before.generated[probe], after.generated[probe]
            return score_unchanged(protocol, probe, old, new, stops, self.judge)
        return score_answer(protocol, probe, after.generated[probe], stops, policy, self.judge)

    def _shown(self, probe: Probe, before: Predictions, after: Predictions) -> dict[str, Any]:
        # Locality is cut at every stop string, whatever its reference answer holds.
        answer = "" if probe.section == "locality" else probe.answers[0][0]
        stops = self.settings["stop_strings"]
        return {
            "section": probe.section,
            "key": probe.key,
            "prompt": probe.prompt,
            "answers": [list(group) for group in probe.answers],
            "prediction": answer_text(after.generated[probe], answer, stops),
            "before": answer_text(before.generated[probe], answer, stops),
        }

    def _add_drift(self, report: EditingReport, chosen: dict[str, list[Probe]], reference: DriftReference) -> None:
        prompts = self._locality_prompts(chosen)
        measured = measure_drift(self._runner, self._drift_sequences(prompts), reference)
        texts = [[kl for piece in pieces for kl in measured[piece]] for pieces in self._texts]
        if texts:
            weights = [float(len(text)) for text in texts]
            report.drift["text_kl"] = {"values": [scoring.mean(text) for text in texts], "weights": weights}
        for row in report.records:
            values = [kl for sequence in prompts.get(row["id"], []) for kl in measured[sequence]]
            row["drift"] = {"locality_kl": scoring.mean(values)} if values else {}

    def _drift_sequences(self, prompts: dict[str, list[ScoredSequence]]) -> list[ScoredSequence]:
        return [sequence for sequences in (*self._texts, *prompts.values()) for sequence in sequences]

    def _locality_prompts(self, chosen: dict[str, list[Probe]]) -> dict[str, list[ScoredSequence]]:
        """Record id -> its locality prompts, each scored on the token that follows."""
        prompts: dict[str, list[ScoredSequence]] = {}
        for record, probes in chosen.items() if self.settings["locality_drift"] else ():
            for probe in (probe for probe in probes if probe.section == "locality"):
                ids = tuple(self._encoder.prompt(probe.prompt))
                prompts.setdefault(record, []).append(ScoredSequence(ids, len(ids), len(ids)))
        return prompts

    def _reference(self, before: Predictions | None, ids: list[str], drift: bool) -> Predictions:
        if before is None:
            if not isinstance(self.model, PeftModel):
                raise ValueError(
                    "before=None needs a PeftModel, whose adapters can be switched off; for an edit of the weights pass the "
                    "result of evaluator.predict() from before the edit."
                )
            with self.model.disable_adapter():
                return self.predict(ids, drift=drift)
        if before.fingerprint != self._fingerprint:
            raise ValueError("before was predicted with other records or settings; predict() with this evaluator.")
        missing = sorted(set(ids) - set(before.records))
        if missing:
            raise ValueError(f"before lacks the records {missing[:5]}; predict() them on the untouched model first.")
        if drift and before.drift is None:
            raise ValueError("before holds no reference for drift; predict(drift=True), or evaluate(drift=False).")
        return before

    def _chosen(self, records: Sequence[str] | None) -> dict[str, list[Probe]]:
        ids = list(self._probes) if records is None else list(records)
        unknown = [record for record in ids if record not in self._probes]
        if unknown or not ids:
            raise ValueError(f"records={unknown[:5]} are not among the evaluator's records; pass their ids.")
        return {record: self._probes[record] for record in ids}

    def _encode(self, probe: Probe) -> list[list[tuple[Tokens, Tokens]]]:
        """Prompt and answer ids of every answer the policy looks at; locality follows its first reference text."""
        policy = "first" if probe.section == "locality" else self.settings["answer_policy"]
        groups = considered_answers(probe.answers, policy)
        pairs = [[self._encoder.pair(probe.prompt, answer) for answer in group] for group in groups]
        return [[(tuple(prompt), tuple(answer)) for prompt, answer in group] for group in pairs]

    def _check_lengths(self) -> None:
        """Raises ValueError naming the first probe that decoding or the context would cut short."""
        decoding = bool(set(self.settings["protocols"]) & set(GENERATED))
        longest = self.settings["max_new_tokens"] if decoding else 0
        fluency = self.settings["fluency_tokens"] or 0
        context = context_length(self.model, self._runner.tokenizer)
        for probe, groups in self._pairs.items():
            where = f"record {probe.record_id!r}, {probe.section}, prompt {probe.prompt[:60]!r}"
            for prompt, answer in (pair for group in groups for pair in group):
                if decoding and probe.section != "locality" and len(answer) > longest:
                    raise ValueError(
                        f"{where}: the answer has {len(answer)} tokens but max_new_tokens={longest}; raise max_new_tokens "
                        "or use teacher-forced protocols only."
                    )
                room = max(len(answer), longest, fluency if probe.section == "reliability" else 0)
                if len(prompt) + room > context:
                    raise ValueError(
                        f"{where}: {len(prompt)} prompt tokens and {room} answer tokens do not fit into the context of "
                        f"{context}; shorten the prompt, or lower max_new_tokens or fluency_tokens."
                    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
