"""Five tasks in a row on a small model: what is kept by adaptive SVD, by fine-tuning, by LoRA, and by methods that look back.

Every method learns the five tasks of `world` in two orders from models of three seeds; task matrices are kept. The first seed and order try two
learning rates, and the others take the one with the better average accuracy there.

    python -m benchmarks.continual.five_tasks [--seeds 0 1 2] [--orders 0 1]

Finished runs are kept in the results file, so the script can be stopped and continued, and several processes can share the seeds.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import get_peft_model
from transformers import LlamaForCausalLM
from trl import SFTConfig

from benchmarks.common import add_stored, markdown, spread, stored_runs, write
from benchmarks.continual.baselines import EWC, OSF, AdaptiveSVD, OLoRA, OptionTrainer, Replay, lora
from benchmarks.continual.world import LENGTH, ORDERS, pretrained_model, task, tokenizer
from benchmarks.training import QUIET, silence
from hf_ext.metrics.continual import TaskMatrix
from hf_ext.trainers.adaptive_svd import AdaptiveSVDConfig
from hf_ext.trainers.task_sequence import TaskSequenceTrainer

NAME = "continual_tasks"
TRAIN_ROWS, EPOCHS, BATCH = 800, 3, 32
FIRST = [0, 0]  # the order and seed that try all learning rates
# The second for adapters.
FULL_RATES, LORA_RATES = (1e-3, 3e-3), (3e-3, 1e-2)


@dataclass(frozen=True)
class Method:
    """A way to learn one task after another.

    Attributes:
        trainer: its class.
        rates: learning rates that are tried.
        config: arguments; those of an `AdaptiveSVDConfig` for `AdaptiveSVD`.
        prepare: what is done with the model first.
        looks_back: whether training reads something of earlier tasks: their rows, or their gradients.
    """

    trainer: type[TaskSequenceTrainer]
    rates: tuple[float, ...] = FULL_RATES
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda model: model
    looks_back: str = ""


class OSFWithRest(OSF):
    """Embeddings, norms and the output layer are trained too, as in ours."""

    rest = True


def uniform(share: float, **options: Any) -> Method:
    return Method(AdaptiveSVD, config={"rank_rule": "uniform", "target_retention": share, **options})


PLAIN, OURS = "fine-tuning", "adaptive SVD"
METHODS = {
    PLAIN: Method(OptionTrainer),
    "LoRA": Method(OptionTrainer, LORA_RATES, prepare=lambda model: get_peft_model(model, lora())),
    "O-LoRA": Method(OLoRA, LORA_RATES),
    "OSF of PEFT, 80 %": Method(OSF),
    "OSF of PEFT, 80 %, all else trained": Method(OSFWithRest),
    f"{OURS}, energy 99 %": Method(AdaptiveSVD, looks_back="mean energies"),
    f"{OURS}, the paper's ranks": Method(AdaptiveSVD, config={"rank_rule": "adaptive"}, looks_back="mean cosines"),
    f"{OURS}, 80 % of every layer": uniform(0.8),
    f"{OURS}, 80 %, formula as printed": uniform(0.8, projection="joint"),
    "EWC": Method(EWC, looks_back="gradients of 200 rows"),
    "replay": Method(Replay, looks_back="28 rows"),
}


def learn(method: Method, rate: float, order: Sequence[str], model: LlamaForCausalLM, seed: int) -> TaskMatrix:
    """The task matrix of one run; the model is copied."""
    kind = AdaptiveSVDConfig if issubclass(method.trainer, AdaptiveSVD) else SFTConfig
    with tempfile.TemporaryDirectory() as scratch:
        settings = kind(
            scratch,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=rate,
            max_length=LENGTH + 8,
            seed=seed,
            **QUIET,
            **method.config,
        )
        tasks = [task(name, TRAIN_ROWS) for name in order]
        trainer = method.trainer(method.prepare(copy.deepcopy(model)), settings, tasks, processing_class=tokenizer())
        trainer.train()
        return trainer.matrix


# -- the table ---------------------------------------------------------------------------------------------------------


def key(run: dict[str, Any]) -> list[Any]:
    return [run["method"], run["rate"], run["order"], run["seed"]]


def matrix_of(run: dict[str, Any]) -> TaskMatrix:
    order = ORDERS[run["order"]]
    return TaskMatrix(order, tuple(tuple(row) for row in run["scores"]), tuple(run["before"]))


def best_rate(runs: Sequence[dict[str, Any]], method: str) -> float | None:
    """The learning rate with the best average accuracy of a method in the first seed and order, when all were tried there."""
    tried = {
        run["rate"]: matrix_of(run).average_accuracy() or 0.0
        for run in runs
        if run["method"] == method and [run["order"], run["seed"]] == FIRST
    }
    return max(tried, key=lambda rate: tried[rate]) if len(tried) == len(METHODS[method].rates) else None


def chosen_runs(runs: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Those of a method at its best rate."""
    rate = best_rate(runs, method)
    return [run for run in runs if run["method"] == method and run["rate"] == rate]


