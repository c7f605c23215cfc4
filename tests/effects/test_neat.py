"""What normalising promises, small: NEAT learns at LoRA's learning rates (benchmarks/neat_facts.py has it in full)."""

import pytest

from benchmarks.neat_facts import measure


@pytest.mark.slow
def test_normalised_features_learn_at_the_rates_of_lora():
    arms = ("LoRA", "NEAT, input", "NEAT, input, normalised")
    loss = {
        run["arm"]: run["loss"] for run in measure(seeds=(0,), arms=arms, rates=(1e-3,), places=("q_proj, v_proj",))
    }
    assert loss["NEAT, input, normalised"] <= 0.4 * loss["NEAT, input"]
    assert loss["NEAT, input, normalised"] < loss["LoRA"]
