"""What every tuner of ours is tested on: the tuners, and what each of them refuses. The models are those of `families`.

A new tuner is one more entry of `TUNERS`; what it does not do is one more entry of its `refusals`, which docs/TUNERS.md lists.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.tensor
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from hf_ext import BaftConfig, LorVpConfig, NeatConfig, RoseLoraConfig
from tests.tuners.families import FAMILIES, IDS, LANGUAGE_AND_MORE, build


@dataclass(frozen=True)
class Refusal:
    """What a tuner says no to, instead of doing something else.

    Attributes:
        situation, reason: as docs/TUNERS.md tells them.
        attempt: raises a `ValueError`, or a `NotImplementedError` where PEFT asks for one.
        error: what it says, as a regular expression.
    """

    situation: str
    reason: str
    attempt: Callable[[], Any]
    error: str


@dataclass(frozen=True)
class Tuner:
    """A tuner and what it claims.

    Attributes:
        name: for people.
        config: (identity at the start, options) -> configuration.
        families: of `FAMILIES`, those that it adapts.
        merges: whether it can be merged into the weights.
        linear: whether it adapts linear layers.
        layers: what it adapts besides linear layers.
        rounding: how far a fresh adapter may be from none.
        refusals: what it does not do, for the table of docs/TUNERS.md.
    """

    name: str
    config: Callable[..., PeftConfig]
    families: tuple[str, ...] = LANGUAGE_AND_MORE
    merges: bool = True
    linear: bool = True
    layers: frozenset[str] = frozenset()
    rounding: float = 0.0
    refusals: tuple[Refusal, ...] = ()


def _roselora(identity: bool | str, **options: Any) -> PeftConfig:
    return RoseLoraConfig(
        **{"r": 4, "t_init": 2, "t_final": 4, "sparsity": 0.5, "init_lora_weights": identity, **options}
    )


def _neat(identity: bool, **options: Any) -> PeftConfig:
    return NeatConfig(**{"r": 4, "depth": 1, "init_weights": identity, **options})


def _baft(identity: bool, **options: Any) -> PeftConfig:
    return BaftConfig(**{"r": 4, "layers": "all", "positions": "f1+l1+tail", "init_weights": identity, **options})


def _lorvp(identity: bool, **options: Any) -> PeftConfig:
    started = {"r": 4, "image_size": 8, "pixel_scale": [2.0, 2.0, 2.5], "head": "none", "init_weights": identity}
    return LorVpConfig(**{**started, **options})


def _away() -> nn.Module:
    class Away(nn.Linear):
        """Its weight is there only while it computes."""

    layer = Away(4, 4)
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return nn.ModuleDict({"linear": layer})


def _distributed() -> nn.Module:
    """One process that holds all of a distributed weight."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
            layer = nn.Linear(4, 4)
            layer.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(layer.weight.detach(), mesh))
        finally:
            torch.distributed.destroy_process_group()
    return nn.ModuleDict({"linear": layer})


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


def _grouped() -> nn.Module:
    return nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})


def _quantised_classifier() -> nn.Module:
    model = build("vit")
    model.classifier.weight = nn.Parameter(torch.zeros(3, 64, dtype=torch.int8), requires_grad=False)
    return model


