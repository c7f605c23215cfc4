"""Pairs by the paper's rule against other pairs and losses, on a small model that copies facts out of its context.

A context has K facts, "k17 v4 .", and a question names a key; the response repeats the fact and gives its value. A Qwen2 of two layers learns this from scratch on
up to 4 facts, and is then asked with up to 24, where other facts mislead it: passages that answer other questions. Every arm gets the same responses that the base model wrote,
and differs in what it makes of them. While it learns, the base model also reads contexts with one passage more that states no fact, and it stops as soon as it can answer with 4 facts: it
then gets worse with the facts step by step instead of failing at the fifth, and is not so sure of itself that its samples are all the same.

    python -m benchmarks.rag.facts

Finished runs are kept in the results file, so the script can be stopped and continued.
"""

from __future__ import annotations

import random
import tempfile
import time
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.common import add_stored, markdown, seeds_to_run, spread, stored_runs, write
from benchmarks.training import QUIET, silence
from hf_ext.pipelines.roserag.prompts import RagPrompts, render
from hf_ext.trainers.roserag import RoseRAGConfig, RoseRAGDatasetBuilder, RoseRAGTrainer, Sampling, TransformersBackend
from hf_ext.trainers.roserag.selection import select

NAME, SEEDS = "rag_facts", (0, 1, 2, 3, 4)
KEYS = VALUES = 32
BASE_FACTS, TRAIN_FACTS, TEST_FACTS = (1, 2, 3, 4), (8, 12, 16), (4, 8, 16, 24)
BASE_PASSAGES, BASE_ROWS, BASE_RATE, BASE_ACCURACY, LOOK_EVERY = 5, 128_000, 1e-3, 97.0, 50
GAIN = 16
QUESTIONS, SAMPLES, TEST_QUESTIONS = 2000, 8, 512
EPOCHS, BATCH, RATES = 3, 32, (3e-4, 1e-3, 3e-3)
PROMPTS = RagPrompts(
    system="",
    passage="{text}",
    question="{passages}\n? {question}",
    hinted="{passages} {question} {answer}",
    plain="{prompt}",
)
# (loss, selection rule)
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "SFT on accepted responses": ({"orpo_lambda": 0.0}, "hardest"),
    "RoseRAG": ({}, "hardest"),
    "ORPO, random pairs": ({}, "random"),
    "ORPO, easiest pairs": ({}, "easiest"),
    "DPO, hardest pairs": ({"loss_type": ["margin_dpo"], "nll_weight": 0.0, "beta": 0.1}, "hardest"),
    "DPO, random pairs": ({"loss_type": ["margin_dpo"], "nll_weight": 0.0, "beta": 0.1}, "random"),
    "DPO with likelihood, hardest pairs": ({"loss_type": ["margin_dpo"], "beta": 0.1}, "hardest"),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "\n", ".", "?", "Answer:"]
    words += [f"k{n}" for n in range(KEYS)] + [f"v{n}" for n in range(VALUES)]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **specials)


def questions(count: int, facts: tuple[int, ...], seed: int, passages: int = 0) -> list[dict[str, Any]]:
    """Rows as the builder takes them; a passage is a fact, and the one asked for is gold. Up to so many `passages`, the others state no fact."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        keys = draw.sample(range(KEYS), draw.choice(facts))
        values, asked = [draw.randrange(VALUES) for _ in keys], draw.randrange(len(keys))
        documents = [
            {"title": "", "text": f"k{key} v{value} .", "is_gold": place == asked}
            for place, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
        for _ in range(draw.randint(0, max(0, passages - len(documents)))):
            idle = {"title": "", "text": f"v{draw.randrange(VALUES)} v{draw.randrange(VALUES)} .", "is_gold": False}
            documents.insert(draw.randint(0, len(documents)), idle)
        row = {"id": str(number), "question": f"k{keys[asked]}", "answers": [f"v{values[asked]}"]}
        rows.append({**row, "documents": documents})
    return rows


def prompt_of(row: dict[str, Any]) -> str:
    return render(tokenizer(), PROMPTS.inference(row["question"], row["documents"]), PROMPTS)


class StopWhenAble(TrainerCallback):
    """Ends the training of the base model when it answers well enough with as many facts as it is trained on."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % LOOK_EVERY == 0:
            found = accuracy(copy_of(model), max(BASE_FACTS), 9000 + self.seed)
            control.should_training_stop = found >= BASE_ACCURACY


def base_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    rows = []
    for row in questions(BASE_ROWS, BASE_FACTS, 1000 + seed, BASE_PASSAGES):
        response = PROMPTS.response(f"{row['question']} {row['answers'][0]} .", row["answers"][0])
        rows.append({"prompt": prompt_of(row), "completion": f" {response}"})
    model = Qwen2ForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            scratch,
            num_train_epochs=4,
            per_device_train_batch_size=64,
            learning_rate=BASE_RATE,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=50,
            seed=seed,
            **QUIET,
        )
        data, callbacks = Dataset.from_list(rows), [StopWhenAble(seed)]
        SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks).train()
    return copy_of(model)


