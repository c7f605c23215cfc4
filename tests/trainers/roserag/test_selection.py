"""Which responses become a pair: recorded cases, and laws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.trainers.roserag.selection import NORMALIZATIONS, Dropped, Pair, score, select

CASES = json.loads((Path(__file__).parents[2] / "oracles" / "roserag" / "selection.json").read_text())


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_recorded_cases(case, normalization):
    recorded = case["expected"][normalization]
    scores = [score(candidate["token_logps"], normalization) for candidate in case["candidates"]]
    found = select(scores, [candidate["correct"] for candidate in case["candidates"]])
    if recorded["status"] == "dropped":
        assert found == Dropped(recorded["reason"])
        return
    assert scores == pytest.approx(recorded["scores"], rel=1e-12)
    assert isinstance(found, Pair)
    assert (found.chosen, found.rejected) == (recorded["chosen"], recorded["rejected"])
    assert found.margin == pytest.approx(recorded["margin"], rel=1e-12)
    easiest = select(scores, [candidate["correct"] for candidate in case["candidates"]], "easiest")
    assert (easiest.chosen, easiest.rejected) == (recorded["easiest"]["chosen"], recorded["easiest"]["rejected"])


candidates = st.lists(st.tuples(st.floats(-20, 0), st.booleans()), min_size=2, max_size=12, unique_by=lambda c: c[0])


@given(candidates, st.integers(0, 99), st.randoms())
def test_laws(rows, seed, shuffler):
    scores, correct = zip(*rows, strict=True)
    hardest, easiest, drawn = (select(scores, correct, rule, seed) for rule in ("hardest", "easiest", "random"))
    if isinstance(hardest, Dropped):
        assert len(set(correct)) == 1 and easiest == drawn == hardest
        return
    assert hardest.margin <= drawn.margin <= easiest.margin
    assert correct[hardest.chosen] and not correct[hardest.rejected]
    assert select(scores, correct, "random", seed) == drawn
    # The order of the candidates does not matter.
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    again = select([scores[i] for i in order], [correct[i] for i in order])
    assert (order[again.chosen], order[again.rejected]) == (hardest.chosen, hardest.rejected)