TUNERS = (
    Tuner(
        "RoseLoRA",
        _roselora,
        layers=frozenset({"convolution", "embedding"}),
        refusals=(
            Refusal(
                "DoRA, QA-LoRA, aLoRA, Arrow and other variants of LoRA",
                "they change the forward pass, so that sparse factors are no sparse update",
                lambda: _roselora(True, use_dora=True),
                "use_dora=True cannot be combined with RoseLoRA",
            ),
            Refusal(
                "PiSSA, OLoRA and other starts from dense factors",
                "pruning would destroy what they start from",
                lambda: _roselora("pissa"),
                "init_lora_weights='pissa' starts from dense factors",
            ),
            Refusal(
                "`get_peft_model(..., mixed=True)`",
                "PEFT builds the layers of mixed models itself, and nothing would prune them",
                lambda: get_peft_model(build("llama"), _roselora(True, target_modules=["q_proj"]), mixed=True),
                "'ROSELORA' is not compatible",
            ),
        ),
    ),
    Tuner(
        "NEAT",
        _neat,
        layers=frozenset({"convolution"}),
        refusals=(
            Refusal(
                "embeddings",
                "the rows of an embedding are looked up, not multiplied",
                lambda: get_peft_model(build("llama"), _neat(True, target_modules=["embed_tokens"])),
                "embed_tokens' is a layer of type Embedding",
            ),
            Refusal(
                "`nn.MultiheadAttention`",
                "it hands its weights to a fused function, past every layer that could stand in their place",
                lambda: get_peft_model(_Attention(), _neat(True, target_modules=["attention"])),
                "'attention' is a layer of type MultiheadAttention",
            ),
            Refusal(
                "convolutions with groups, or with padding other than zeros",
                "the network reads a weight as one matrix of inputs and outputs; padding is that of the base layer alone",
                lambda: get_peft_model(_grouped(), _neat(True, target_modules=["conv"])),
                "groups=2",
            ),
            Refusal(
                '`side="output"` on GPTQ, AWQ, AQLM, EETQ and offloaded weights',
                "these layers multiply by their weight and do not show its columns",
                lambda: get_peft_model(_away(), _neat(True, side="output", target_modules=["linear"])),
                "side='output' reads the columns of a weight, which Away does not give",
            ),
            Refusal(
                "weights that are distributed already: tensor parallelism",
                "the network reads whole rows or columns",
                lambda: get_peft_model(_distributed(), _neat(True, target_modules=["linear"])),
                "'linear' is a layer of type Linear whose weight is distributed",
            ),
            Refusal(
                "`get_peft_model(..., mixed=True)`",
                "PEFT mixes six types of its own",
                lambda: get_peft_model(build("llama"), _neat(True, target_modules=["q_proj"]), mixed=True),
                "'NEAT' is not compatible",
            ),
        ),
    ),
    Tuner(
        "BaFT",
        _baft,
        families=("llama", "qwen3", "gemma3", "gpt2", "bert", "vit"),
        merges=False,
        linear=False,
        rounding=1e-6,
        refusals=(
            Refusal(
                "merging into the weights",
                "how far a hidden state is moved depends on the state",
                lambda: get_peft_model(build("llama"), _baft(True)).merge_and_unload(),
                "BaFT cannot be merged into the weights",
            ),
            Refusal(
                "models with an encoder and a decoder, such as T5",
                "positions are those of prompt and answer in one sequence",
                lambda: get_peft_model(build("t5"), _baft(True)),
                "T5ForConditionalGeneration has an encoder and a decoder",
            ),
            Refusal(
                "models that are not of transformers, such as the UNet",
                "which tokens are a prompt is read from the arguments of the model",
                lambda: get_peft_model(build("unet"), _baft(True)),
                "UNet2DConditionModel is no model of transformers",
            ),
            Refusal(
                "linear layers, and whatever is no block",
                "it edits what blocks put out",
                lambda: get_peft_model(build("llama"), _baft(True, layers=None, target_modules=["q_proj"])),
                "q_proj' is no block of the model",
            ),
            Refusal(
                "state-space models such as Mamba",
                "their state does not say how many tokens it has read",
                lambda: get_peft_model(MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1)), _baft(True)),
                "MambaForCausalLM keeps a state",
            ),
            Refusal(
                "training without labels, where positions depend on the end of a prompt",
                "every token would be taken for the prompt",
                lambda: get_peft_model(build("llama"), _baft(True)).train()(input_ids=IDS),
                "a training step without labels does not say where the prompts end",
            ),
            Refusal(
                "`get_peft_model(..., mixed=True)`",
                "PEFT mixes six types of its own",
                lambda: get_peft_model(build("llama"), _baft(True), mixed=True),
                "'BAFT' is not compatible",
            ),
        ),
    ),
    Tuner(
        "LoR-VP",
        _lorvp,
        families=("vit", "resnet"),
        linear=False,
        refusals=(
            Refusal(
                "models without a two-dimensional convolution over pixels: language models, videos, pictures that come as patches",
                "a prompt is a picture, and what a convolution makes of it is the same for every input",
                lambda: get_peft_model(build("llama"), _lorvp(True)),
                "LlamaForCausalLM has no nn.Conv2d that reads pictures",
            ),
            Refusal(
                "layers other than the one that reads the pixels",
                "behind it a prompt is no longer a picture",
                lambda: get_peft_model(build("vit"), _lorvp(True, target_modules=["q_proj"])),
                "target_modules=.* matches",
            ),
            Refusal(
                "pictures of another size than the prompt, unless `resize_prompt=True`",
                "a prompt is learnt for its pixels",
                lambda: get_peft_model(build("vit"), _lorvp(True))(pixel_values=torch.zeros(1, 3, 4, 4)),
                "is for pictures of 8 x 8 pixels, and these have 4 x 4",
            ),
            Refusal(
                'the head `"label_map"` with more classes than the model has',
                "each class is given a source class of its own",
                lambda: get_peft_model(build("vit"), _lorvp(True, head="label_map", num_labels=4)),
                "num_labels=4: the model has 3 classes",
            ),
            Refusal(
                'a classifier in 4 or 8 bits, with the head `"linear"`',
                "integers cannot be trained",
                lambda: get_peft_model(_quantised_classifier(), _lorvp(True, head="linear")),
                "the classifier 'classifier' is quantised",
            ),
            Refusal(
                "`get_peft_model(..., mixed=True)`",
                "PEFT mixes six types of its own",
                lambda: get_peft_model(build("vit"), _lorvp(True), mixed=True),
                "'LORVP' is not compatible",
            ),
        ),
    ),
)


def config(tuner: Tuner, family: str, identity: bool = False, **options: Any) -> PeftConfig:
    """A configuration for a family; `identity=False` starts with an adapter that changes something."""
    found = FAMILIES[family]
    targets = {"target_modules": list(found.linear)} if tuner.linear else {}
    return tuner.config(identity, **{**targets, "task_type": found.task, **options})
