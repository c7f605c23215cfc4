"""Refuses settings that cannot work, once, when an evaluator is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext.metrics.editing.protocols import GENERATED, PROTOCOLS, Judge
from hf_ext.metrics.editing.scoring import ANSWER_POLICIES


def check_settings(settings: Mapping[str, Any], batch_size: int, judge: Judge | None) -> None:
    """Raises ValueError naming the argument, its value and the remedy."""
    protocols = settings["protocols"]
    unknown = [protocol for protocol in protocols if protocol not in PROTOCOLS]
    if unknown or not protocols or len(set(protocols)) != len(protocols):
        raise ValueError(f"protocols={protocols}: name one or more of {list(PROTOCOLS)}, each once.")
    if settings["answer_policy"] not in ANSWER_POLICIES:
        raise ValueError(f"answer_policy={settings['answer_policy']!r}: choose one of {list(ANSWER_POLICIES)}.")
    if ("generate_judge" in protocols) != (judge is not None):
        raise ValueError(
            f"protocols={protocols} and judge={judge!r:.60}: 'generate_judge' and a judge belong together; give both or neither."
        )
    for name, value in (
        ("max_new_tokens", settings["max_new_tokens"]),
        ("batch_size", batch_size),
        ("drift_top_k", settings["drift_top_k"]),
        ("fluency_tokens", settings["fluency_tokens"]),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    stops, separator = settings["stop_strings"], settings["separator"]
    if "" in stops:
        raise ValueError(
            f"stop_strings={stops} holds an empty string, which would end every answer at once; remove it."
        )
    blank = separator[len(separator.rstrip()) :]
    if set(protocols) & set(GENERATED) and any(stop in blank for stop in stops):
        raise ValueError(
            f"separator={separator!r} ends in a stop string, so decoding would stop before the answer; "
            f"remove it from stop_strings={stops}."
        )


def context_length(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens the model reads, as far as its configuration or its tokenizer says; virtual tokens take their part."""
    config = model.config.get_text_config()
    # GPT-2 and others have a name of their own for it.
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    declared = config.to_dict().get(name)
    length = tokenizer.model_max_length if declared is None else min(tokenizer.model_max_length, declared)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        length -= model.active_peft_config.num_virtual_tokens
    return length
