"""Settings of a SQuat cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_ext.kernels.quantize import BITS

CLIP_RATIOS = {2: 0.8, 3: 0.95, 4: 1.0, 8: 1.0}


@dataclass(frozen=True)
class SQuatCacheConfig:
    """What a `SQuatCache` stores and how it rounds. `SQuatCache(model.config, bits=2)` takes the same names.

    Args:
        bits (`int`, defaults to 2): bits of a key and of a value: 2, 3, 4 or 8.
        key_bits (`int`, *optional*): bits of a key, `bits` if absent.
        value_bits (`int`, *optional*): bits of a value, `bits` if absent.
        group_size (`int`, defaults to 64): tokens of a channel (keys) or channels of a token (values) that share a scale and a minimum.
            A head whose channels are no multiple of it uses the largest divisor below it for its values. 32 takes half a bit more per number and is finer.
        residual_length (`int`, defaults to 64): newest tokens that stay whole, a multiple of `group_size`. Between this and `group_size` more are whole at any
            time, and as many can be taken back (`crop`) without a trace.
        sink_tokens (`int`, defaults to 4): first tokens that stay whole for good, since most heads look at them (KVQuant,
            https://huggingface.co/papers/2401.18079). In a left-padded row these may be padding.
        subspace_dim (`int`, defaults to 20): directions of the prompt's queries that the rounding spares (the paper's r, 5 to 60 there); 0 gives KIVI's plain
            rounding (https://huggingface.co/papers/2402.02750).
        squat_lambda (`float` or `"auto"`, defaults to `"auto"`): strength of the compensation. `"auto"` chooses it per head among relative strengths, plain rounding
            included, by the score error on held-out queries of the prompt. A number is the paper's lambda, which depends on the length of the prompt (0.001 to 0.1 there).
        block_size (`int`, defaults to 8): channels rounded together before their error is compensated (the paper's g, 64 there).
        order (`"descending"` or `"index"`, defaults to `"descending"`): channels are rounded from the widest range to the narrowest, or in index order as in the paper.
        clip_ratio (`float` or `"auto"`, defaults to `"auto"`): a group's codes span its range or, where that has the smaller squared error, only this middle share of it.
            `"auto"` is 0.8 at 2 bits, 0.95 at 3 and 1 above. 1 is the paper's, and KIVI's, min-max.
        schedule (`"lazy"` or `"kivi"`, defaults to `"lazy"`): when tokens are packed. `"lazy"` packs groups older than `residual_length` before the next step.
            `"kivi"` follows the authors' code, for comparison with it: keys `residual_length` at a time as soon as so many are there, values one by one.

    Raises:
        ValueError: a setting that cannot work, with its name, its value and the remedy.
    """

    bits: int = 2
    key_bits: int = None  # type: ignore[assignment]  # `bits`, set below
    value_bits: int = None  # type: ignore[assignment]
    group_size: int = 64
    residual_length: int = 64
    sink_tokens: int = 4
    subspace_dim: int = 20
    squat_lambda: float | Literal["auto"] = "auto"
    block_size: int = 8
    order: Literal["descending", "index"] = "descending"
    clip_ratio: float | Literal["auto"] = "auto"
    schedule: Literal["lazy", "kivi"] = "lazy"

    def __post_init__(self):
        for name in ("key_bits", "value_bits"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.bits)
        for name in ("bits", "key_bits", "value_bits"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in BITS:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, BITS))}.")
        for name, least in (
            ("group_size", 2),
            ("residual_length", 1),
            ("sink_tokens", 0),
            ("subspace_dim", 0),
            ("block_size", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give an integer of at least {least}.")
        if self.residual_length % self.group_size:
            raise ValueError(
                f"residual_length={self.residual_length} is not a multiple of group_size={self.group_size}: keys are packed in whole groups; "
                f"use {-(-self.residual_length // self.group_size) * self.group_size}."
            )
        if self.squat_lambda != "auto" and not (_number(self.squat_lambda) and 0 <= self.squat_lambda < float("inf")):
            raise ValueError(f"squat_lambda={self.squat_lambda!r}: give 'auto' or a number of at least 0.")
        if self.clip_ratio != "auto" and not (_number(self.clip_ratio) and 0.5 <= self.clip_ratio <= 1):
            raise ValueError(
                f"clip_ratio={self.clip_ratio!r}: give 'auto' or a number from 0.5 to 1, the share of a group's range."
            )
        if self.order not in ("descending", "index"):
            raise ValueError(f"order={self.order!r}: choose 'descending' or 'index'.")
        if self.schedule not in ("lazy", "kivi"):
            raise ValueError(f"schedule={self.schedule!r}: choose 'lazy' or 'kivi'.")

    def clip(self, bits: int) -> float:
        """The least share of a group's range that codes of `bits` bits span."""
        return CLIP_RATIOS[bits] if self.clip_ratio == "auto" else float(self.clip_ratio)

    def value_group(self, channels: int) -> int:
        """Channels that share a scale in a head of `channels` channels: the largest divisor up to `group_size`."""
        return max(size for size in range(1, self.group_size + 1) if channels % size == 0)

    def check_channels(self, channels: int, which: str) -> None:
        """Refuse a head dimension that cannot be packed.

        Raises:
            ValueError: the codes of a token do not fill whole bytes, or `block_size` does not divide the keys' channels.
        """
        bits = self.key_bits if which == "key" else self.value_bits
        per_byte = 8 if bits == 3 else 8 // bits
        if channels % per_byte:
            raise ValueError(
                f"{which}_bits={bits}: the model's head dimension {channels} is not a multiple of {per_byte}, so the codes of a token do not fill "
                f"whole bytes; use {which}_bits=8 or a DynamicCache."
            )
        if which == "key" and self.subspace_dim and self.block_size >= channels:
            raise ValueError(
                f"block_size={self.block_size}: the model's head dimension is {channels}, so nothing would be left to compensate in; choose a smaller "
                "divisor, or subspace_dim=0 for plain rounding."
            )
        if which == "key" and self.subspace_dim and channels % self.block_size:
            raise ValueError(
                f"block_size={self.block_size} does not divide the model's head dimension {channels}; choose a divisor."
            )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
