"""The splits of TOFU, as `evaluate_unlearning` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_ext._lazy import optional_import

FORGET_SPLITS = ("forget01", "forget05", "forget10")
# What a row of TOFU calls the fields of a row of ours.
_FIELDS = {"answer": "answer", "paraphrase": "paraphrased_answer", "perturbed": "perturbed_answer"}


def load_tofu(
    forget: str = "forget10",
    source: str | Path = "locuslab/TOFU",
    *,
    as_prompt: Callable[[str], Any] = str,
    limit: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Splits of TOFU (https://huggingface.co/papers/2401.06121) for `evaluate_unlearning`.

    Args:
        forget: "forget01", "forget05" or "forget10"; the holdout rows are those of the same size.
        source: the dataset on the Hub, or a folder with a copy of it.
        as_prompt: makes a prompt of a question, in the form in which the model was trained: a text, or a list of messages.
        limit: rows of each split, from its start; all by default.

    Returns:
        "forget", "holdout", "retain", "real_authors" and "world_facts"; the second only if the dataset has it.

    Raises:
        ValueError: an unknown split, or a `limit` below 1.
        ImportError: datasets is not installed.
    """
    if forget not in FORGET_SPLITS:
        raise ValueError(f"forget={forget!r} is no split of TOFU: choose one of {', '.join(FORGET_SPLITS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: give at least 1; leave it out for all rows.")
    holdout = forget.replace("forget", "holdout")
    names = {
        "forget": f"{forget}_perturbed",
        "holdout": holdout,
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    datasets = optional_import("datasets", "unlearning")
    # The holdout rows are younger than the other files.
    if holdout not in datasets.get_dataset_config_names(str(source)):
        del names["holdout"]
    split = "train" if limit is None else f"train[:{limit}]"
    return {
        part: _rows(datasets.load_dataset(str(source), name, split=split), as_prompt) for part, name in names.items()
    }


def _rows(data: Iterable[Mapping[str, Any]], as_prompt: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Without ids: rows are numbered, as in the logs of open-unlearning."""
    found = []
    for row in data:
        fields = {ours: row[theirs] for ours, theirs in _FIELDS.items() if row.get(theirs) is not None}
        if row.get("paraphrased_question") is not None:
            other = as_prompt(row["paraphrased_question"])
            fields["prompt_paraphrases"] = [other if isinstance(other, str) else other[-1]["content"]]
        found.append({"prompt": as_prompt(row["question"]), **fields})
    return found
