"""The losses that unlearning methods are compared with, as pure functions.

The objective is `gamma * forget + alpha * retain`, see `DEFAULT_COEFFICIENTS`. With p_t the probability of answer
token t, T the number of answer tokens, `nll = -sum_t log p_t` and `ref` the model before unlearning, the forget terms
are

    gradient ascent   mean_t log p_t                               https://huggingface.co/papers/2401.06121
    NPO               -(2/beta) log sigmoid(beta (nll - nll_ref))  https://huggingface.co/papers/2404.05868
    SimNPO            -(2/beta) log sigmoid(beta (nll/T - delta))  https://huggingface.co/papers/2410.07163
    DPO, refusals     -(2/beta) log sigmoid(beta ((nll_ref - nll) of the refusal - (nll_ref - nll) of the answer))
                                                                   https://huggingface.co/papers/2401.06121
    WGA               mean_t p_t^beta log p_t                      https://huggingface.co/papers/2502.19301
    SatImp            mean_t p_t^beta1 (1 - p_t)^beta2 log p_t     https://huggingface.co/papers/2505.11953
    UNDIAL            CE(softmax(ref logits - beta onehot), p)     https://huggingface.co/papers/2402.10052
    CE-U              CE(softmax(own logits without the label), p) https://huggingface.co/papers/2503.01224
    RMU               activations towards a random vector          https://huggingface.co/papers/2403.03218

Powers of p_t and the targets of UNDIAL and CE-U are constants: no gradient flows through them.

Losses per example return `(B,)`, to be averaged. Losses per token return their mean over the answer tokens, a scalar:
the sum divided by `num_items`, which is the number of answer tokens in this batch unless the caller gives another.
Exact gradient accumulation needs that of the whole step, or one number per row `(B,)` (per position `(N,)` in the
losses on hidden states) that does not depend on the rest of the batch: `B * answer_lengths(mask)` makes it the mean
over examples of the mean over tokens.

Shapes: B examples, S tokens with the prompt, N wanted positions, H hidden size, V vocabulary.
`log_probs` and `mask` are `(B, S-1)` as in `loss.py`. Everything is computed in float32, or float64 for float64
inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_ext.trainers.flat.distributions import Head, Target, check_labels, soft_target_loss
from hf_ext.trainers.flat.divergences import full_precision
from hf_ext.trainers.flat.loss import answer_lengths

# (gamma, alpha): weights of the forget and of the retain term.
DEFAULT_COEFFICIENTS: dict[str, tuple[float, float]] = {
    "gradient_ascent": (1.0, 0.0),
    "gradient_difference": (1.0, 1.0),
    "npo": (1.0, 1.0),
    "simnpo": (0.125, 1.0),
    "idk_dpo": (1.0, 1.0),
    "wga": (1.0, 1.0),
    "satimp": (0.1, 1.0),
    "undial": (1.0, 0.0),
    "ceu": (1.0, 0.0),
    "rmu": (1.0, 1.0),
}


def _masked(log_probs: Tensor, mask: Tensor) -> Tensor:
    return full_precision(log_probs).masked_fill(~mask, 0)


def _mean(totals: Tensor, count: Tensor | int, num_items: Tensor | int | None) -> Tensor:
    """Sum of `totals / num_items`, by default over `count` items; zero if there are none."""
    items = count if num_items is None else num_items
    items = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
    if isinstance(items, Tensor) and items.dim():
        return (totals / items).sum()
    return totals.sum() / items


def sequence_nll(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of each answer, `(B,)`; divided by `answer_lengths(mask)` it is that per token."""
    return -_masked(log_probs, mask).sum(-1)


