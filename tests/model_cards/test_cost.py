"""What training cost: measured, estimated with the assumption said, or not known."""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_ext.model_cards import Cost, CostCallback, build_card, estimated_cost
from hf_ext.model_cards.facts.cost import read_cost
from tests.conftest import make_tiny_llama

ROW = {"emissions": "0.0125", "energy_consumed": "0.05", "country_iso_code": "DEU", "codecarbon_version": "3.3.2"}


def write(file, rows):
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ROW)
        writer.writeheader()
        writer.writerows(rows)


def test_kilograms_become_grams(tmp_path):
    write(tmp_path / "emissions.csv", [{**ROW, "emissions": "9"}, ROW])
    for source in (tmp_path, tmp_path / "emissions.csv", SimpleNamespace(**ROW)):
        cost = read_cost(source)
        assert (cost.energy_kwh, cost.emissions_g, cost.region, cost.source) == (0.05, 12.5, "DEU", "CodeCarbon 3.3.2")
    card = build_card(make_tiny_llama(), cost=tmp_path)
    assert card.data.co2_eq_emissions == {
        "emissions": 12.5,
        "source": "CodeCarbon 3.3.2",
        "training_type": "fine-tuning",
        "geographical_location": "DEU",
    }
    assert "Energy and emissions: 0.05 kWh, 12.5 g CO2eq (CodeCarbon 3.3.2, region DEU)." in card.text


def test_an_estimate_says_so():
    cost = estimated_cost(3600, 250, grams_per_kwh=400, region="FRA")
    assert (cost.energy_kwh, cost.emissions_g) == (0.25, 100)
    assert "duration x 250 W, assumed, at 400 g/kWh" in cost.sentences[0]
    assert estimated_cost(3600, 250).metadata("a GPU") is None


def test_nothing_is_invented():
    assert Cost().sentences == ["Energy and emissions were not measured."]
    assert "co2_eq_emissions" not in build_card(make_tiny_llama()).data.to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cost(energy_kwh=-1, source="x"), "energy_kwh=-1"),
        (lambda: Cost(emissions_g=float("nan"), source="x"), "emissions_g=nan"),
        (lambda: Cost(energy_kwh=1), "source is empty"),
        (lambda: estimated_cost(0, 1), "seconds=0"),
        (lambda: estimated_cost(1, float("inf")), "watts=inf"),
        (lambda: CostCallback("Germany"), "country='Germany'"),
        (lambda: read_cost("absent.csv"), "cost='absent.csv' does not exist"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "emissions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no run of CodeCarbon"):
        read_cost(tmp_path)


def test_codecarbon_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ImportError, match=r"hf-ext\[cards\]"):
        CostCallback("DEU")


def run(folder, callback):
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    arguments = TrainingArguments(str(folder), max_steps=2, report_to=[], use_cpu=True)
    trainer = Trainer(make_tiny_llama(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()
    return trainer


def test_memory_of_a_run(tmp_path):
    text = build_card(run(tmp_path, CostCallback())).text
    assert "Peak memory: " in text and "resident, one process" in text and "emissions were not measured" in text


@pytest.mark.parametrize(("device", "told"), [("cpu", "resident, one process"), ("cuda:0", "allocated on a GPU")])
def test_memory_is_that_of_the_device_of_the_run(monkeypatch, device, told):
    """On a machine with a GPU, whether the run uses it or not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device=None: 2e9)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "a GPU")
    callback, arguments = CostCallback(), SimpleNamespace(device=torch.device(device))
    callback.on_train_begin(arguments, None, None)
    callback.on_train_end(arguments, None, None)
    assert told in callback.cost.sentences[0]


def test_energy_of_a_run(tmp_path):
    """With CodeCarbon itself, which needs no network for a given country."""
    card = build_card(run(tmp_path, CostCallback("DEU")))
    told = card.data.co2_eq_emissions
    assert (
        told["geographical_location"] == "DEU" and told["source"].startswith("CodeCarbon ") and told["emissions"] > 0
    )
    assert list(tmp_path.glob("**/emissions.csv")) == []
