"""Which tokens of a forward pass are edited: read from what the model is called with, for all layers of an adapter.

One `Calls` is shared by the layers of a model. A hook before the model's forward pass tells it what the call is about, and another forgets that
afterwards, so that no tensor of a pass stays on a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin

from hf_ext.tuners.baft.positions import (
    Positions,
    mask_of_call,
    prompts_and_answers,
    sequence_starts,
    token_mask,
)


@dataclass
class Call:
    """One forward pass: which of its tokens are prompt and answer, `(B, T)`, or which are edited whatever an adapter says.

    Attributes:
        generated: the text is being generated: (real tokens of the prompt `(B, P)`, tokens that are in the cache), instead of `prompt_BT`.
        guessed: nothing says where the prompts end, and gradients are wanted, so that the answers cannot all be prompt.
    """

    shape: tuple[int, int]
    prompt_BT: Tensor | None = None
    answer_BT: Tensor | None = None
    starts_BT: Tensor | None = None
    explicit_BT: Tensor | None = None
    generated: tuple[Tensor, int] | None = None
    guessed: bool = False
    _masks: dict[Positions, Tensor] = field(default_factory=dict)
    _places: dict[Positions, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, positions: Positions) -> Tensor:
        """The tokens that are edited, `(B, T)`.

        Raises:
            ValueError: they depend on where the prompts end, which nothing says.
        """
        if self.explicit_BT is not None:
            return self.explicit_BT
        if positions not in self._masks:
            self._masks[positions] = self._mask(positions)
        return self._masks[positions]

    def places(self, positions: Positions) -> tuple[Tensor, Tensor]:
        """The same as (rows, columns)."""
        if positions not in self._places:
            self._places[positions] = self.mask(positions).nonzero(as_tuple=True)  # type: ignore[assignment]
        return self._places[positions]

    def _mask(self, positions: Positions) -> Tensor:
        if self.guessed and positions.need_ends():
            raise ValueError(
                "a training step without labels does not say where the prompts end, which the positions of this adapter depend on. Pass "
                "labels, or prompt_mask or intervention_mask, both (batch, tokens) and bool; or use positions 'all'."
            )
        if self.generated is not None:
            real_BP, past = self.generated
            prompt_BP = token_mask(positions, real_BP, torch.zeros_like(real_BP), _first_tokens(real_BP))
            return mask_of_call(positions, prompt_BP, real_BP, past, self.shape[1])
        assert self.prompt_BT is not None and self.answer_BT is not None and self.starts_BT is not None
        return token_mask(positions, self.prompt_BT, self.answer_BT, self.starts_BT)


def _first_tokens(real_BT: Tensor) -> Tensor:
    return sequence_starts(real_BT, None)


class Recorded(NamedTuple):
    """What an edit did in one pass.

    Attributes:
        block, adapter: names.
        weights: of the basis vectors, `(N, K)` at the N edited tokens; in a compiled model `(B, T, K)` at all.
        mask_BT: then, which tokens are edited.
    """

    block: str
    adapter: str
    weights: Tensor
    mask_BT: Tensor | None = None

    def edited(self) -> Tensor:
        """`weights` at the edited tokens, `(N, K)`."""
        return self.weights if self.mask_BT is None else self.weights[self.mask_BT]


class Calls:
    """What the layers of a model need to know of the pass that they are in.

    Attributes:
        names: for each row, the adapter that it is to get, or "__base__"; None if all get the active ones.
        weights: while they are recorded, those of every edit in every pass.
    """

    def __init__(self) -> None:
        self.names: list[str] | None = None
        self.weights: list[Recorded] | None = None
        self._inputs: tuple[nn.Module, dict[str, Any], int] | None = None  # of the pass, with the tokens in the cache
        self._call: Call | None = None  # made of them when a layer asks
        # While a prompt is continued: its tokens, and its attention mask.
        self._prompt: tuple[int, Tensor | None] | None = None
        self._arguments: list[str] = []
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Listen to the calls of a model, once."""
        if not self._hooks:
            self._arguments = list(inspect.signature(model.forward).parameters)
            self._hooks = [
                model.register_forward_pre_hook(self.begin, with_kwargs=True),
                model.register_forward_hook(self.end, always_call=True),
            ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The hook before a pass: keeps its arguments, and takes out those that are ours.

        `intervention_labels` stand for `labels` where a trainer does not want the model to compute a loss.
        """
        ours = ("intervention_mask", "prompt_mask", "intervention_labels")
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        # The cache grows before the first layer asks.
        self._inputs, self._call = (model, inputs, _cached_tokens(inputs.get("past_key_values"))), None
        return args, {name: value for name, value in kwargs.items() if name not in ours}

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """The hook after a pass."""
        self._inputs = self._call = None

    def current(self, hidden: Tensor) -> Call:
        """The pass in which a block puts out hidden states `(B, T, D)`.

        Raises:
            ValueError: there is none, or it has another number of tokens.
        """
        if self._inputs is None:
            raise ValueError(
                "a block with a BaFT adapter was called outside of its model, which says where the prompts are: call the model itself, not a "
                "part of it. (Activation checkpointing does so, too, if it wraps whole blocks; use gradient_checkpointing_enable.)"
            )
        shape = (hidden.shape[0], hidden.shape[1])
        if self._call is None:
            self._call = self._read(*self._inputs) or _whole(shape, hidden.device)
        if self._call.shape != shape:
            raise ValueError(
                f"a block puts out hidden states of shape {tuple(hidden.shape)} for {self._call.shape} tokens: BaFT edits outputs of shape (batch, "
                "tokens, width)."
            )
        return self._call

    @contextmanager
    def generating(self, prompt: int | None, attention_mask: Tensor | None, names: list[str] | None) -> Iterator[None]:
        """While `generate` runs, which gives the model pieces of a growing text.

        Args:
            prompt: its tokens; None if this is no `generate`, or its prompt is not known.
            names: see `Calls`.
        """
        before = self._prompt, self.names
        self._prompt = None if prompt is None else (prompt, attention_mask)
        self.names = names
        try:
            yield
        finally:
            self._prompt, self.names = before

    @contextmanager
    def recording(self) -> Iterator[list[Recorded]]:
        """Collect the weights of all edits, with their graphs."""
        before = self.weights
        found: list[Recorded] = []
        self.weights = found
        try:
            yield found
        finally:
            self.weights = before
            if before is not None:
                before.extend(found)

    # -- what a call says ----------------------------------------------------------------------------------------------

    def _read(self, model: nn.Module, inputs: dict[str, Any], past: int) -> Call | None:
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # pictures, say
        shape = (tokens.shape[0], tokens.shape[1])
        if (explicit := inputs.get("intervention_mask")) is not None:
            return Call(shape, explicit_BT=_checked("intervention_mask", explicit, shape, tokens.device))
        real = self._real_tokens(inputs.get("attention_mask"), (shape[0], past + shape[1]), tokens.device)
        labels = inputs.get("intervention_labels")
        if labels is None and isinstance(model, GenerationMixin):
            labels = inputs.get("labels")
        prompt = inputs.get("prompt_mask")
        told = labels is not None or prompt is not None
        gradients = model.training and torch.is_grad_enabled()
        if self._prompt is not None and not told and not gradients and (past, shape[1]) != (0, self._prompt[0]):
            # A prompt that is read in pieces is known by its length alone; what is missing on the right is no padding.
            missing = max(self._prompt[0] - real.shape[1], 0)
            return Call(shape, generated=(F.pad(real, (0, missing), value=True)[:, : self._prompt[0]], past))
        real_BT = real[:, past:]
        starts_BT = _starts(real_BT, inputs)
        if prompt is not None:
            prompt_BT = real_BT & _checked("prompt_mask", prompt, shape, tokens.device)
            return Call(shape, prompt_BT, real_BT & ~prompt_BT, starts_BT)
        if past and not told:
            return Call(shape, torch.zeros_like(real_BT), real_BT, starts_BT)
        if labels is not None:
            labels = labels.to(tokens.device)
        guessed = isinstance(model, GenerationMixin) and gradients and not told
        return Call(shape, *prompts_and_answers(real_BT, starts_BT, labels), starts_BT, guessed=guessed)

    def _real_tokens(self, attention_mask: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Which tokens of a text, cached ones first, are no padding, `(B, past + T)`."""
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            return _checked("attention_mask", attention_mask.bool(), shape, device)
        real = torch.ones(shape, dtype=torch.bool, device=device)
        if attention_mask is None:
            return real
        if self._prompt is None:
            raise ValueError(
                "attention_mask: BaFT reads where the texts begin from a mask of two dimensions, (batch, tokens); give that, or "
                "intervention_mask."
            )
        # `generate` hands models with a cache of fixed size the masks of their layers instead.
        if self._prompt[1] is None:
            return real
        prompt = self._prompt[1].to(device).bool().repeat_interleave(shape[0] // len(self._prompt[1]), 0)
        width = min(prompt.shape[1], shape[1])
        return torch.cat([prompt[:, :width], real[:, width:]], 1)


def _whole(shape: tuple[int, int], device: torch.device) -> Call:
    """A pass of which every token belongs to a prompt, as in models of pictures."""
    real_BT = torch.ones(shape, dtype=torch.bool, device=device)
    return Call(shape, real_BT, torch.zeros_like(real_BT), _first_tokens(real_BT))


def _checked(name: str, mask: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{name} of shape {tuple(mask.shape)} and dtype {mask.dtype}: give {shape}, one bool for each token of the batch"
            f"{', those in the cache first' if name == 'attention_mask' else ''}."
        )
    return mask.to(device)


def _cached_tokens(cache: Any) -> int:
    """How many tokens a cache of keys and values has; 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def _starts(real_BT: Tensor, inputs: dict[str, Any]) -> Tensor:
    """First tokens of sequences, from position ids or from lengths, where several stand in a row."""
    lengths, position_ids = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if lengths is not None:
        starts = torch.zeros_like(real_BT)
        starts[:, lengths[:-1].long()] = True
        return starts
    # Models of pictures and text have position ids in three dimensions, in which positions of one picture are alike.
    flat = position_ids if isinstance(position_ids, Tensor) and position_ids.dim() == 2 else None
    return sequence_starts(real_BT, None if flat is None else flat.to(real_BT.device))
