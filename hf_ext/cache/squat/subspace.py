"""What a layer remembers of the queries it has seen, and the basis it rounds with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from hf_ext.cache.squat import reference
from hf_ext.cache.squat.config import SQuatCacheConfig

HELD_OUT = 64  # query rows of a head that judge the strength
SAMPLE = 512  # tokens that the strength is chosen on
SLICE = 1024  # tokens whose queries are in float32 at a time


@dataclasses.dataclass
class QuerySubspace:
    """The queries' directions, and how strongly the rounding follows them; every tensor has batch and key-value heads in front.

    Attributes:
        directions: Qhat with sum(S^2) = 1, float16 `(B, H, K, D)`.
        energy: sum(S^2), float32 `(B, H)`.
        strength: W = sqrt(strength) * directions, float32 `(B, H)`; None until keys are packed after new queries.
        order: channels in the order in which they are rounded, int16 `(B, H, D)`; None for index order.
        trial: directions without the held-out queries, float32 `(B, H, K, D)`; None once the strength is chosen.
        held_out: queries that choose the strength, `(B, H, N, D)`; None once it is chosen.
    """

    directions: torch.Tensor
    energy: torch.Tensor
    strength: torch.Tensor | None = None
    order: torch.Tensor | None = None
    trial: torch.Tensor | None = None
    held_out: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        past: QuerySubspace | None,
        heads: int,
        config: SQuatCacheConfig,
        real: torch.Tensor | None = None,
    ) -> QuerySubspace:
        """The subspace after more queries.

        Args:
            query: `(B, Q, N, D)`; query heads of one key-value head are neighbours.
            past: what was known before; its leading directions count as queries with their energy.
            heads: H, the number of key-value heads.
            config: settings of the cache.
            real: `(B, N)`, False for padding; None if there is none.
        """
        rows = query.unflatten(1, (heads, -1))  # (B, H, Q / H, N, D)
        batch, _, ratio, tokens, _ = rows.shape
        kept = real if real is not None else torch.ones(batch, tokens, dtype=torch.bool, device=rows.device)
        known = 0 if past is None else past.energy[..., None, None] * reference.gram(past.directions)
        trial = held_out = None
        if config.squat_lambda == "auto":
            # The last quarter of each sequence is held out, counted from its end, so that padding in front changes nothing.
            held = kept.sum(-1) // 4
            early = torch.arange(tokens, device=rows.device) < (tokens - held)[:, None]  # (B, N)
            picks = torch.arange(max(HELD_OUT // ratio, 1), device=rows.device)
            picks = (tokens - held[:, None] + picks * held[:, None] // len(picks)).clamp(max=tokens - 1)
            held_out = rows.take_along_dim(picks[:, None, None, :, None], -2)
            # A sequence too short to hold anything out is rounded plainly.
            held_out = (held_out * ((held > 0)[:, None] & kept.gather(1, picks))[:, None, None, :, None]).flatten(2, 3)
            known = known + _gram(rows, kept & early)
            trial = _normalised(reference.directions(known, config.subspace_dim))[0]
            kept = kept & ~early
        directions, energy = _normalised(reference.directions(known + _gram(rows, kept), config.subspace_dim))
        return cls(directions.half(), energy, trial=trial, held_out=held_out)

    def basis(
        self, keys: torch.Tensor, config: SQuatCacheConfig, scale_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W `(B, H, K, D)` and the order of the channels, chosen on `keys` `(B, H, T, D)` if there are new queries."""
        if self.strength is None:
            self._choose(keys, config, scale_dtype)
        assert self.strength is not None
        return self.strength.sqrt()[
            ..., None, None
        ] * self.directions.float(), None if self.order is None else self.order.long()

    def _choose(self, keys: torch.Tensor, config: SQuatCacheConfig, scale_dtype: torch.dtype) -> None:
        order = reference.descending_range(keys, config.group_size) if config.order == "descending" else None
        if self.trial is not None and self.held_out is not None:
            groups = keys.shape[-2] // config.group_size
            every = max(groups * config.group_size // SAMPLE, 1)
            sample = keys.unflatten(-2, (groups, config.group_size))[..., ::every, :, :].flatten(-3, -2)
            relative = reference.choose_strength(
                sample,
                self.trial,
                self.held_out,
                order,
                bits=config.key_bits,
                group_size=config.group_size,
                block_size=config.block_size,
                scale_dtype=scale_dtype,
                clip=config.clip(config.key_bits),
            )
            self.strength = relative * keys.shape[-1]
        else:
            self.strength = float(config.squat_lambda) * self.energy
        self.order = None if order is None else order.to(torch.int16)
        self.trial = self.held_out = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> QuerySubspace:
        """Apply `function` to every tensor, for batch operations and moves between devices."""
        return QuerySubspace(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is known, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _gram(rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Q^T Q of the rows `(B, H, Q / H, N, D)` whose tokens are `kept` `(B, N)`, a slice of tokens at a time."""
    total = rows.new_zeros(*rows.shape[:2], rows.shape[-1], rows.shape[-1], dtype=torch.float32)
    for start in range(0, rows.shape[-2], SLICE):
        tokens = slice(start, start + SLICE)
        if kept[:, tokens].any():
            total += reference.gram((rows[..., tokens, :] * kept[:, None, None, tokens, None]).flatten(2, 3))
    return total


def _normalised(directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions with sum(S^2) = 1, and sum(S^2)."""
    energy = directions.square().sum((-2, -1))
    return directions / energy.clamp_min(torch.finfo(torch.float32).tiny).sqrt()[..., None, None], energy