def table(runs: Sequence[dict[str, Any]]) -> str:
    accuracies = {tuple(key(run)[2:]): matrix_of(run).average_accuracy() or 0.0 for run in chosen_runs(runs, PLAIN)}
    if not accuracies:
        return ""
    rows = []
    for name, method in METHODS.items():
        chosen = [run for run in chosen_runs(runs, name) if tuple(key(run)[2:]) in accuracies]
        if not chosen:
            continue
        matrices = [matrix_of(run) for run in chosen]
        found = [matrix.average_accuracy() or 0.0 for matrix in matrices]
        gains = [a - accuracies[tuple(key(run)[2:])] for a, run in zip(found, chosen, strict=True)]
        rows.append(
            [
                name,
                method.looks_back or "nothing",
                f"{chosen[0]['rate']:g}",
                spread(found),
                "" if name == PLAIN else f"{spread(gains)} ({sum(gain > 0 for gain in gains)} of {len(gains)})",
                spread([matrix.backward_transfer() or 0.0 for matrix in matrices]),
                spread([matrix.learning_accuracy() or 0.0 for matrix in matrices]),
            ]
        )
    seeds, orders = {run["seed"] for run in runs}, {run["order"] for run in runs}
    note = (
        f"Percent. Mean and standard deviation over {len(seeds)} seeds and {len(orders)} orders of the five tasks; the gain is that over {PLAIN} in the same "
        f"seed and order. LoRA and O-LoRA train neither embeddings nor output layer. {EPOCHS} epochs of at most {TRAIN_ROWS} rows per task. The learning rate is the better one of two in the first seed and order. "
        "`python -m benchmarks.continual.five_tasks` repeats it."
    )
    head = [
        "method",
        "reads of earlier tasks",
        "lr",
        "average accuracy",
        "gain",
        "backward transfer",
        "learning accuracy",
    ]
    return markdown(head, rows) + "\n\n" + note


def save(runs: list[dict[str, Any]]) -> None:
    add_stored(NAME, runs, key)
    write(NAME, {"command": "python -m benchmarks.continual.five_tasks", "runs": runs, "table": table(runs)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--orders", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    silence()
    runs = stored_runs(NAME)
    for seed in options.seeds:
        model = None
        for order in options.orders:
            for name in options.methods:
                best = None if [order, seed] == FIRST else best_rate(runs, name)
                for rate in METHODS[name].rates if best is None else (best,):
                    run: dict[str, Any] = {"method": name, "rate": rate, "order": order, "seed": seed}
                    if key(run) in [key(one) for one in runs]:
                        continue
                    model = model or pretrained_model(seed)
                    start = time.perf_counter()
                    matrix = learn(METHODS[name], rate, ORDERS[order], model, seed)
                    run |= {"scores": matrix.scores, "before": matrix.before}
                    runs.append(run | {"seconds": time.perf_counter() - start})
                    save(runs)
                    print(*key(run), f"{matrix.average_accuracy():.1f} {matrix.backward_transfer():.1f}", flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
