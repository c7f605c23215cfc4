"""End a response with the line of its answer, which models without an end of turn would go beyond."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from hf_ext.pipelines.roserag.prompts import RagPrompts


class AnswerComplete(StoppingCriteria):
    """Stop a row when the line after the marker has ended.

    Args:
        tokenizer: reads what was generated.
        prompts: knows the marker.
        prompt_length: tokens before the response.
    """

    def __init__(self, tokenizer: Any, prompts: RagPrompts, prompt_length: int) -> None:
        self._tokenizer, self._prompts, self._prompt_length = tokenizer, prompts, prompt_length
        self._with_newline: dict[int, bool] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [
            self._ends_line(row[-1]) and self._is_complete(row) for row in input_ids[:, self._prompt_length :].tolist()
        ]
        return torch.tensor(done, device=input_ids.device)

    def _ends_line(self, token: int) -> bool:
        """Whether a token has a newline; only then is the whole response read."""
        if token not in self._with_newline:
            self._with_newline[token] = "\n" in self._tokenizer.decode([token])
        return self._with_newline[token]

    def _is_complete(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return self._prompts.is_complete(text)
