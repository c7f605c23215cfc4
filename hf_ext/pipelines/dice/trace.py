"""What an inversion leaves behind: the tokens, their noise, what the model was told, and the settings. It can be saved, and replayed any number of times."""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_ext.pipelines.dice.reference import (
    CONVENTIONS,
    LOG_FLOOR,
    MASK_SCHEDULES,
    State,
    anchor_logits,
    log_onehot,
    noised,
    trajectory,
)

ANCHORS = ("auto", "model", "corrected", "onehot")
# Each with the share of noise in the last state that suits it: what is never a mask is never edited.
NOISES = {"random": 0.9, "mask": 1.0}
FORMAT = 1


def one_of(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; take one of {', '.join(map(repr, choices))}.")


def fingerprint(model: nn.Module) -> str | None:
    """Tells models with other weights apart, from a few numbers of each, rounded to bfloat16, in which they may be loaded; None if some weights are not in memory.

    Packed weights are left out: some kernels pack them anew when they are first used.
    """
    found = []
    for parameter in model.parameters():
        if parameter.is_meta:
            return None
        if parameter.is_floating_point():
            numbers = parameter.detach().reshape(-1)
            found.append(numbers[:: max(1, len(numbers) // 16)][:16].to(torch.bfloat16).float().cpu())
    return hashlib.sha256(torch.cat(found).numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class DiceSettings:
    """How the trajectory of an inversion is made; a `DiceTrace` keeps it for the replay.

    Args:
        num_inference_steps: S, number of states; at least 1.
        tau: share of noise in the last state, in (0, 1]: more of it leaves more freedom, and 1 nothing of the input but the residuals.
        mask_schedule: how the share of noise grows: `"linear"`, `"cosine"`, `"late_cosine"`, `"root"` or `"early_root"`.
        temperatures: what logits are divided by, in the first and in the last state. The authors take (0.2, 1.2) for Paella, and (1, 1) else.
        guidance_scale: of classifier-free guidance; 1 is none.
        anchor: what full strength leads back to. `"model"`: the model's logits for the input, as the authors; exact only where the model repeats what it sees. `"corrected"`: the same, but each token of the input is
            at least 1 above the rest. `"onehot"`: 0 at the token and `anchor_floor` elsewhere. `"auto"`: `"onehot"` with guidance, and where noise is a mask and the model does not repeat the row;
            `"corrected"` else.
        anchor_floor: of `"onehot"`: the lower, the closer the result stays. By default -7 times the guidance, at least -69.
        carry_over: predict what is noise in a state, and leave the rest as it is: how models are used that were trained on masks alone. The authors predict everything in every step. It wants `tau=1`, since what is never noise never changes.
        convention: `"paper"`, or `"paella"`, the S - 1 states of the authors' image code.
        truncation_rate: of multinomial diffusion: share of the probability that is kept, the likeliest values first.

    Raises:
        ValueError: a value is out of its range.
    """

    num_inference_steps: int
    tau: float = 0.9
    mask_schedule: str = "linear"
    temperatures: tuple[float, float] = (1.0, 1.0)
    guidance_scale: float = 1.0
    anchor: str = "auto"
    anchor_floor: float | None = None
    carry_over: bool = False
    convention: str = "paper"
    truncation_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tau", "guidance_scale", "truncation_rate"):
            object.__setattr__(self, name, float(getattr(self, name)))
        least = 2 if self.convention == "paella" else 1
        if self.num_inference_steps != int(self.num_inference_steps) or self.num_inference_steps < least:
            raise ValueError(f"num_inference_steps={self.num_inference_steps}: give a whole number, at least {least}.")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau}: give a number in (0, 1]: the share of noise in the last state.")
        object.__setattr__(self, "num_inference_steps", int(self.num_inference_steps))
        one_of("mask_schedule", self.mask_schedule, MASK_SCHEDULES)
        one_of("anchor", self.anchor, ANCHORS)
        one_of("convention", self.convention, CONVENTIONS)
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        if len(self.temperatures) != 2 or not all(0 < each < math.inf for each in self.temperatures):
            raise ValueError(f"temperatures={self.temperatures}: give two positive numbers.")
        if not math.isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise ValueError(f"guidance_scale={self.guidance_scale}: give a finite number >= 0; 1 is no guidance.")
        if self.anchor_floor is not None and not -math.inf < self.anchor_floor < 0:
            raise ValueError(f"anchor_floor={self.anchor_floor}: give a negative number.")
        if not 0 < self.truncation_rate <= 1:
            raise ValueError(f"truncation_rate={self.truncation_rate}: give a number in (0, 1].")

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1

    @property
    def floor(self) -> float:
        if self.anchor_floor is not None:
            return self.anchor_floor
        return max(-7.0 * max(self.guidance_scale, 1.0), -69.0)


@dataclass
class DiceTrace(ABC):
    """An inversion: B rows of N tokens. Positions that are not editable, such as padding, keep their tokens.

    Attributes:
        tokens: int64 `(B, N)`.
        editable: bool `(B, N)`.
        settings: how the trajectory was made.
        source: what the model was told besides the tokens; tensors with a row per row.
        negative: the same for guidance; empty without.
        recorded_with: pipeline, model and scheduler, which must be the same in replay.
        notes: texts and prompts, for people and for the pipeline.
        residuals: float `(S, B, N, V)` if they were stored, 4 S B N V bytes; otherwise they are computed again in replay.
    """

    tokens: Tensor
    editable: Tensor
    settings: DiceSettings
    source: dict[str, Tensor]
    negative: dict[str, Tensor]
    recorded_with: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    residuals: Tensor | None = None

    kind: ClassVar[str]

    # -- the trajectory

    @property
    @abstractmethod
    def states(self) -> list[State]:
        """From the least noise to the most."""

    @abstractmethod
    def state(self, number: int) -> Tensor:
        """Tokens of a state, `(B, N)`."""

    @abstractmethod
    def noised(self, tokens_BN: Tensor, number: int) -> Tensor:
        """Predicted tokens with the noise of a state."""

    def changed(self, number: int) -> Tensor:
        """Positions that the step from a state predicts, `(B, N)`."""
        return self.editable

    @abstractmethod
    def needs_logits(self) -> bool:
        """Whether the anchor asks for the model's logits for the tokens without noise."""

    @abstractmethod
    def anchor(self, number: int, plain_BNV: Tensor, positions: slice) -> Tensor:
        """The anchor of a state at some positions, `(B, n, V)`.

        Args:
            plain_BNV: logits for the tokens without noise, at these positions; of a trace that does not need them, any tensor of their shape.
        """

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self._tensors().values())

    # -- tensors, files

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                found[each.name] = value
            elif each.name in ("source", "negative"):
                found |= {f"{each.name}.{name}": tensor for name, tensor in value.items()}
        return found

    @classmethod
    def _assembled(cls, tensors: dict[str, Tensor], others: dict[str, Any]) -> DiceTrace:
        groups: dict[str, Any] = {"source": {}, "negative": {}}
        for name, tensor in tensors.items():
            group, dot, inner = name.partition(".")
            if dot:
                groups[group][inner] = tensor
            else:
                groups[name] = tensor
        return cls(**groups, **others)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DiceTrace:
        """
        Args:
            dtype: of what the model is told.
        """
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        for name, tensor in moved.items():
            if "." in name and tensor.is_floating_point():
                moved[name] = tensor.to(dtype)
        others = {"settings": self.settings, "recorded_with": self.recorded_with, "notes": self.notes}
        return self._assembled(moved, others)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; its folder is made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        others = {"settings": asdict(self.settings), "recorded_with": self.recorded_with, "notes": self.notes}
        about = json.dumps({"format": FORMAT, "kind": self.kind, **others})
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, aside, {"dice": about})
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DiceTrace:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is no such file, or one of a newer version.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("dice", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no trace, or only a part of one: {error}") from None
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} is no trace of format {FORMAT}, but of {about.get('format')}.")
        kind = {each.kind: each for each in (MaskedTrace, MultinomialTrace)}[about["kind"]]
        others = {"settings": DiceSettings(**about["settings"])}
        others |= {name: about[name] for name in ("recorded_with", "notes")}
        return kind._assembled(tensors, others)

    def check(self, recorded_with: dict[str, Any]) -> None:
        """Compare with the pipeline that is to replay.

        Raises:
            ValueError: something else was recorded with.
        """
        for name, expected in self.recorded_with.items():
            found = recorded_with.get(name)
            if found != expected and None not in (found, expected):
                raise ValueError(
                    f"the trace was recorded with another {name}: {expected!r}, and here it is {found!r}. Invert again with this pipeline."
                )


@dataclass
class MaskedTrace(DiceTrace):
    """Of masked models: a state replaces the tokens whose uniform number is small enough by their noise.

    Attributes:
        noise: int64 `(B, N)`, the same in all states.
        uniforms: float `(B, N)` in [0, 1).
        onehot: bool `(B,)`, rows whose anchor is one-hot.
    """

    noise: Tensor = None  # type: ignore[assignment]
    uniforms: Tensor = None  # type: ignore[assignment]
    onehot: Tensor = None  # type: ignore[assignment]

    kind: ClassVar[str] = "masked"

    def __post_init__(self) -> None:
        self.uniforms = torch.where(self.editable, self.uniforms, 2.0)
        chosen = self.settings
        self._states = trajectory(
            chosen.num_inference_steps,
            chosen.tau,
            chosen.mask_schedule,
            chosen.temperatures,
            chosen.convention,
            from_noise=chosen.carry_over,
        )

    @property
    def states(self) -> list[State]:
        return self._states

    def state(self, number: int) -> Tensor:
        return self.noised(self.tokens, number)

    def noised(self, tokens_BN: Tensor, number: int) -> Tensor:
        return noised(tokens_BN, self.noise, self.uniforms, self.states[number].fraction)

    def changed(self, number: int) -> Tensor:
        if not self.settings.carry_over:
            return self.editable
        return self.editable & (self.uniforms <= self.states[number].fraction)

    def needs_logits(self) -> bool:
        return not self.onehot.all()

    def anchor(self, number: int, plain_BNV: Tensor, positions: slice) -> Tensor:
        tokens, floor = self.tokens[:, positions], self.settings.floor
        if not self.needs_logits():
            return anchor_logits(plain_BNV, tokens, "onehot", floor)
        own = anchor_logits(plain_BNV, tokens, "model" if self.settings.anchor == "model" else "corrected")
        if not self.onehot.any():
            return own
        return torch.where(self.onehot[:, None, None], anchor_logits(plain_BNV, tokens, "onehot", floor), own)


@dataclass
class MultinomialTrace(DiceTrace):
    """Of multinomial diffusion: each state is drawn on its own.

    Attributes:
        trajectory: int64 `(S, B, N)`, tokens of the states.
    """

    trajectory: Tensor = None  # type: ignore[assignment]

    kind: ClassVar[str] = "multinomial"

    @property
    def states(self) -> list[State]:
        count = len(self.trajectory)
        return [State((number + 1) / count, number) for number in range(count)]

    def state(self, number: int) -> Tensor:
        return self.trajectory[number]

    def noised(self, tokens_BN: Tensor, number: int) -> Tensor:
        """A step leads to the next state as it is."""
        return tokens_BN

    def needs_logits(self) -> bool:
        return False

    def anchor(self, number: int, plain_BNV: Tensor, positions: slice) -> Tensor:
        before = self.state(number - 1) if number else self.tokens
        floor = LOG_FLOOR if self.settings.anchor_floor is None else self.settings.anchor_floor
        found = log_onehot(before[:, positions], plain_BNV.shape[-1], plain_BNV.dtype)
        return found.clamp(min=floor)
