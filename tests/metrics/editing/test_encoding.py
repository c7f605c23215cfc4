"""The boundary between prompt and answer, on tokenizers of the awkward kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_ext.metrics.editing.encoding import PromptEncoder, pad
from tests.metrics.editing.conftest import bpe_tokenizer, word_tokenizer

CORPUS = ["the cat sat on the mat", "in the city of Rome", "in the city of Oslo in Norway", "room 12 34 is 1234"] * 3
TOKENIZERS = {
    "byte_level": bpe_tokenizer(CORPUS, kind="byte_level"),
    "byte_level_bos": bpe_tokenizer(CORPUS, kind="byte_level", bos=True),
    "metaspace_bos_eos": bpe_tokenizer(CORPUS, kind="metaspace", vocab_size=120, bos=True, eos=True),
    "unsplit": bpe_tokenizer(CORPUS, kind="unsplit", vocab_size=120),
    "words": word_tokenizer(),
}
word = st.text(alphabet="acehimnoORst1234", min_size=1, max_size=6)
phrase = st.lists(word, min_size=1, max_size=4).map(" ".join)


def by_offsets(tokenizer: PreTrainedTokenizerFast, prompt: str, rest: str) -> tuple[list[int], list[int], bool]:
    """Splits the ids of the joined text by character offsets; the last value tells whether a token spans the boundary."""
    encoded = tokenizer(prompt + rest, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    answer_at = next(index for index, (_, (_, end)) in enumerate(spans) if end > len(prompt))
    ids = [token for token, _ in spans]
    return ids[:answer_at], ids[answer_at:], spans[answer_at][1][0] < len(prompt)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(prompt=phrase, answer=phrase, separator=st.sampled_from([" ", "", ": ", "\nA: "]))
def test_boundary_agrees_with_character_offsets(kind, prompt, answer, separator):
    tokenizer = TOKENIZERS[kind]
    encoder = PromptEncoder(tokenizer, separator=separator, sample=prompt)
    try:
        prompt_ids, answer_ids = encoder.pair(prompt, answer)
    except ValueError as error:
        assert "share their first token" in str(error)
        return
    head = separator.rstrip()
    expected_prompt, expected_answer, spans = by_offsets(tokenizer, prompt + head, separator[len(head) :] + answer)
    assert prompt_ids[: len(encoder.prefix)] == encoder.prefix
    assert answer_ids
    body = prompt_ids[len(encoder.prefix) :]
    if not spans and body == expected_prompt:
        assert answer_ids == expected_answer
    joined = tokenizer(prompt + separator + answer, add_special_tokens=False)["input_ids"]
    # Whatever the route, the ids spell the text (as far as the vocabulary can).
    assert tokenizer.decode(body + answer_ids) == tokenizer.decode(joined)


def test_merge_across_the_boundary_keeps_the_prompt_that_generation_sees():
    tokenizer = TOKENIZERS["unsplit"]
    encoder = PromptEncoder(tokenizer, separator="", sample="room")
    assert by_offsets(tokenizer, "room 12", " 34 is")[2]
    prompt_ids, answer_ids = encoder.pair("room 12", " 34 is")
    assert prompt_ids == encoder.prompt("room 12")
    assert tokenizer.decode(prompt_ids + answer_ids) == "room 12 34 is"


def test_appended_eos_does_not_end_the_prompt():
    tokenizer = TOKENIZERS["metaspace_bos_eos"]
    encoder = PromptEncoder(tokenizer, sample="the cat")
    assert tokenizer("the cat")["input_ids"][-1] == tokenizer.eos_token_id
    assert encoder.prefix == [tokenizer.bos_token_id]
    assert tokenizer.eos_token_id not in encoder.prompt("the cat")
    assert PromptEncoder(tokenizer, add_special_tokens=False, sample="the cat").prefix == []
    assert PromptEncoder(TOKENIZERS["byte_level"], sample="the cat").prefix == []


def test_eos_inside_a_prompt_is_counted_when_pad_equals_eos():
    tokenizer = bpe_tokenizer(CORPUS, kind="byte_level", bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    encoder = PromptEncoder(tokenizer, sample="the")
    prompt_ids, answer_ids = encoder.pair("the cat<eos>the mat", "sat")
    assert tokenizer.eos_token_id in prompt_ids
    assert tokenizer.decode(answer_ids) == " sat"


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side):
    ids, mask = pad([[5, 6, 7], [8]], 9, side)
    row = [9, 9, 8] if side == "left" else [8, 9, 9]
    assert ids.tolist() == [[5, 6, 7], row]
    assert mask.tolist() == [[1, 1, 1], [int(token != 9) for token in row]]
    assert ids.dtype == mask.dtype == torch.long
