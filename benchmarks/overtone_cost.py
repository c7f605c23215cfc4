"""What OVERTONE costs next to TRL's own fused negative log-likelihood: time and peak memory, and how both grow.

Claim 1: the head. Forward and backward of the loss behind a one-layer model with Gemma 3's head (262,144 x 640, float32),
for 16 to 256 labelled tokens, with the head frozen (adapters) and trained (full fine-tuning).
Claim 2: the step. `training_step` plus optimizer update of OvertoneTrainer and SFTTrainer on Gemma 3 270M with LoRA, 64
labelled tokens.

Both sides run in turn in the same process, on one thread; a ratio is taken within each pair. Time is the CPU time of the
process: with one thread that is the wall time on an idle machine, whatever else the machine is doing. Peak memory is the largest number of bytes that
torch's CPU allocator holds above the start of the call, from the profiler's allocation record; weights are not in it.

    python -m benchmarks.overtone_cost
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer import add_fused_lm_head

from benchmarks import cost
from benchmarks.common import write
from benchmarks.cost import Line, compare, memory_line, show, time_line
from hf_ext.demo.model import embedded_model
from hf_ext.trainers.overtone import OvertoneConfig, OvertoneSettings, OvertoneStatistics, OvertoneTrainer
from hf_ext.trainers.overtone.head import add_overtone_head

NAME, VOCAB, HIDDEN, SEED = "overtone_cost", 262_144, 640, 0
STEP = "step, Gemma 3 270M, LoRA, 64 labelled of 96"


class Size(NamedTuple):
    """How much is measured: heads (trained, labelled tokens, tokens of the prompt), and pairs of each."""

    heads: tuple[tuple[bool, int, int], ...]
    repeats: int


FULL = Size(((False, 16, 0), (False, 64, 0), (False, 256, 0), (False, 64, 192), (True, 64, 0), (True, 256, 0)), 7)
SMALL = Size(((False, 64, 0), (True, 64, 0)), 3)


def head_rows(size: Size) -> list[dict[str, Any]]:
    """Claim 1: one model, the forward patched by TRL as the peer and patched once more by us."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    peer_forward = model.forward
    add_overtone_head(model, OvertoneSettings(), OvertoneStatistics())
    our_forward = model.forward

    def step(forward: Callable, ids: torch.Tensor, labels: torch.Tensor) -> None:
        forward(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()
        # Nothing may stay allocated: freeing it inside the other side's record would count as a gain there.
        model.zero_grad(set_to_none=True)

    rows = []
    for trained, labelled, prompt in size.heads:
        model.lm_head.weight.requires_grad_(trained)
        ids = torch.randint(VOCAB, (1, prompt + labelled + 1))
        labels = ids.clone()
        labels[:, : prompt + 1] = -100
        row = compare(
            lambda ids=ids, labels=labels: step(our_forward, ids, labels),
            lambda ids=ids, labels=labels: step(peer_forward, ids, labels),
            size.repeats,
        )
        name = f"head, {labelled} labelled of {prompt + labelled}, {'trained' if trained else 'frozen'}"
        rows.append({"name": name, "labelled": labelled, "prompt": prompt, "head_trained": trained, **row})
        show(name, row)
    return rows


def trainer_step(trainer: SFTTrainer) -> Callable[[], None]:
    """One training step with its optimizer update, as a function without arguments."""
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["labels"][:, 1:] != -100).sum()
    assert int(tokens) == 64, f"expected 64 labelled tokens, got {int(tokens)}"
    optimizer = trainer.optimizer
    assert optimizer is not None

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=tokens)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_row(repeats: int) -> dict[str, Any]:
    """Claim 2: whole training steps on Gemma 3 270M; four sequences of 24 tokens with 16 labels each."""
    path = embedded_model()
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1000, 50_000, (4, 24), generator=generator).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids])
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, trainer_class, config_class in (
            ("ours", OvertoneTrainer, OvertoneConfig),
            ("peer", SFTTrainer, SFTConfig),
        ):
            arguments = config_class(
                folder,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                per_device_train_batch_size=4,
                # Small enough that the data is never learnt: every token stays active in every repeat.
                learning_rate=1e-7,
                report_to=[],
                disable_tqdm=True,
            )
            trainer = trainer_class(
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
                arguments,
                train_dataset=data,
                processing_class=AutoTokenizer.from_pretrained(path),
                peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            )
            steps[name] = trainer_step(trainer)
    row = compare(steps["ours"], steps["peer"], repeats)
    show(STEP, row)
    return {"name": STEP, **row}


def measure(size: Size) -> list[dict[str, Any]]:
    rows = head_rows(size)
    gc.collect()
    return [*rows, step_row(size.repeats)]


def table(rows: list[dict[str, Any]]) -> str:
    return cost.table(rows, "TRL")


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    """TRL's loss is another, but the head and the model are read as often."""
    return [line(row, "TRL", bar=1.0) for row in rows for line in (time_line, memory_line)]


def main() -> None:
    torch.set_num_threads(1)
    rows = measure(FULL)
    report = {
        "command": "python -m benchmarks.overtone_cost",
        "seed": SEED,
        "repeats": FULL.repeats,
        "threads": 1,
        "time": "median CPU seconds of interleaved repeats on one thread; ratios within pairs",
        "memory": "peak of torch's CPU allocator above the start of the call, from the profiler's allocation record",
        "peer": "TRL's fused NLL head (add_fused_lm_head) and SFTTrainer",
        "results": rows,
        "table": table(rows),
    }
    write(NAME, report)


if __name__ == "__main__":
    main()
