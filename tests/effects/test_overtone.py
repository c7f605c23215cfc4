"""The effect OVERTONE promises, small: an edit that moves the model less (benchmarks/overtone_world.py has it in full)."""

import copy

import pytest
import torch

from benchmarks.memorised_facts import OBJECTS, RELATIONS, SUBJECTS, answers, world
from hf_ext.trainers.overtone import OvertoneSettings, overtone_from_logits


@pytest.mark.slow
def test_an_edit_drifts_less_than_with_stopped_cross_entropy():
    base, facts = world(0)
    with torch.no_grad():
        before = base(input_ids=facts[:, :2]).logits[:, -1].log_softmax(-1)

    def drift(overtone: bool) -> float:
        total = 0.0
        for which in (3, 77, 200, 410):
            model = copy.deepcopy(base)
            weight = model.model.layers[2].mlp.down_proj.weight.requires_grad_(True)
            optimizer = torch.optim.Adam([weight], lr=3e-3)
            new = torch.tensor([SUBJECTS + RELATIONS + (int(facts[which, 2]) + which) % OBJECTS])
            for _ in range(60):
                logits = model(input_ids=facts[which : which + 1, :2]).logits[:, -1]
                if overtone:
                    losses = overtone_from_logits(logits, new, OvertoneSettings())
                    loss, learnt = losses.loss.sum(), not losses.active.any()
                else:
                    loss = torch.nn.functional.cross_entropy(logits, new)
                    learnt = loss.item() < 0.01
                if learnt:
                    break
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert answers(model, facts)[which] == new
            with torch.no_grad():
                after = model(input_ids=facts[:, :2]).logits[:, -1].log_softmax(-1)
            total += torch.nn.functional.kl_div(after, before, reduction="batchmean", log_target=True).item()
        return total / 4

    assert drift(overtone=True) <= 0.85 * drift(overtone=False)
