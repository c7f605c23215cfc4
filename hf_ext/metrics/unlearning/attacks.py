"""Attacks on an unlearned model: what a user, an owner of the weights, or mere deployment can bring back.

Every attack leaves the model as it found it, bit by bit, also after an exception: parameters are pointed at copies and
then back at the tensors they had, which are never written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ext._compat import has_injected_adapters
from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.unlearning.measures import Floats
from hf_ext.metrics.unlearning.options import whole
from hf_ext.metrics.unlearning.rows import Row
from hf_ext.metrics.unlearning.scores import Pair, RowEncoder, answer_pieces

Model = PreTrainedModel | PeftModel


class AttackUnavailable(ValueError):
    """The attack has nothing to act on in this model."""


class AttackFailed(ValueError):
    """The attack broke down on the way."""


# -- Weights ----------------------------------------------------------------------------------------------------------


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Whatever happens to parameters inside, each has its own tensor, flag and gradient again on leaving."""
    kept = [(weight, weight.data, weight.requires_grad, weight.grad) for weight in model.parameters()]
    for weight, *_ in kept:
        weight.grad = None
    try:
        yield
    finally:
        for weight, data, requires_grad, grad in kept:
            weight.grad = None
            weight.data = data
            # Quantised weights cannot even be asked to require a gradient.
            if weight.requires_grad != requires_grad:
                weight.requires_grad_(requires_grad)
            weight.grad = grad


def trained_weights(model: Model) -> list[nn.Parameter]:
    """What an attacker with the weights trains: the base model, or the adapter where the base is quantised.

    Training the base of an adapted layer W + BA is the same as training the merged weight, so that packing an
    unlearned model differently does not change what it relearns.

    Raises:
        AttackUnavailable: a quantised model without an adapter, or parameters that are not in memory.
    """
    weights = _weights_in_memory(model)
    adapters = _adapter_weights(model)
    base = [weight for weight in weights if id(weight) not in adapters]
    if all(weight.is_floating_point() for weight in base):
        return base
    trainable = [weight for weight in weights if id(weight) in adapters and weight.is_floating_point()]
    if not trainable:
        raise AttackUnavailable("the weights are quantised; load the model unquantised, or add an adapter to train")
    return trainable


def _weights_in_memory(model: Model) -> list[nn.Parameter]:
    weights = list(model.parameters())
    # Hooks would bring in the untouched weights from elsewhere.
    if any(weight.is_meta for weight in weights):
        raise AttackUnavailable("some weights are offloaded; load the model without offloading")
    return weights


def _adapter_weights(model: Model) -> set[int]:
    """Identities of the parameters that adapters add; copies of whole modules count as the model's own."""
    if isinstance(model, PeftModel):
        states = [
            get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            for name in model.peft_config
        ]
    elif has_injected_adapters(model):
        states = [model.get_adapter_state_dict(name) for name in model.peft_config]
    else:
        return set()
    pointers = {tensor.data_ptr() for state in states for tensor in state.values()}
    return {
        id(weight)
        for name, weight in model.named_parameters()
        if weight.data_ptr() in pointers and ".modules_to_save." not in name
    }


@contextmanager
def quantized_copy(model: Model, bits: int) -> Iterator[Model]:
    """The model with the weights of its linear layers rounded to `bits` bits, and as before on leaving.

    Round-to-nearest with one scale per output channel, symmetric: ŵ = s · round(w / s), s = max|w| / (2^(bits−1) − 1).
    The output head stays as it is, as in bitsandbytes. Adapters are merged first, because that is what is deployed: an
    update smaller than half a step of the grid is rounded away, and the knowledge is back
    (https://huggingface.co/papers/2410.16454).

    Raises:
        ValueError: `bits` is no whole number from 2 to 8.
        AttackUnavailable: a model without linear layers in floating point, or with offloaded weights.
    """
    if not whole(bits, 2, 8):
        raise ValueError(f"bits={bits!r}: give a whole number from 2 to 8.")
    weights = _weights_in_memory(model)
    adapters = _adapter_weights(model)
    head = model.get_output_embeddings()
    head_weights = set() if head is None else {id(weight) for weight in head.parameters()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in adapters | head_weights
    ]
    if not layers or not all(w.is_floating_point() for w in weights if id(w) not in adapters):
        raise AttackUnavailable("the model has no linear layers in floating point; load it unquantised")
    tuned = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not module.merged and not module.disable_adapters
    ]
    with borrowed(model), _own_copies([tuner.get_base_layer() for tuner in tuned]), torch.no_grad():
        try:
            for tuner in tuned:
                tuner.merge()
            for layer in layers:
                layer.weight.data = rounded(layer.weight.data, bits, channel=1 if isinstance(layer, Conv1D) else 0)
            yield model
        finally:
            for tuner in tuned:
                if tuner.merged:
                    tuner.unmerge()


