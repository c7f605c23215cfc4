"""At which tokens hidden states are edited: a small grammar, and the masks that it gives for batches as models get them.

`f2` and `l3` are the first two and the last three tokens of a prompt, `tail` is its last token and every token after the prompt, `all` is every token; parts are
joined by `+`. A prompt ends where an answer begins: with several turns, or several sequences in a row, there are several prompts.

Shapes: B rows, T tokens of a call, P tokens of a prompt.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # label of tokens that are no answer


class Positions(NamedTuple):
    """What the grammar says: numbers of first and last tokens of a prompt, and whether the tail, or every token, is edited."""

    first: int = 0
    last: int = 0
    tail: bool = False
    everything: bool = False

    def need_ends(self) -> bool:
        """Whether they depend on where a prompt ends."""
        return (self.last > 0 or self.tail) and not self.everything


def parse_positions(text: str) -> Positions:
    """
    Raises:
        ValueError: a part is none of `fN`, `lN` with N at least 1, `tail`, `all`, or stands there twice.
    """
    if not isinstance(text, str):
        raise ValueError(f"positions={text!r}: give a text, such as 'l1+tail'.")
    found: dict[str, int | bool] = {}
    for part in text.split("+"):
        number = re.fullmatch(r"([fl])([1-9]\d*)", part)
        if number:
            name, value = {"f": "first", "l": "last"}[number[1]], int(number[2])
        elif part in ("tail", "all"):
            name, value = {"tail": "tail", "all": "everything"}[part], True
        else:
            raise ValueError(f"positions={text!r}: {part!r} is none of 'fN', 'lN' (N at least 1), 'tail' and 'all'.")
        if name in found:
            raise ValueError(f"positions={text!r} names {part[0] if number else part!r} twice; say it once.")
        found[name] = value
    return Positions(**found)  # type: ignore[arg-type]


def _places_in_runs(member_BT: Tensor, starts_BT: Tensor) -> Tensor:
    """How many members of the same run stand before each token; a run ends where there is no member, or at a start."""
    before = torch.nn.functional.pad(member_BT, (1, 0))[:, :-1]
    begins = member_BT & (starts_BT | ~before)
    index = torch.arange(member_BT.shape[1], device=member_BT.device).expand_as(member_BT)
    return index - torch.where(begins, index, 0).cummax(1).values


def token_mask(positions: Positions, prompt_BT: Tensor, answer_BT: Tensor, starts_BT: Tensor) -> Tensor:
    """Which tokens are edited, `(B, T)`.

    Args:
        prompt_BT, answer_BT: what belongs to a prompt, and what follows one; padding is neither.
        starts_BT: first tokens of sequences, where several stand in a row.
    """
    ends = torch.nn.functional.pad(starts_BT, (0, 1), value=True)[:, 1:]
    from_start = _places_in_runs(prompt_BT, starts_BT)
    from_end = _places_in_runs(prompt_BT.flip(1), ends.flip(1)).flip(1)
    last = max(positions.last, int(positions.tail))
    mask = prompt_BT & ((from_start < positions.first) | (from_end < last))
    if positions.tail or positions.everything:
        mask |= answer_BT
    return mask | prompt_BT if positions.everything else mask


def prompts_and_answers(real_BT: Tensor, starts_BT: Tensor, labels_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens belong to prompts and which to answers.

    Without labels everything is prompt. With them, what has a label is an answer, and what stands before an answer of its sequence is its prompt; a
    sequence without any answer is a prompt.
    """
    if labels_BT is None:
        return real_BT, torch.zeros_like(real_BT)
    answer = real_BT & (labels_BT != IGNORED)
    sequence = starts_BT.long().cumsum(1)
    counts = torch.zeros(len(answer), answer.shape[1] + 1, dtype=torch.long, device=answer.device)
    total = counts.scatter_add(1, sequence, answer.long()).gather(1, sequence)
    before_sequence = counts.scatter_add(1, sequence, answer.long()).cumsum(1).gather(1, sequence) - total
    still_to_come = total - (answer.long().cumsum(1) - before_sequence)
    return real_BT & ~answer & ((still_to_come > 0) | (total == 0)), answer


def sequence_starts(real_BT: Tensor, position_ids_BT: Tensor | None) -> Tensor:
    """First tokens of sequences: the first real one of a row, and where position ids begin again."""
    first = real_BT & (real_BT.long().cumsum(1) == 1)
    if position_ids_BT is None:
        return first
    # With left padding, position ids of padding may be 0 or 1, so that only a fall between two real tokens counts.
    position_ids_BT = position_ids_BT.expand_as(real_BT)
    falls = position_ids_BT[:, 1:] <= position_ids_BT[:, :-1]
    both_real = real_BT[:, 1:] & real_BT[:, :-1]
    return first | torch.nn.functional.pad(falls & both_real, (1, 0))


def mask_of_call(positions: Positions, prompt_mask_BP: Tensor, real_BP: Tensor, past: int, tokens: int) -> Tensor:
    """Which of the tokens `past` to `past + tokens` of a text that is being generated are edited, `(B, T)`.

    Args:
        prompt_mask_BP: of the prompt, as `token_mask` gives it.
        real_BP: which of its tokens are no padding.
        past: tokens that are in the cache already.
        tokens: of this call.
    """
    rows, prompt = real_BP.shape
    mask = torch.zeros(rows, past + tokens, dtype=torch.bool, device=real_BP.device)
    kept = min(prompt, past + tokens)
    mask[:, :kept] = prompt_mask_BP[:, :kept]
    mask[:, prompt:] = positions.tail or positions.everything
    return mask[:, past:]
