"""What a compressed key-value cache costs and loses against full precision."""

from __future__ import annotations

import dataclasses
import gc
import types
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Cache

_CODE = (type, types.ModuleType, types.FunctionType)  # these lead out of a cache and into the whole program


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache of any kind keeps alive, counted by storage, so that a view of a large tensor counts in full."""
    storages = {}
    for tensor in _tensors(cache, set()):
        for part in _plain(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bits_per_element(cache: Cache, elements: int) -> float:
    """Bits that a cache spends on each of its `elements`: tokens times channels, keys and values, over all heads, layers and sequences.

    Raises:
        ValueError: `elements` is not positive.
    """
    if elements < 1:
        raise ValueError(f"elements={elements}: give the number of cached numbers, keys and values together.")
    return 8 * cache_bytes(cache) / elements


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with memory behind a tensor; quantised tensor types consist of several."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in _plain(getattr(tensor, name))]


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors that an object refers to, at any depth and by whatever kind of attribute or container."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif not isinstance(value, _CODE):
        for part in gc.get_referents(value):
            yield from _tensors(part, seen)


def _scores(query: torch.Tensor, keys: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `(B, Q, N, S)` in float32 and which of them a query attends to; the last query is at the last key."""
    keys = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], 1)
    scores = query.float() @ keys.mT * query.shape[-1] ** -0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return scores, allowed.tril(scores.shape[-1] - scores.shape[-2]) if causal else allowed


def score_error(query: torch.Tensor, keys: torch.Tensor, approximation: torch.Tensor, causal: bool = True) -> float:
    """Root mean square of q (k - k_hat) / sqrt(D) over the pairs that attend.

    Args:
        query: `(B, Q, N, D)`; query heads of one key-value head are neighbours.
        keys, approximation: `(B, H, S, D)`.
        causal: whether queries, the last N positions, attend to no later key.
    """
    scores, allowed = _scores(query, keys - approximation, causal)
    return scores[..., allowed].square().mean().sqrt().item()


def attention_output_error(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_approximation: torch.Tensor,
    value_approximation: torch.Tensor,
    causal: bool = True,
) -> float:
    """||attention(q, k, v) - attention(q, k_hat, v_hat)|| / ||attention(q, k, v)||, Frobenius norms; arguments as in `score_error`."""

    def output(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores, allowed = _scores(query, keys, causal)
        values = values.float().repeat_interleave(query.shape[1] // values.shape[1], 1)
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values

    exact = output(keys, values)
    return ((output(key_approximation, value_approximation) - exact).norm() / exact.norm()).item()


@dataclasses.dataclass
class LogitComparison:
    """Predictions with a compressed cache against those with a full one, summed over batches of `update`.

    Attributes:
        tokens: predicted tokens so far.
        nll, reference_nll: summed negative log-likelihoods of the labels, in nats.
        agreements: tokens where both predict the same most likely token.
        divergence: summed KL(full || compressed), in nats.
    """

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    agreements: int = 0
    divergence: float = 0.0

    def update(self, logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> None:
        """Add predictions.

        Args:
            logits, reference: `(*, V)`, with the compressed and with the full cache.
            labels: `(*)`, the tokens that follow.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if logits.shape != reference.shape or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"logits {tuple(logits.shape)}, reference {tuple(reference.shape)} and labels {tuple(labels.shape)} do not belong together: "
                "give logits of equal shape (*, V) and labels (*)."
            )
        log_p, log_q = (x.float().log_softmax(-1) for x in (reference, logits))
        self.tokens += labels.numel()
        self.nll -= log_q.gather(-1, labels.unsqueeze(-1)).sum().item()
        self.reference_nll -= log_p.gather(-1, labels.unsqueeze(-1)).sum().item()
        self.agreements += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.divergence += (log_p.exp() * (log_p - log_q)).sum().item()

    def result(self) -> dict[str, float]:
        """Perplexities, their difference, the share of equal tokens and the mean divergence.

        Raises:
            ValueError: nothing has been added.
        """
        if not self.tokens:
            raise ValueError("No predictions were added; call update() first.")
        perplexity, reference = (
            torch.tensor(total / self.tokens).exp().item() for total in (self.nll, self.reference_nll)
        )
        return {
            "perplexity": perplexity,
            "reference_perplexity": reference,
            "perplexity_increase": perplexity - reference,
            "token_agreement": self.agreements / self.tokens,
            "kl_divergence": self.divergence / self.tokens,
            "tokens": self.tokens,
        }
