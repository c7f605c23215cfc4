"""What training cost: time, memory, energy and emissions."""

from __future__ import annotations

import csv
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import CodeCarbonCallback

from hf_ext._lazy import optional_import

JOULES_PER_KWH = 3.6e6


class EmissionsData(Protocol):
    """What CodeCarbon's trackers leave in `final_emissions_data`, and a row of its `emissions.csv`: kilograms and kWh."""

    emissions: float
    energy_consumed: float
    country_iso_code: str
    codecarbon_version: str


@dataclass(frozen=True)
class Cost:
    """What a run used: energy, emissions and memory, with how they are known.

    Attributes:
        energy_kwh: electricity.
        emissions_g: grams of CO2 equivalents.
        region: where the electricity came from, e.g. an ISO 3166 code.
        source: how energy and emissions are known, with the assumptions.
        peak_memory_gb: the most memory in use at once, in 10^9 bytes.
        memory_of: what that is the memory of.
    """

    energy_kwh: float | None = None
    emissions_g: float | None = None
    region: str | None = None
    source: str | None = None
    peak_memory_gb: float | None = None
    memory_of: str | None = None

    def __post_init__(self) -> None:
        for name in ("energy_kwh", "emissions_g", "peak_memory_gb"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 <= value < float("inf")):
                raise ValueError(
                    f"{name}={value!r} must be a finite number of at least 0, or None if it is not known."
                )
        if (self.energy_kwh is not None or self.emissions_g is not None) and not self.source:
            raise ValueError("source is empty: say how energy and emissions are known, with the assumptions.")

    @property
    def sentences(self) -> list[str]:
        """For the card."""
        told = []
        if self.peak_memory_gb is not None:
            told.append(f"Peak memory: {self.peak_memory_gb:.1f} GB ({self.memory_of or 'not said of what'}).")
        known = [
            f"{value:.3g} {unit}"
            for value, unit in ((self.energy_kwh, "kWh"), (self.emissions_g, "g CO2eq"))
            if value is not None
        ]
        if known:
            place = f", region {self.region}" if self.region else ""
            told.append(f"Energy and emissions: {', '.join(known)} ({self.source}{place}).")
        else:
            told.append("Energy and emissions were not measured.")
        return told

    def metadata(self, hardware: str | None) -> dict[str, Any] | None:
        """`co2_eq_emissions` of the card, in grams as the Hub has it; `None` without emissions."""
        if self.emissions_g is None:
            return None
        stated = {
            "emissions": float(f"{self.emissions_g:.4g}"),
            "source": self.source,
            "training_type": "fine-tuning",
            "geographical_location": self.region,
            "hardware_used": hardware,
        }
        return {key: value for key, value in stated.items() if value}


def estimated_cost(
    seconds: float, watts: float, *, grams_per_kwh: float | None = None, region: str | None = None
) -> Cost:
    """Energy as duration x power, where nothing measured it.

    Args:
        seconds: how long the run took.
        watts: mean power of all that ran, measured or rated; the card says that it is an assumption.
        grams_per_kwh: carbon intensity of the electricity; no emissions are stated without it.
        region: where that intensity holds.
    """
    for name, value in (("seconds", seconds), ("watts", watts)):
        if not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise ValueError(f"{name}={value!r} must be a finite number above 0.")
    energy = seconds * watts / JOULES_PER_KWH
    source = f"duration x {watts:g} W, assumed"
    if grams_per_kwh is None:
        return Cost(energy, None, region, source)
    return Cost(energy, energy * grams_per_kwh, region, f"{source}, at {grams_per_kwh:g} g/kWh")


def read_cost(cost: Cost | EmissionsData | str | os.PathLike[str]) -> Cost:
    """A `Cost`, from CodeCarbon's data or the last run in its `emissions.csv` too. CodeCarbon counts kilograms, the Hub grams.

    Raises:
        ValueError: the file is missing or not of CodeCarbon.
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, str | os.PathLike):
        return _from_row(_last_row(Path(cost)))
    return _from_row(vars(cost))


def _last_row(file: Path) -> Mapping[str, Any]:
    file = file / "emissions.csv" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"cost={str(file)!r} does not exist; give CodeCarbon's emissions.csv, its data, or a Cost.")
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"emissions", "energy_consumed"} <= rows[-1].keys():
        raise ValueError(f"cost={str(file)!r} has no run of CodeCarbon; give its emissions.csv.")
    return rows[-1]


def _from_row(row: Mapping[str, Any]) -> Cost:
    version = row.get("codecarbon_version")
    return Cost(
        float(row["energy_consumed"]),
        1000 * float(row["emissions"]),
        row.get("country_iso_code") or None,
        f"CodeCarbon {version}" if version else "CodeCarbon",
    )


class CostCallback(TrainerCallback):
    """Measures what training costs, for the card: peak memory always, energy with CodeCarbon, which needs no network.

    Args:
        country: ISO 3166 code with three letters, e.g. `"DEU"`, whose electricity is used; needs `pip install "hf-ext[cards]"`. Without
            it no energy is measured.

    Raises:
        ImportError: `country` is given and CodeCarbon is not installed.
    """

    def __init__(self, country: str | None = None) -> None:
        if country is not None and not (len(country) == 3 and country.isalpha() and country.isupper()):
            raise ValueError(f"country={country!r} must be an ISO 3166 code with three capital letters, e.g. 'DEU'.")
        self.country = country
        self.cost: Cost | None = None
        self._tracker: Any = None
        if country is not None:
            optional_import("codecarbon", "cards")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cost = None
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        if self.country is not None and state.is_local_process_zero:
            codecarbon = optional_import("codecarbon", "cards")
            self._tracker = codecarbon.OfflineEmissionsTracker(
                country_iso_code=self.country, save_to_file=False, log_level="error", allow_multiple_runs=True
            )
            self._tracker.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        energy = Cost()
        if self._tracker is not None:
            self._tracker.stop()
            energy, self._tracker = read_cost(self._tracker.final_emissions_data), None
        memory, of = _peak_memory(args.device)
        self.cost = replace(energy, peak_memory_gb=round(memory / 1e9, 1), memory_of=of)


def _peak_memory(device: torch.device) -> tuple[float, str]:
    """Bytes, and what they are the memory of. A run on the CPU of a machine with a GPU has none of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(
            device
        ), f"allocated on {torch.cuda.get_device_name(device)}, one process"
    of = f"resident, one process on {platform.machine()}"
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset, of
    import resource  # not there on Windows

    # Linux counts in units of 1024 bytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, of


def measured_cost(trainer: Trainer) -> Cost | None:
    """What a callback of the trainer has measured: `CostCallback`, or transformers' `CodeCarbonCallback`."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CostCallback) and callback.cost is not None:
            return callback.cost
        if isinstance(callback, CodeCarbonCallback) and callback.tracker is not None:
            data = callback.tracker.final_emissions_data
            return read_cost(data) if data is not None else None
    return None