def retain_nll(log_probs: Tensor, mask: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Token mean of the negative log-likelihood, a scalar: the cross-entropy of the retain set."""
    return _mean(sequence_nll(log_probs, mask), mask.sum(), num_items)


def gradient_ascent(log_probs: Tensor, mask: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The negated cross-entropy of the forget set, a scalar. Unbounded below."""
    return -retain_nll(log_probs, mask, num_items)


def gradient_difference(
    log_probs: Tensor,
    mask: Tensor,
    retain_log_probs: Tensor,
    retain_mask: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """`gamma * gradient_ascent(forget) + alpha * retain_nll(retain)`, a scalar."""
    return gamma * gradient_ascent(log_probs, mask) + alpha * retain_nll(retain_log_probs, retain_mask)


def npo(log_probs: Tensor, mask: Tensor, ref_log_probs: Tensor, *, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation, `(B,)`; tends to gradient ascent on the sum as beta tends to 0.

    Args:
        log_probs, mask: of the answers to forget.
        ref_log_probs: log-probability of each of those answers under the reference, summed, `(B,)`.
        beta: inverse temperature, > 0.
    """
    margin = sequence_nll(log_probs, mask) + full_precision(ref_log_probs)
    return -2 / beta * logsigmoid(beta * margin)


def simnpo(log_probs: Tensor, mask: Tensor, *, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """NPO without a reference, on the mean over tokens, `(B,)`; `delta` is the margin in nats per token.

    Raises:
        ValueError: a row without an answer token.
    """
    margin = sequence_nll(log_probs, mask) / answer_lengths(mask) - delta
    return -2 / beta * logsigmoid(beta * margin)


def idk_dpo(
    idk_log_probs: Tensor,
    idk_mask: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    ref_idk_log_probs: Tensor,
    ref_log_probs: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """DPO with a refusal preferred to the answer to forget, `(B,)`.

    Args:
        idk_log_probs, idk_mask: of the refusals.
        log_probs, mask: of the answers to forget.
        ref_idk_log_probs, ref_log_probs: log-probabilities of both under the reference, summed per row, `(B,)`.
        beta: inverse temperature, > 0.
    """
    refusal_gain = -sequence_nll(idk_log_probs, idk_mask) - full_precision(ref_idk_log_probs)
    answer_loss = sequence_nll(log_probs, mask) + full_precision(ref_log_probs)
    return -2 / beta * logsigmoid(beta * (refusal_gain + answer_loss))


def satimp(
    log_probs: Tensor, mask: Tensor, *, beta1: float = 5.0, beta2: float = 1.0, num_items: Tensor | int | None = None
) -> Tensor:
    """Gradient ascent weighted by p_t^beta1 (saturation) and (1 - p_t)^beta2 (importance), a scalar."""
    log_probs = _masked(log_probs, mask)
    fixed = log_probs.detach()
    # 1 - p_t loses its digits for a memorised token, and rounding can put log p_t above 0.
    weight = (beta1 * fixed).exp() * (-torch.expm1(fixed)).clamp(min=0).pow(beta2)
    return _mean((weight * log_probs).sum(-1), mask.sum(), num_items)


def wga(log_probs: Tensor, mask: Tensor, *, beta: float = 1.0, num_items: Tensor | int | None = None) -> Tensor:
    """Gradient ascent weighted by p_t^beta, a scalar: SatImp without the importance."""
    return satimp(log_probs, mask, beta1=beta, beta2=0.0, num_items=num_items)


def undial(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    ref_hidden_NH: Tensor,
    ref_head: Head,
    *,
    beta: float = 10.0,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy to the reference's distribution with the label's logit lowered by `beta`, a scalar.

    The definition over answer tokens. The code in circulation also averages over prompt and padding and lowers an
    unrelated token there.

    Args:
        hidden_NH: hidden states at the N positions that predict the answers' tokens, all rows of the batch together.
        head: the output layer; gradients reach its weight and bias if they require some.
        labels_N: those tokens.
        ref_hidden_NH, ref_head: the same of the reference, constants; with an adapter switched off `ref_head` is
            `head`.
        beta: what is taken off the label's logit, in nats.
        num_items: what the sum is divided by, N by default.
        chunk_tokens: tokens whose logits exist at the same time; the result does not depend on it.

    Raises:
        IndexError: a label is outside the vocabulary, -100 included.
    """
    check_labels(labels_N, head)
    target = Target(
        lambda logits_TV, chunk: logits_TV.scatter_(1, labels_N[chunk, None], -beta, reduce="add"),
        (ref_hidden_NH, ref_head),
    )
    return _mean(soft_target_loss(hidden_NH, head, target, chunk_tokens), len(hidden_NH), num_items)


def ceu(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy to the model's own distribution without the label, renormalised and held constant, a scalar.

    Arguments and errors as for `undial`. The method leaves out the first token of every answer: see `without_first`.
    """
    check_labels(labels_N, head)
    target = Target(lambda logits_TV, chunk: logits_TV.scatter_(1, labels_N[chunk, None], -math.inf))
    return _mean(soft_target_loss(hidden_NH, head, target, chunk_tokens), len(hidden_NH), num_items)


def without_first(mask: Tensor, count: int = 1) -> Tensor:
    """The mask `(B, S-1)` without the first `count` answer tokens of each row."""
    return mask & (mask.cumsum(-1) > count)


def retain_kl(
    hidden_NH: Tensor,
    head: Head,
    ref_hidden_NH: Tensor,
    ref_head: Head,
    *,
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """KL(reference || model) averaged over the N given positions, a scalar.

    Arguments as for `undial`. Which positions count is the caller's choice; the code in circulation takes all, padding
    included.
    """
    target = Target(lambda logits_TV, chunk: None, (ref_hidden_NH, ref_head), relative=True)
    return _mean(soft_target_loss(hidden_NH, head, target, chunk_tokens), len(hidden_NH), num_items)


def control_vector(hidden_size: int, coefficient: float = 2.0, generator: torch.Generator | None = None) -> Tensor:
    """RMU's target for the forget set, float32 `(H,)` on the CPU: uniform in [0, 1), scaled to norm `coefficient`.

    It is drawn once per run.
    """
    uniform_H = torch.rand(hidden_size, generator=generator)
    return uniform_H * (coefficient / uniform_H.norm())


def activation_distance(activations_BSH: Tensor, target: Tensor, mask_BS: Tensor) -> Tensor:
    """RMU's two terms: mean squared distance over the answer's positions and the hidden size, `(B,)`.

    Args:
        activations_BSH: output of the steered layer.
        target: the control vector `(H,)` for the forget term, the frozen model's activations `(B, S, H)` for the
            retain term.
        mask_BS: boolean, True at the answer's own tokens (not at those that predict them).

    Raises:
        ValueError: a row without an answer token.
    """
    difference_BSH = full_precision(activations_BSH) - full_precision(target.detach())
    squared_BS = difference_BSH.masked_fill(~mask_BS[..., None], 0).square().mean(-1)
    return squared_BS.sum(-1) / answer_lengths(mask_BS)
