"""What the card of an unlearned model says beyond any other: what was forgotten, and what brings it back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ext.metrics.unlearning import ATTACKS, UnlearningReport
from hf_ext.registry import FLAT, UNLEARNING_LOSSES, Method

TAG = "unlearning"
# Switching the adapter off needs no measurement: the card says what it does.
_TO_MEASURE = [name for name in ATTACKS if name != "adapter_off"]
_RECALL = "_Q_A_ROUGE"
_SPLITS = {"ra": "real authors", "wf": "world facts"}
_ATTACKED = {
    r"(\d+)bit": "after rounding to {} bits",
    "adapter_off": "with the adapter switched off",
    "paraphrased_prompts": "asked in other words",
    "in_context": "with the facts in the prompt",
    r"best_of_(\d+)": "best of {} samples",
}


@dataclass(frozen=True)
class Unlearning:
    """Content of the section.

    Attributes:
        table: what was measured, in Markdown; empty without a report.
        compared: a retrained model was measured as well.
        missing: attacks that nobody made.
        switched_off: the report holds the attack that drops the adapter.
    """

    table: str
    compared: bool
    missing: list[str]
    switched_off: bool


def unlearning_methods(tags: Sequence[str]) -> tuple[Method, ...]:
    """The losses that `UnlearnTrainer` put on the model as tags, as entries of a card; FLAT is in the registry."""
    if TAG not in tags:
        return ()
    return tuple(_entry(tag) for tag in tags if tag in UNLEARNING_LOSSES and tag != FLAT.slug)


def _entry(loss: str) -> Method:
    name, paper = UNLEARNING_LOSSES[loss].name, UNLEARNING_LOSSES[loss].paper
    return Method(
        slug=loss,
        name=name,
        kind=FLAT.kind,
        summary="a loss with which a model forgets the answers it is given",
        paper_title=paper.title,
        arxiv=paper.id,
        citation=(
            f"@misc{{{loss},\n  title         = {{{paper.title}}},\n  eprint        = {{{paper.id}}},\n"
            "  archivePrefix = {arXiv},\n}"
        ),
        entry_points={},
        changes="The weights were trained against the answers to forget.",
        limits=FLAT.limits,
    )


def read_unlearning(tags: Sequence[str], methods: Sequence[Method], metrics: Any) -> Unlearning | None:
    """The section of a model that was trained to forget, or that comes with a report of it; `None` for others."""
    if isinstance(metrics, UnlearningReport):
        return _from_report(metrics)
    if TAG in tags or FLAT in methods:
        return Unlearning("", False, list(map(_words, _TO_MEASURE)), False)
    return None


def _from_report(report: UnlearningReport) -> Unlearning:
    models = {"this model": report.logs}
    if report.retrained:
        models["retrained model"] = report.retrained
    rows = [
        (label, *(_number(logs.get(name)) for logs in models.values()))
        for name, label in _labels(report)
        if report.logs[name]["agg_value"] is not None
    ]
    lines = [("measured", *models), ("---",) * (len(models) + 1), *rows]
    made = report.settings["attacks"]
    missing = [name for name in _TO_MEASURE if name not in made or _unavailable(report, name)]
    switched_off = "adapter_off" in made and not _unavailable(report, "adapter_off")
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return Unlearning(table, bool(report.retrained), list(map(_words, missing)), switched_off)


def _labels(report: UnlearningReport) -> Iterator[tuple[str, str]]:
    """(metric, what it is called in the card), in the order of the table."""
    yield "forget_quality", "forget quality: p-value against the retrained model, high is good"
    yield "model_utility", "model utility: what must stay, high is good"
    for name in report.logs:
        attack, _, measure = name.rpartition("/")
        split = measure.removesuffix(_RECALL)
        if not measure.endswith(_RECALL):
            continue
        if not attack:
            kept = f"answers to keep ({_SPLITS.get(split, split)}), ROUGE-L"
            yield name, "answers to forget, ROUGE-L" if split == "forget" else kept
        else:
            yield name, f"answers to forget, ROUGE-L, {_attacked(attack)}"
    if "relearning" in report.logs:
        measure = _words(str(report.logs["relearning"].get("measure")))
        steps = max(report.settings["attacks"]["relearning"]["steps"])
        yield "relearning", f"{measure} of one half while the other half is learnt again, mean over {steps} steps"


def _attacked(attack: str) -> str:
    for pattern, words in _ATTACKED.items():
        if found := re.fullmatch(pattern, attack):
            return words.format(*found.groups())
    return _words(attack)


def _unavailable(report: UnlearningReport, attack: str) -> bool:
    return attack in report.logs and report.logs[attack]["agg_value"] is None


def _number(log: dict[str, Any] | None) -> str:
    value = (log or {}).get("agg_value")
    return "–" if value is None else f"{value:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ")
