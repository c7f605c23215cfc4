"""Runs the model: teacher-forced logits at chosen positions of ragged batches, and greedy decoding with stop strings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from hf_ext._modes import evaluating
from hf_ext.metrics.editing.encoding import pad

# Rows of logits kept per forward pass: 256 rows of a vocabulary of 262,144 are 0.27 GB in float32.
_MAX_LOGIT_ROWS = 256


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids of one sequence; the logits that predict `ids[scored_from:]` are wanted.

    Attributes:
        ids: token ids, not padded.
        scored_from: index of the first predicted token; `len(ids)` asks for the token that would follow.
        prompt_length: tokens that belong to the prompt, for models that read a prompt mask.
    """

    ids: tuple[int, ...]
    scored_from: int
    prompt_length: int

    @property
    def positions(self) -> range:
        """Positions whose logits are needed: one before each predicted token."""
        return range(self.scored_from - 1, max(self.scored_from, len(self.ids) - 1))


class ModelRunner:
    """Batched forward passes and greedy decoding, in eval mode and without gradients.

    Args:
        model: causal language model, plain, quantised, spread over devices, or with adapters.
        tokenizer: for decoding and for the padding and EOS ids.
        batch_size: sequences per forward pass; results do not depend on it.
        prompt_mask_argument: name of the keyword under which the model takes a bool [B, T] mask of prompt tokens.

    Raises:
        ValueError: the architecture cannot restrict its logits to chosen positions.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        prompt_mask_argument: str | None = None,
    ) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if "logits_to_keep" not in inspect.signature(base.forward).parameters:
            raise ValueError(
                f"{type(base).__name__}.forward takes no `logits_to_keep`; pass a causal language model that does."
            )
        # `generate` comes from a mixin that the type of a loaded model does not name.
        self.model: Any = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.prompt_mask_argument = prompt_mask_argument
        ends = model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self.eos_ids = sorted({end for end in [*listed, tokenizer.eos_token_id] if end is not None})
        # Padding is masked wherever it is used, so any id of the vocabulary will do.
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (self.eos_ids or [0])[0]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; on leaving, every module returns to the mode it had."""
        with evaluating(self.model), torch.no_grad():
            yield

    def logits(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[int, Tensor]]:
        """Yields (index, logits [positions, vocabulary]) of every sequence, in an order that saves padding."""
        for batch, columns, logits in self.logit_batches(sequences):
            place = {position: column for column, position in enumerate(columns)}
            for row, index in enumerate(batch):
                yield index, logits[row, [place[position] for position in sequences[index].positions]]

    def logit_batches(self, sequences: Sequence[ScoredSequence]) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Yields (indices of sequences, positions, logits [indices, positions, vocabulary]), one forward pass each.

        The output head runs only on the union of the positions that a batch needs; no [B, T, vocabulary] tensor is made.
        """
        for batch in _batches(sequences, self.batch_size):
            rows = [sequences[index] for index in batch]
            input_ids, mask = pad([row.ids for row in rows], self.pad_id, "right")
            columns = sorted({position for row in rows for position in row.positions})
            extra = {}
            if self.prompt_mask_argument is not None:
                lengths = torch.tensor([[row.prompt_length] for row in rows])
                extra = {self.prompt_mask_argument: self._on(torch.arange(input_ids.shape[1]) < lengths)}
            # Counted from the end, a position stays right when an adapter puts virtual tokens in front. The index stays
            # on the CPU, since the last layer may sit on another device than the first.
            keep = torch.tensor(columns) - input_ids.shape[1]
            output = self.model(
                input_ids=self._on(input_ids),
                attention_mask=self._on(mask),
                use_cache=False,
                logits_to_keep=keep,
                **extra,
            )
            yield batch, columns, output.logits

    def predicted_tokens(self, sequences: Sequence[ScoredSequence]) -> list[tuple[int, ...]]:
        """Most likely token at every scored position, per sequence."""
        predicted: list[tuple[int, ...]] = [()] * len(sequences)
        for index, logits in self.logits(sequences):
            predicted[index] = tuple(logits.argmax(dim=-1).tolist())
        return predicted

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_strings: Sequence[str] = ()
    ) -> list[str]:
        """Greedy continuations as text, up to EOS, the first stop string (included) or `max_new_tokens` tokens."""
        texts = [""] * len(prompts)
        for batch in self._prompt_batches([len(prompt) for prompt in prompts]):
            input_ids, mask = pad([prompts[index] for index in batch], self.pad_id, "left")
            criteria = [_StopAtText(self._new_text, input_ids.shape[1], stop_strings)] if stop_strings else []
            output = self.model.generate(
                input_ids=self._on(input_ids),
                attention_mask=self._on(mask),
                generation_config=self._greedy(max_new_tokens),
                stopping_criteria=criteria,
            )
            for index, ids in zip(batch, output, strict=True):
                texts[index] = self._new_text(ids[input_ids.shape[1] :])
        return texts

    def _prompt_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in batches of similar length; of equal length where an adapter puts virtual tokens in front.

        PEFT places those tokens before the padding and drops position ids, so padding would change the result.
        """
        unpadded = isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        for _, same in groupby(order, key=lambda index: lengths[index] if unpadded else 0):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        # Given although they are defaults: generate() fills in whatever is None from the model's own configuration,
        # which may sample or penalise repetition.
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            min_new_tokens=0,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.pad_id,
        )

    def _new_text(self, ids: Tensor) -> str:
        tokens = ids.tolist()
        end = next((index for index, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def _on(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


class _StopAtText(StoppingCriteria):
    """Ends a row once its decoded continuation holds a stop string.

    The library's own stop strings prepare a table over the whole vocabulary, which takes longer than the short answers
    of an edit set; decoding a few tokens a step does not.
    """

    def __init__(self, decode: Callable[[Tensor], str], prompt_width: int, stop_strings: Sequence[str]) -> None:
        self.decode = decode
        self.prompt_width = prompt_width
        self.stop_strings = stop_strings

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        texts = [self.decode(row) for row in input_ids[:, self.prompt_width :]]
        stopped = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)


def _batches(sequences: Sequence[ScoredSequence], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length that need at most `_MAX_LOGIT_ROWS` rows of logits (or hold one sequence)."""
    batch: list[int] = []
    columns: set[int] = set()
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i].ids), sequences[i].scored_from))
    for index in order:
        union = columns | set(sequences[index].positions)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(union) > _MAX_LOGIT_ROWS):
            yield batch
            batch, union = [], set(sequences[index].positions)
        batch.append(index)
        columns = union
    if batch:
        yield batch
