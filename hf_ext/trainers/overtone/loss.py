"""The OVERTONE token loss: a readable truth, and a closed form that never builds a target.

Paper: https://huggingface.co/papers/2502.00602. Tensors in, tensors out; no Hugging Face import.

Shape suffixes: N labelled tokens, T tokens of one chunk, R rows of one block, H hidden size, V vocabulary.

For one token with logits `z`, probabilities `p = softmax(z)` and label `y`:

    S      = {v : z_v >= max(z) - n * std(z)}                   the top-n-sigma filter
    flt    = softmax of z restricted to S, zero elsewhere
    cand   = lambda * onehot(y) + (1 - lambda) * flt
    t      = cand if y is an arg-max of cand else onehot(y)     a constant: no gradient flows through it
    loss   = max(KL(t || p), epsilon)                           so d loss / dz = (p - t) * 1[KL > epsilon]

With `lambda = 1` and `epsilon = 0` this is cross-entropy. Two points the paper leaves open are settled here: a tie in the
arg-max test accepts the candidate, and `std` is the unbiased estimator. `require_top1` is an addition: a token is only
clipped once its label is the model's first choice, because a candidate with a small `lambda` can come within `epsilon`
while greedy decoding is still wrong. Such a token keeps its KL as the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

# Elements of one block of rows on the CPU: 1 MiB in float32, so that the dozen passes over it stay in the cache.
BLOCK_ELEMENTS_CPU = 2**18


@dataclass(frozen=True)
class OvertoneSettings:
    """The numbers of the OVERTONE loss.

    Args:
        mix_lambda: weight of the one-hot label in the target, in [0, 1]. From 0.5 on the candidate is always accepted.
        clip_epsilon: KL divergence in nats below which a token contributes no gradient, >= 0.
        n_sigma: width of the filter in standard deviations of the logits, > 0; `inf` keeps the whole vocabulary.
        require_top1: clip a token only if its label is the most likely next token.
        valid_vocab_size: number of real vocabulary entries when the head is padded; the rest is left out of every
            statistic and gets no gradient. `None` uses all of them.

    Raises:
        ValueError: a value is outside its range.
    """

    mix_lambda: float = 0.5
    clip_epsilon: float = 0.05
    n_sigma: float = 1.0
    require_top1: bool = True
    valid_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix_lambda <= 1.0:
            raise ValueError(
                f"mix_lambda={self.mix_lambda} is the weight of the label in the target: choose a value in [0, 1]; "
                "1 is plain clipped cross-entropy."
            )
        if not 0.0 <= self.clip_epsilon < math.inf:
            raise ValueError(
                f"clip_epsilon={self.clip_epsilon} is a KL divergence in nats: choose a finite value >= 0; "
                "0 switches the clipping off."
            )
        if not self.n_sigma > 0.0:
            raise ValueError(
                f"n_sigma={self.n_sigma} is the width of the filter: choose a value > 0; inf switches the filter off."
            )
        if self.valid_vocab_size is not None and self.valid_vocab_size < 1:
            raise ValueError(
                f"valid_vocab_size={self.valid_vocab_size}: give a positive number of tokens, or None for all of them."
            )


def check_labels(labels: Tensor, vocab: int) -> None:
    """Raises `IndexError` naming the first label that is neither -100 nor in [0, vocab)."""
    wrong = ((labels < 0) | (labels >= vocab)) & (labels != IGNORE_INDEX)
    if bool(wrong.any()):
        raise IndexError(
            f"label {int(labels[wrong][0])} is outside the vocabulary of {vocab} tokens: check that the tokenizer belongs "
            f"to the model, and mark positions without loss with {IGNORE_INDEX}."
        )


class TokenLosses(NamedTuple):
    """What the loss says about each token; zero or False where the label is ignored. Only `loss` carries a gradient.

    `loss` is max(KL, epsilon), `nll` is -log p_y and `entropy` that of p, all in nats; `active` tokens have a gradient,
    `accepted` ones use the mixed target, and `is_top1` says whether the label is the first arg-max of p.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor
    active: Tensor
    accepted: Tensor
    is_top1: Tensor


