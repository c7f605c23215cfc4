"""Several answers to one prompt, scored with one reading of the prompt.

A row of a classification task has one prompt and as many answers as there are labels; reading each pair in full reads the prompt once per
label. Here the prompt fills a key-value cache once, and its copies are continued with the answers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_ext.trainers.output_layer import score_answers
from hf_ext.tuners.baft.ledger import layers_of


def can_share_prefix(model: nn.Module, base: PreTrainedModel) -> bool:
    """Whether the cache of this model can be copied and continued at any position: attention alone, with position ids.

    Prompt learning puts virtual tokens in front of every call, so that a cache would have them twice. BaFT asks where the prompts end, which a part of the
    model is not told.
    """
    if layers_of(base):
        return False
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    if not {"position_ids", "past_key_values"} <= set(inspect.signature(type(base.base_model).forward).parameters):
        return False
    layers = DynamicCache(config=base.config).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def common_prefix(ids_GNS: Tensor, answer_GNS: Tensor) -> Tensor:
    """How many tokens the rows of each group have in common before the first answer, `(G,)`."""
    same_GS = (ids_GNS == ids_GNS[:, :1]).all(1) & ~answer_GNS.any(1)
    return same_GS.long().cumprod(-1).sum(-1)


def score_groups(
    model: nn.Module, base: PreTrainedModel, ids_RS: Tensor, mask_RS: Tensor, answer_RS: Tensor, group: int
) -> tuple[Any, Tensor]:
    """(output of `score_answers`, where it has answers), of rows of which `group` in turn begin alike; what they share is read once per group.

    Both are `(R, T)` and begin after the last shared token of each row.

    Args:
        model, base: as there, for which `can_share_prefix`.
        ids_RS: tokens, padded on the right; R is a multiple of `group`.
        mask_RS: 1 where there is a token.
        answer_RS: True at the tokens of the answer.
        group: rows per prompt.
    """
    rows, device = len(ids_RS), ids_RS.device
    ids_GS = ids_RS.view(rows // group, group, -1)[:, 0]
    shared_G = common_prefix(ids_RS.view(*ids_GS.shape[:1], group, -1), answer_RS.view(*ids_GS.shape[:1], group, -1))
    # The last shared token is read with the answers, since it predicts the first of them.
    shared_G = (shared_G - 1).clamp(min=0)
    prefix, owner_R = int(shared_G.max()), torch.arange(rows, device=device) // group
    inputs: dict[str, Any] = {"use_cache": False}
    past_GP = shared_G.new_ones(len(shared_G), 0)
    if prefix:
        # On the left, so that the answers continue where the cache ends.
        columns_GP = torch.arange(prefix, device=device) - (prefix - shared_G)[:, None]
        past_GP = (columns_GP >= 0).long()
        cache = DynamicCache(config=base.config)
        base.base_model(
            input_ids=ids_GS.gather(1, columns_GP.clamp(min=0)),
            attention_mask=past_GP,
            position_ids=columns_GP.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(owner_R)
        inputs = {"past_key_values": cache, "use_cache": True}
    start_R = shared_G[owner_R][:, None]
    longest = int((mask_RS.sum(-1, keepdim=True) - start_R).max())
    columns_RT = start_R + torch.arange(longest, device=device)
    inside_RT = columns_RT < ids_RS.shape[1]
    columns_RT = columns_RT.clamp(max=ids_RS.shape[1] - 1)
    here_RT = mask_RS.gather(1, columns_RT) * inside_RT
    inputs |= {
        "input_ids": ids_RS.gather(1, columns_RT),
        "attention_mask": torch.cat([past_GP[owner_R], here_RT], 1),
        "position_ids": columns_RT,
    }
    answer_RT = answer_RS.gather(1, columns_RT) & here_RT.bool()
    return score_answers(model, base, inputs, answer_RT), answer_RT[:, 1:]
