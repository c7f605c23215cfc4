"""Configuration of NEAT."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from peft import PeftConfig
from peft.tuners.peanut import PeanutConfig
from transformers.activations import ACT2FN

from hf_ext._compat import peft_type
from hf_ext.tuners.ranges import is_count

SIDES = ("input", "output", "auto")


@dataclass
class NeatConfig(PeanutConfig):
    """Configuration of a NEAT adapter: a small network reads the rows of a frozen weight and returns its update.

    Fields that are not named here are those of [`~peft.PeanutConfig`], PEFT's implementation of the same method.
    Source: https://huggingface.co/papers/2410.01870.

    Args:
        r (`int`): width of the network, and the rank of the update. Default 32 (the authors' language models).
        side (`str`): what the network reads: `"input"`, rows of the weight (paper, and the authors' language models);
            `"output"`, its columns (their other code, and PEFT's type PEANUT); `"auto"`, whichever needs fewer parameters in each
            layer. Default `"input"`.
        depth (`int`): pairs of hidden layers between the first and the last, at least 0. Default 0.
        act_fn (`str`): activation: a key of `transformers.activations.ACT2FN`, or `"sin"`. Default `"relu"`.
        scaling (`float`): factor of the update. Default 1.
        lora_alpha (`float`, *optional*): sets `scaling` to `lora_alpha / r`, as the authors' language models do.
        normalize (`bool`): multiply what the network computes from a weight by a constant, found at the start and kept with the
            adapter, which gives it the size of LoRA's random factor, so that LoRA's learning rates fit. Default True; False is the
            paper, whose learning rates are 5 to 50 times higher, and PEANUT.
        dropout (`float`): on the inputs of the adapter while it trains, in [0, 1). Default 0.
        rank_pattern (`dict`): names of layers, or regular expressions, and the `r` that they get instead.

    Raises:
        ValueError: a field is out of its range, or two of them contradict each other.
    """

    side: str = field(
        default="input", metadata={"help": "What the network reads: 'input' (rows), 'output' or 'auto'."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Sets scaling to lora_alpha / r."})
    normalize: bool = field(default=True, metadata={"help": "Give the features the size of LoRA's random factor."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the inputs of the adapter, in [0, 1)."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Layers with another r."})

    def __post_init__(self) -> None:
        # PeanutConfig would set its own type, and refuses an activation that transformers does not name.
        PeftConfig.__post_init__(self)
        self.peft_type = peft_type("NEAT")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check()
        if self.lora_alpha is not None:
            self.scaling = self.lora_alpha / self.r

    def _check(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}.")

        require(is_count(self.r) and self.r > 0, "r", "give a positive width")
        require(
            is_count(self.depth) and self.depth >= 0, "depth", "give the number of pairs of hidden layers, 0 or more"
        )
        require(self.act_fn in ACT2FN or self.act_fn == "sin", "act_fn", f"choose 'sin' or one of {sorted(ACT2FN)}")
        require(self.side in SIDES, "side", f"choose one of {', '.join(map(repr, SIDES))}")
        require(0 <= self.dropout < 1, "dropout", "the share of inputs that are dropped lies in [0, 1)")
        for pattern, r in self.rank_pattern.items():
            require(is_count(r) and r > 0, "rank_pattern", f"give {pattern!r} a positive width")
        if self.lora_alpha is not None:
            # A saved configuration holds both, in agreement.
            require(
                self.scaling in (1.0, self.lora_alpha / self.r),
                "scaling",
                f"lora_alpha={self.lora_alpha!r} sets it to {self.lora_alpha / self.r:g}; give one of the two",
            )
            require(not self.rank_pattern, "rank_pattern", "lora_alpha has no one meaning then; give scaling instead")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r}: give layers_to_transform too, which says which of them."
            )

    @classmethod
    def from_peanut(cls, config: PeanutConfig) -> NeatConfig:
        """The configuration with which NEAT is what PEFT's type PEANUT is: its fields, the side "output", nothing normalised."""
        shared = {f.name: getattr(config, f.name) for f in fields(PeanutConfig) if f.init and f.name != "peft_type"}
        return cls(**shared, side="output", normalize=False)