class ReferenceLosses(NamedTuple):
    """`loss` [N] (differentiable), `kl` [N], `target` [N, V], `accepted` [N], `active` [N], `keep` [N, V]."""

    loss: Tensor
    kl: Tensor
    target: Tensor
    accepted: Tensor
    active: Tensor
    keep: Tensor


def overtone_reference(logits_NV: Tensor, labels_N: Tensor, settings: OvertoneSettings) -> ReferenceLosses:
    """The OVERTONE loss of logits [N, V] and labels [N] by its definition, in the dtype of the logits; the fast versions are tested against it.

    Padded columns beyond `valid_vocab_size` are dropped, so `target` and `keep` have that many columns.
    """
    z_NV = logits_NV[:, : settings.valid_vocab_size]
    log_p_NV = z_NV.log_softmax(-1)
    with torch.no_grad():
        fixed_NV = z_NV.detach()
        onehot_NV = torch.nn.functional.one_hot(labels_N, z_NV.shape[1]).to(z_NV.dtype)
        sigma_N = fixed_NV.std(-1, correction=min(1, z_NV.shape[1] - 1))
        keep_NV = fixed_NV >= (fixed_NV.amax(-1) - settings.n_sigma * sigma_N)[:, None]
        if math.isinf(settings.n_sigma):
            keep_NV = torch.ones_like(keep_NV)
        filtered_NV = fixed_NV.masked_fill(~keep_NV, -math.inf).softmax(-1)
        candidate_NV = settings.mix_lambda * onehot_NV + (1 - settings.mix_lambda) * filtered_NV
        accepted_N = candidate_NV.gather(1, labels_N[:, None])[:, 0] >= candidate_NV.amax(-1)
        target_NV = torch.where(accepted_N[:, None], candidate_NV, onehot_NV)
    kl_N = (torch.special.xlogy(target_NV, target_NV) - target_NV * log_p_NV).sum(-1)
    active_N = kl_N.detach() > settings.clip_epsilon
    if settings.require_top1:
        active_N |= fixed_NV.argmax(-1) != labels_N
    loss_N = torch.where(active_N, kl_N, settings.clip_epsilon)
    return ReferenceLosses(loss_N, kl_N.detach(), target_NV, accepted_N, active_N, keep_NV)


class _Scratch:
    """Two [R, V] buffers reused by every block of a call: a fresh megabyte per block costs more in page faults than in
    arithmetic."""

    def __init__(self, rows: int, vocab: int, like: Tensor):
        self.first, self.second = (torch.empty(rows, vocab, dtype=like.dtype, device=like.device) for _ in range(2))


