"""Lets a model answer: greedily in batches, or with k samples per question, whatever its own settings say."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.editing.scoring import cut_at_stop
from hf_ext.metrics.unlearning.rows import Row
from hf_ext.metrics.unlearning.scores import RowEncoder


def greedy_answers(
    runner: ModelRunner,
    encoder: RowEncoder,
    rows: Sequence[Row],
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """The most likely continuation of every prompt, up to EOS, a stop string (left out) or `max_new_tokens` tokens.

    Raises:
        ValueError: the model would stop at an ordinary word.
    """
    check_end_tokens(runner)
    prompts = [encoder.prompt(row) for row in rows]
    with runner.evaluating(), plain_generation(runner.model):
        texts = runner.generate(prompts, max_new_tokens, stop_strings)
    return [cut_at_stop(text, stop_strings) for text in texts]


def sampled_answers(
    runner: ModelRunner,
    encoder: RowEncoder,
    rows: Sequence[Row],
    samples: int,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    *,
    seed: int = 0,
) -> list[list[str]]:
    """`samples` answers per prompt, drawn from the model's own distribution (temperature 1, nothing cut off).

    The draws of a row depend on the seed and on its prompt only, neither on the batch size nor on the other rows; the
    random states of all devices are left alone.

    Raises:
        ValueError: the model would stop at an ordinary word.
    """
    check_end_tokens(runner)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=runner.eos_ids or None, pad_token_id=runner.pad_id
    )
    device = runner.model.get_input_embeddings().weight.device
    draw = _Draw(torch.Generator(device))
    answers = []
    with runner.evaluating(), plain_generation(runner.model):
        for row in rows:
            ids = torch.tensor([encoder.prompt(row)] * samples, device=device)
            draw.generator.manual_seed(seed + zlib.crc32(str(ids[0].tolist()).encode()))
            output = runner.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
            )
            texts = [_text(runner, tokens[ids.shape[1] :].tolist()) for tokens in output]
            answers.append([cut_at_stop(text, stop_strings) for text in texts])
    return answers


class _Draw(LogitsProcessor):
    """Scores whose largest is a draw from the distribution of the logits, with random numbers of a generator of its own.

    `generate` can only sample with the generators of the devices, which a seed for one of them would disturb. If the
    E_i are exponential, argmax p_i / E_i is i with probability p_i; `torch.multinomial` does the same.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.softmax(-1) / torch.empty_like(scores).exponential_(generator=self.generator)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Takes the model's own generation settings out of the way and puts the same object back afterwards.

    `generate` fills whatever the caller leaves open from them, so that `suppress_tokens` or `bad_words_ids` in a
    `generation_config.json` could keep a model from saying what it knows.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = base.generation_config
    base.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        base.generation_config = own


def check_end_tokens(runner: ModelRunner) -> None:
    """Refuses an ordinary word as end of a text: a model that ends before it answers would pass as one that forgot.

    Raises:
        ValueError: an id of `generation_config.eos_token_id` is not a special or added token of the tokenizer.
    """
    tokenizer: PreTrainedTokenizerBase = runner.tokenizer
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ordinary = [token for token in runner.eos_ids if token not in known]
    if ordinary:
        raise ValueError(
            f"generation_config.eos_token_id holds {ordinary[0]} ({tokenizer.decode([ordinary[0]])!r}), an ordinary "
            "token, at which every answer would end; remove it from the model's generation_config."
        )


def _text(runner: ModelRunner, tokens: list[int]) -> str:
    end = next((index for index, token in enumerate(tokens) if token in runner.eos_ids), len(tokens))
    return str(runner.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
