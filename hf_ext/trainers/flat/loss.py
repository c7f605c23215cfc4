"""The FLAT loss: prefer a template answer to the answer that is to be forgotten, within the bounds of an f-divergence.

Paper: https://huggingface.co/papers/2410.11143. Tensors in, tensors out; no Hugging Face import.

For a prompt x with template answer y_e and answer to forget y_f,

    P(x, y) = (1/T) * sum_t p_t                  p_t the probability of answer token t, T their number
    L       = -g*(P(x, y_e)) + f*(g*(P(x, y_f)))

is the negated variational bound of an f-divergence with P as the critic: minimising it raises P of the template and
lowers P of the answer to forget. P is a probability, so that nothing overflows, no epsilon is needed, and both pulls
are bounded.

Shapes: B examples, S tokens with the prompt. `log_probs` and `mask` are `(B, S-1)`: entry t belongs to the label at
t+1. Everything is computed in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math

from torch import Tensor

from hf_ext.trainers.flat.divergences import full_precision, get_divergence

PROBABILITY_KINDS = ("mean", "geometric")


def answer_lengths(mask: Tensor) -> Tensor:
    """Answer tokens of each row `(B,)` of a boolean mask; raises `ValueError` naming the rows that have none."""
    lengths = mask.sum(-1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"rows {empty} of the batch have no answer token, so there is no probability: check that the answer is "
            "not empty and that the prompt leaves room for it within `max_length`."
        )
    return lengths


def answer_probability(log_probs: Tensor, mask: Tensor, kind: str = "mean") -> Tensor:
    """Probability of each answer, `(B,)` in [0, 1].

    "mean" is the paper's (1/T) sum_t p_t: a token pulls in proportion to its own probability, improbable ones hardly.
    "geometric" is exp((1/T) sum_t log p_t): every token pulls alike, in proportion to the value itself.

    Args:
        log_probs: log-probabilities of the labels, `(B, S-1)`; what they hold outside the mask does not matter.
        mask: boolean, True at the labels that belong to the answer.
        kind: "mean" or "geometric".

    Raises:
        ValueError: an unknown kind, or a row without an answer token.
    """
    if kind not in PROBABILITY_KINDS:
        raise ValueError(f"kind={kind!r} is unknown: choose one of {', '.join(PROBABILITY_KINDS)}.")
    lengths, log_probs = answer_lengths(mask), full_precision(log_probs)
    if kind == "geometric":
        return (log_probs.masked_fill(~mask, 0).sum(-1) / lengths).exp()
    return log_probs.masked_fill(~mask, -math.inf).exp().sum(-1) / lengths


def padded_probability(log_probs: Tensor, mask: Tensor, length: int) -> Tensor:
    """One probability for the batch as the authors' code has it: sum of p_t over all answers / (B * length), a scalar.

    Padding and prompt count in the denominator, so the value is small, grows with the answers and depends on what else
    is in the batch. It serves to reproduce that code, where `length` is the padded length of all sequences less one.

    Raises:
        ValueError: `length` is smaller than the S-1 positions of the batch, or no row has an answer.
    """
    if length < log_probs.shape[-1]:
        raise ValueError(
            f"length={length} is shorter than the {log_probs.shape[-1]} positions of the batch: it is the length that "
            "every sequence is padded to, so raise it or lower `max_length`."
        )
    answer_lengths(mask)
    return full_precision(log_probs).masked_fill(~mask, -math.inf).exp().sum() / (mask.shape[0] * length)


def flat_loss(
    p_template: Tensor, p_forget: Tensor, divergence: str, template_coef: float = 1.0, forget_coef: float = 1.0
) -> Tensor:
    """Loss of each example: -template_coef * g*(p_template) + forget_coef * f*(g*(p_forget)).

    Args:
        p_template, p_forget: probabilities in [0, 1], both `(B,)` or both scalars.
        divergence: a name of `divergences.DIVERGENCES`.
        template_coef, forget_coef: weights of the two terms.

    Returns:
        The loss in the shape of the probabilities; the objective is its mean.

    Raises:
        ValueError: an unknown divergence.
    """
    chosen = get_divergence(divergence)
    pull = chosen.activation(full_precision(p_template))
    push = chosen.conjugate(full_precision(p_forget))
    return forget_coef * push - template_coef * pull
