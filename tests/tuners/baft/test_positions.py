"""Which tokens are edited: the grammar, padding, turns, packed sequences, and texts that grow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.tuners.baft.positions import (
    Positions,
    mask_of_call,
    parse_positions,
    prompts_and_answers,
    sequence_starts,
    token_mask,
)
from tests.oracles import ORACLES


def mask(text, real, labels=None, position_ids=None) -> list[str]:
    """Rows of `x` where a token is edited; `real` and `labels` are given as strings, of which a dot is nothing."""
    real = torch.tensor([[c != "." for c in row] for row in real])
    if labels is not None:
        labels = torch.tensor([[-100 if c == "." else 1 for c in row] for row in labels])
    starts = sequence_starts(real, None if position_ids is None else torch.tensor(position_ids))
    found = token_mask(parse_positions(text), *prompts_and_answers(real, starts, labels), starts)
    return ["".join("x" if edited else "." for edited in row) for row in found.tolist()]


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("l1+tail", Positions(last=1, tail=True)),
        ("f2+l3", Positions(first=2, last=3)),
        ("all", Positions(everything=True)),
        ("f12", Positions(first=12)),
    ],
)
def test_grammar(text, positions):
    assert parse_positions(text) == positions


@pytest.mark.parametrize("text", ["", "l0", "f-1", "last", "l1+", "l1,f1", "tail+tail", "l1+l2", "F1"])
def test_bad_grammar_is_named(text):
    with pytest.raises(ValueError, match="positions="):
        parse_positions(text)


@pytest.mark.parametrize(
    ("text", "real", "labels", "edited"),
    [
        ("l1", ["..ttt", "ttttt"], None, ["....x", "....x"]),
        ("f1+l1", ["..ttt", "ttttt", "....t"], None, ["..x.x", "x...x", "....x"]),
        ("l9", ["..ttt"], None, ["..xxx"]),
        ("l1", ["tttttt.."], ["...aaa.."], ["..x....."]),
        ("tail", ["tttttt.."], ["...aaa.."], ["..xxxx.."]),
        ("l1+tail", [".ttttt"], ["...aaa"], ["..xxxx"]),
        ("all", [".ttttt"], ["...aaa"], [".xxxxx"]),
        # Two turns, and tokens after the last answer.
        ("f1+l1", ["tttttttttt"], ["...aa..aa."], ["x.x..xx..."]),
        ("tail", ["tttttttttt"], ["...aa..aa."], ["..xxx.xxx."]),
        # No answer in the second row.
        ("l2", ["tttt", "tttt"], ["..aa", "...."], ["xx..", "..xx"]),
    ],
)
def test_prompts_and_answers(text, real, labels, edited):
    assert mask(text, real, labels) == edited


def test_packed_sequences_have_prompts_of_their_own():
    ids = [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert mask("l1", ["tttttttt"], None, ids) == ["...x..xx"]
    assert mask("f1+l1", ["tttttttt"], ["..aa.aa."], ids) == ["xx..x..x"]
    # Padding on the left, whose position ids do not count.
    assert mask("f1", ["..ttt"], None, [[1, 1, 0, 1, 2]]) == ["..x.."]
    assert mask("f1", ["ttt", "ttt"], None, [[0, 1, 2]]) == ["x..", "x.."]


@pytest.mark.parametrize(("name", "text"), [("last1", "l1"), ("last3", "l3")])
def test_equals_recorded_masks(name, text):
    found = load_file(ORACLES / "baft/tiny_llama.safetensors")
    real = found["attention_mask"].bool()
    starts = sequence_starts(real, None)
    edited = token_mask(parse_positions(text), *prompts_and_answers(real, starts, None), starts)
    assert torch.equal(edited, found[f"{name}.mask"].bool())


@given(
    prompt=st.integers(1, 6),
    answer=st.integers(0, 4),
    padding=st.integers(0, 3),
    chunk=st.integers(1, 5),
    text=st.sampled_from(["l1", "f1+l2", "tail", "l2+tail", "all"]),
)
@settings(max_examples=60, deadline=None)
def test_a_text_in_pieces_is_edited_like_the_whole(prompt, answer, padding, chunk, text):
    """Teacher forcing with labels, one call for the whole, and one call for each piece agree."""
    positions, total = parse_positions(text), padding + prompt + answer
    real = torch.arange(total)[None] >= padding
    labels = torch.where(torch.arange(total)[None] >= padding + prompt, 1, -100)
    starts = sequence_starts(real, None)
    whole = token_mask(positions, *prompts_and_answers(real, starts, labels), starts)
    given_real = real[:, : padding + prompt]
    given_starts = sequence_starts(given_real, None)
    own = token_mask(positions, *prompts_and_answers(given_real, given_starts, None), given_starts)
    assert torch.equal(mask_of_call(positions, own, given_real, 0, total), whole)
    pieces = [
        mask_of_call(positions, own, given_real, past, min(chunk, total - past)) for past in range(0, total, chunk)
    ]
    assert torch.equal(torch.cat(pieces, 1), whole)
