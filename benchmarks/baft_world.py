"""BaFT in a small world: facts changed in a model that knows an invented world by heart, and what else changes.

The world and the model are those of `benchmarks.overtone_world`: four layers, hidden size 128, words as tokens. Twelve facts are taught to an adapter at the output
of the third block (one edit after another: of the second and third), until the loss is below 0.02 nats per token or for 70 steps of Adam. LoReFT is
the gate "none"; LoRA adapts `down_proj` of the third block. Each arm runs with several learning rates.

Reliability and generality are shares of answers recited word for word, to the prompt of the edit and to another with the same meaning; locality is the share of
answer words that are as before: other relations of the same person, the same relation of others, and facts that have nothing to do with the edits.

    python -m benchmarks.baft_world [--seeds 0 1 2]

Finished runs are kept in the results file.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.common import add_stored, markdown, seeds_to_run, spread, stored_runs, write
from benchmarks.overtone_world import World, build, encode, rows
from benchmarks.training import edit_settings, silence
from hf_ext.demo.recipes import StopBelow
from hf_ext.trainers.baft import BaftTrainer, BaftTrainerConfig
from hf_ext.tuners.baft import BaftConfig

NAME, SEEDS, EDITS, STEPS, STOP, RATES = "baft_world", (0, 1, 2), 12, 70, 0.02, (3e-3, 1e-2, 3e-2)
UNRELATED = 100  # facts to measure on, and as many others to protect


@dataclass(frozen=True)
class Arm:
    """`adapter` without layers and positions; `more` for the trainer; `protect`: with a locality dataset."""

    name: str
    adapter: PeftConfig
    more: dict[str, Any] = field(default_factory=dict)
    protect: bool = False


LORA = LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[2], task_type="CAUSAL_LM")
BATCH = (
    Arm("LoRA", LORA),
    Arm("LoReFT", BaftConfig(gate="none")),
    Arm("BaFT, gates from 0.5", BaftConfig(gate_bias=0.0)),
    Arm("BaFT", BaftConfig()),
    Arm("BaFT, locality", BaftConfig(), protect=True),
)
ONE_BY_ONE = (
    Arm("LoRA", LORA),
    Arm("LoReFT", BaftConfig(gate="none")),
    Arm("BaFT, not balanced", BaftConfig(), {"load_balance_weight": 0.0}),
    Arm("BaFT", BaftConfig()),
    Arm("BaFT, locality", BaftConfig(), protect=True),
    Arm("BaFT, own bases, locality", BaftConfig(r=2), {"own_bases": True}, protect=True),
)
SHOWN = ("reliability", "generality", "same subject", "same relation", "unrelated")


@dataclass
class Task:
    """What is taught, what is protected, and what is measured: pairs of prompt and answer."""

    world: World
    edits: list[tuple[str, str]]
    protected: list[tuple[str, str]]
    probes: dict[str, list[tuple[str, str]]]


def task(world: World, seed: int) -> Task:
    records = random.Random(seed).sample(rows("synthkb_edits"), EDITS)
    asked = {r["prompt"] for r in records} | {prompt for r in records for prompt in r["rephrase"]}

    def near(key: str) -> list[tuple[str, str]]:
        found = [(q["prompt"], q["ground_truth"][0]) for r in records for q in r["locality"][key]]
        return [pair for pair in found if pair[0] not in asked]

    probes = {
        "reliability": [(r["prompt"], r["target_new"]) for r in records],
        "generality": [(prompt, r["target_new"]) for r in records for prompt in r["rephrase"]],
        "same subject": near("same_subject"),
        "same relation": near("same_relation"),
    }
    taken = asked | {prompt for pairs in probes.values() for prompt, _ in pairs}
    others = [(f["prompt"], f["completion"]) for f in world.facts if f["prompt"] not in taken]
    others = random.Random(seed).sample(others, 2 * UNRELATED)
    probes["unrelated"], protected = others[:UNRELATED], others[UNRELATED:]
    return Task(world, probes["reliability"], protected, probes)


def tokenizer_of(words: dict[str, int]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


def tokenised(words: dict[str, int], pairs: Sequence[tuple[str, str]]) -> Dataset:
    """Without an end token, as the world's sentences."""
    data = []
    for prompt, answer in pairs:
        before, after = ([words[word] for word in text.split()] for text in (prompt, answer))
        data.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return Dataset.from_list(data)


