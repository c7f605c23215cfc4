"""Bad reviews made good: what of them is kept, with DICE, with masked inpainting, and written anew.

The world is that of `examples/edit_a_review.py`: a RoBERTa of a quarter of a million weights, trained on invented reviews of seven words. 256 negative ones of its kind get a positive prompt. An edit is right where both
judgements are good ones of the topic; what should stay are the other five words. Perplexity is that of the model itself under the positive prompt, of 64 of them.

    python -m benchmarks.dice_text [--seeds 0 1 2]
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import markdown, run_seeds, spread
from examples.edit_a_review import WORDS, learn_reviews, review, word_tokenizer
from hf_ext import DiceTextEditPipeline, DiceTrace
from hf_ext.metrics.discrete_editing import edit_distance, exactness, flip_rate, preserved, pseudo_perplexity

NAME, SEEDS, COUNT = "dice_text", (0, 1, 2), 256
# Places of the judgements among the seven words.
JUDGED = [3, 5]
# Arm: tau, anchor, arguments of an edit.
ARMS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "written anew": (1.0, "auto", {"lambda1": 0.0}),
    "written anew from 70 % noise": (0.7, "auto", {"lambda1": 0.0}),
    **{
        f"DICE, tau {tau}, lambda {strength}": (tau, "auto", {"lambda1": strength})
        for tau in (0.7, 0.9)
        for strength in (0.2, 0.25, 0.5, 0.7, 0.9)
    },
    "published anchor, tau 0.9, lambda 0.7": (0.9, "model", {"lambda1": 0.7}),
    "one-hot anchor, tau 0.9, lambda 0.7": (0.9, "onehot", {"lambda1": 0.7}),
}


def reviews(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Prompts, texts, prompts of the edits."""
    generator = random.Random(1000 + seed)
    rows = [review("negative", generator) for _ in range(COUNT)]
    prompts, texts = map(list, zip(*rows, strict=True))
    return prompts, texts, [prompt.replace("negative", "positive") for prompt in prompts]


def feeling(prompts: list[str]) -> Callable[[list[str]], list[str]]:
    """Says of texts on the topics of prompts whether both of their judgements are positive or negative ones."""

    def classify(texts: list[str]) -> list[str]:
        found = []
        for prompt, text in zip(prompts, texts, strict=True):
            words, judgements = text.split(), WORDS[prompt.split()[1]][1:]
            both = [all(words[place] in kind for place in JUDGED) for kind in judgements]
            found.append("positive" if both[0] else "negative" if both[1] else "neither")
        return found

    return classify


@torch.no_grad()
def inpainted(
    pipe: DiceTextEditPipeline, trace: DiceTrace, prompts: list[str], seed: int, places: list[int] | None
) -> Tensor:
    """Masks at given places, or at those of the trace's last state, filled one after another, the surest first; the other words are left alone."""
    masks = trace.state(len(trace.states) - 1) != trace.tokens
    if places is not None:
        masks = torch.zeros_like(masks)
        masks[:, places] = True
    condition, generator = pipe._conditions(trace, prompts), torch.Generator().manual_seed(seed)
    tokens = torch.where(masks, pipe.tokenizer.mask_token_id, trace.tokens)
    while masks.any():
        logits = pipe._denoise(trace, tokens, condition, 0.0)
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view_as(tokens)
        sure = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0].masked_fill(~masks, -1.0)
        chosen = torch.nn.functional.one_hot(sure.argmax(-1), tokens.shape[1]).bool() & masks
        tokens, masks = torch.where(chosen, drawn, tokens), masks & ~chosen
    return tokens


