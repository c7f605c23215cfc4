"""The one table of unlearning methods: what each needs of a batch and how its terms are computed.

A batch is one forward over the groups `[template][forget][retain]`, as far as the method and the user ask for them,
each with one row per example. Every term is a mean over examples, so that accumulated micro-batches and parallel
processes, weighed by their rows, add up exactly; where a method is defined on tokens, an example counts the mean over
its own. The code in circulation divides those sums by the tokens of the whole batch, which weights long answers more;
both agree on answers of one length, and the functions of `baselines.py` keep that form for comparisons. The one
exception is FLAT's `padded_length`, which reproduces a loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from hf_ext.registry import UNLEARNING_LOSSES, Paper
from hf_ext.trainers.flat import baselines
from hf_ext.trainers.flat.loss import answer_lengths, answer_probability, flat_loss, padded_probability


class Rows(NamedTuple):
    """One group of a batch: B examples of S tokens, H the hidden size.

    Attributes:
        tokens: token ids, `(B, S)`.
        answer: boolean, True at the tokens of the answer, `(B, S)`.
        log_probs, is_top1: log-probability of each next token and whether it is the most likely one, `(B, S-1)`.
        ref_sums: log-probability of each answer under the reference, `(B,)`; for `reference="sums"`.
        hidden, ref_hidden: last hidden states, `(B, S, H)`, of the model and of the one before unlearning.
        activations, ref_activations: the same at the output of the layer that RMU steers.
    """

    tokens: Tensor
    answer: Tensor
    log_probs: Tensor
    is_top1: Tensor
    # Each is a tensor for the methods that read it.
    ref_sums: Any = None
    hidden: Any = None
    ref_hidden: Any = None
    activations: Any = None
    ref_activations: Any = None

    @property
    def mask(self) -> Tensor:
        """True at the positions that predict the answer, `(B, S-1)`."""
        return self.answer[:, 1:]


class Batch(NamedTuple):
    """The groups of one forward, the output layers, and the vector `(H,)` that RMU steers towards."""

    forget: Rows
    # `Rows`, `Head` or a tensor for the methods that read them.
    template: Any = None
    retain: Any = None
    head: Any = None
    ref_head: Any = None
    control: Any = None


class Method(NamedTuple):
    """One unlearning method.

    Attributes:
        name: as its authors write it.
        paper: what a model card refers to.
        forget: (batch, keyword arguments) -> forget term, a scalar.
        kwargs: the keyword arguments that `loss_kwargs` may set, with their defaults.
        template: a refusal per prompt takes part.
        hidden: the forget term reads hidden states.
        reference: what is read of the model before unlearning: "sums" (one number per answer, computed once), "hidden"
            (in every step), or nothing.
        activations: both terms compare the activations of one layer (RMU).
        positive: the keyword arguments that must be above 0; the others must be at least 0.
    """

    name: str
    paper: Paper
    forget: Callable[..., Tensor]
    kwargs: Mapping[str, float] = MappingProxyType({})
    template: bool = False
    hidden: bool = False
    reference: str | None = None
    activations: bool = False
    positive: tuple[str, ...] = ()


def items(mask: Tensor) -> Tensor:
    """`num_items` of each row, `(B,)`, that makes a sum over tokens the mean over examples of their token means."""
    return len(mask) * answer_lengths(mask)


def _token_items(mask: Tensor) -> Tensor:
    """The same for each position in the mask, `(N,)`."""
    return items(mask)[:, None].expand_as(mask)[mask]


def _predicting(hidden_BSH: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `(N, H)` at the positions in the mask `(B, S-1)`."""
    return hidden_BSH[:, :-1][mask]


def _flat(
    batch: Batch,
    *,
    divergence: str,
    template_probability: str,
    forget_probability: str,
    padded_length: int | None,
    template_coef: float,
    forget_coef: float,
) -> Tensor:
    """`flat_loss` of the pairs; with `padded_length` that of one probability for the whole batch."""
    pairs = [(batch.template, template_probability), (batch.forget, forget_probability)]
    if padded_length is None:
        p_template, p_forget = (answer_probability(rows.log_probs, rows.mask, kind) for rows, kind in pairs)
    else:
        p_template, p_forget = (padded_probability(rows.log_probs, rows.mask, padded_length) for rows, _ in pairs)
    return flat_loss(p_template, p_forget, divergence, template_coef, forget_coef).mean()


def _gradient_ascent(batch: Batch) -> Tensor:
    rows = batch.forget
    return baselines.gradient_ascent(rows.log_probs, rows.mask, num_items=items(rows.mask))


def _npo(batch: Batch, *, beta: float) -> Tensor:
    rows = batch.forget
    return baselines.npo(rows.log_probs, rows.mask, rows.ref_sums, beta=beta).mean()


