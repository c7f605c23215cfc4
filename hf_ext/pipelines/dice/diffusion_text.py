"""Texts, edited with a masked diffusion language model: LLaDA and its kin."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext.pipelines.dice.editing import Condition
from hf_ext.pipelines.dice.text import TextEditing


class DiceDiffusionTextPipeline(TextEditing, DiffusionPipeline):
    """Edits texts with a language model that fills in masks anywhere, such as LLaDA: the text is the answer to the prompt (https://huggingface.co/papers/2410.08207).

    It takes the model and the tokenizer of `LLaDA2Pipeline`: `from_pipe(other, tokenizer=other.tokenizer)`. All tokens of the text are edited at once.

    Args:
        model: anything with `(input_ids, attention_mask) -> logits` at the positions of the inputs, in which every token sees all others.
        tokenizer: with a mask token; a chat template is used if there is one.
        tau: share of noise in the last state, if `invert` is not told; by default 1 with masks, 0.9 with random tokens.
        lambda1: strength of the residual, if `edit` is not told.
        noise: `"mask"`, or `"random"` tokens.

    Raises:
        ValueError: the tokenizer has no mask token and `noise="mask"`.
    """

    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tau: float | None = None,
        lambda1: float = 0.7,
        noise: str = "mask",
    ) -> None:
        super().__init__()
        self._set_up(model, tokenizer, tau, lambda1, noise)

    def _prepare(self) -> None:
        """
        Raises:
            ValueError: what a token predicts does not depend on those behind it: the model is causal.
        """
        super()._prepare()
        two = torch.stack([self._ordinary[[0, 0]], self._ordinary[:2]])
        first, second = self.model(input_ids=two, attention_mask=torch.ones_like(two)).logits[:, 0]
        if torch.equal(first, second):
            raise ValueError(
                f"{type(self.model).__name__} is causal: a token does not see those behind it. Take a masked diffusion language model."
            )

    def _encoded(self, texts: list[str], prompts: list[str | None]) -> tuple[Condition, Tensor, Tensor]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows, own = [], []
        for text, prompt in zip(texts, prompts, strict=True):
            before, inside = self._before(prompt), self.tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor(before + inside + end))
            own.append(torch.tensor([False] * len(before) + [True] * len(inside) + [False] * len(end)))
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        fill = self.tokenizer.pad_token_id or 0
        ids = pad_sequence(rows, batch_first=True, padding_value=fill)
        return self._placed(texts, ids, pad_sequence(own, batch_first=True), {"attention_mask": mask})

    def _before(self, prompt: str | None) -> list[int]:
        """Tokens in front of the text."""
        if prompt is None:
            return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        message = {"role": "user", "content": prompt}
        return self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