def teach(model: Any, arm: Arm, now: Task, pairs: Sequence[tuple[str, str]], rate: float, seed: int) -> int:
    """The steps that it took."""
    words = now.world.words
    with tempfile.TemporaryDirectory() as scratch:
        settings = edit_settings(scratch, len(pairs), STEPS, rate, seed)
        shared: dict[str, Any] = {
            "model": model,
            "train_dataset": tokenised(words, pairs),
            "processing_class": tokenizer_of(words),
        }
        if isinstance(arm.adapter, BaftConfig):
            args = BaftTrainerConfig(
                **settings, stop_loss=STOP, **arm.more, locality_batch_size=32 if arm.protect else None
            )
            protected = tokenised(words, now.protected) if arm.protect else None
            trainer: SFTTrainer = BaftTrainer(args=args, locality_dataset=protected, **shared)
        else:
            trainer = SFTTrainer(args=SFTConfig(**settings), callbacks=[StopBelow(1, STOP)], **shared)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.state.global_step


@torch.no_grad()
def predictions(model: nn.Module, words: dict[str, int], pairs: Sequence[tuple[str, str]]) -> tuple[Any, Any]:
    """(most likely words, labels) `(B, T)`; labels say where answers are, to the adapters too."""
    ids, labels = encode(words, pairs)
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[:, :-1].argmax(
        -1
    ), labels[:, 1:]


def measure(now: Task, arm: Arm, positions: str, rate: float, seed: int, one_by_one: bool) -> dict[str, Any]:
    adapter, model = copy.deepcopy(arm.adapter), copy.deepcopy(now.world.model)
    adapter.task_type = "CAUSAL_LM"
    if isinstance(adapter, BaftConfig):
        adapter.layers, adapter.positions = [1, 2] if one_by_one else [2], positions
    before = {name: predictions(model, now.world.words, pairs)[0] for name, pairs in now.probes.items()}
    torch.manual_seed(seed)
    model = get_peft_model(model, adapter)
    start = time.perf_counter()
    batches = [[pair] for pair in now.edits] if one_by_one else [now.edits]
    steps = [teach(model, arm, now, batch, rate, seed) for batch in batches]
    found: dict[str, Any] = {"steps": sum(steps) / len(steps), "seconds": time.perf_counter() - start}
    for name, pairs in now.probes.items():
        after, labels = predictions(model, now.world.words, pairs)
        answer = labels != -100
        if name in SHOWN[:2]:
            found[name] = ((after == labels) | ~answer).all(1).double().mean().item() * 100
        else:
            found[name] = (after == before[name])[answer].double().mean().item() * 100
    return found


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["setting"], run["arm"], run["positions"], run["rate"], run["seed"]


def table(runs: list[dict[str, Any]]) -> str:
    cells = []
    for setting, arms in (("batch", BATCH), ("one by one", ONE_BY_ONE)):
        for positions in ("l1+tail", "l1"):
            for arm in arms:
                for rate in RATES:
                    mine = [r for r in runs if key(r)[:4] == (setting, arm.name, positions, rate)]
                    if mine:
                        scores = [spread([run[name] for run in mine]) for name in SHOWN]
                        shown = positions if isinstance(arm.adapter, BaftConfig) else ""
                        cells.append(
                            [
                                setting,
                                arm.name,
                                shown,
                                f"{rate:g}",
                                *scores,
                                f"{statistics.mean(run['steps'] for run in mine):.0f}",
                            ]
                        )
    note = (
        f"{EDITS} facts; percent, mean and standard deviation over {len({run['seed'] for run in runs})} worlds, each with other facts; at most {STEPS} steps, of an edit alone where they come one by "
        "one. `python -m benchmarks.baft_world` repeats it."
    )
    return markdown(["setting", "adapter", "positions", "lr", *SHOWN, "steps"], cells) + "\n\n" + note


def main() -> None:
    seeds = seeds_to_run(SEEDS)
    silence()
    runs = stored_runs(NAME)
    plan = [("batch", positions, arm) for positions in ("l1+tail", "l1") for arm in BATCH]
    plan += [("one by one", "l1+tail", arm) for arm in ONE_BY_ONE]
    for seed in seeds:
        now = task(build(seed), seed)
        for setting, positions, arm in plan:
            if positions == "l1" and not isinstance(arm.adapter, BaftConfig):
                continue
            for rate in RATES:
                run = {"setting": setting, "arm": arm.name, "positions": positions, "rate": rate, "seed": seed}
                if key(run) in map(key, runs):
                    continue
                run |= measure(now, arm, positions, rate, seed, setting == "one by one")
                runs.append(run)
                add_stored(NAME, runs, key)
                write(NAME, {"command": "python -m benchmarks.baft_world", "runs": runs, "table": table(runs)})
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in run.items()}, flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
