"""Arguments of the adaptive SVD trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from hf_ext.trainers.adaptive_svd.importance import SCORES

RANK_RULES = ("energy", "adaptive", "uniform")
# Settings that only some of the rules read.
_READ_BY = {
    "retained_energy": ("energy",),
    "importance_rows": ("energy", "adaptive"),
    "importance_score": ("adaptive",),
    "minimum_retention": ("adaptive",),
    "target_retention": ("adaptive", "uniform"),
}
PROJECTIONS = ("double", "joint")
EIGHT_BIT = (OptimizerNames.ADAMW_BNB, OptimizerNames.ADAMW_8BIT)
_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED, *EIGHT_BIT)


@dataclass
class AdaptiveSVDConfig(SFTConfig):
    r"""
    Arguments of [`AdaptiveSVDTrainer`]: those of [`~trl.SFTConfig`] and the following
    (https://huggingface.co/papers/2504.07097). Steps, epochs and the learning rate schedule are those of each task. With
    `optim="adamw_bnb_8bit"` the moments of the targeted layers are kept in 8 bits, which the projection of the update follows.

    Parameters:
        target_modules (`list[str]` or `str`, *optional*):
            Linear layers that are protected: names or their ends, or a regular expression for whole names. `None` takes all
            linear layers of the transformer blocks.
        rank_rule (`str`, *optional*, defaults to `"energy"`):
            How many singular directions of each weight are protected. `"energy"`: as many as put out the share
            `retained_energy` of what the layer puts out on the previous task. `"adaptive"`: the paper's, more where the
            previous task's inputs pass with little change. `"uniform"`: the share `target_retention` of all. Settings that
            the rule does not read are refused.
        retained_energy (`float`, *optional*, defaults to `0.99`):
            Share of the output that is protected, in (0, 1]; for `"energy"`.
        target_retention (`float`, *optional*, defaults to `0.8`):
            Share of protected directions, over all layers on average, in [0, 1]; for `"adaptive"` and `"uniform"`. The paper's.
        minimum_retention (`float`, *optional*, defaults to `0.1`):
            Share where the importance is 0, in [0, `target_retention`]; for `"adaptive"`. The paper's.
        importance_score (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"`, `"positive"` or the paper's `"signed"` cosine, for `"adaptive"`; signed ones are near 0 in many
            trained models.
        importance_rows (`int`, *optional*, defaults to `128`):
            Rows of the previous task, from its start, on which energy or importance is measured, >= 1.
        first_task_retention (`float`, *optional*, defaults to `0.0`):
            Share of protected directions during the first task, for which there is no previous one, in [0, 1]. The paper
            protects nothing then; with a pretrained model, protect what it knows.
        projection (`str`, *optional*, defaults to `"double"`):
            `"joint"` is the formula that the paper prints, which leaves all but the block of both protected sides free; the
            paper's code does what is called `"double"` here.
        unprotected_lr_scale (`float`, *optional*, defaults to `1.0`):
            Factor of the learning rate of everything that has no subspace: embeddings, norms, biases, output layer; >= 0.
            0 freezes them.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to protect; None: all of the transformer blocks."}
    )
    rank_rule: str = field(default="energy", metadata={"help": "energy, adaptive or uniform."})
    retained_energy: float = field(default=0.99, metadata={"help": "Share of the output energy that is protected."})
    target_retention: float = field(default=0.8, metadata={"help": "Mean share of protected directions, in [0, 1]."})
    minimum_retention: float = field(default=0.1, metadata={"help": "Share where the importance is 0."})
    importance_score: str = field(default="absolute", metadata={"help": "absolute, positive or signed."})
    importance_rows: int = field(default=128, metadata={"help": "Rows of the previous task that are measured."})
    first_task_retention: float = field(default=0.0, metadata={"help": "Share protected during the first task."})
    projection: str = field(default="double", metadata={"help": "double, or the paper's formula: joint."})
    unprotected_lr_scale: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate of what has no subspace; 0 freezes it."}
    )

    def __post_init__(self) -> None:
        choices = {"rank_rule": RANK_RULES, "importance_score": SCORES, "projection": PROJECTIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(known)}.")
        for name in ("target_retention", "minimum_retention", "first_task_retention", "retained_energy"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "retained_energy" and value == 0):
                raise ValueError(f"{name}={value!r} is a share of what is protected: give a number between 0 and 1.")
        defaults = {item.name: item.default for item in fields(self)}
        for name, rules in _READ_BY.items():
            if self.rank_rule not in rules and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with rank_rule={self.rank_rule!r}: leave it out, or set "
                    f"rank_rule to {' or '.join(map(repr, rules))}."
                )
        if self.rank_rule == "adaptive" and self.minimum_retention > self.target_retention:
            raise ValueError(
                f"minimum_retention={self.minimum_retention} is above target_retention={self.target_retention}, the mean: "
                "lower it."
            )
        if self.importance_rows < 1:
            raise ValueError(f"importance_rows={self.importance_rows}: give at least 1.")
        if not self.unprotected_lr_scale >= 0:
            raise ValueError(f"unprotected_lr_scale={self.unprotected_lr_scale}: give at least 0.")
        super().__post_init__()
        if self.optim not in _ADAMW:
            raise ValueError(
                f"optim={OptimizerNames(self.optim).value!r}: inside a subspace only adamw_torch, adamw_torch_fused and adamw_bnb_8bit work."
            )
        if self.fp16:
            raise ValueError("fp16=True scales the loss, which subspace gradients do not follow: use bf16=True.")
        if self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end=True would undo the end of each task: leave it out.")
        if self.save_only_model and self.save_strategy != SaveStrategy.NO:
            raise ValueError("save_only_model=True leaves checkpoints from which no task can go on: leave it out.")
