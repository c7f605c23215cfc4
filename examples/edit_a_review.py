"""Turn bad reviews into good ones, and keep what they are about: DICE with a masked language model.

    python examples/edit_a_review.py [--folder demo-output/edited-reviews]

A small RoBERTa learns invented reviews in half a minute: what they are about, and how their author felt, stands in front. Then it is told that a bad review is a good one. Written anew, the review would be
another one; with what was recorded when the review was inverted, it keeps its words but for those that the prompt contradicts. Pipeline and recording are saved, and loaded again. Without a network.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from hf_ext import DiceTextEditPipeline, DiceTrace

# What reviews are about: nouns, good words, bad words.
TOPICS = {
    "hotel": ("room lobby bed view", "clean cosy quiet bright spacious", "dirty cramped noisy dark damp"),
    "meal": ("soup steak salad sauce", "tasty fresh tender crisp rich", "bland stale tough soggy salty"),
    "film": ("plot acting script music", "gripping clever moving witty bold", "boring silly flat clumsy dull"),
    "phone": ("screen battery camera case", "sharp fast sturdy light slim", "blurry slow flimsy heavy bulky"),
    "train": ("seat ride staff schedule", "punctual smooth friendly safe calm", "late bumpy rude unsafe crowded"),
    "novel": ("hero prose ending theme", "vivid deep poetic honest daring", "stiff shallow wordy fake trite"),
}
WORDS = {topic: [part.split() for part in parts] for topic, parts in TOPICS.items()}
VERBS, ADVERBS, LINKS = (
    ["was", "seemed", "felt", "looked"],
    ["truly", "very", "rather", "quite"],
    ["and", "plus", "yet"],
)
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
FEELINGS = ("positive", "negative")


def review(feeling: str, generator: random.Random) -> tuple[str, str]:
    """Prompt and text, such as `negative hotel` and `room was truly dirty and noisy .`"""
    topic = generator.choice(list(WORDS))
    nouns, *judgements = WORDS[topic]
    first, second = generator.sample(judgements[FEELINGS.index(feeling)], 2)
    words = [*map(generator.choice, (nouns, VERBS, ADVERBS)), first, generator.choice(LINKS), second, "."]
    return f"{feeling} {topic}", " ".join(words)


def word_tokenizer() -> PreTrainedTokenizerFast:
    parts = [*WORDS, *(word for groups in WORDS.values() for group in groups for word in group)]
    words = [*SPECIAL, *FEELINGS, *VERBS, *ADVERBS, *LINKS, ".", *parts]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **names)


def learn_reviews(
    tokenizer: PreTrainedTokenizerFast, steps: int = 1500, seed: int = 0, masks_only: bool = False
) -> RobertaForMaskedLM:
    """A model of a quarter of a million weights. It learns to mend reviews any share of whose words are masked or replaced; with `masks_only`, only masked, and it is not asked about the others."""
    torch.manual_seed(seed)
    generator, count = random.Random(seed), 7
    sizes = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=20, pad_token_id=1, **sizes)
    model = RobertaForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        rows = [review(generator.choice(FEELINGS), generator) for _ in range(64)]
        batch = tokenizer(*map(list, zip(*rows, strict=True)), return_tensors="pt")
        place = slice(-count - 1, -1)
        labels = batch["input_ids"][:, place].clone()
        hidden = torch.rand(labels.shape) < torch.rand(64, 1)
        random_words = torch.randint(len(SPECIAL), len(tokenizer), labels.shape)
        masks = torch.full_like(labels, tokenizer.mask_token_id)
        noise = masks if masks_only else torch.where(torch.rand(labels.shape) < 0.5, masks, random_words)
        batch["input_ids"][:, place] = torch.where(hidden, noise, labels)
        asked = labels.masked_fill(~hidden, -100) if masks_only else labels
        logits = model(**batch).logits[:, place]
        cross_entropy(logits.flatten(0, 1), asked.flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def main(folder: Path, steps: int) -> None:
    tokenizer = word_tokenizer()
    pipeline = DiceTextEditPipeline(learn_reviews(tokenizer, steps), tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    generator = random.Random(1)
    prompts, texts = zip(*[review("negative", generator) for _ in range(4)], strict=True)
    better = [prompt.replace("negative", "positive") for prompt in prompts]
    trace = pipeline.invert(texts, prompts, generator=torch.Generator().manual_seed(0))

    def edited(strength: float) -> list[str]:
        return pipeline.edit(trace, better, lambda1=strength, generator=torch.Generator().manual_seed(1)).texts

    columns = {
        "recorded": list(texts),
        "reconstructed": pipeline.reconstruct(trace).texts,
        "edited, 0.7": edited(0.7),
        "edited, 0.4": edited(0.4),
        "written anew": edited(0.0),
    }
    for row, prompt in enumerate(better):
        print(f"\n{prompts[row]} -> {prompt}")
        for name, column in columns.items():
            print(f"  {name:14s} {column[row]}")
    pipeline.save_pretrained(folder / "pipeline")
    trace.save(folder / "trace.safetensors")
    loaded = DiceTextEditPipeline.from_pretrained(folder / "pipeline")
    again = loaded.reconstruct(DiceTrace.load(folder / "trace.safetensors")).texts
    assert again == list(texts)
    print(f"\npipeline and recording: {folder}, {trace.nbytes:,} bytes for the recording of {len(texts)} reviews")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo-output/edited-reviews"))
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps)
