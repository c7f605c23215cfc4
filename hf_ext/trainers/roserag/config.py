"""Arguments of `RoseRAGTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl import DPOConfig

from hf_ext.trainers.roserag.loss import NATIVE_LOSSES, NLL_NORMALIZATIONS, PREFERENCE_LOSSES, PreferenceLoss


@dataclass
class RoseRAGConfig(DPOConfig):
    r"""
    Arguments of [`RoseRAGTrainer`]: those of [`~trl.DPOConfig`], with other defaults where the paper's setting asks for them, and the following.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `5e-6`):
            Learning rate, > 0; for full fine-tuning. LoRA usually needs twenty times as much.
        max_length (`int` or `None`, *optional*, defaults to `4096`):
            Tokens of prompt and response. Prompts hold passages, so TRL's 1024 would drop many rows.
        loss_type (`list[str]`, *optional*, defaults to `["rose_rag"]`):
            Terms of the loss: `"rose_rag"` (ORPO's odds ratio, the paper's), `"margin_dpo"`, `"simpo"`, those you registered, and those
            of [`~trl.DPOConfig`]; `loss_weights` weighs them. `beta` is that of margin_dpo, simpo and TRL's, and not the weight of the odds ratio, which ORPO's
            authors call so too.
        orpo_lambda (`float`, *optional*, defaults to `0.5`):
            Weight of the odds ratio, >= 0. Our choice: the paper's is not known, and ORPO's authors take 0.1.
        margin (`float`, *optional*, defaults to `0.0`):
            gamma: how far the chosen response has to be ahead, finite. The paper has none, and neither has ORPO.
        margin_column (`str`, *optional*):
            Column of the dataset with a gamma for every pair, in the place of `margin`. The column `margin` of a built dataset is what the
            scores differ by, and no gamma.
        nll_normalization (`str`, *optional*, defaults to `"sequence"`):
            The negative log-likelihood of the chosen response: `"sequence"`, its mean over tokens, then over pairs, which gradient accumulation leaves as it
            is; `"token"`, the mean over all tokens of a micro-batch; `"full_token"`, the same over prompt and response, as TRL's `ORPOTrainer`; or `"none"`.
        nll_weight (`float`, *optional*):
            Its weight, >= 0, which `loss_weights` leaves alone. `None` is 1 for rose_rag and margin_dpo, and 0 for the others. TRL's `"sft"` is the same term over
            tokens: name it beside rose_rag with `nll_weight=0` alone.
    """

    learning_rate: float = field(
        default=5e-6,
        metadata={"help": "Learning rate, > 0; for full fine-tuning. LoRA usually needs twenty times as much."},
    )
    max_length: int | None = field(
        default=4096,
        metadata={"help": "Tokens of prompt and response. Prompts hold passages, so TRL's 1024 would drop many rows."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["rose_rag"],
        metadata={"help": "Terms: rose_rag, margin_dpo, simpo, those you registered, and those of DPOConfig."},
    )
    orpo_lambda: float = field(
        default=0.5,
        metadata={"help": "Weight of the odds ratio, >= 0."},
    )
    margin: float = field(
        default=0.0,
        metadata={"help": "gamma: how far the chosen response has to be ahead. The paper has none."},
    )
    margin_column: str | None = field(
        default=None,
        metadata={"help": "Column of the dataset with a gamma for every pair, in the place of margin."},
    )
    nll_normalization: str = field(
        default="sequence",
        metadata={"help": "Of the chosen response: sequence, token, full_token or none."},
    )
    nll_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the negative log-likelihood, >= 0. None: 1 for rose_rag and margin_dpo."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        known = (*PREFERENCE_LOSSES, *NATIVE_LOSSES)
        unknown = [name for name in self.loss_type if name not in known]
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type={self.loss_type!r}: choose among {list(known)}.")
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type={self.loss_type!r} names a loss twice: use loss_weights.")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights={self.loss_weights!r}: give one for each of loss_type={self.loss_type!r}.")
        if not (math.isfinite(self.orpo_lambda) and self.orpo_lambda >= 0):
            raise ValueError(f"orpo_lambda={self.orpo_lambda!r}: give a finite number >= 0.")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin={self.margin!r}: give a finite number.")
        if self.margin and self.margin_column is not None:
            raise ValueError(
                f"margin={self.margin!r} has no effect beside margin_column={self.margin_column!r}: leave one out."
            )
        if (self.margin or self.margin_column is not None) and not self.own_losses:
            raise ValueError(f"a margin has no effect on loss_type={self.loss_type!r}: leave it out.")
        if self.nll_normalization not in NLL_NORMALIZATIONS:
            raise ValueError(f"nll_normalization={self.nll_normalization!r}: choose among {NLL_NORMALIZATIONS}.")
        if self.nll_weight is not None and not (math.isfinite(self.nll_weight) and self.nll_weight >= 0):
            raise ValueError(f"nll_weight={self.nll_weight!r}: give a finite number >= 0.")
        if self.nll_weight and self.nll_normalization == "none":
            raise ValueError(
                f"nll_weight={self.nll_weight!r} has no effect with nll_normalization='none': leave one out."
            )
        if self.own_losses and (self.ld_alpha is not None or self.use_weighting):
            raise ValueError(
                f"ld_alpha and use_weighting are for TRL's own losses, and {list(self.own_losses)} would ignore them: leave them out."
            )
        if self.label_smoothing and self.own_losses.keys() == set(self.loss_type):
            raise ValueError(f"label_smoothing has no effect on loss_type={self.loss_type!r}: leave it out.")
        if self.sync_ref_model and not self.needs_reference:
            raise ValueError(f"sync_ref_model: loss_type={self.loss_type!r} has no reference; leave it out.")
        super().__post_init__()

    @property
    def own_losses(self) -> dict[str, PreferenceLoss]:
        """Those that `DPOTrainer` does not know, in order."""
        return {name: PREFERENCE_LOSSES[name] for name in self.loss_type if name in PREFERENCE_LOSSES}

    @property
    def needs_reference(self) -> bool:
        """Whether a term compares with the model before training."""
        native = set(self.loss_type) - PREFERENCE_LOSSES.keys() - {"sft"}
        return bool(native) or any(loss.needs_reference for loss in self.own_losses.values())

    @property
    def weights(self) -> dict[str, float]:
        """Of every term; that of the odds ratio has `orpo_lambda` in it."""
        given = self.loss_weights or [1.0] * len(self.loss_type)
        factors = {"rose_rag": self.orpo_lambda}
        return {name: weight * factors.get(name, 1.0) for name, weight in zip(self.loss_type, given, strict=True)}

    @property
    def effective_nll_weight(self) -> float:
        """Of the negative log-likelihood, the default filled in."""
        if self.nll_normalization == "none":
            return 0.0
        if self.nll_weight is not None:
            return self.nll_weight
        return max((loss.nll_weight for loss in self.own_losses.values()), default=0.0)