def _score_(
    z_RV: Tensor, labels_R: Tensor, settings: OvertoneSettings, scratch: _Scratch, gradient: bool
) -> TokenLosses:
    """The loss of R tokens in closed form; `z_RV` is overwritten, with d loss / dz if `gradient`.

    With Z = p(S), b = 1 - lambda and q = p_y / Z inside S (0 outside), the target's entry at y is t_y = lambda + b*q, and

        accepted  <=>  t_y >= b * max_{v in S} p_v / Z
        KL        =    b * (1 - q) * (log b - log Z) + t_y * (log t_y - log p_y)     if accepted, else -log p_y

    The strongest competitor is the maximum of z, which S always holds; where y itself is the maximum, the comparison is
    true as it should be.
    """
    vocab, mix = z_RV.shape[1], settings.mix_lambda
    rest = 1.0 - mix
    e_RV, mask_RV = scratch.first[: len(z_RV)], scratch.second[: len(z_RV)]

    # Everything below is relative to the row's maximum, which keeps it finite and precise for logits of any size.
    u_RV = z_RV.sub_(z_RV.amax(-1, keepdim=True))
    u_y = u_RV.gather(1, labels_R[:, None])[:, 0]
    top1 = _is_first_argmax(u_RV, u_y, labels_R)
    torch.exp(u_RV, out=e_RV)
    total = e_RV.sum(-1)
    log_total = total.log()
    entropy = log_total - torch.mul(e_RV, u_RV, out=mask_RV).sum(-1) / total

    filtering = rest > 0.0 and math.isfinite(settings.n_sigma)
    kept, in_filter, sigma = total, torch.ones_like(top1), None
    if filtering:
        # Two passes: the mean of squares minus the square of the mean would lose every digit for large logits.
        torch.sub(u_RV, u_RV.mean(-1, keepdim=True), out=mask_RV)
        sigma = torch.linalg.vector_norm(mask_RV, dim=-1) / math.sqrt(max(vocab - 1, 1))
        threshold = -settings.n_sigma * sigma
        torch.ge(u_RV, threshold[:, None], out=mask_RV)
        in_filter = u_y >= threshold
        kept = torch.mul(mask_RV, e_RV, out=u_RV).sum(-1)  # the last use of u_RV's memory for u

    log_p_y = u_y - log_total
    q = torch.where(in_filter, u_y.exp() / kept, 0.0)
    t_y = mix + rest * q
    accepted = t_y >= rest / kept
    kl = torch.special.xlogy(t_y, t_y) - t_y * log_p_y
    if rest > 0.0:
        kl = kl + rest * (1 - q) * (math.log(rest) - kept.log() + log_total)
    kl = torch.where(accepted, kl, -log_p_y).clamp(min=0.0)
    if sigma is not None:
        kl = kl.masked_fill(~sigma.isfinite(), math.nan)
    active = kl > settings.clip_epsilon
    if settings.require_top1:
        active = active | ~top1

    if gradient:
        live = active.to(z_RV.dtype)
        outside, at_label = live / total, torch.where(accepted, mix * live, live)
        inside = outside - live * accepted * (rest / kept)
        if filtering:
            torch.mul(mask_RV, (inside - outside)[:, None], out=z_RV)
            z_RV.add_(outside[:, None]).mul_(e_RV)
        else:
            torch.mul(e_RV, inside[:, None], out=z_RV)
        z_RV.scatter_add_(1, labels_R[:, None], -at_label[:, None])
    loss = torch.where(active, kl, settings.clip_epsilon)
    return TokenLosses(loss, -log_p_y, kl, entropy, active, accepted, top1)


def _is_first_argmax(u_RV: Tensor, u_y: Tensor, labels_R: Tensor) -> Tensor:
    # Finding the position of the maximum is the slowest pass on a CPU, and only labels that tie with it need it.
    if u_RV.device.type == "cpu" and not bool((u_y >= 0).any()):
        return torch.zeros_like(u_y, dtype=torch.bool)
    return u_RV.argmax(-1) == labels_R


def score_rows_(
    rows_TV: Tensor,
    labels_T: Tensor,
    settings: OvertoneSettings,
    gradient: bool,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    upstream_T: Tensor | None = None,
) -> TokenLosses:
    """`_score_` over blocks of rows, with the head's `z = softcap * tanh(logit_scale * x / softcap)` and its derivative.

    `rows_TV` holds x in any floating dtype and is overwritten with d loss / dx (times `upstream_T`) if `gradient`.
    Statistics are float32, or float64 for float64 rows.
    """
    tokens, vocab = rows_TV.shape
    dtype = torch.float64 if rows_TV.dtype == torch.float64 else torch.float32
    block = max(1, tokens if rows_TV.device.type != "cpu" else min(tokens, BLOCK_ELEMENTS_CPU // vocab))
    scratch = _Scratch(block, vocab, rows_TV.new_empty(0, dtype=dtype))
    parts = []
    for start in range(0, max(tokens, 1), block):
        source = rows_TV[start : start + block]
        z = source.to(dtype)
        slope = None
        if softcap is not None:
            z.mul_(logit_scale / softcap).tanh_()
            slope = (1 - z.square()).mul_(logit_scale) if gradient else None
            z.mul_(softcap)
        elif logit_scale != 1.0:
            z.mul_(logit_scale)
        parts.append(_score_(z, labels_T[start : start + block], settings, scratch, gradient))
        if gradient:
            if slope is not None:
                z.mul_(slope)
            elif logit_scale != 1.0:
                z.mul_(logit_scale)
            if upstream_T is not None:
                z.mul_(upstream_T[start : start + block, None])
            if z.dtype != source.dtype:
                source.copy_(z)
    return TokenLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))
