"""From text to token ids with an exact boundary between prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Tokenises prompts, prompt-answer pairs and plain texts the way the evaluated model is meant to see them.

    The prompt ids are the same for teacher forcing and for generation, so a padding token that equals EOS, or a merge
    across the boundary, cannot shift the answer.

    Args:
        tokenizer: any tokenizer; padding side and padding token are not used.
        separator: text between prompt and answer. Its trailing white space opens the answer, the rest closes the prompt.
        add_special_tokens: put the tokenizer's leading special tokens (BOS) in front.
        chat_template: wrap each prompt as a user turn with the tokenizer's chat template; `separator` and
            `add_special_tokens` are then the template's business.
        sample: any text of the data, used to find out which special tokens the tokenizer puts in front.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        separator: str = " ",
        add_special_tokens: bool = True,
        chat_template: bool = False,
        sample: str = "a",
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._head = separator.rstrip()
        self._lead = "" if chat_template else separator[len(self._head) :]
        # Only what stands in front is kept: an EOS appended by the tokenizer would end the prompt before its answer.
        self.prefix = _leading_special_tokens(tokenizer, sample) if add_special_tokens else []

    def text(self, text: str) -> list[int]:
        """Ids of a plain text, with leading special tokens."""
        return self.prefix + self._ids(text)

    def prompt(self, prompt: str) -> list[int]:
        """Ids the model sees before it answers."""
        text = self._prompt_text(prompt)
        return self._ids(text) if self.chat_template else self.prefix + self._ids(text)

    def pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer that follows it.

        1. If the ids of the joined text begin with the ids of the prompt, the rest is the answer.
        2. Otherwise a token spans the boundary. The pieces are tokenised apart, since that is what a model that reads the
           prompt and then writes the answer does, provided that the ids still spell the same text.
        3. If they do not (a tokenizer that puts a space before every piece), the tokens both encodings share are the
           prompt, and the token across the boundary counts as part of the answer.
        """
        text = self._prompt_text(prompt)
        prompt_ids = self.prompt(prompt)
        prefix = [] if self.chat_template else self.prefix
        joined = prefix + self._ids(text + self._lead + answer)
        if len(joined) > len(prompt_ids) and joined[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, joined[len(prompt_ids) :]
        answer_ids = self._ids(self._lead + answer)
        if self.tokenizer.decode(prompt_ids + answer_ids) == self.tokenizer.decode(joined):
            return prompt_ids, answer_ids
        differing = (i for i, (a, b) in enumerate(zip(prompt_ids, joined, strict=False)) if a != b)
        shared = next(differing, len(joined) - 1)
        if shared == 0:
            raise ValueError(
                f"prompt {prompt!r} and answer {answer!r} share their first token; use another separator."
            )
        return joined[:shared], joined[shared:]

    def _prompt_text(self, prompt: str) -> str:
        if not self.chat_template:
            return prompt + self._head
        turn = [{"role": "user", "content": prompt}]
        return str(self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase, sample: str) -> list[int]:
    plain = list(tokenizer(sample, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(sample)["input_ids"])
    starts = range(len(full) - len(plain) + 1)
    return full[: next(start for start in starts if full[start : start + len(plain)] == plain)]


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Stacks ragged rows: (`input_ids`, `attention_mask`), both int64 [rows, longest], padded on `"left"` or `"right"`."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask
