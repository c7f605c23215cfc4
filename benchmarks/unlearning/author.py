"""Gemma 3 270M learns three invented authors by heart and is made to forget one of them: what is forgotten, what stays, what comes back.

The model is fine-tuned on the question-answer pairs of an author to forget and of two to keep; a second one, the retrained model, only on those of the two. Every
method then trains a LoRA adapter for five epochs, as in TOFU, with retain data, at two learning rates. `evaluate_unlearning` measures forget quality and model
utility, rounds to 4 bits, and relearns from half of the rows.

    python -m benchmarks.unlearning.author [--seeds 0 1] [--rates 5e-4 2e-4]

A seed chooses the author to forget, the order of rows and the initial adapter. Finished runs are kept in the results file, so the script can be stopped and
continued.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks.common import add_stored, markdown, stored_runs, write
from hf_ext.demo.model import cache_folder, embedded_model
from hf_ext.metrics.unlearning import UnlearningReport, evaluate_unlearning
from hf_ext.trainers.flat import UnlearnConfig, UnlearnTrainer

NAME = "unlearning"
DATA = Path(__file__).parents[1] / "data" / "tofu.jsonl"
FORGOTTEN = ("Hsiao Yun-Hwa", "Behrouz Rohani")
KEPT = ("Jaime Vasquez", "Chukwu Akabueze")
EPOCHS_TO_LEARN, LEARNING_RATE, BATCH = 12, 5e-4, 10
EPOCHS, UNLEARN_BATCH = 5, 4
RATES = (5e-4, 2e-4)
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ATTACKS: dict[str, dict[str, Any]] = {
    "quantization": {"bits": (4,)},
    "relearning": {"steps": (4,), "learning_rate": 5e-5, "train_batch_size": 5},
}


@dataclass(frozen=True)
class Arm:
    """One way to unlearn; `options` are fields of `UnlearnConfig`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-4


METHODS: dict[str, dict[str, Any]] = {
    "FLAT, mean": {},
    "FLAT, geometric": {"template_probability": "geometric"},
    "NPO": {"loss_type": "npo"},
    "SimNPO": {"loss_type": "simnpo"},
    "gradient difference": {"loss_type": "gradient_difference"},
    "DPO, refusals": {"loss_type": "idk_dpo"},
    "WGA": {"loss_type": "wga"},
    "SatImp": {"loss_type": "satimp"},
    "UNDIAL": {"loss_type": "undial", "retain_coef": 1.0},
    "CE-U": {"loss_type": "ceu", "retain_coef": 1.0},
    "RMU": {"loss_type": "rmu"},
}
ARMS = [Arm(name, options, rate) for rate in RATES for name, options in METHODS.items()]
SHOWN = {
    "forget_quality": "forget quality",
    "model_utility": "utility",
    "forget_choice_accuracy": "answers preferred",
    "forget_Q_A_Prob": "probability, forget",
    "forget_Q_A_ROUGE": "ROUGE-L, forget",
    "retain_Q_A_ROUGE": "ROUGE-L, retain",
    "4bit/forget_Q_A_ROUGE": "ROUGE-L, forget, 4 bits",
    "relearning": "relearning",
}


def rows(split: str, authors: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows for the evaluation: questions as a base model reads them."""
    records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    chosen = [r for r in records if r["split"] == split and (not authors or r["author"] in authors)]
    return [r | {"prompt": f"Question: {r['prompt']}\nAnswer:"} for r in chosen]


def pairs(records: Sequence[dict[str, Any]]) -> Dataset:
    """The same for training."""
    return Dataset.from_list([{"prompt": r["prompt"], "completion": " " + r["answer"]} for r in records])


def splits(seed: int) -> dict[str, list[dict[str, Any]]]:
    """What is evaluated: the 20 rows to forget, and 10 of each other kind."""
    found = {
        "forget": rows("forget", FORGOTTEN[seed : seed + 1]),
        "retain": rows("retain", KEPT)[::4],
        "holdout": rows("holdout")[::2],
        "real_authors": rows("real_authors")[::2],
        "world_facts": rows("world_facts")[::2],
    }
    fields = ("prompt", "answer", "perturbed")
    return {
        name: [{"id": f"{name}-{i}"} | {k: r[k] for k in fields if k in r} for i, r in enumerate(items)]
        for name, items in found.items()
    }


def shared_arguments(scratch: str, seed: int) -> dict[str, Any]:
    return {
        "output_dir": scratch,
        "bf16": True,
        "use_cpu": True,
        "activation_checkpointing": False,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": seed,
    }


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def taught(name: str, data: Dataset, seed: int, tokenizer: Any) -> Path:
    """The folder of the model that has learnt `data`; it is trained when it is first asked for."""
    folder = cache_folder() / "benchmarks" / f"unlearning-{name}-{seed}"
    if (folder / "config.json").is_file():
        return folder
    set_seed(seed)
    # Trained in bfloat16 with a large adapter, merged in float32.
    adapter = LoraConfig(**ADAPTER | {"r": 64, "lora_alpha": 128})
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            **shared_arguments(scratch, seed),
            num_train_epochs=EPOCHS_TO_LEARN,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=BATCH,
        )
        trainer = SFTTrainer(
            load(embedded_model()), arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapter
        )
        trainer.train()
        trainer.save_model(scratch)
        base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, scratch).merge_and_unload()
        target = folder.with_suffix(".tmp")
        plain.to(torch.bfloat16).save_pretrained(target)
        target.rename(folder)
    return folder


def measured(model: Any, tokenizer: Any, seed: int, retrained: UnlearningReport | None) -> UnlearningReport:
    return evaluate_unlearning(
        model, tokenizer, splits(seed), retrained, attacks=ATTACKS, batch_size=20, max_new_tokens=80
    )


def unlearnt(arm: Arm, folder: Path, seed: int, tokenizer: Any) -> Any:
    """The trained model with its adapter."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = UnlearnTrainer(
            load(folder),
            UnlearnConfig(
                **shared_arguments(scratch, seed),
                **arm.options,
                learning_rate=arm.learning_rate,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=UNLEARN_BATCH,
            ),
            train_dataset=pairs(rows("forget", FORGOTTEN[seed : seed + 1])),
            retain_dataset=pairs(rows("retain", KEPT)),
            processing_class=tokenizer,
            peft_config=LoraConfig(**ADAPTER),
        )
        trainer.train()
        return trainer.model


