"""What a recipe may say beyond the fields of TRL: adapters, further datasets, tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import yaml
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

from hf_ext.model_cards.facts.base_model import identify
from hf_ext.pipelines.roserag import RagPrompts
from hf_ext.recipes.data import check_columns, load
from hf_ext.recipes.methods import TEXTS
from hf_ext.recipes.values import checked
from hf_ext.trainers.tasks import ContinualTask

CARD_WORDS = (
    *(
        "base_model",
        "license",
        "language",
        "datasets",
        "evaluated_on",
        "intended_use",
        "out_of_scope",
        "factors",
        "ethics",
    ),
    *("caveats", "developers", "contact", "title"),
)


@dataclass
class PeftArguments:
    """The adapter that is trained.

    Parameters:
        peft (`dict`, *optional*): fields of the configuration of a PEFT type, which `peft_type` names unless the method has its own.
    """

    peft: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of the adapter's configuration, and peft_type; one of them: --peft.r 8"},
    )

    def __post_init__(self) -> None:
        if isinstance(self.peft, str):
            self.peft = yaml.safe_load(self.peft)

    def config(self, own: str | None) -> PeftConfig | None:
        """The configuration, of the type `own` of a method that has one; None if the recipe names no adapter.

        Raises:
            ValueError: the type is unknown or another than `own`, or a field is unknown or does not fit.
        """
        if self.peft is None and own is None:
            return None
        if not isinstance(self.peft, dict | None):
            raise ValueError(f"peft={self.peft!r} is no mapping of names to values.")
        values = dict(self.peft or {})
        named = values.pop("peft_type", own)
        types = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if named is None:
            raise ValueError("peft: peft_type is missing; name the adapter's type, for example LORA or ROSELORA.")
        if str(named).upper() not in types:
            raise ValueError(f"peft: peft_type={named!r} is unknown; choose one of {', '.join(sorted(types))}.")
        if own is not None and str(named).upper() != own:
            raise ValueError(f"peft: peft_type={named!r}: this method trains {own}; leave it out.")
        cls = types[str(named).upper()]
        return cls(**{"task_type": "CAUSAL_LM", **checked(cls, values, "peft")})


@dataclass
class CardArguments:
    """What only the author of a model can say of it.

    Parameters:
        card (`dict`, *optional*): arguments of `hf_ext.build_card`.
    """

    card: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": f"What the model card says besides what the run knows: {', '.join(CARD_WORDS)}."},
    )

    def words(self) -> dict[str, Any]:
        """Arguments for the card.

        Raises:
            ValueError: a word that no card has, or no text.
        """
        given = yaml.safe_load(self.card) if isinstance(self.card, str) else self.card or {}
        if not isinstance(given, dict):
            raise ValueError(f"card={given!r} is no mapping of names to texts.")
        for name, value in given.items():
            if name not in CARD_WORDS:
                raise ValueError(f"card: {name!r} is unknown; choose among {', '.join(CARD_WORDS)}.")
            if not (
                isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
            ):
                raise ValueError(f"card: {name}={value!r} is no text.")
        if "base_model" in given:
            identify(None, explicit=given["base_model"])
        return given


class Further(ABC):
    """Fields of a recipe that become keyword arguments of the trainer."""

    @abstractmethod
    def for_trainer(self) -> dict[str, Any]:
        """Raises `ValueError` or `OSError` if what the fields name cannot be used."""


@dataclass
class RetainArguments(Further):
    """Answers to keep, for the losses that read them."""

    retain_dataset_name: str | None = field(default=None, metadata={"help": "Prompts and completions to keep."})
    retain_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    retain_dataset_split: str = field(default="train", metadata={"help": "Its split."})

    def for_trainer(self) -> dict[str, Any]:
        return _further(
            "retain_dataset", self.retain_dataset_name, self.retain_dataset_config, self.retain_dataset_split
        )


@dataclass
class LocalityArguments(Further):
    """Text that an edit is to leave alone."""

    locality_dataset_name: str | None = field(default=None, metadata={"help": "Text that is to stay as it is."})
    locality_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    locality_dataset_split: str = field(default="train", metadata={"help": "Its split."})

    def for_trainer(self) -> dict[str, Any]:
        return _further(
            "locality_dataset", self.locality_dataset_name, self.locality_dataset_config, self.locality_dataset_split
        )


def _further(argument: str, name: str | None, config: str | None, split: str) -> dict[str, Any]:
    return {} if name is None else {argument: load(f"{argument}_name", name, config, split)}


@dataclass
class PromptArguments(Further):
    """The texts that pairs were built with."""

    prompts_file: str | None = field(
        default=None, metadata={"help": "The rag_config.json of the prompts that the pairs were built with."}
    )

    def for_trainer(self) -> dict[str, Any]:
        return {} if self.prompts_file is None else {"prompts": RagPrompts.from_file(self.prompts_file)}


@dataclass
class TaskArguments:
    """One task of a sequence; `dataset_test_split`, if given, is scored after every task."""

    name: str
    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    options: list[str] | None = None

    def task(self) -> ContinualTask:
        def split(name: str | None) -> Any:
            if name is None:
                return None
            data = load(f"task {self.name!r}: dataset_name", self.dataset_name, self.dataset_config, name)
            check_columns(data, TEXTS, f"task {self.name!r}: dataset_name={self.dataset_name!r}")
            return data

        options = None if self.options is None else tuple(self.options)
        return ContinualTask(self.name, split(self.dataset_train_split), split(self.dataset_test_split), options)


@dataclass
class SequenceArguments(Further):
    """Tasks that are learnt one after another."""

    tasks: list[TaskArguments] = field(default_factory=list, metadata={"help": "In the recipe: one mapping each."})

    def for_trainer(self) -> dict[str, Any]:
        if not self.tasks:
            raise ValueError("tasks is missing: give a list of tasks, each with name and dataset_name.")
        return {"tasks": [each.task() for each in self.tasks]}
