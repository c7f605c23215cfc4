"""Small models of the families that people adapt, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

DECODER = dict(
    vocab_size=99,
    hidden_size=64,
    intermediate_size=128,  # bitsandbytes' 4-bit kernel on CPU needs a multiple of its block
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
IDS = torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        build: the model, random weights.
        inputs: of a forward pass that returns a loss, if the model computes one.
        linear: names of two kinds of linear layers.
        task: of `PeftConfig`.
        convolution: name of a convolution.
        embedding: name of an embedding.
        head: name of the last layer.
    """

    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    linear: tuple[str, str]
    task: str | None = "CAUSAL_LM"
    convolution: str | None = None
    embedding: str | None = None
    head: str = "lm_head"


def _decoder(kind: type, config: type, **more: Any) -> Callable[[], nn.Module]:
    return lambda: kind(config(**DECODER, **more))


FAMILIES = {
    "llama": Family(
        _decoder(LlamaForCausalLM, LlamaConfig),
        dict(input_ids=IDS, labels=IDS),
        ("q_proj", "up_proj"),
        embedding="embed_tokens",
    ),
    "qwen3": Family(_decoder(Qwen3ForCausalLM, Qwen3Config), dict(input_ids=IDS, labels=IDS), ("v_proj", "down_proj")),
    "gemma3": Family(
        _decoder(
            Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        ),
        dict(input_ids=IDS, labels=IDS),
        ("q_proj", "gate_proj"),
    ),
    "gpt2": Family(
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=99,
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        ),
        dict(input_ids=IDS, labels=IDS),
        ("c_attn", "c_fc"),
    ),
    "t5": Family(
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        dict(input_ids=IDS, labels=IDS[:, :6].contiguous()),
        ("q", "wo"),
        task="SEQ_2_SEQ_LM",
    ),
    "bert": Family(
        lambda: BertForSequenceClassification(
            BertConfig(
                vocab_size=99,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=96,
                max_position_embeddings=64,
            )
        ),
        dict(input_ids=IDS, labels=torch.tensor([0, 1, 0])),
        ("query", "output.dense"),
        task="SEQ_CLS",
        embedding="word_embeddings",
    ),
    "vit": Family(
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=8,
                patch_size=4,
                num_labels=3,
            )
        ),
        dict(
            pixel_values=torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
            labels=torch.tensor([0, 1, 2]),
        ),
        ("q_proj", "fc1"),
        task=None,
        convolution="projection",
        head="classifier",
    ),
    "unet": Family(
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        ),
        dict(
            sample=torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
            timestep=torch.tensor(3),
            encoder_hidden_states=torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)),
        ),
        ("to_q", "to_v"),
        task=None,
        convolution="conv1",
    ),
}
LANGUAGE_AND_MORE = tuple(FAMILIES)
FAMILIES["resnet"] = Family(
    lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
    FAMILIES["vit"].inputs,
    ("classifier.1", "classifier.1"),
    task=None,
    head="classifier.1",
)
GENERATING = ("llama", "qwen3", "gemma3", "gpt2")


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].build().eval()


def output(model: nn.Module, family: str) -> Tensor:
    """What a model computes."""
    return model(**FAMILIES[family].inputs)[0 if family == "unet" else "logits"]


def loss(model: nn.Module, family: str) -> Tensor:
    return output(model, family).square().mean() if family == "unet" else model(**FAMILIES[family].inputs).loss
