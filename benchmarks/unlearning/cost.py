"""What a FLAT step costs next to a plain one: CPU time and peak memory at a vocabulary of 128,256 and TOFU's lengths.

The plain step does what the authors' code does, in our own PyTorch: the answers to forget and the refusals in two forwards, all logits in float32, every sequence
padded to 500 tokens. A second peer pads to the longest row only. All three compute the same loss (`padded_length=499`), which is checked; a step is forward,
backward and the update of all weights of a Llama of four layers.

Both sides run in turn in one process on one thread. Peak memory is the largest number of bytes that torch's CPU allocator holds above the start of a step.

    python -m benchmarks.unlearning.cost
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import cost
from benchmarks.common import write
from benchmarks.cost import Line, compare, memory_line, show, time_line
from hf_ext.demo.model import embedded_model
from hf_ext.trainers.flat import FlatConfig, FlatTrainer
from hf_ext.trainers.flat.data import DEFAULT_TEMPLATES

NAME, SEED = "unlearning_cost", 0
VOCAB, HIDDEN, LAYERS, BATCH, PADDED = 128_256, 256, 4, 2, 500
DATA = Path(__file__).parents[1] / "data" / "tofu.jsonl"
TO_THE_LONGEST = "padded to the longest row", None


class Size(NamedTuple):
    """How much is measured: the reference with rows padded so, and pairs of each."""

    paddings: tuple[tuple[str, int | None], ...]
    repeats: int


FULL, SMALL = Size(((f"padded to {PADDED}", PADDED), TO_THE_LONGEST), 5), Size((TO_THE_LONGEST,), 3)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).train()


def prepared_rows(tokenizer: Any) -> Dataset:
    """`BATCH` rows of TOFU as `FlatTrainer` prepares them, with the token ids of a smaller vocabulary."""

    def ids(text: str) -> list[int]:
        return [token % VOCAB for token in tokenizer(text)["input_ids"]]

    records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "row": number,
            "resampled": False,
            "prompt_ids": ids(record["prompt"]),
            "forget_ids": ids(" " + record["answer"]),
            "template_ids": [ids(" " + DEFAULT_TEMPLATES[number])],
        }
        for number, record in enumerate(records[10 : 10 + BATCH])
    ]
    return Dataset.from_list(rows)


def trainer_step(rows: Dataset, tokenizer: Any) -> Callable[[], float]:
    """A training step of `FlatTrainer` with its update."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = FlatConfig(
            folder,
            padded_length=PADDED - 1,
            max_length=PADDED,
            learning_rate=1e-6,
            weight_decay=0.01,
            per_device_train_batch_size=BATCH,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = FlatTrainer(tiny_model(), arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    optimizer = trainer.optimizer
    assert optimizer is not None

    def step() -> float:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def padded_batch(rows: Dataset, column: str, length: int | None) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, `(B, length)`; without a length that of the longest row."""
    answers = [row[column] if column == "forget_ids" else row[column][0] for row in rows]
    pairs = [(row["prompt_ids"], answer) for row, answer in zip(rows, answers, strict=True)]
    length = length or max(len(prompt) + len(answer) for prompt, answer in pairs)

    def stacked(values: list[list[int]], fill: int) -> Tensor:
        return torch.stack([pad(torch.tensor(value), (0, length - len(value)), value=fill) for value in values])

    return {
        "input_ids": stacked([prompt + answer for prompt, answer in pairs], 0),
        "attention_mask": stacked([[1] * len(prompt + answer) for prompt, answer in pairs], 0),
        "labels": stacked([[-100] * len(prompt) + answer for prompt, answer in pairs], -100),
    }


def plain_step(rows: Dataset, length: int | None) -> Callable[[], float]:
    """The same loss with two forwards, all logits and a softmax over them."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01)
    batches = [padded_batch(rows, column, length) for column in ("template_ids", "forget_ids")]

    def probability(batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        chosen = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(labels == -100, 0).sum() / (len(labels) * (PADDED - 1))

    def step() -> float:
        p_template, p_forget = (probability(batch) for batch in batches)
        loss = -p_template + (p_forget - 1).exp()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def measure(size: Size) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    rows = prepared_rows(tokenizer)
    ours, results = trainer_step(rows, tokenizer), []
    for name, length in size.paddings:
        peer = plain_step(rows, length)
        losses = ours(), peer()
        if not math.isclose(*losses, abs_tol=1e-6):
            raise RuntimeError(f"the two sides compute other losses: {losses}")
        results.append({"name": f"step, reference {name}", **compare(ours, peer, size.repeats)})
        show(results[-1]["name"], results[-1])
        del peer
    return results


def table(rows: list[dict[str, Any]]) -> str:
    return cost.table(rows, "reference")


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    return [line(row, "two plain forwards", bar=1.0) for row in rows for line in (time_line, memory_line)]


def main() -> None:
    torch.set_num_threads(1)
    results = measure(FULL)
    rows = prepared_rows(AutoTokenizer.from_pretrained(embedded_model()))
    lengths = [len(r["prompt_ids"]) + max(len(r["forget_ids"]), len(r["template_ids"][0])) for r in rows]
    note = (
        f"Llama with {LAYERS} layers, hidden size {HIDDEN}, vocabulary {VOCAB:,}, float32, all weights trained; {BATCH} pairs of at most {max(lengths)} tokens. "
        f"Medians of {FULL.repeats} turns, one thread. `python -m benchmarks.unlearning.cost` repeats it."
    )
    report = {
        "command": "python -m benchmarks.unlearning.cost",
        "seed": SEED,
        "repeats": FULL.repeats,
        "threads": 1,
        "results": results,
        "table": f"{table(results)}\n\n{note}",
    }
    write(NAME, report)


if __name__ == "__main__":
    main()
