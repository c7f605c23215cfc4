"""How far an edit moves the model's distribution elsewhere: KL divergence from the model before the edit.

For a position t with vocabulary distributions p (before) and q (after), KL(p‖q) = Σ_v p(v) (log p(v) − log q(v)), in nats.
It reacts to changes that leave every argmax in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_ext.metrics.editing.inference import ModelRunner, ScoredSequence

# A long text is scored in independent windows, so that one text never needs more logits than a batch may hold.
WINDOW = 128
# Log-probabilities below this are rounded up to it; half precision ends near -65504.
_FLOOR = -1e4


@dataclass
class DriftReference:
    """What the untouched model predicts, on the CPU in float16: 2 bytes × positions × vocabulary.

    Attributes:
        log_probs: sequence -> [positions, vocabulary], or [positions, top_k + 1] whose last column is all other tokens.
        tokens: sequence -> ids [positions, top_k] of those columns; empty where the vocabulary is complete.
    """

    log_probs: dict[ScoredSequence, Tensor] = field(default_factory=dict)
    tokens: dict[ScoredSequence, Tensor] = field(default_factory=dict)


def drift_reference(runner: ModelRunner, sequences: Sequence[ScoredSequence], top_k: int | None) -> DriftReference:
    """Stores what the model predicts now at every scored position."""
    reference = DriftReference()
    distinct = list(dict.fromkeys(sequences))
    for index, logits in runner.logits(distinct):
        chosen = None if top_k is None else logits.topk(min(top_k, logits.shape[-1] - 1), dim=-1).indices
        reference.log_probs[distinct[index]] = _compressed(logits, chosen).cpu()
        if chosen is not None:
            reference.tokens[distinct[index]] = chosen.int().cpu()
    return reference


def measure_drift(
    runner: ModelRunner, sequences: Sequence[ScoredSequence], reference: DriftReference
) -> dict[ScoredSequence, list[float]]:
    """KL, in nats, from the reference to what the model predicts now, at every scored position of each sequence."""
    distinct = list(dict.fromkeys(sequences))
    measured = {}
    for index, logits in runner.logits(distinct):
        sequence = distinct[index]
        chosen = reference.tokens[sequence].to(logits.device).long() if reference.tokens else None
        before = reference.log_probs[sequence].to(logits.device)
        measured[sequence] = kl_divergence(before, _compressed(logits, chosen)).tolist()
    return measured


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) in nats, [positions], of two tables of log-probabilities [positions, outcomes] of any precision.

    Both are renormalised after rounding, so that the result is never negative and exactly 0 for equal tables.
    """
    log_p, log_q = log_p.float().log_softmax(dim=-1), log_q.float().log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)


def windows(ids: Sequence[int], prefix_length: int) -> list[ScoredSequence]:
    """A text in windows of at most `WINDOW` tokens that each repeat its leading special tokens.

    Every token but the first of a window is scored; a window of a single token is left out.
    """
    prefix, body = list(ids[:prefix_length]), list(ids[prefix_length:])
    step = WINDOW - len(prefix)
    pieces = [prefix + body[start : start + step] for start in range(0, len(body), step)]
    return [ScoredSequence(tuple(piece), 1, len(piece)) for piece in pieces if len(piece) > 1]


def _compressed(logits: Tensor, tokens: Tensor | None) -> Tensor:
    """Float16 log-probabilities of all tokens, or of the given ones and, last, of everything else together."""
    log_probs = logits.float().log_softmax(dim=-1)
    if tokens is not None:
        kept = log_probs.gather(-1, tokens)
        rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1, keepdim=True)
        log_probs = torch.cat([kept, rest], dim=-1)
    return log_probs.clamp(min=_FLOOR).half()
