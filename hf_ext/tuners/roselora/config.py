"""Configuration of RoseLoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

from peft import LoraConfig

from hf_ext._compat import peft_type
from hf_ext.tuners.ranges import is_count
from hf_ext.tuners.roselora.reference import MASK_RULES

# LoRA options that change the forward pass or the start of A and B in a way that a sparse B @ A cannot express.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "layer_replication",
    "megatron_config",
)
_INITS = (True, False, "gaussian")


@dataclass
class RoseLoraConfig(LoraConfig):
    """Configuration of a RoseLoRA adapter: LoRA whose A rows and B columns are pruned while it trains.

    Every field of [`~peft.LoraConfig`] keeps its meaning. "Line" means a row of A or a column of B.
    Source: https://huggingface.co/papers/2406.10777, and the authors' editing code for the defaults marked (code).

    Args:
        sparsity (`float`): fraction of zeros in every line at the end, in [0, 1). Default 0.95 (code, where the variable
            holds the kept fraction 0.05). 0 is plain LoRA. The setting that matters most: tune it.
        beta (`float`): decay of the average of |weight * gradient|, in [0, 1). Default 0.8 (paper and code).
        t_init (`int` or `float`): last dense optimizer step: a step count >= 2, or a fraction of `total_step` in [0, 1).
            Default 0.1.
        t_final (`int` or `float`): first optimizer step at full sparsity; a step count or a fraction in (0, 1].
            Default 0.8. The editing code uses 3 and 20 of 25.
        total_step (`int`, *optional*): optimizer steps that fractions refer to. `RoseLoraCallback` fills it in from the
            `Trainer`; in a loop of your own give it here, or give both limits as step counts.
        value_clip (`float`, *optional*): clamp A and B to [-value_clip, value_clip] after each pruning, so that no entry
            of the update exceeds lora_alpha * value_clip**2. Default None; the editing code uses 3e-3 on a model of
            hidden size 4096, a value that stops smaller models from learning.
        mask_rule (`str`): `"topk"` keeps exactly ceil((1 - sparsity) * n) entries of a line of n, equal scores to the
            lower index; `"reference"` is the threshold of the authors' code, which keeps one more and all ties.
        prune_interval (`int`): prune every so many optimizer steps before `t_final`, and at every step after it.
            Default 1 (paper).
        freeze_mask (`bool`): stop scoring at `t_final` and hold the masks. Default True: pruning is one-way in practice,
            and training from there on costs one masked fill.

    Raises:
        ValueError: a field is out of its range, or a LoRA option cannot hold together with sparse factors.
    """

    sparsity: float = field(default=0.95, metadata={"help": "Fraction of zeros in every row of A and column of B."})
    beta: float = field(default=0.8, metadata={"help": "Decay of the averaged importance |weight * gradient|."})
    t_init: int | float = field(default=0.1, metadata={"help": "Last dense step: a count, or a fraction below 1."})
    t_final: int | float = field(default=0.8, metadata={"help": "First step at full sparsity: count or fraction."})
    total_step: int | None = field(default=None, metadata={"help": "Optimizer steps that fractions refer to."})
    value_clip: float | None = field(default=None, metadata={"help": "Clamp A and B to this magnitude when pruning."})
    mask_rule: str = field(default="topk", metadata={"help": "'topk' (exact) or 'reference' (authors' threshold)."})
    prune_interval: int = field(default=1, metadata={"help": "Prune every so many optimizer steps before t_final."})
    freeze_mask: bool = field(default=True, metadata={"help": "Hold the masks from t_final on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("ROSELORA")
        self._check_lora_options()
        self._check_ranges()
        if is_count(self.t_init) and self.t_init < 2:
            warnings.warn(
                f"t_init={self.t_init}: no entry has a score before the second optimizer step, because B starts at "
                "zero; t_init is raised to 2.",
                stacklevel=3,
            )
            self.t_init = 2

    def _check_lora_options(self) -> None:
        for name in _UNSUPPORTED:
            value = getattr(self, name)
            if value not in (None, False):
                raise ValueError(
                    f"{name}={value!r} cannot be combined with RoseLoRA; leave it unset or use LoraConfig."
                )
        if self.init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} starts from dense factors that pruning would destroy; "
                f"use one of {', '.join(map(repr, _INITS))}."
            )

    def _check_ranges(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}.")

        require(
            _is_number(self.sparsity) and 0 <= self.sparsity < 1, "sparsity", "the fraction of zeros lies in [0, 1)"
        )
        require(_is_number(self.beta) and 0 <= self.beta < 1, "beta", "the decay lies in [0, 1)")
        for name in ("t_init", "t_final"):
            value = getattr(self, name)
            require(
                _is_number(value) and value >= 0 and (is_count(value) or value <= 1),
                name,
                "give a step count (int) or a fraction of total_step between 0.0 and 1.0",
            )
        if is_count(self.t_init) == is_count(self.t_final):
            require(self.t_init < self.t_final, "t_init", f"it must be smaller than t_final={self.t_final!r}")
        if self.total_step is not None:
            require(is_count(self.total_step) and self.total_step > 0, "total_step", "give a positive step count")
        if self.value_clip is not None:
            require(_is_number(self.value_clip) and self.value_clip > 0, "value_clip", "give a positive bound or None")
        require(self.mask_rule in MASK_RULES, "mask_rule", f"choose one of {', '.join(map(repr, MASK_RULES))}")
        require(is_count(self.prune_interval) and self.prune_interval > 0, "prune_interval", "give a positive count")

    def schedule(self, total_step: int | None = None) -> tuple[int, int]:
        """The limits (t_init, t_final) in optimizer steps, 2 <= t_init < t_final.

        Args:
            total_step: stands in for the field of the same name when that is None.

        Raises:
            ValueError: a limit is a fraction and no total is known.
        """
        total = self.total_step or total_step
        steps = []
        for name in ("t_init", "t_final"):
            value = getattr(self, name)
            if is_count(value):
                steps.append(value)
            elif total is None:
                raise ValueError(
                    f"{name}={value!r} is a fraction, and the number of optimizer steps is unknown: set total_step, give "
                    f"{name} as a step count, or train with RoseLoraCallback."
                )
            else:
                steps.append(round(value * total))
        t_init = max(2, steps[0])
        if is_count(self.t_final) and self.t_final <= t_init:
            raise ValueError(f"t_final={self.t_final!r} is not after t_init={self.t_init!r}, which is step {t_init}.")
        return t_init, max(t_init + 1, steps[1])

    def to_lora_config(self) -> LoraConfig:
        """The stock `LoraConfig` with which the same tensors give the same outputs, where this package is not installed."""
        shared = {f.name: getattr(self, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        return LoraConfig(**shared)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