# -- The results file -------------------------------------------------------------------------------------------------


def key(run: dict[str, Any]) -> list[Any]:
    return [run["seed"], run["arm"]]


def save(runs: list[dict[str, Any]]) -> None:
    add_stored(NAME, runs, key)
    write(NAME, {"command": "python -m benchmarks.unlearning.author", "runs": runs, "table": table(runs)})


def on_frontier(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> bool:
    """Whether no other run on the same author has both a higher forget quality and a higher utility."""
    quality, utility = (run["metrics"].get(name, -1.0) for name in ("forget_quality", "model_utility"))
    others = [other["metrics"] for other in runs if other["seed"] == run["seed"] and other["arm"]["name"] in METHODS]
    return not any(o["forget_quality"] > quality and o["model_utility"] > utility for o in others)


def table(runs: Sequence[dict[str, Any]]) -> str:
    order = {arm.name: number for number, arm in enumerate(ARMS)}
    found = []
    for run in sorted(runs, key=lambda r: (r["seed"], order.get(r["arm"]["name"], -1), r["arm"]["learning_rate"])):
        metrics = run["metrics"]
        cells = [f"{metrics[name]:.2g}" if name in metrics else "" for name in SHOWN]
        unlearnt = run["arm"]["name"] in METHODS
        rate = f"{run['arm']['learning_rate']:g}" if unlearnt else ""
        mark = "*" if unlearnt and on_frontier(run, runs) else ""
        found.append([FORGOTTEN[run["seed"]], run["arm"]["name"], rate, mark, *cells])
    note = (
        f"Gemma 3 270M, 20 rows of the forgotten author, {EPOCHS} epochs in steps of {UNLEARN_BATCH} of them, as many refusals where the method has them and as many retain "
        f"rows, LoRA of rank {ADAPTER['r']}. Forget quality is the p-value of the truth ratios against the retrained model, answers preferred the share of rows whose "
        "answer is more probable than three wrong ones, relearning the mean height of its curve while half of the rows are learnt again in 4 steps. A star marks the frontier: no other run has both more forget quality "
        "and more utility. `python -m benchmarks.unlearning.author` repeats it."
    )
    return markdown(["forgotten", "method", "lr", "frontier", *SHOWN.values()], found) + "\n\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], choices=range(len(FORGOTTEN)))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    options = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    runs = stored_runs(NAME)
    for seed in options.seeds:
        done = [key(run) for run in runs]
        arms = [arm for arm in ARMS if arm.learning_rate in options.rates]
        todo = [arm for arm in arms if key({"arm": asdict(arm), "seed": seed}) not in done]
        if not todo:
            continue
        kept, forgotten = rows("retain", KEPT), rows("forget", FORGOTTEN[seed : seed + 1])
        full = taught("full", pairs([*forgotten, *kept]), seed, tokenizer)
        retrained = measured(load(taught("retrained", pairs(kept), seed, tokenizer)), tokenizer, seed, None)
        report(runs, Arm("retrained"), seed, retrained, 0.0)
        report(runs, Arm("before unlearning"), seed, measured(load(full), tokenizer, seed, retrained), 0.0)
        for arm in todo:
            started = time.perf_counter()
            model = unlearnt(arm, full, seed, tokenizer)
            seconds = time.perf_counter() - started
            report(runs, arm, seed, measured(model, tokenizer, seed, retrained), seconds)
    print(table(runs))


def report(runs: list[dict[str, Any]], arm: Arm, seed: int, measures: UnlearningReport, seconds: float) -> None:
    """Keep a run, and print what it showed."""
    metrics = measures.metrics
    print(
        f"seed {seed} {arm.name} {arm.learning_rate:g}:",
        {n: round(metrics[n], 4) for n in SHOWN if n in metrics},
        flush=True,
    )
    one = {"arm": asdict(arm), "seed": seed, "training_seconds": round(seconds, 1), "metrics": metrics}
    runs[:] = [run for run in runs if key(run) != key(one)] + [one]
    save(runs)


if __name__ == "__main__":
    main()
