"""Arguments of `BaftTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from trl import SFTConfig

BALANCES = ("overlap", "variation")


@dataclass(frozen=True)
class BaftSettings:
    """What `BaftMixin` needs to know of an edit; the fields are those of `BaftTrainerConfig`.

    Raises:
        ValueError: a field is out of its range, or has no effect beside another.
    """

    stop_loss: float | None = 0.01
    edit_name: str | None = None
    own_bases: bool = False
    load_balance_weight: float | None = None
    load_balance: str = "overlap"
    locality_weight: float | None = None
    locality_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("load_balance_weight", "locality_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: give a finite number >= 0.")
        if self.stop_loss is not None and not self.stop_loss > 0:
            raise ValueError(f"stop_loss={self.stop_loss!r}: give a number > 0, or None.")
        if self.load_balance not in BALANCES:
            raise ValueError(f"load_balance={self.load_balance!r}: choose among {BALANCES}.")
        if self.own_bases and (self.load_balance_weight or self.load_balance != "overlap"):
            raise ValueError(
                f"load_balance_weight={self.load_balance_weight!r} and load_balance={self.load_balance!r} have no effect with own_bases=True, which shares no basis "
                "vectors: leave them out."
            )
        if self.locality_batch_size is not None and self.locality_batch_size < 1:
            raise ValueError(f"locality_batch_size={self.locality_batch_size!r}: give at least 1 row.")


@dataclass
class BaftTrainerConfig(SFTConfig):
    r"""
    Arguments of [`BaftTrainer`]: those of [`~trl.SFTConfig`], with other defaults where few facts are taught in few steps, and the following.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `5e-3`):
            Learning rate, > 0. Adapters of a few thousand numbers take more than LoRA.
        num_train_epochs (`float`, *optional*, defaults to `50`):
            Epochs at most; `stop_loss` ends most edits earlier.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Schedule of the learning rate.
        stop_loss (`float`, *optional*, defaults to `0.01`):
            Training ends after an optimizer step whose loss on the answers, in nats per token, was below it, > 0. `None` never ends it.
        edit_name (`str`, *optional*):
            Name in the ledger of the adapter. Default: `edit-1`, `edit-2`, ...
        own_bases (`bool`, *optional*, defaults to `False`):
            Give the edit basis vectors of its own, so that it can be taken back alone: the first edit those that the adapter was made with, each later
            one as many new ones. All earlier ones are fixed. `False` trains the same vectors in every edit, as the paper does.
        load_balance_weight (`float`, *optional*):
            alpha, >= 0: weight of the load-balancing loss, by which an edit prefers basis vectors that earlier edits use less. `None` is 0.1, and 0 where
            nothing is to be balanced: `own_bases`, or the gate `"none"`.
        load_balance (`str`, *optional*, defaults to `"overlap"`):
            Its form: `"overlap"` of the edit's weights with those of earlier edits, or `"variation"`, the squared coefficient of variation of their sum.
        locality_weight (`float`, *optional*):
            beta, >= 0: weight of the locality loss, the mean square of the weights on `locality_dataset`. `None` is 1 if there is one.
        locality_batch_size (`int`, *optional*):
            Rows of `locality_dataset` per forward pass and device, >= 1. `None` is `per_device_train_batch_size`.
    """

    learning_rate: float = field(default=5e-3, metadata={"help": "Learning rate, > 0."})
    num_train_epochs: float = field(default=50.0, metadata={"help": "Epochs at most."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    stop_loss: float | None = field(
        default=0.01, metadata={"help": "Training ends after a step whose loss in nats per token was below it, > 0."}
    )
    edit_name: str | None = field(default=None, metadata={"help": "Name in the ledger of the adapter."})
    own_bases: bool = field(default=False, metadata={"help": "Give the edit basis vectors of its own."})
    load_balance_weight: float | None = field(
        default=None, metadata={"help": "alpha, >= 0: weight of the load-balancing loss."}
    )
    load_balance: str = field(default="overlap", metadata={"help": "Its form: overlap or variation."})
    locality_weight: float | None = field(default=None, metadata={"help": "beta, >= 0: weight of the locality loss."})
    locality_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of the locality dataset per forward pass, >= 1."}
    )

    def __post_init__(self) -> None:
        self.baft_settings()
        super().__post_init__()

    def baft_settings(self) -> BaftSettings:
        """The fields that are not of `SFTConfig`; raises `ValueError` for one out of its range."""
        return BaftSettings(**{each.name: getattr(self, each.name) for each in fields(BaftSettings)})
