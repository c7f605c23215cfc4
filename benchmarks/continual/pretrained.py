"""Three tasks in a row on Gemma 3 270M: the task matrix, and perplexity on text that has nothing to do with them.

The text is Python's own language reference. Ours protects the pretrained weights from the first task on (`first_task_retention`), which the
paper does not.

    python -m benchmarks.continual.pretrained

Finished runs are kept in the results file, so the script can be stopped and continued.
"""

from __future__ import annotations

import math
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from benchmarks.common import markdown, stored_runs, write
from benchmarks.continual.world import task
from benchmarks.kv_cache.quality import windows
from benchmarks.training import QUIET, silence
from hf_ext.demo.model import embedded_model
from hf_ext.metrics.continual import TaskMatrix
from hf_ext.trainers.adaptive_svd import AdaptiveSVDConfig, AdaptiveSVDTrainer
from hf_ext.trainers.task_sequence import TaskSequenceTrainer

NAME, SEED = "continual_pretrained", 0
TASKS = ("agnews", "yelp", "dbpedia_a")
TRAIN_ROWS, EVAL_ROWS, BATCH, MICRO_BATCH = 96, 40, 8, 4
TEXTS, TEXT_TOKENS = 12, 256
PROTECTED = {"first_task_retention": 0.8}
METHODS: dict[str, dict[str, Any] | None] = {
    "fine-tuning": None,
    "adaptive SVD, energy 99 %": PROTECTED,
    "adaptive SVD, 80 % of every layer": {"rank_rule": "uniform", "target_retention": 0.8, **PROTECTED},
    "adaptive SVD, the paper's ranks": {"rank_rule": "adaptive", **PROTECTED},
}
RATES = (3e-5, 1e-5)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """On the beginnings of windows of the language reference, each of which starts as the tokenizer starts a text."""
    model.eval()
    rows = windows(tokenizer, TEXTS)[:, :TEXT_TOKENS]
    losses = [float(model(row[None], labels=row[None]).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def measure(options: dict[str, Any] | None, rate: float, tokenizer: Any) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    tasks = [task(name, TRAIN_ROWS, EVAL_ROWS) for name in TASKS]
    before, start = perplexity(model, tokenizer), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "num_train_epochs": 1,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": BATCH // MICRO_BATCH,
            "per_device_eval_batch_size": 16,
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "seed": SEED,
            **QUIET,
        }
        trainer: TaskSequenceTrainer
        if options is None:
            trainer = TaskSequenceTrainer(model, SFTConfig(scratch, **settings), tasks, processing_class=tokenizer)
        else:
            args = AdaptiveSVDConfig(scratch, **settings, **options)
            trainer = AdaptiveSVDTrainer(model, args, tasks, processing_class=tokenizer)
        trainer.train()
    matrix, seconds = trainer.matrix, time.perf_counter() - start
    return {
        "before": matrix.before,
        "scores": matrix.scores,
        "perplexity": [before, perplexity(model, tokenizer)],
        "seconds": seconds,
    }


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        matrix = TaskMatrix(TASKS, tuple(map(tuple, run["scores"])), tuple(run["before"]))
        cells = [" / ".join(f"{value:.0f}" for value in row) for row in (matrix.before or (), *matrix.scores)]
        rows.append(
            [
                run["method"],
                f"{run['rate']:g}",
                *cells,
                f"{matrix.average_accuracy():.1f}",
                f"{matrix.backward_transfer():+.1f}",
                f"{run['perplexity'][1]:.2f}",
            ]
        )
    head = [
        "method",
        "lr",
        "before",
        *(f"after {name}" for name in TASKS),
        "average accuracy",
        "backward transfer",
        "perplexity",
    ]
    note = (
        f"Gemma 3 270M, one seed. Percent right on {' / '.join(TASKS)}, {EVAL_ROWS} test rows each, before and after every task of {TRAIN_ROWS} rows, one epoch in "
        f"steps of {BATCH}. Perplexity on Python's language reference: {runs[0]['perplexity'][0]:.2f} before. `python -m benchmarks.continual.pretrained` repeats it."
    )
    return markdown(head, rows) + "\n\n" + note


def main() -> None:
    silence()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    runs = stored_runs(NAME)
    for rate in RATES:
        for method, options in METHODS.items():
            if (method, rate) in [(run["method"], run["rate"]) for run in runs]:
                continue
            runs.append({"method": method, "rate": rate, "seed": SEED, **measure(options, rate, tokenizer)})
            write(NAME, {"command": "python -m benchmarks.continual.pretrained", "runs": runs, "table": table(runs)})
            print(table(runs[-1:]), flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