def measure(seed: int) -> list[dict[str, Any]]:
    tokenizer = word_tokenizer()
    pipe = DiceTextEditPipeline(learn_reviews(tokenizer, seed=seed), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    prompts, texts, better = reviews(seed)
    keep = torch.ones(COUNT, 7, dtype=torch.bool)
    keep[:, JUDGED] = False
    runs = []

    def generator(first: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * first + seed)

    def judged(arm: str, trace: DiceTrace, found: Tensor, exact: float | None) -> None:
        words = tokenizer.batch_decode(found)
        runs.append(
            {
                "seed": seed,
                "arm": arm,
                "positive": flip_rate(feeling(prompts), words, ["positive"] * COUNT),
                "kept": preserved(found, trace.tokens, keep),
                "distance": edit_distance(words, texts),
                "perplexity": pseudo_perplexity(pipe.model, tokenizer, words[:64], better[:64]),
                "exact": exact,
            }
        )
        print(runs[-1], flush=True)

    for arm, (tau, anchor, options) in ARMS.items():
        trace = pipe.invert(texts, prompts, tau=tau, anchor=anchor, generator=generator(1))
        found = pipe.edit(trace, better, generator=generator(2), output_type="seq", **options).sequences
        back = pipe.reconstruct(trace, output_type="seq").sequences
        judged(arm, trace, found, exactness(back, trace.tokens))
    for tau in (0.7, 0.9):
        trace = pipe.invert(texts, prompts, tau=tau, generator=generator(1))
        judged(f"inpainting of {tau:.0%} of the words", trace, inpainted(pipe, trace, better, seed, None), None)
    judged(
        "inpainting of the judgements, given where they are", trace, inpainted(pipe, trace, better, seed, JUDGED), None
    )

    masked = DiceTextEditPipeline(learn_reviews(tokenizer, seed=seed, masks_only=True), tokenizer, noise="mask")
    masked.set_progress_bar_config(disable=True)
    pipe = masked
    for anchor in ("model", "corrected", "onehot", "auto"):
        # As the authors: all words are predicted in every step. By default, those that are masked.
        how = {"tau": 1.0} if anchor == "auto" else {"tau": 0.9, "carry_over": False}
        trace = masked.invert(texts, prompts, anchor=anchor, generator=generator(1), **how)
        found = masked.edit(trace, better, lambda1=0.7, generator=generator(2), output_type="seq").sequences
        back = masked.reconstruct(trace, output_type="seq").sequences
        judged(f"trained on masks alone: {anchor}", trace, found, exactness(back, trace.tokens))
    return runs


NAMES = {
    "trained on masks alone: model": "model trained on masks alone, published anchor",
    "trained on masks alone: corrected": "model trained on masks alone, corrected anchor",
    "trained on masks alone: onehot": "model trained on masks alone, one-hot anchor",
    "trained on masks alone: auto": "model trained on masks alone, one-hot anchor, tau 1, only masks predicted",
}


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    arms = [
        "written anew",
        "written anew from 70 % noise",
        *(run["arm"] for run in runs if run["arm"].startswith("inpainting")),
        *ARMS,
        *NAMES,
    ]
    for arm in dict.fromkeys(arms):
        mine = [run for run in runs if run["arm"] == arm]
        shares = [spread([100 * run[name] for run in mine]) for name in ("positive", "kept", "distance")]
        perplexity = spread([run["perplexity"] for run in mine])
        exact = "" if mine[0]["exact"] is None else spread([100 * run["exact"] for run in mine])
        rows.append([NAMES.get(arm, arm), *shares, perplexity, exact])
    head = ["", "both judgements good", "other words kept", "edit distance", "perplexity", "exact reconstructions"]
    note = f"{COUNT} reviews, {len({run['seed'] for run in runs})} seeds, percent but for the perplexity, mean and standard deviation. lambda is lambda1, and lambda2 = 1 - lambda1. `python -m benchmarks.dice_text` repeats it."
    return markdown(head, rows) + "\n\n" + note


def main() -> None:
    run_seeds(NAME, SEEDS, measure, table, lambda run: (run["arm"], run["seed"]))


if __name__ == "__main__":
    main()