@contextmanager
def _own_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives modules copies of their parameters that no other module shares, and the same parameters back on leaving.

    An adapter on the input embeddings is not one on an output layer tied to them, which merging must leave alone.
    """
    places = {
        (id(module), name): (module, name) for module in modules for name, _ in module.named_parameters(recurse=False)
    }
    kept = [(module, name, module.get_parameter(name)) for module, name in places.values()]
    for module, name, weight in kept:
        module.register_parameter(name, nn.Parameter(weight.data.clone(), requires_grad=False))
    try:
        yield
    finally:
        for module, name, weight in kept:
            module.register_parameter(name, weight)


def rounded(weight: Tensor, bits: int, channel: int = 0) -> Tensor:
    """`weight` [out, in] rounded to a symmetric grid of 2^bits − 1 points per slice along dimension `channel`."""
    others = [dim for dim in range(weight.dim()) if dim != channel]
    exact = weight.float()
    scale = exact.abs().amax(dim=others, keepdim=True) / (2 ** (bits - 1) - 1)
    # A slice of zeros has the scale 0.
    return (torch.round(exact / scale.where(scale > 0, 1)) * scale).to(weight.dtype)


@contextmanager
def without_adapter(model: Model) -> Iterator[Model]:
    """The model with its adapters switched off: what anyone has who drops the adapter file.

    Raises:
        AttackUnavailable: there is no adapter, or it is merged into the weights already.
    """
    if not isinstance(model, PeftModel) and not has_injected_adapters(model):
        raise AttackUnavailable("the model has no adapter")
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise AttackUnavailable("the adapter is merged into the weights, where nobody can switch it off")
    # PEFT marks the adapter as trainable when it switches it on again.
    with borrowed(model):
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield model
        else:
            model.disable_adapters()
            try:
                yield model
            finally:
                model.enable_adapters()


# -- Gradients -------------------------------------------------------------------------------------------------------


def answer_gradients(runner: ModelRunner, examples: Sequence[Pair], weights: Sequence[nn.Parameter]) -> float:
    """Adds the gradient of the mean cross-entropy over all answer tokens to `weight.grad`, and returns that mean.

    The output head runs on answer positions only, as many at a time as in scoring, and each forward pass is followed by
    its backward pass.
    """
    pieces = [piece for pair in examples for piece in answer_pieces(pair)]
    tokens = sum(len(answer) for _, answer in examples)
    losses = []
    with torch.enable_grad():
        for batch, columns, logits in runner.logit_batches(pieces):
            place = {position: column for column, position in enumerate(columns)}
            labels = torch.full((len(batch), len(columns)), -100)
            for row, piece in enumerate(pieces[index] for index in batch):
                found = [place[position] for position in piece.positions]
                labels[row, found] = torch.tensor(piece.ids[piece.scored_from :])
            flat, targets = logits.flatten(0, 1).float(), labels.flatten().to(logits.device)
            loss = F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum") / tokens
            loss.backward(inputs=list(weights))
            losses.append(loss.item())
    return math.fsum(losses)


def gradient_norms(
    model: Model, encoder: RowEncoder, rows: Sequence[Row], runner: ModelRunner, *, p: float = 2.0
) -> Floats:
    """Mean over the weights of the p-norm of the gradient of each row's NLL, [n].

    https://huggingface.co/papers/2402.17012; what closes the answer is left out. Larger means less likely a member of
    the training set.

    Raises:
        AttackUnavailable: see `trained_weights`.
        AttackFailed: a gradient that is not finite.
    """
    norms = []
    with borrowed(model), runner.evaluating():
        weights = trained_weights(model)
        for weight in weights:
            weight.requires_grad_(True)
        for row in rows:
            prompt, answer, closing = encoder.pair(row, row.answer)
            content = answer[: len(answer) - closing]
            answer_gradients(runner, [(tuple(prompt), tuple(content))], weights)
            values = [weight.grad.float().norm(p).item() for weight in weights if weight.grad is not None]
            for weight in weights:
                weight.grad = None
            norms.append(math.fsum(values) / len(values))
            if not math.isfinite(norms[-1]):
                raise AttackFailed(
                    f"row {row.id!r}: the norm of its gradient is {norms[-1]}; load the model in float32 or bfloat16"
                )
    return np.asarray(norms)


# -- Prompts ----------------------------------------------------------------------------------------------------------


def in_context(rows: Sequence[Row], separator: str = " ") -> list[Row]:
    """Rows with the knowledge put back into the prompt (https://huggingface.co/papers/2407.00106).

    The facts are the row's `context`, or else its own question and answer. A model that never saw them can read them
    off as well, so only the comparison with a retrained model tells what a high score means.
    """
    facts = [row.context or f"{row.question}{separator}{row.answer}" for row in rows]
    return [row.asked(f"{fact}\n{row.question}", "context") for row, fact in zip(rows, facts, strict=True)]


def paraphrased(rows: Sequence[Row]) -> list[Row]:
    """One row for every entry of `prompt_paraphrases`."""
    return [
        row.asked(text, f"paraphrase-{index}") for row in rows for index, text in enumerate(row.prompt_paraphrases)
    ]
