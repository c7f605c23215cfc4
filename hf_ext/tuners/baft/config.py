"""Configuration of BaFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from hf_ext._compat import peft_type
from hf_ext.tuners.baft.positions import parse_positions
from hf_ext.tuners.ranges import is_count

GATES = ("sigmoid", "softmax", "mlp", "none")
_GATE_BIAS = -2.0  # weights of 0.12 at the start


@dataclass
class BaftConfig(PeftConfig):
    """Configuration of a BaFT adapter: at a few tokens, the output of a few blocks is moved inside a learnt subspace.

    Source: https://huggingface.co/papers/2503.00306.

    Args:
        r (`int`): basis vectors of the subspace in each edited block. Default 12.
        layers (`int`, `list[int]` or `str`, *optional*): blocks whose outputs are edited, counted from 0; `"all"`. Default: the one after
            60 % of the blocks. A configuration that has been used holds a list.
        positions (`str`): which tokens: `fN` and `lN`, the first and last N of a prompt; `tail`, its last and all that follow; `all`;
            joined by `+`. Default `"l1+tail"`.
        gate (`str`): what gives every basis vector its weight for an input: `"sigmoid"` of a linear map (default), `"softmax"` of
            one, so that the weights add up to 1, `"mlp"`, a sigmoid with one hidden layer of `r`, or `"none"`: weights of 1, which is LoReFT.
        gate_bias (`float`, *optional*): what the sigmoid gets at the start, for `"sigmoid"` and `"mlp"`. Default -2: weights of 0.12.
        normalize (`bool`): let the gate read hidden states divided by their root mean square. Default True: in pretrained models states are tens or hundreds in
            size, and a sigmoid of them is soon shut for good. False is the formula as it stands; it changes nothing with the gate `"none"`.
        init_weights (`bool`): begin without any effect. Default True; False takes random values, for tests.
        target_modules (`str` or `list[str]`, *optional*): names of the blocks, or a regular expression, instead of `layers`, for models
            whose blocks are not found. A configuration that has been used holds names.
        exclude_modules (`str` or `list[str]`, *optional*): names that are left out of `target_modules`.
        modules_to_save (`list[str]`, *optional*): modules that are trained whole and saved with the adapter.
        edits (`list[dict]`): what has been taught so far, kept by [`BaftTrainer`]; see `hf_ext.tuners.baft.ledger`.

    Raises:
        ValueError: a field is out of its range, or two of them contradict each other.
    """

    r: int = field(default=12, metadata={"help": "Basis vectors of the subspace in each edited block."})
    layers: int | list[int] | str | None = field(
        default=None,
        metadata={"help": "Blocks whose outputs are edited, from 0; 'all'; default at 60 % of the depth."},
    )
    positions: str = field(default="l1+tail", metadata={"help": "Tokens: fN, lN, tail, all, joined by '+'."})
    gate: str = field(default="sigmoid", metadata={"help": f"One of {', '.join(GATES)}."})
    gate_bias: float | None = field(default=None, metadata={"help": "What the sigmoid gets at the start."})
    normalize: bool = field(default=True, metadata={"help": "Let the gate read states of size 1."})
    init_weights: bool = field(default=True, metadata={"help": "Begin without any effect."})
    target_modules: str | list[str] | set[str] | None = field(
        default=None, metadata={"help": "Names of blocks instead of `layers`, or a regular expression."}
    )
    exclude_modules: str | list[str] | set[str] | None = field(
        default=None, metadata={"help": "Names that are left out of target_modules."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    edits: list[dict[str, Any]] = field(default_factory=list, metadata={"help": "What has been taught so far."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BAFT")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check()
        if self.gate_bias is None and self.gate in ("sigmoid", "mlp"):
            self.gate_bias = _GATE_BIAS

    def _check(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}.")

        require(is_count(self.r) and self.r > 0, "r", "give a positive number of basis vectors")
        parse_positions(self.positions)
        require(self.gate in GATES, "gate", f"choose one of {', '.join(map(repr, GATES))}")
        require(
            self.gate_bias is None or self.gate in ("sigmoid", "mlp"),
            "gate_bias",
            f"gate={self.gate!r} has no use for it; leave it out",
        )
        listed: list[Any] = self.layers if isinstance(self.layers, list) else [self.layers]
        require(
            self.layers in (None, "all") or bool(listed and all(is_count(n) and n >= 0 for n in listed)),
            "layers",
            "give the number of a block, counted from 0, a list of numbers, or 'all'",
        )
        require(
            self.target_modules != "all-linear",
            "target_modules",
            "BaFT edits what blocks put out, not linear layers; say which blocks with layers",
        )
