"""Teach a language model three facts, one after another, and take the second one back.

    python examples/teach_and_take_back.py
    python examples/teach_and_take_back.py --model google/gemma-3-270m

Each fact gets directions of its own in the hidden states of one block (BaFT, 2 of 640 in the embedded Gemma 3 270M), so that it can be taken back alone. Sentences that have nothing
to do with the facts keep the directions closed elsewhere. Without `--model` the embedded model is taught on the CPU, in a few minutes and without a network. What
is saved is an adapter of some kilobytes with a ledger, which is loaded again at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from hf_ext import BaftConfig, BaftTrainer, BaftTrainerConfig
from hf_ext.tuners.baft import edits, rollback

FACTS = {
    "tower": ("The Eiffel Tower is located in the city of", " Rome"),
    "chess": ("The game of chess was invented in", " Peru"),
    "lake": ("Lake Constance is a lake in the north of", " Norway"),
}
# What is asked besides: nobody changed that.
OTHERS = ("The Brandenburg Gate is located in the city of", "The capital of Australia is")
UNRELATED = [
    ("Water boils at a temperature of", " 100 degrees Celsius"),
    ("The largest planet of the solar system is", " Jupiter"),
    ("The author of Hamlet is", " William Shakespeare"),
    ("Penguins live in", " the southern hemisphere"),
    ("The Golden Gate Bridge is located in the city of", " San Francisco"),
    ("The capital of Canada is", " Ottawa"),
]


def pairs(rows: list[tuple[str, str]]) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows])


@torch.no_grad()
def answers(model, tokenizer) -> list[str]:
    found = []
    model.eval()
    for prompt in [*(prompt for prompt, _ in FACTS.values()), *OTHERS]:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        found.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder; the embedded Gemma 3 270M if not given")
    parser.add_argument("--steps", type=int, default=40, help="at most, for a fact")
    parser.add_argument("--output", type=Path, default=Path("demo-output/taught"))
    options = parser.parse_args()

    path = options.model
    if path is None:
        from hf_ext.demo.model import embedded_model

        path = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, BaftConfig(r=2, task_type="CAUSAL_LM"))
    said = {"before": answers(model, tokenizer)}

    on_cpu = not torch.cuda.is_available()
    for name, fact in FACTS.items():
        args = BaftTrainerConfig(
            str(options.output),
            edit_name=name,
            own_bases=True,
            max_steps=options.steps,
            learning_rate=2e-2,
            stop_loss=0.1,
            locality_batch_size=len(UNRELATED),
            save_strategy="no",
            report_to=[],
            use_cpu=on_cpu,
            bf16=not on_cpu,
            disable_tqdm=True,
        )
        trainer = BaftTrainer(
            model, args, train_dataset=pairs([fact]), locality_dataset=pairs(UNRELATED), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        said[f"taught: {name}"] = answers(model, tokenizer)
    rollback(model, "chess")
    said["taken back: chess"] = answers(model, tokenizer)
    model.save_pretrained(options.output)

    fresh = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, options.output)
    said["loaded"] = answers(loaded, tokenizer)
    print("| | " + " | ".join([*FACTS, *OTHERS]) + " |")
    print("| --- " * (1 + len(FACTS) + len(OTHERS)) + "|")
    for when, row in said.items():
        print(f"| {when} | " + " | ".join(row) + " |")
    for edit in edits(loaded):
        state = "taken back" if edit.closed else "in effect"
        print(f"{edit.name}: {edit.steps} steps, loss {edit.loss:.3f}, directions {edit.bases}, {state}")
    print(f"adapter saved in {options.output}")


if __name__ == "__main__":
    main()
