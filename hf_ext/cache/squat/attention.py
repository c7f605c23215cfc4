"""The attention that reads packed tokens, registered with transformers as `"squat"`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_ext._compat import attention_name, is_causal_module, reads_other_keys, set_own_attention
from hf_ext.cache.squat.handle import KVHandle, layer_of, uncompiled
from hf_ext.cache.squat.layer import SQuatLayer
from hf_ext.kernels.attention import attend

NAME = "squat"
ROWS = 16  # new tokens that read the packed ones together
_IGNORED = {"position_ids", "cache_position"}  # tensors that are handed to an attention but change nothing
_UNDERSTOOD = {*_IGNORED, "s_aux"}  # tensors that the packed path deals with
_SDPA = {
    *_IGNORED,
    "position_bias",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "indices",
}  # tensors that sdpa, or its mask, deals with


def squat_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for transformers' `AttentionInterface`.

    New tokens, as many as stay whole, attend to the packed ones as they are. A prompt attends to whole keys and values, its queries are
    observed, and then its tokens are packed. Keys and values that do not come straight from a `SQuatCache` take the
    ordinary attention.

    Args:
        module: the attention module.
        query: `(B, Q, N, D)`.
        key, value: `(B, H, S, D)`, or handles of a `SQuatCache`.
        attention_mask: `(B, 1 or Q, N, S)`, boolean or additive; None if everything (one token) or everything before
            (several) is attended to.
        scaling: factor of the scores, 1 / sqrt(D) if None.
        dropout: of the attention weights, in training.
        **kwargs: what the model hands to its attention; `softcap` and `s_aux` (attention sinks) are understood.

    Returns:
        `(B, N, Q, D)` and, where the ordinary attention gives them, the weights.

    Raises:
        ValueError: the model attends to blocks of its own choice.
        RuntimeError: two calls use the cache at once.
    """
    if isinstance(key, KVHandle) or isinstance(value, KVHandle):
        return _with_cache(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    attention_mask = _complete(module, attention_mask, query.shape[2], key, False, kwargs)
    return _ordinary(module, query, key, value, attention_mask, scaling, dropout, kwargs)


@uncompiled
def _with_cache(module, query, key, value, attention_mask, scaling, dropout, kwargs):
    """The attention where keys, values or both are handles of a `SQuatCache`."""
    layer = layer_of(key, value)
    attention_mask = _complete(module, attention_mask, query.shape[2], key, layer is not None, kwargs)
    if layer is None:
        return _ordinary(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    tokens = query.shape[2]
    real = _real(attention_mask, tokens, query.shape[0]) if tokens > 1 else None
    if real is not None:
        layer.mark(real)
    few = tokens <= layer.config.residual_length and (tokens == 1 or attention_mask is not None)
    if few and layer.has_packed:
        if dropout or not _packed_can(kwargs) or (torch.is_grad_enabled() and query.requires_grad):
            return _ordinary(
                module, query, layer.materialize(0), layer.materialize(1), attention_mask, scaling, dropout, kwargs
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _packed(layer, query, attention_mask, scaling, kwargs), None
    result = _ordinary(
        module, query, layer.materialize(0), layer.materialize(1), attention_mask, scaling, dropout, kwargs
    )
    if tokens > 1:
        layer.observe(query, real)
        if not layer.shared:
            layer.pack()
    return result


@torch.no_grad()
def _packed(
    layer: SQuatLayer, query: torch.Tensor, mask: torch.Tensor | None, scaling: float, kwargs: dict[str, Any]
) -> torch.Tensor:
    """The attention of a few tokens, `(B, N, Q, D)`; the packed ones are read once for `ROWS` of them."""
    keys, values = layer.tokens
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, query.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            own = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
            parts.append(
                attend(
                    query[:, :, rows],
                    keys,
                    values,
                    own,
                    scaling=scaling,
                    softcap=kwargs.get("softcap"),
                    sinks=kwargs.get("s_aux"),
                ).transpose(1, 2)
            )
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()


def _packed_can(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return False
    return not any(isinstance(value, torch.Tensor) and name not in _UNDERSTOOD for name, value in kwargs.items())


def _complete(module, mask, rows, key, packed, kwargs):
    """The mask with all that a model leaves to an attention that it does not know to be like `sdpa`."""
    if kwargs.get("block_indices") is not None:
        raise ValueError(
            f'attn_implementation="{NAME}" does not know the blocks that a {type(module).__name__} attends to: '
            'use "sdpa" with this model.'
        )
    columns = key.shape[2]
    # Gemma 4 keeps only the last queries in layers that read the keys of others, and with them a mask of None, which
    # `sdpa` would take for the first queries.
    last = packed or reads_other_keys(module)
    if mask is None and last and 1 < rows < columns and _is_causal(module, kwargs):
        mask = _causal_mask(rows, columns, key.device, columns - rows)
    # DeepSeek-V3.2 and its kin choose keys, which they write into the mask for "sdpa" and "eager" only.
    if (chosen := kwargs.get("indices")) is not None:
        others = chosen.new_ones((*chosen.shape[:2], columns), dtype=torch.bool).scatter_(-1, chosen.long(), False)
        others = others[:, None]
        mask = mask & ~others if mask.dtype == torch.bool else mask.masked_fill(others, torch.finfo(mask.dtype).min)
    return mask


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return is_causal_module(module) if causal is None else causal


def _causal_mask(rows: int, columns: int, device: torch.device, past: int = 0) -> torch.Tensor:
    """`(1, 1, rows, columns)`: row i may attend to the first `past + i + 1` columns."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(past)[None, None]


def _ordinary(module, query, key, value, mask, scaling, dropout, kwargs):
    """`sdpa`, or the model's own eager attention for what `sdpa` cannot do."""
    unknown = any(isinstance(extra, torch.Tensor) and name not in _SDPA for name, extra in kwargs.items())
    if not unknown and kwargs.get("softcap") is None and not kwargs.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if mask is None and query.shape[2] > 1 and _is_causal(module, kwargs):
        mask = _causal_mask(query.shape[2], key.shape[2], query.device)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    key, value = (tensor.contiguous() if type(tensor) is torch.Tensor else tensor.clone() for tensor in (key, value))
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)


def _real(mask: torch.Tensor | None, tokens: int, batch: int) -> torch.Tensor | None:
    """Which of the newest `tokens` are no padding, `(B, N)`: those that any of their queries attends to, in any head."""
    if mask is None:
        return None
    newest = mask[..., -tokens:]
    seen = newest if newest.dtype == torch.bool else newest > torch.finfo(newest.dtype).min / 2
    if seen[:, :, -1].all():
        return None
    real = seen.flatten(1, 2).any(1).expand(batch, -1)
    return None if real.all() else real


def register() -> None:
    """Make `"squat"` known to transformers; importing `hf_ext.cache.squat` does so."""
    AttentionInterface.register(NAME, squat_attention_forward)
    # Without an entry of its own an implementation gets no masks at all, and padded batches go wrong.
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def squat_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Use the packed attention in all parts of `model` inside the `with`, and afterwards what each used before."""
    configs = _configs(model)
    before = [attention_name(config) for config in configs]
    try:
        model.set_attn_implementation(NAME)
        yield model
    finally:
        for config, implementation in zip(configs, before, strict=True):
            set_own_attention(config, implementation)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that `set_attn_implementation` may change: of all parts, and sub-configs that belong to no part."""
    waiting = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found: dict[int, PreTrainedConfig] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [part for name in config.sub_configs if (part := getattr(config, name)) is not None]
    return list(found.values())
