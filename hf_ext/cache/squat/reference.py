"""The mathematics of SQuat: the subspace of the queries, the strength of the compensation, and its guard.

Source: https://huggingface.co/papers/2503.24358. Keys are only read through q k^T, so their rounding error should be orthogonal to the
directions that queries take. The metric is A = I + lambda Qhat^T Qhat with Qhat = diag(S_1 .. S_K) V_K^T of the prompt's queries;
`hf_ext.kernels.quantize` rounds under it, with W = sqrt(lambda) Qhat.

The paper's lambda is not free of scale: S^2 grows with the number of queries. Ours is relative, lambda = relative * D / sum(S^2), and is chosen for
every head by the score error that it leaves on queries it has not seen, plain rounding being one of the candidates.

Shapes: B batch, H key-value heads, N query rows of a key-value head, T tokens, K rank, D channels.
"""

from __future__ import annotations

import torch

from hf_ext.kernels.quantize import dequantize, quantize_keys

CANDIDATES = (0.0, 0.03, 0.3, 3.0, 30.0)  # relative strengths; 0 is plain rounding


def directions(gram_DD: torch.Tensor, rank: int) -> torch.Tensor:
    """Qhat, float32 `(*, K, D)`, from the Gram matrix Q^T Q of the queries: its leading eigenvectors times the root of their eigenvalues.

    The sign of a row is arbitrary, and nothing depends on it.
    """
    values, vectors = torch.linalg.eigh(gram_DD.float())
    values, vectors = values[..., -rank:], vectors[..., -rank:]
    return (values.clamp_min(0).sqrt().unsqueeze(-2) * vectors).mT


def gram(rows_ND: torch.Tensor) -> torch.Tensor:
    """Q^T Q in float32, `(*, D, D)`; nothing where a number is not finite."""
    rows_ND = rows_ND.float()
    return (product := rows_ND.mT @ rows_ND).where(product.isfinite().all(-1).all(-1)[..., None, None], 0)


def descending_range(keys_TD: torch.Tensor, group_size: int) -> torch.Tensor:
    """Channels by their mean range over groups of tokens, the widest first, int64 `(*, D)`.

    Wide channels round worst; rounded first, they leave all others to compensate what they cost.
    """
    low, high = keys_TD.unflatten(-2, (-1, group_size)).aminmax(dim=-2)
    return (high - low).float().mean(-2).argsort(dim=-1, descending=True, stable=True)


def score_error(delta_TD: torch.Tensor, rows_ND: torch.Tensor) -> torch.Tensor:
    """Root mean square of q . delta over all pairs, float32 `(*)`."""
    return (rows_ND.float() @ delta_TD.float().mT).square().mean((-2, -1)).sqrt()


def choose_strength(
    keys_BHTD: torch.Tensor,
    directions_BHKD: torch.Tensor,
    held_out_BHND: torch.Tensor,
    order_BHD: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    block_size: int,
    scale_dtype: torch.dtype,
    clip: float = 1.0,
) -> torch.Tensor:
    """The relative strength among `CANDIDATES` with the least score error on held-out queries, float32 `(B, H)`.

    Args:
        keys_BHTD: a sample of the keys to round; T is a multiple of `group_size`.
        directions_BHKD: Qhat with sum(S^2) = 1, from the other queries.
        held_out_BHND: queries that `directions_BHKD` has not seen; rows of zeros do not count.
        order_BHD: the order in which channels are rounded.

    Returns:
        A strength per head; on a tie the weakest, so that heads whose queries are unknown stay plain.
    """
    strengths = torch.tensor(CANDIDATES, device=keys_BHTD.device)
    count, channels = len(CANDIDATES), keys_BHTD.shape[-1]
    basis = (strengths * channels).sqrt().view(-1, 1, 1, 1, 1) * directions_BHKD.float()
    keys = keys_BHTD.float().expand(count, *keys_BHTD.shape)
    packed = quantize_keys(
        keys,
        basis,
        None if order_BHD is None else order_BHD.expand(count, *order_BHD.shape),
        bits=bits,
        group_size=group_size,
        block_size=block_size,
        scale_dtype=scale_dtype,
        clip=clip,
    )
    errors = score_error(dequantize(packed, bits, group_size, -2) - keys, held_out_BHND)
    return strengths[errors.argmin(0)]
