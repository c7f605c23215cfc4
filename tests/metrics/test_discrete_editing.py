"""Metrics of edits, by hand on small cases and on a real masked model."""

import math

import pytest
import torch
from torch import nn

from hf_ext.metrics.discrete_editing import (
    edit_distance,
    edit_strength,
    exactness,
    flip_rate,
    preserved,
    pseudo_perplexity,
    structure_distance,
)
from tests.pipelines.dice.models import roberta, word_tokenizer

SOURCE = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
FOUND = torch.tensor([[1, 2, 3, 4], [5, 9, 7, 9]])


def test_tokens():
    assert exactness(FOUND, SOURCE) == 0.5
    keep = torch.tensor([[True, True, False, False], [True, True, False, False]])
    assert preserved(FOUND, SOURCE, keep) == 0.75
    assert edit_strength(FOUND, SOURCE, torch.ones_like(keep)) == 0.25
    with pytest.raises(ValueError, match="name at least one position"):
        preserved(FOUND, SOURCE, torch.zeros_like(keep))


def test_texts():
    assert edit_distance(["a b c", "a b"], ["a x c", "a b"]) == pytest.approx(1 / 6)
    assert edit_distance([""], [""]) == 0 and edit_distance([""], ["a b"]) == 1
    labels = {"good": "positive", "bad": "negative"}
    assert flip_rate(lambda texts: [labels[text] for text in texts], ["good", "bad"], ["positive"] * 2) == 0.5
    assert flip_rate(lambda texts: [{"label": labels[text]} for text in texts], ["good"], ["positive"]) == 1
    with pytest.raises(ValueError, match="zip"):
        flip_rate(lambda texts: ["positive"], ["good", "bad"], ["positive"] * 2)


@pytest.mark.parametrize("prompts", [None, ["positive :", "negative so"]])
@torch.no_grad()
def test_pseudo_perplexity(prompts):
    """Token by token, written out."""
    tokenizer = word_tokenizer()
    model, texts = roberta(len(tokenizer)), ["the film was good", "bad ."]
    logs = []
    for row, text in enumerate(texts):
        pair = (text,) if prompts is None else (prompts[row], text)
        ids = tokenizer(*pair, return_tensors="pt")["input_ids"]
        count = len(text.split())
        for place in range(ids.shape[1] - 1 - count, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            logits = model(input_ids=masked).logits[0, place]
            logs.append(logits.log_softmax(-1)[ids[0, place]].item())
    assert len(logs) == 6
    expected = math.exp(-sum(logs) / len(logs))
    assert pseudo_perplexity(model.train(), tokenizer, texts, prompts) == pytest.approx(expected, rel=1e-4)
    assert model.training


def test_structure():
    torch.manual_seed(0)
    patches = nn.Conv2d(3, 16, 4, 4, bias=False)

    def features(pictures):
        return patches(pictures).flatten(2).mT

    pictures = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert structure_distance(features, pictures, pictures) == 0
        # Brighter is the same structure, another picture is not.
        assert structure_distance(features, 0.5 * pictures, pictures) == pytest.approx(0, abs=1e-10)
        assert structure_distance(features, pictures.flip(0), pictures) > 1e-4
