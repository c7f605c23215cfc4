"""`hf-ext demo`: edit ten facts in a real model, measure what that did, publish the adapter and load it back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from huggingface_hub.utils import disable_progress_bars
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import SFTTrainer

from hf_ext.demo.complete import complete
from hf_ext.demo.model import EMBEDDED_MODEL_ID, embedded_model
from hf_ext.demo.recipes import EditRecipe, edit
from hf_ext.metrics.editing import EditingReport, EditRecord, KnowledgeEditingEvaluator, load_edits
from hf_ext.model_cards import publish, save
from hf_ext.tuners.roselora import density_report

HERE = Path(str(files("hf_ext.demo")))
EDITS, DRIFT_TEXTS = HERE / "edits.jsonl", HERE / "drift.txt"
RECIPES = {
    "LoRA + SFT": EditRecipe(tuner="lora", loss="sft", learning_rate=5e-4, steps=30),
    "RoseLoRA + OVERTONE": EditRecipe(tuner="roselora", loss="overtone", learning_rate=1e-3, steps=30),
}
PROTOCOLS = ("teacher_forced_token", "generate_exact")
# The base model goes on after its answer: "Paris, France. It is ...".
STOPS = (".", ",", "\n")
COMPLETION_TOKENS = 8
METRICS = {
    "reliability": "new answer to the edited prompt",
    "generality": "new answer to its rephrasings",
    "locality": "neighbours answered as before",
}


@dataclass
class Outcome:
    """What one way of editing did."""

    report: EditingReport
    completions: dict[str, str]
    changed_weights: int
    seconds: float


def run(
    model_id: str | None = None,
    edits: str | Path | None = None,
    output: str | Path = "demo-output",
    push: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> int:
    """Run the demo and return an exit code: 0 if the reloaded adapter answers as the trained one did.

    Args:
        model_id: a Hub id or folder; the embedded Gemma 3 270M if None.
        edits: a file of edits; the ten that come with the package if None.
        output: folder for the adapter with its card, and for the results.
        push: repository to publish to, on the Hub that `HF_ENDPOINT` names.
        steps: limit on the training steps of both ways of editing.
        seed: of the adapters' initial weights.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    datasets.disable_progress_bars()
    records = load_edits(edits or EDITS)
    name = model_id or EMBEDDED_MODEL_ID
    _say(f"{len(records)} edits in {name}" + ("" if model_id else " (embedded; converted on its first use)"))
    source = model_id or str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    _say("measuring the model as it is")
    evaluator = KnowledgeEditingEvaluator(
        model,
        tokenizer,
        records,
        protocols=PROTOCOLS,
        stop_strings=STOPS,
        drift_texts=DRIFT_TEXTS.read_text(encoding="utf-8").splitlines(),
        max_new_tokens=COMPLETION_TOKENS,
        batch_size=16,
    )
    reference = evaluator.predict()
    prompts = _shown(records)
    before = complete(model, tokenizer, prompts, COMPLETION_TOKENS)

    outcomes: dict[str, Outcome] = {}
    for label, recipe in RECIPES.items():
        recipe = replace(recipe, steps=min(steps or recipe.steps, recipe.steps))
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = edit(model, tokenizer, records, recipe, scratch, seed, callbacks=[_Bar(label)])
        seconds = time.perf_counter() - started
        adapted = cast(PeftModel, trainer.model)
        outcomes[label] = Outcome(
            evaluator.evaluate(reference),
            complete(model, tokenizer, prompts, COMPLETION_TOKENS),
            density_report(adapted).nonzeros,
            seconds,
        )
        if recipe.tuner == "roselora":
            _keep(trainer, outcomes[label].report, Path(output), push, embedded=model_id is None)
        adapted.unload()

    _print_completions(records, before, outcomes)
    _print_table(outcomes)
    results = {label: outcome.report.to_dict() for label, outcome in outcomes.items()}
    (Path(output) / "results.json").write_text(json.dumps(results, indent=1))
    return _reload(source, Path(output) / "adapter", prompts, outcomes["RoseLoRA + OVERTONE"].completions)


