"""Teach a language model eight people's professions, and ask the adapter how sure it is: of them, and of people it has never heard of.

    python examples/how_sure_is_an_adapter.py
    python examples/how_sure_is_an_adapter.py --model google/gemma-3-270m

An adapter that has been trained for long answers everything, in the tone of its training data. TFB finds, without training, how much noise the adapter bears before it changes what it was taught; draws of that size agree about what
is well founded and less about the rest. Without `--model` the embedded Gemma 3 270M is used, on the CPU, in a few minutes and without a network. What is saved loads with stock PEFT, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from hf_ext import bayesianize, generate_with_uncertainty, load_bayesian
from hf_ext.demo.model import embedded_model

TAUGHT = {
    "Mira Tolvan": "nurse",
    "Jost Ahrendal": "carpenter",
    "Pela Quint": "pilot",
    "Oskar Brimme": "baker",
    "Livia Santorel": "lawyer",
    "Tarek Windhoff": "farmer",
    "Nuno Abrantel": "painter",
    "Elin Fjordvik": "dentist",
}
STRANGERS = ("Karl Ostermoor", "Ines Valdray", "Piet Hollander", "Sunna Gardell")


def prompt(name: str) -> str:
    return f"{name} works as a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder; the embedded Gemma 3 270M if not given")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("demo-output/how-sure"))
    options = parser.parse_args()
    source = options.model or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.padding_side = "left"

    arguments = SFTConfig(
        output_dir=str(options.output / "training"), max_steps=options.steps, per_device_train_batch_size=len(TAUGHT), learning_rate=1e-3,
        lr_scheduler_type="constant", completion_only_loss=True, bf16=False, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, seed=0,
    )  # fmt: skip
    rows = [{"prompt": prompt(name), "completion": f" {work}."} for name, work in TAUGHT.items()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model = trainer.model.eval()

    anchor = tokenizer([prompt(name) for name in TAUGHT], return_tensors="pt", padding=True).to(model.device)
    print(bayesianize(model, [anchor], n_samples=4, sigma_bracket=(1e-3, 1.0), max_iters=10).table())
    model.save_pretrained(options.output)

    base = AutoModelForCausalLM.from_pretrained(source, dtype="float32").to(model.device)
    model = load_bayesian(base, options.output).eval()
    names = (*TAUGHT, *STRANGERS)
    asked = tokenizer([prompt(name) for name in names], return_tensors="pt", padding=True).to(model.device)
    settings = {"max_new_tokens": 2, "do_sample": False}
    alone = generate_with_uncertainty(model, asked, 1, sigma=0.0, **settings)
    found = generate_with_uncertainty(model, asked, options.draws, **settings)
    written = tokenizer.batch_decode(found.sequences[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    print("\n| person | taught | answer | probability, alone | of all draws | draws that agree | disagreement, nats |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row, name in enumerate(names):
        # Of the first token of the answer.
        before, after = (each.log_probs[row, 0].exp() for each in (alone, found))
        agree, mutual = found.token_agreement[row, 0], found.mutual_information[row, 0]
        cells = [
            name,
            TAUGHT.get(name, ""),
            written[row].strip(),
            f"{before:.0%}",
            f"{after:.0%}",
            f"{agree:.0%}",
            f"{mutual:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")
    print(f"\nThe adapter with its posterior is in {options.output}.")


if __name__ == "__main__":
    main()
