"""Adapters in the weights of a copy."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

from peft import PeftModel
from torch import equal
from torch.nn import Parameter
from transformers import PreTrainedModel


def merged_copy(model: PeftModel) -> PreTrainedModel:
    """A copy of the model with its active adapters in the weights.

    An output layer that shares its weight with the input embeddings becomes one of its own if the adapter changed one
    of the two, as `tie_word_embeddings` of the copy's config then says.
    """
    model = copy.deepcopy(model)
    base = cast(PreTrainedModel, model.get_base_model())
    configs = (base.config, base.config.get_text_config())
    declared, tied = [config.tie_word_embeddings for config in configs], _untie(base)
    with warnings.catch_warnings():
        # PEFT takes the copy of `_untie` for the user's wish and says in every case that the weights are no longer tied.
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = cast(PreTrainedModel, cast(Any, model).merge_and_unload())
    if tied:
        embedding, head = cast(Any, merged.get_input_embeddings()), cast(Any, merged.get_output_embeddings())
        same = equal(embedding.weight, head.weight)
        if same:
            head.weight = embedding.weight
        for config, before in zip(configs, declared, strict=True):
            config.tie_word_embeddings = before and same
    return merged


def _untie(base: PreTrainedModel) -> bool:
    """Give the output layer a copy of each weight that it shares with the input embeddings; False if it shares none."""
    shared = {id(parameter) for parameter in base.get_input_embeddings().parameters()}
    found = False
    for module in base.get_output_embeddings().modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared:
                setattr(module, name, Parameter(parameter.detach().clone(), parameter.requires_grad))
                found = True
    return found