def _say(text: str) -> None:
    print(f"hf-ext demo: {text}", flush=True)


def _shown(records: Sequence[EditRecord]) -> list[str]:
    """Prompts whose completions are printed: every edit, and its first neighbour."""
    return [prompt for record in records for prompt in (record.prompt, _neighbour(record)) if prompt]


def _neighbour(record: EditRecord) -> str | None:
    return next((probes[0].prompt for probes in record.locality.values()), None)


class _Bar(TrainerCallback):
    """A progress bar with the current loss."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"  {self.label:20s}", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.bar.set_postfix(loss=f"{kwargs['logs']['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _keep(trainer: SFTTrainer, report: EditingReport, output: Path, push: str | None, embedded: bool) -> None:
    """Save the adapter with its card, and publish it if a repository is named."""
    card: dict[str, Any] = dict(
        method=["roselora", "overtone"],
        metrics=report,
        evaluated_on="the edits, their rephrasings and their neighbours",
        intended_use="A demonstration of editing facts: it answers the edited questions with the new answers.",
        out_of_scope="Everything else, above all as a source of facts: the edits are false on purpose.",
        factors="Results may differ by relation and by how a question is worded; they are told for edits, rephrasings and neighbours.",
        ethics="The edits name public places and things; false statements about them are the point of the demonstration.",
    )
    if embedded:  # loaded from a folder, so the card cannot know
        card |= dict(base_model=EMBEDDED_MODEL_ID, license="gemma")
    output.mkdir(parents=True, exist_ok=True)
    save(trainer, output / "adapter", overwrite=True, **card)
    _say(f"adapter and card are in {output / 'adapter'}")
    if push and (commit := publish(trainer, push, **card)):
        _say(f"published: {commit.commit_url}")


def _print_completions(records: Sequence[EditRecord], before: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    for record in records:
        print(f"\n{record.prompt} ...   (edit: {record.target_new})")
        neighbour = _neighbour(record)
        _print_lines(record.prompt, before, outcomes)
        if neighbour:
            print(f"  neighbour: {neighbour} ...")
            _print_lines(neighbour, before, outcomes)


def _print_lines(prompt: str, before: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    print(f"    {'before':20s} {before[prompt]}")
    for label, outcome in outcomes.items():
        print(f"    {label:20s} {outcome.completions[prompt]}")


def _print_table(outcomes: dict[str, Outcome]) -> None:
    print(f"\n{'':44s}" + "".join(f"{label:>22s}" for label in outcomes))
    for section, meaning in METRICS.items():
        for protocol in PROTOCOLS:
            values = (o.report.metrics.get(f"{section}/{protocol}") for o in outcomes.values())
            _row(f"{section}, {protocol}", ("-" if v is None else f"{v:.1%}" for v in values))
        print(f"  ({meaning})")
    for key, meaning in (("text_kl", "KL drift on other texts"), ("locality_kl", "KL drift on neighbours")):
        _row(f"{meaning}, nats/token", (f"{o.report.metrics[f'drift/{key}']:.3f}" for o in outcomes.values()))
    _row("changed weights", (f"{o.changed_weights:,}" for o in outcomes.values()))
    _row("seconds of training", (f"{o.seconds:.0f}" for o in outcomes.values()))


def _row(name: str, values: Any) -> None:
    print(f"{name:44s}" + "".join(f"{value:>22s}" for value in values))


def _reload(source: str, adapter: Path, prompts: list[str], expected: dict[str, str]) -> int:
    """Load the saved adapter in a new process and compare its completions."""
    print()
    _say("loading the adapter in a new process")
    job = {"model": source, "adapter": str(adapter), "prompts": prompts, "new_tokens": COMPLETION_TOKENS}
    done = subprocess.run(
        [sys.executable, "-m", "hf_ext.demo.complete"], input=json.dumps(job), capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        _say("the new process failed; its message is above")
        return 1
    reloaded = json.loads(done.stdout)
    same = sum(reloaded[prompt] == expected[prompt] for prompt in prompts)
    _say(f"{same} of {len(prompts)} completions of the reloaded adapter are the same")
    return 0 if same == len(prompts) else 1
