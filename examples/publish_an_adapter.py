"""Make an adapter, write its card, and publish it.

Without an argument the result goes to the folder my-adapter and no network is needed. With one, as in
`python examples/publish_an_adapter.py user/my-adapter`, it goes to the Hub, or to the loopback Hub of docs/PUBLISHING.md.
"""

from __future__ import annotations

import sys
import tempfile

from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext import RoseLoraConfig, publish
from hf_ext.model_cards import check_adapter, save


def main(repo_id: str | None) -> None:
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    adapter = RoseLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], total_step=100)
    # The code in the card is run before publishing, and loads the base model from where this one came from.
    with tempfile.TemporaryDirectory() as base:
        LlamaForCausalLM(config).save_pretrained(base)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), adapter)
        publish_or_save(model, repo_id)


def publish_or_save(model: PeftModel, repo_id: str | None) -> None:
    facts = {
        "base_model": "user/tiny-llama",
        "license": "apache-2.0",
        "intended_use": "A demonstration of publishing.",
        "out_of_scope": "Everything else: the weights are random.",
        "factors": "None: the model knows no language.",
        "ethics": "Nothing was learnt, so nothing sensitive was.",
        "caveats": "Load it to see that it loads, and delete it.",
    }
    if repo_id is None:
        folder = save(model, "my-adapter", run_snippet=True, **facts)
        check_adapter(folder, model)
        print((folder / "README.md").read_text())
    elif commit := publish(model, repo_id, **facts):
        print(commit.commit_url)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
