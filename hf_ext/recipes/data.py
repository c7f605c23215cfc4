"""Datasets that a recipe names: on the Hub, in a folder, or in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

_FILES = (".json", ".jsonl")
# What `save_to_disk` leaves in its folder.
_SAVED = ("state.json", "dataset_dict.json")


def load(key: str, name: str, config: str | None, split: str, streaming: bool = False) -> Any:
    """One split of a dataset.

    Args:
        key: of the recipe, for messages; `<key>_config` and so on belong to it.
        name: Hub id, folder (files, or what `save_to_disk` wrote), or a .json or .jsonl file.
        config: of a dataset that has several.

    Raises:
        ValueError: it cannot be read, or has no such split.
        FileNotFoundError: there is none.
    """
    return pick(_load(key, name, config, streaming), split, f"{key}={name!r}")


def _load(key: str, name: str, config: str | None, streaming: bool) -> Mapping[str, Any]:
    path = Path(name)
    if path.suffix in _FILES and not path.is_file():
        raise FileNotFoundError(f"{key}={name!r}: there is no such file; paths are relative to {Path.cwd().name}/.")
    if any((path / file).is_file() for file in _SAVED):
        if streaming or config:
            raise ValueError(f"{key}={name!r} was saved by datasets: it has no configurations, and is not streamed.")
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
    try:
        if path.is_file():
            return load_dataset("json", config, data_files=name, streaming=streaming)
        return load_dataset(name, config, streaming=streaming)
    except (DatasetsError, TypeError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{key}={name!r} cannot be read: {error.__cause__ or error}") from error


def pick(splits: Mapping[str, Any], split: str, where: str) -> Any:
    """Raises `ValueError` naming the splits there are if `split` is none of them."""
    if split not in splits:
        raise ValueError(f"{where} has no split {split!r}; it has {', '.join(splits)}.")
    return splits[split]


def check_columns(data: Any, forms: tuple[tuple[str, ...], ...], where: str) -> None:
    """Raises `ValueError` if the columns of `data` have none of these forms; those of a stream may be unknown."""
    columns = data.column_names
    if columns is not None and not any(set(form) <= set(columns) for form in forms):
        needed = ", or ".join(" and ".join(f"`{name}`" for name in form) for form in forms)
        raise ValueError(f"{where} has the columns {sorted(columns)}; it needs {needed}: rename yours.")
    if isinstance(data, Dataset) and not len(data):
        raise ValueError(f"{where} has no rows.")


def train_and_eval(
    script: ScriptArguments, mixture: DatasetMixtureConfig, evaluates: bool, forms: tuple[tuple[str, ...], ...]
) -> dict[str, Any]:
    """`train_dataset` and `eval_dataset` of a trainer.

    Args:
        script, mixture: TRL's arguments; either `dataset_name` or `datasets`.
        evaluates: whether there is to be an `eval_dataset`.
        forms: what the columns may be.

    Raises:
        ValueError: no data are named, or two kinds, or they do not fit.
        FileNotFoundError: they are not there.
    """
    if bool(script.dataset_name) == bool(mixture.datasets):
        problem = "both dataset_name and datasets are given" if script.dataset_name else "no data are named"
        raise ValueError(
            f"{problem}: give either dataset_name (a Hub id, a folder, a .json or .jsonl file) or the list datasets."
        )
    train, test = script.dataset_train_split, script.dataset_test_split
    if script.dataset_name:
        where = f"dataset_name={script.dataset_name!r}"
        splits = _load("dataset_name", script.dataset_name, script.dataset_config, script.dataset_streaming)
    else:
        where, splits, train, test = "datasets", get_dataset(mixture), "train", "test"
    found = {"train_dataset": pick(splits, train, where)}
    if evaluates:
        found["eval_dataset"] = pick(splits, test, where)
    for name, data in found.items():
        check_columns(data, forms, f"{where}, {name}")
    return found
