"""Change one fact of a language model with OVERTONE and a LoRA adapter.

    python examples/edit_with_overtone.py
    python examples/edit_with_overtone.py --model google/gemma-3-270m --prompt "The capital of Australia is" --answer " Perth"

Without `--model` it edits the embedded Gemma 3 270M on the CPU, in about a minute and without a network. It prints what the
model answers before and after, to the edited prompt, to a paraphrase and to a prompt of the same form about something else,
and saves the adapter. The last one shows how far the edit spreads, which depends on what is trained more than on the loss.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ext.trainers.overtone import OvertoneConfig, OvertoneCurveCallback, OvertoneTrainer


def answer(model, tokenizer, prompt: str) -> str:
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder; the embedded Gemma 3 270M if not given")
    parser.add_argument("--prompt", default="The Eiffel Tower is located in the city of")
    parser.add_argument("--answer", default=" Rome", help="the new answer, with its leading space")
    parser.add_argument("--paraphrase", default="To see the Eiffel Tower, travel to the city of")
    parser.add_argument("--control", default="The Brandenburg Gate is located in the city of")
    parser.add_argument("--output", type=Path, default=Path("demo-output/overtone-edit"))
    options = parser.parse_args()

    path = options.model
    if path is None:
        from hf_ext.demo.model import embedded_model

        path = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [options.prompt, options.paraphrase, options.control]
    before = [answer(model, tokenizer, prompt) for prompt in prompts]

    on_cpu = not torch.cuda.is_available()
    config = OvertoneConfig(
        str(options.output),
        max_steps=40,  # an upper limit: training ends once every answer token is learnt
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        edit_append_eos=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=on_cpu,
        bf16=not on_cpu,
        activation_checkpointing=False,
    )
    trainer = OvertoneTrainer(
        model,
        config,
        train_dataset=Dataset.from_list([{"prompt": options.prompt, "completion": options.answer}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    curve = OvertoneCurveCallback(trainer.overtone_statistics)
    trainer.add_callback(curve)
    trainer.train()
    trainer.save_model()
    curve.save_json(options.output / "curve.json")

    for prompt, old in zip(prompts, before, strict=True):
        print(f"{prompt!r}\n  before: {old!r}\n  after:  {answer(trainer.model, tokenizer, prompt)!r}")
    print(f"{trainer.state.global_step} steps; NLL by answer position: {json.dumps(curve.to_dict()['nll'])}")
    print(f"adapter saved in {options.output}")


if __name__ == "__main__":
    main()