def _simnpo(batch: Batch, *, beta: float, delta: float) -> Tensor:
    return baselines.simnpo(batch.forget.log_probs, batch.forget.mask, beta=beta, delta=delta).mean()


def _idk_dpo(batch: Batch, *, beta: float) -> Tensor:
    idk, rows = batch.template, batch.forget
    return baselines.idk_dpo(
        idk.log_probs, idk.mask, rows.log_probs, rows.mask, idk.ref_sums, rows.ref_sums, beta=beta
    ).mean()


def _wga(batch: Batch, *, beta: float) -> Tensor:
    rows = batch.forget
    return baselines.wga(rows.log_probs, rows.mask, beta=beta, num_items=items(rows.mask))


def _satimp(batch: Batch, *, beta1: float, beta2: float) -> Tensor:
    rows = batch.forget
    return baselines.satimp(rows.log_probs, rows.mask, beta1=beta1, beta2=beta2, num_items=items(rows.mask))


def _undial(batch: Batch, *, beta: float) -> Tensor:
    rows, mask = batch.forget, batch.forget.mask
    return baselines.undial(
        _predicting(rows.hidden, mask),
        batch.head,
        rows.tokens[:, 1:][mask],
        _predicting(rows.ref_hidden, mask),
        batch.ref_head,
        beta=beta,
        num_items=_token_items(mask),
    )


def _ceu(batch: Batch, *, ignore_first: int) -> Tensor:
    """Answers of at most `ignore_first` tokens count nothing."""
    rows, mask = batch.forget, baselines.without_first(batch.forget.mask, ignore_first)
    per_row = len(mask) * mask.sum(-1).clamp(min=1)
    return baselines.ceu(
        _predicting(rows.hidden, mask),
        batch.head,
        rows.tokens[:, 1:][mask],
        num_items=per_row[:, None].expand_as(mask)[mask],
    )


def _rmu(batch: Batch, *, layer: int, coefficient: float) -> Tensor:
    """The layer was read by the trainer, and the coefficient is the norm of `batch.control`."""
    return baselines.activation_distance(batch.forget.activations, batch.control, batch.forget.answer).mean()


def retain_term(batch: Batch, kind: str) -> Tensor:
    """The retain term, a scalar: "nll", "kl" to the model before unlearning, or "activations" for RMU."""
    rows = batch.retain
    if kind == "activations":
        return baselines.activation_distance(rows.activations, rows.ref_activations, rows.answer).mean()
    if kind == "nll":
        return baselines.retain_nll(rows.log_probs, rows.mask, num_items=items(rows.mask))
    return baselines.retain_kl(
        _predicting(rows.hidden, rows.mask),
        batch.head,
        _predicting(rows.ref_hidden, rows.mask),
        batch.ref_head,
        num_items=_token_items(rows.mask),
    )


METHODS: dict[str, Method] = {
    "flat": Method(*UNLEARNING_LOSSES["flat"], _flat, template=True),
    "gradient_ascent": Method(*UNLEARNING_LOSSES["gradient_ascent"], _gradient_ascent),
    "gradient_difference": Method(*UNLEARNING_LOSSES["gradient_difference"], _gradient_ascent),
    "npo": Method(*UNLEARNING_LOSSES["npo"], _npo, {"beta": 0.1}, reference="sums", positive=("beta",)),
    "simnpo": Method(*UNLEARNING_LOSSES["simnpo"], _simnpo, {"beta": 4.5, "delta": 0.0}, positive=("beta",)),
    "idk_dpo": Method(
        *UNLEARNING_LOSSES["idk_dpo"], _idk_dpo, {"beta": 0.1}, template=True, reference="sums", positive=("beta",)
    ),
    "wga": Method(*UNLEARNING_LOSSES["wga"], _wga, {"beta": 1.0}),
    "satimp": Method(*UNLEARNING_LOSSES["satimp"], _satimp, {"beta1": 5.0, "beta2": 1.0}),
    "undial": Method(*UNLEARNING_LOSSES["undial"], _undial, {"beta": 10.0}, hidden=True, reference="hidden"),
    "ceu": Method(*UNLEARNING_LOSSES["ceu"], _ceu, {"ignore_first": 1}, hidden=True),
    "rmu": Method(
        *UNLEARNING_LOSSES["rmu"], _rmu, {"layer": 7, "coefficient": 2.0}, activations=True, positive=("coefficient",)
    ),
}

# (forget_coef, retain_coef) of a run with a retain dataset. FLAT's paper has no retain term; its 1.0 is ours.
COEFFICIENTS: dict[str, tuple[float, float]] = {"flat": (1.0, 1.0), **baselines.DEFAULT_COEFFICIENTS}