def copy_of(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Without the forward that a trainer gave it."""
    fresh = Qwen2ForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def accuracy(model: Any, facts: int, seed: int) -> float:
    """Share of right answers with so many facts, in percent."""
    rows = questions(TEST_QUESTIONS, (facts,), 5000 + seed)
    backend = TransformersBackend(model, tokenizer(), batch_size=128)
    asked = [PROMPTS.inference(row["question"], row["documents"]) for row in rows]
    found = backend.write(asked, [[0]] * len(rows), Sampling(0.0, max_new_tokens=12), PROMPTS)
    right = [PROMPTS.read(texts[0]).answer == row["answers"][0] for texts, row in zip(found, rows, strict=True)]  # type: ignore[index]
    return 100 * sum(right) / len(right)


def pairs_by(rule: str, data: Dataset, seed: int) -> Dataset:
    """Other pairs out of the candidates of a built dataset."""
    rows = []
    for number, row in enumerate(data):
        candidates = row["candidates"]
        scores = [candidate["sum"] / candidate["tokens"] for candidate in candidates]
        pair = select(scores, [candidate["correct"] for candidate in candidates], rule, 100_000 * seed + number)
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}  # type: ignore[union-attr]
        rows.append({"prompt": row["prompt"], **{side: f" {candidates[n]['text']}" for side, n in sides.items()}})
    return Dataset.from_list(rows)


def train(base: Any, pairs: Dataset, options: dict[str, Any], rate: float, seed: int) -> Any:
    model = copy_of(base)
    with tempfile.TemporaryDirectory() as scratch:
        args = RoseRAGConfig(
            scratch,
            **{
                "num_train_epochs": EPOCHS,
                "per_device_train_batch_size": BATCH,
                "learning_rate": rate,
                "max_length": 256,
                "seed": seed,
                **QUIET,
                **options,
            },
        )
        reference = copy_of(base) if args.needs_reference else None
        trainer = RoseRAGTrainer(model, args, train_dataset=pairs, ref_model=reference, processing_class=tokenizer())
        trainer.train()
    return copy_of(model)


def measured(model: Any, seed: int) -> dict[str, float]:
    return {str(facts): accuracy(model, facts, seed) for facts in TEST_FACTS}


def best_rate(arm: str, runs: list[dict[str, Any]]) -> float:
    """The rate of an arm with the most right answers in the first seed."""
    tried = [run for run in runs if (run["arm"], run["seed"]) == (arm, SEEDS[0])]
    return max(tried, key=lambda run: run["accuracy"][str(GAIN)])["rate"]


def table(runs: list[dict[str, Any]]) -> str:
    cells = []
    before = {run["seed"]: run["accuracy"][str(GAIN)] for run in runs if run["arm"] == "base"}
    for arm in ("base", *ARMS):
        if arm not in {run["arm"] for run in runs}:
            continue
        rate = best_rate(arm, runs)
        mine = [run for run in runs if (run["arm"], run["rate"]) == (arm, rate)]
        row = [arm, f"{rate:g}" if rate else ""]
        for facts in TEST_FACTS:
            row.append(spread([run["accuracy"][str(facts)] for run in mine]))
        gains = [run["accuracy"][str(GAIN)] - before[run["seed"]] for run in mine]
        cells.append([*row, spread(gains, "+") if rate else ""])
    pairs = [run["pairs"] for run in runs if run["arm"] != "base"]
    head = ["trained on", "lr", *(f"{facts} facts" for facts in TEST_FACTS), f"gain, {GAIN} facts"]
    note = (
        f"Percent of {TEST_QUESTIONS} answers right; mean and standard deviation over {len(before)} seeds, each with a base model, questions and responses of its own. "
        f"{QUESTIONS} questions with {', '.join(map(str, TRAIN_FACTS))} facts, {SAMPLES} responses each, {min(pairs)} to {max(pairs)} pairs; {EPOCHS} epochs in steps of {BATCH}. "
        f"The learning rate is the best of {', '.join(f'{rate:g}' for rate in RATES)} in the first seed. `python -m benchmarks.rag.facts` repeats it."
    )
    return markdown(head, cells) + "\n\n" + note


def main() -> None:
    seeds = seeds_to_run(SEEDS)
    silence()
    runs = stored_runs(NAME)

    def key(run: dict[str, Any]) -> tuple[str, float, int]:
        return run["arm"], run["rate"], run["seed"]

    def done(**run: Any) -> None:
        runs.append(run)
        add_stored(NAME, runs, key)
        if len(runs) > 1:
            write(NAME, {"command": "python -m benchmarks.rag.facts", "runs": runs, "table": table(runs)})
        print(run, flush=True)

    for seed in seeds:
        wanted = [
            (arm, rate, seed) for arm in ARMS for rate in (RATES if seed == SEEDS[0] else [best_rate(arm, runs)])
        ]
        if not (missing := [run for run in [("base", 0.0, seed), *wanted] if run not in map(key, runs)]):
            continue
        start = time.perf_counter()
        base = base_model(seed)
        if missing[0][0] == "base":
            found = measured(base, seed)
            done(arm="base", rate=0.0, seed=seed, accuracy=found, seconds=time.perf_counter() - start)
        backend = TransformersBackend(base, tokenizer(), batch_size=128)
        builder = RoseRAGDatasetBuilder(
            backend,
            prompts=PROMPTS,
            n_hinted=0,
            n_unhinted=SAMPLES,
            sampling=Sampling(max_new_tokens=12),
            seed=seed,
            batch_size=64,
        )
        data = builder.build(questions(QUESTIONS, TRAIN_FACTS, 3000 + seed))
        for arm, rate, _ in missing:
            if arm != "base":
                settings, rule = ARMS[arm]
                model = train(base, pairs_by(rule, data, seed), settings, rate, seed)
                done(arm=arm, rate=rate, seed=seed, pairs=len(data), accuracy=measured(model, seed))
    print(table(runs))


if __name__ == "__main__":
    main()
