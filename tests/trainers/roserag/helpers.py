"""A writer and scorer whose answers are known, and small models that can be trained."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_ext.trainers.roserag.backends import BackendError
from hf_ext.trainers.roserag.sampling import seed_of
from tests.pipelines.roserag.helpers import ANSWERS, CHAT, word_tokenizer

COUNTRIES = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Peru": "Lima"}


def question_rows(count: int = 4):
    """Questions, each with a passage that tells and one that does not."""
    names = list(COUNTRIES)
    rows = []
    for number in range(count):
        country = names[number % len(names)]
        told = {"title": country, "text": f"The capital of {country} is {COUNTRIES[country]}.", "is_gold": True}
        documents = [told, {"title": "Sea", "text": "The sea is wide.", "is_gold": False}]
        question = {"id": f"q{number}", "question": f"What is the capital of {country}?"}
        rows.append({**question, "answers": [COUNTRIES[country]], "documents": documents})
    return rows


class ScriptedBackend:
    """Writes a right or a wrong answer by the seed alone, and scores by the text alone."""

    identity = "scripted@1"

    def __init__(self, fails=()):
        self.fails, self.written, self.scored = set(fails), 0, 0

    def write(self, conversations, seeds, sampling, prompts):
        found = []
        for messages, own in zip(conversations, seeds, strict=True):
            text = str(messages)
            if any(name in text for name in self.fails):
                found.append(BackendError("scripted to fail"))
                continue
            self.written += len(own)
            if messages[-1]["content"] == prompts.last_question:
                found.append([f"Answer: {messages[-2]['content'].split()[1]}" for _ in own])
            elif "is known to be" in text:
                gold = text.partition("is known to be: ")[2].split("\\n")[0]
                found.append([f"Because {gold if seed % 3 else 'Lyon'} w{seed % 50} [1]." for seed in own])
            else:
                gold = next(city for country, city in COUNTRIES.items() if f"capital of {country}?" in text)
                found.append([f"Reason w{seed % 50}.\nAnswer: {gold if seed % 2 else 'Bern'}\nmore" for seed in own])
        return found

    def prompt(self, messages, prompts):
        return messages

    def score(self, prompt, responses, prompts):
        self.scored += len(responses)
        return [[-(seed_of(text, n) % 1000) / 100 for n in range(1 + len(text) % 5)] for text in responses]


def tiny_policy(seed: int = 0, template=CHAT):
    """A Qwen2 of two layers and its tokenizer of words."""
    import torch

    torch.manual_seed(seed)
    tokenizer = word_tokenizer(template)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config), tokenizer


def preference_rows(count: int = 8, template=CHAT):
    """Pairs about words, as conversations or, without a template, as texts."""
    rows = []
    for n in range(count):
        prompt, chosen = f"Question: w{n} w{n + 1}", f"Reason w{n}.\nAnswer: {ANSWERS[n % 4]}"
        rejected = f"Reason.\nAnswer: {ANSWERS[(n + 1) % 4]}"
        if template is None:
            rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
        else:
            turns = [
                [{"role": r, "content": c}]
                for r, c in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
            ]
            rows.append(dict(zip(("prompt", "chosen", "rejected"), turns, strict=True)))
    return rows
