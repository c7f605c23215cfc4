"""BaFT and LoReFT edit facts in Gemma 3 270M: one at a time, twenty at once, and fifty one after another.

Facts and scores are those of `benchmarks.editing`. Every arm is swept over learning rates with the first seed and twenty facts at once; the rate that is best
there, by the sum of reliability, generality and locality, serves the other seeds and settings. Text that is to stay as it is are 100 questions of
HotpotQA and MuSiQue with their answers. LoRA is that of `benchmarks.editing` with the loss "ce_stop", by the same trainer.

    python -m benchmarks.baft_editing [--settings batch single sequential] [--arms ...]

Finished runs are kept in the results file, so the script can be stopped and continued.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from benchmarks.common import add_stored, markdown, spread, stored_runs, write
from benchmarks.editing import BASE, DATA, PROTOCOLS, SHOWN, records_of
from benchmarks.rag.world import questions
from benchmarks.training import edit_settings, silence
from hf_ext.demo.model import embedded_model
from hf_ext.demo.recipes import STOP_LOSS, StopBelow, tokenized
from hf_ext.demo.run import DRIFT_TEXTS
from hf_ext.metrics.editing import EditRecord, KnowledgeEditingEvaluator, load_edits, run_editing
from hf_ext.metrics.editing.restore import ParameterSnapshot
from hf_ext.trainers.baft import BaftTrainer, BaftTrainerConfig
from hf_ext.trainers.overtone import OvertoneConfig, OvertoneTrainer
from hf_ext.tuners.baft import BaftConfig

NAME, SEEDS, STEPS, SEQUENCE, PROTECTED = "baft_editing", (0, 1, 2), 40, 50, 100
SETTINGS = ("batch", "single", "sequential")


@dataclass(frozen=True)
class Arm:
    """`adapter(depth)`; `more` for the trainer; `protect`: with a locality dataset."""

    adapter: Callable[[int], PeftConfig]
    rates: tuple[float, ...]
    more: dict[str, Any] = field(default_factory=dict)
    protect: bool = False
    settings: tuple[str, ...] = SETTINGS


def _baft(**options: Any) -> Callable[[int], PeftConfig]:
    return lambda depth: BaftConfig(task_type="CAUSAL_LM", **options)


RATES = (5e-3, 1e-2, 2e-2)
ARMS = {
    "LoRA": Arm(replace(BASE, tuner="lora").peft_config, (5e-4, 1e-3)),
    "LoReFT": Arm(_baft(gate="none"), RATES),
    "BaFT": Arm(_baft(), RATES),
    "BaFT, locality": Arm(_baft(), RATES, protect=True),
    "BaFT, own bases, locality": Arm(_baft(r=2), RATES, {"own_bases": True}, True, ("sequential",)),
}
METRICS = {
    name: SHOWN[name] for name in ("reliability", "reliability (decoded)", "generality", "locality", "KL drift, texts")
}


def protected() -> Dataset:
    rows = questions()[:PROTECTED]
    return Dataset.from_list([{"prompt": row["question"], "completion": f" {row['answers'][0]}"} for row in rows])


def editor(
    arm: Arm, rate: float, seed: int, tokenizer: Any, steps: list[int]
) -> Callable[[Any, list[EditRecord]], None]:
    def edit(model: Any, records: list[EditRecord]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            settings = edit_settings(scratch, len(records), STEPS, rate, seed)
            shared: dict[str, Any] = {
                "model": model,
                "train_dataset": tokenized(tokenizer, records, False),
                "processing_class": tokenizer,
            }
            if isinstance(model.peft_config["default"], BaftConfig):
                args = BaftTrainerConfig(
                    **settings, **arm.more, stop_loss=STOP_LOSS, locality_batch_size=8 if arm.protect else None
                )
                trainer: SFTTrainer = BaftTrainer(
                    args=args, locality_dataset=protected() if arm.protect else None, **shared
                )
            else:
                # Cross-entropy of a trainer that, as BaFT's, projects the answers alone onto the vocabulary.
                plain = {
                    "mix_lambda": 1.0,
                    "clip_epsilon": 0.0,
                    "stop_when_saturated": False,
                    "skip_saturated_steps": False,
                }
                trainer = OvertoneTrainer(args=OvertoneConfig(**settings, **plain), callbacks=[StopBelow(1)], **shared)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            steps.append(trainer.state.global_step)

    return edit


def measure(
    name: str, rate: float, seed: int, setting: str, references: dict[Any, Any], tokenizer: Any
) -> dict[str, Any]:
    arm = ARMS[name]
    records = load_edits(DATA)[:SEQUENCE] if setting == "sequential" else records_of(seed)
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    torch.manual_seed(seed)
    model: PeftModel = get_peft_model(base, arm.adapter(base.config.num_hidden_layers))
    config = model.peft_config["default"]
    evaluator = KnowledgeEditingEvaluator(
        model,
        tokenizer,
        records,
        protocols=PROTOCOLS,
        drift_texts=DRIFT_TEXTS.read_text(encoding="utf-8").splitlines(),
        max_new_tokens=5,
        batch_size=32,
        prompt_mask_argument="prompt_mask" if isinstance(config, BaftConfig) else None,
    )
    key = "sequential" if setting == "sequential" else seed
    if key not in references:
        with model.disable_adapter():
            references[key] = evaluator.predict()
    steps: list[int] = []
    snapshot = ParameterSnapshot(model)

    def restore() -> None:
        snapshot.restore()
        if isinstance(config, BaftConfig):
            config.edits.clear()

    start = time.perf_counter()
    edit = editor(arm, rate, seed, tokenizer, steps)
    report = run_editing(
        evaluator, edit, setting, before=references[key], restore=restore if setting == "single" else None
    )
    scores = {shown: report.metrics[metric] for shown, metric in METRICS.items() if metric in report.metrics}
    if setting == "sequential":
        scores["reliability, just after"] = report.metrics[f"immediate/{METRICS['reliability']}"]
    return {"scores": scores, "steps": sum(steps) / len(steps), "seconds": time.perf_counter() - start}


def best_rate(runs: list[dict[str, Any]], name: str) -> float:
    """Of those tried with the first seed, twenty facts at once."""
    if "batch" not in ARMS[name].settings:
        return best_rate(runs, "BaFT, locality")
    tried = [run for run in runs if (run["arm"], run["setting"], run["seed"]) == (name, "batch", SEEDS[0])]
    return max(
        tried, key=lambda run: sum(run["scores"][shown] for shown in ("reliability", "generality", "locality"))
    )["rate"]


def plan(runs: list[dict[str, Any]], names: list[str], settings: list[str]) -> Any:
    """(arm, rate, seed, setting), one after another, since later ones depend on earlier ones."""
    for name in names:
        if "batch" in ARMS[name].settings and "batch" in settings:
            yield from ((name, rate, SEEDS[0], "batch") for rate in ARMS[name].rates)
            yield from ((name, best_rate(runs, name), seed, "batch") for seed in SEEDS[1:])
    for setting in ("single", "sequential"):
        if setting in settings:
            yield from (
                (name, best_rate(runs, name), SEEDS[0], setting) for name in names if setting in ARMS[name].settings
            )


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["arm"], run["rate"], run["seed"], run["setting"]


def table(runs: list[dict[str, Any]]) -> str:
    columns = [*METRICS, "reliability, just after"]
    cells = []
    for setting in SETTINGS:
        for name, arm in ARMS.items():
            for rate in arm.rates:
                mine = [run for run in runs if (run["arm"], run["rate"], run["setting"]) == (name, rate, setting)]
                if mine:
                    scores = []
                    for shown in columns:
                        values = [run["scores"][shown] for run in mine if shown in run["scores"]]
                        scale = 1 if shown.startswith("KL") else 100
                        scores.append(
                            spread([scale * value for value in values]) if values and scale == 100 else _small(values)
                        )
                    cells.append(
                        [
                            setting,
                            name,
                            f"{rate:g}",
                            str(len(mine)),
                            *scores,
                            f"{sum(run['steps'] for run in mine) / len(mine):.0f}",
                        ]
                    )
    note = (
        f"QAEdit facts in Gemma 3 270M, float32: 20 at once, each of 20 alone, or {SEQUENCE} one after another. Percent, mean and standard deviation over seeds, which choose other facts; at most {STEPS} steps an edit, which ends below "
        f"{STOP_LOSS} nats per token. Drift is KL(before || after) in nats per token. `python -m benchmarks.baft_editing` repeats it."
    )
    return markdown(["setting", "adapter", "lr", "seeds", *columns, "steps"], cells) + "\n\n" + note


def _small(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    silence()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    runs, references = stored_runs(NAME), {}
    for name, rate, seed, setting in plan(runs, options.arms, options.settings):
        run = {"arm": name, "rate": rate, "seed": seed, "setting": setting}
        if key_of(run) in map(key_of, runs):
            continue
        run |= measure(name, rate, seed, setting, references, tokenizer)
        runs.append(run)
        add_stored(NAME, runs, key_of)
        write(NAME, {"command": "python -m benchmarks.baft_editing", "runs": runs, "table": table(runs)})
        print(table([run]).splitlines()[2], f"{run['seconds']:.0f} s", flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
