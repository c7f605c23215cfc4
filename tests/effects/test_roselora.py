"""The effect RoseLoRA promises, small: an edit that leaves other facts alone (benchmarks/memorised_facts.py has it in full)."""

import statistics

import pytest

from benchmarks.memorised_facts import Arm, measure


@pytest.mark.slow
def test_an_edit_leaves_other_facts_alone():
    rose, lora = Arm("RoseLoRA", 5e-3), Arm("LoRA", 5e-3)
    results = measure(seeds=(0,), edits=4, arms=(rose, lora))

    def mean(arm, key):
        return statistics.mean(row[key] for row in results[arm])

    assert mean(rose, "success") >= 0.95
    assert mean(rose, "locality") >= mean(lora, "locality") + 0.03
    assert mean(rose, "density") < 0.02
