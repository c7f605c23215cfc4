"""How an edit of tokens is judged: what came back, what was kept, what changed, and whether it says what it should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ext._lazy import optional_import
from hf_ext._modes import evaluating


def exactness(found_BN: Tensor, source_BN: Tensor) -> float:
    """Share of rows in which every token came back."""
    return (found_BN == source_BN).all(-1).float().mean().item()


def preserved(found_BN: Tensor, source_BN: Tensor, keep_BN: Tensor) -> float:
    """Share of the positions that an edit should leave alone whose tokens it left alone.

    Args:
        keep_BN: bool, these positions.

    Raises:
        ValueError: there are none.
    """
    if not keep_BN.any():
        raise ValueError("keep_BN: the mask is False everywhere; name at least one position.")
    return (found_BN == source_BN)[keep_BN].float().mean().item()


def edit_strength(found_BN: Tensor, source_BN: Tensor, editable_BN: Tensor) -> float:
    """Share of the editable positions whose tokens changed."""
    return 1 - preserved(found_BN, source_BN, editable_BN)


def edit_distance(found: Sequence[str], source: Sequence[str]) -> float:
    """Mean Levenshtein distance of words, as a share of the longer text; needs nltk.

    Raises:
        ImportError: nltk is not installed.
    """
    distance = optional_import("nltk", "diffusers").edit_distance
    pairs = [(a.split(), b.split()) for a, b in zip(found, source, strict=True)]
    return sum(distance(a, b) / max(len(a), len(b), 1) for a, b in pairs) / len(pairs)


def flip_rate(classify: Callable[[list[str]], Iterable[Any]], found: Sequence[str], labels: Sequence[Any]) -> float:
    """Share of texts that a classifier gives the label that the edit was to bring about.

    Args:
        classify: labels of texts: a function, or a `text-classification` pipeline of transformers.
        labels: what each text should be.
    """
    predicted = [each["label"] if isinstance(each, dict) else each for each in classify(list(found))]
    return sum(a == b for a, b in zip(predicted, labels, strict=True)) / len(labels)


@torch.no_grad()
def pseudo_perplexity(model: Any, tokenizer: Any, texts: Sequence[str], prompts: Sequence[str] | None = None) -> float:
    """Perplexity of texts under a masked language model: every token is predicted with itself alone masked (https://huggingface.co/papers/1910.14659).

    Args:
        prompts: stand before the texts, and are not predicted.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for row, text in enumerate(texts):
            inputs = (
                tokenizer(text, return_tensors="pt")
                if prompts is None
                else tokenizer(prompts[row], text, return_tensors="pt")
            )
            own = int(prompts is not None)
            places = torch.tensor([place for place, part in enumerate(inputs.sequence_ids(0)) if part == own])
            count += len(places)
            # A few at a time: logits are of every position.
            for some in places.split(8):
                rows = torch.arange(len(some))
                batch = {name: each.repeat(len(some), 1).to(model.device) for name, each in inputs.items()}
                labels = batch["input_ids"][rows, some]
                batch["input_ids"][rows, some] = tokenizer.mask_token_id
                logits = model(**batch).logits[rows, some].float()
                total += F.cross_entropy(logits, labels, reduction="sum").item()
    return math.exp(total / count)


def structure_distance(features: Callable[[Tensor], Tensor], found: Tensor, source: Tensor) -> float:
    """Mean squared difference of the cosine similarities among the patches of a picture (https://huggingface.co/papers/2201.00424); 0 is the same structure.

    Args:
        features: patches of pictures, `(B, 3, H, W)` to `(B, P, d)`. Published figures take the keys of the last layer of DINO ViT-B/8.
    """

    def similarities(pictures: Tensor) -> Tensor:
        directions = F.normalize(features(pictures).float(), dim=-1)
        return directions @ directions.mT

    return F.mse_loss(similarities(found), similarities(source)).item()
