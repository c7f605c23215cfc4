"""Texts, edited with a masked language model."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext.pipelines.dice.editing import Condition
from hf_ext.pipelines.dice.text import TextEditing


class DiceTextEditPipeline(TextEditing, DiffusionPipeline):
    """Edits texts with any `AutoModelForMaskedLM`: `<s> prompt </s></s> text </s>`, of which the text is edited (https://huggingface.co/papers/2410.08207).

    Args:
        model: a masked language model, `AutoModelForMaskedLM`.
        tokenizer: its fast tokenizer.
        tau: share of noise in the last state, if `invert` is not told; by default 0.9 with random tokens, 1 with masks.
        lambda1: strength of the residual, if `edit` is not told.
        noise: `"random"` tokens, for models that were trained on some (BERT and its kin), or `"mask"`.

    Raises:
        ValueError: the tokenizer is slow, or has no mask token and `noise="mask"`.
    """

    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tau: float | None = None,
        lambda1: float = 0.7,
        noise: str = "random",
    ) -> None:
        super().__init__()
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is slow and cannot say where the text begins; load it with use_fast=True."
            )
        self._set_up(model, tokenizer, tau, lambda1, noise)

    def _encoded(self, texts: list[str], prompts: list[str | None]) -> tuple[Condition, Tensor, Tensor]:
        pairs = (texts,) if prompts[0] is None else (prompts, texts)
        found = self.tokenizer(*pairs, padding=True, return_tensors="pt")
        own = [[each == len(pairs) - 1 for each in found.sequence_ids(row)] for row in range(len(texts))]
        others = dict(found)
        return self._placed(texts, others.pop("input_ids"), torch.tensor(own), others)
