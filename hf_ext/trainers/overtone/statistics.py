"""What happened to the tokens of an optimizer step, summed over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ext.trainers.overtone.loss import TokenLosses


@dataclass(frozen=True)
class StepSummary:
    """Sums over the labelled tokens of one optimizer step on every rank.

    Args:
        tokens, active, accepted: counts of labelled tokens, of those with a gradient and of those with a mixed target.
        kl, nll: sums in nats.
        position_nll, position_tokens: sum and count by position in the answer, if positions are recorded.
    """

    tokens: float
    active: float
    accepted: float
    kl: float
    nll: float
    position_nll: tuple[float, ...] = ()
    position_tokens: tuple[float, ...] = ()


class OvertoneStatistics:
    """Collects `TokenLosses` during an optimizer step and reduces them once at its end.

    The loss calls `record` for every micro-batch; the callbacks call `close_step`, on every rank; the trainer calls
    `pop_log` when it logs. One collective per optimizer step, however many micro-batches it has.

    Args:
        positions: how many positions of the answer to keep apart; 0 keeps none apart.
    """

    def __init__(self, positions: int = 0) -> None:
        self.positions = positions
        self.reset()

    def reset(self) -> None:
        """Forget everything that was recorded: a new training run begins."""
        self.last_step: StepSummary | None = None
        self._running: Tensor | None = None
        self._closed_step: int | None = None
        self._since_log = [0.0] * 5

    @torch.no_grad()
    def record(self, losses: TokenLosses, labelled: Tensor) -> None:
        """Add a micro-batch; `losses` and the boolean `labelled` have the same shape, [..., sequence]."""
        sums = [labelled.sum(), losses.active.sum(), losses.accepted.sum(), losses.kl.sum(), losses.nll.sum()]
        row = torch.stack([x.to(torch.float32) for x in sums])
        if self.positions:
            index = answer_positions(labelled).clamp(max=self.positions)[labelled]
            by_position = row.new_zeros(2, self.positions + 1)
            by_position[0].index_add_(0, index, losses.nll[labelled].to(row.dtype))
            by_position[1].index_add_(0, index, torch.ones_like(index, dtype=row.dtype))
            row = torch.cat([row, by_position[:, :-1].flatten()])
        self._running = row if self._running is None else self._running + row.to(self._running.device)

    def close_step(self, step: int) -> StepSummary:
        """The summary of optimizer step `step`; a second call for the same step returns the same summary.

        Raises:
            RuntimeError: nothing was recorded, so the loss in use does not feed this object.
        """
        if self._closed_step == step and self.last_step is not None:
            return self.last_step
        if self._running is None:
            raise RuntimeError(
                "no OVERTONE loss was recorded in this step: pass the callback the `statistics` of the OvertoneLoss or "
                "the `overtone_statistics` of the trainer that computes the loss."
            )
        from accelerate.utils import reduce

        values = reduce(self._running, reduction="sum").tolist()
        count = self.positions
        tokens, active, accepted, kl, nll = values[:5]
        by_position = tuple(values[5 : 5 + count]), tuple(values[5 + count :])
        self.last_step = StepSummary(tokens, active, accepted, kl, nll, *by_position)
        self._since_log = [a + b for a, b in zip(self._since_log, values[:5], strict=True)]
        self._running, self._closed_step = None, step
        return self.last_step

    def pop_log(self) -> dict[str, float]:
        """Means over the labelled tokens since the last call, for the log; empty if there were none."""
        tokens, active, accepted, kl, nll = self._since_log
        self._since_log = [0.0] * 5
        if not tokens:
            return {}
        return {
            "overtone/active_fraction": active / tokens,
            "overtone/accepted_fraction": accepted / tokens,
            "overtone/kl": kl / tokens,
            "overtone/nll": nll / tokens,
        }


def answer_positions(labelled: Tensor) -> Tensor:
    """Index of every labelled token inside its run of labelled tokens; [..., sequence] bool -> int64.

    A run is one answer: in packed sequences the prompts between the answers carry no labels.
    """
    index = torch.arange(labelled.shape[-1], device=labelled.device).expand(labelled.shape)
    run_start = torch.where(labelled, 0, index + 1).cummax(-1).values
    return index - run_start
