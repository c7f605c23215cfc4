"""Every touch of a private or version-dependent part of another library, each with its reason.

Each function has a test in tests/test_compat.py that fails loudly when upstream changes what it relies on.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub import errors
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

# -- PyTorch ---------------------------------------------------------------------------------------------------------

# What a subclass of `Tensor` that stands for data elsewhere is made of: the way that PyTorch documents has no public names.
disabled_torch_function: Any = torch._C._disabled_torch_function_impl


def wrapper_tensor(cls: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of the class `cls` with a shape, a dtype and a device, but no data."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


def map_nested(cls: type, function: Callable[[Any], Any], nested: Any) -> Any:
    """Replace the instances of `cls` in nested lists, tuples and dictionaries: the arguments of an operator."""
    return tree_map_only(cls, function, nested)


def tensor_places(module: Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries in which a module holds its own parameters and buffers: the public ways to them are too slow for every forward pass."""
    return module._parameters, module._buffers


# -- PEFT ------------------------------------------------------------------------------------------------------------


def extend_peft_type(name: str) -> PeftType:
    """Add the member `name` to `PeftType` and return it; the existing one if there is one already.

    `register_peft_method` accepts only names that are members, and `enum` offers no way to add one at run time. A plain
    string would not do: PEFT and transformers read `.value` and iterate over `list(PeftType)`.

    Raises:
        RuntimeError: the interpreter's `enum` does not take the member in every way that PEFT uses it.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # CPython 3.13 keeps a second list of values for its membership test.
    if "_hashable_values_" in vars(PeftType):
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    _check_member(member, name)
    return member


def _check_member(member: Any, name: str) -> None:
    uses = {
        "PeftType(name)": lambda: PeftType(name) is member,
        "PeftType[name]": lambda: PeftType[name] is member,
        "PeftType.name": lambda: PeftType.__dict__[name] is member,
        "iteration": lambda: member in list(PeftType) and name in list(PeftType),
        "equality and hash": lambda: member == name and {member: 1}[name] == 1,
        "value": lambda: member.value == name and member.name == name,
        "json": lambda: json.loads(json.dumps({"t": member})) == {"t": name},
        "deepcopy": lambda: copy.deepcopy(member) is member,
        "pickle": lambda: pickle.loads(pickle.dumps(member)) is member,
    }

    def works(use: str) -> bool:
        try:
            return uses[use]()
        except Exception:
            return False

    failed = [use for use in uses if not works(use)]
    if failed:
        raise RuntimeError(
            f"PeftType.{name} could not be added on this Python: {', '.join(failed)} failed: report it with your "
            "Python version; until then the type cannot be used."
        )


def peft_type(name: str) -> PeftType:
    """The registered member `name`.

    Raises:
        RuntimeError: registration was switched off and `hf_ext.tuners.register()` has not run.
    """
    if name not in PeftType.__members__:
        raise RuntimeError(f"PeftType.{name} is not registered; call hf_ext.tuners.register() first.")
    return PeftType[name]


def register_tuner(name: str, config_cls: type[PeftConfig], model_cls: type, prefix: str) -> bool:
    """Register a tuner under `name` (upper case) unless PEFT already has one of that name; True if it is ours afterwards.

    PEFT wins a collision: its own implementation stays in place, and ours stays importable under its module.
    """
    existing = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[name]) if name in PeftType.__members__ else None
    if existing is None:
        extend_peft_type(name)
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)
        return True
    if existing.__module__ == config_cls.__module__:
        return True
    warnings.warn(
        f"PEFT already provides the type {name} ({existing.__module__}.{existing.__qualname__}); it stays in place, and "
        f"adapters of this type load with it. Ours remains importable as {config_cls.__module__}.{config_cls.__qualname__}.",
        stacklevel=4,
    )
    return False


def allow_hotswap(name: str) -> None:
    """Let `peft.utils.hotswap` exchange adapters of a LoRA-shaped type: its table of types is module-level data."""
    from peft.utils import hotswap

    hotswap.CONFIG_KEYS_TO_CHECK[PeftType[name]] = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]


def layer_features(module: Module) -> tuple[int, int]:
    """(inputs, outputs) of any layer that PEFT knows, quantised ones included; every tuner of PEFT asks this, and it is not exported.

    Raises:
        ValueError: PEFT cannot tell.
    """
    from peft.tuners.tuners_utils import _get_in_out_features

    inputs, outputs = _get_in_out_features(module)
    if inputs is None or outputs is None:
        raise ValueError(
            f"a layer of type {type(module).__name__} does not say how many inputs and outputs it has: leave it out of target_modules."
        )
    return inputs, outputs


def saved_buffers() -> Any:
    """A dictionary of buffers by adapter that are saved with it: PEFT's `BufferDict`, which it does not export."""
    from peft.tuners._buffer_dict import BufferDict

    return BufferDict(persistent=True)


# -- huggingface_hub ---------------------------------------------------------------------------------------------------


def is_request_error(error: Exception) -> bool:
    """Whether a request got no answer. The client, httpx or from huggingface_hub 2 on httpx2, is named in no public place."""
    return isinstance(error, errors.HTTPError)


# -- transformers ------------------------------------------------------------------------------------------------------


def has_injected_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters were added with `add_adapter` or `load_adapter`; the public methods raise where there are none."""
    return model._hf_peft_config_loaded


def attention_name(config: PreTrainedConfig) -> str | None:
    """The attention that a part of a model uses; `set_attn_implementation` has no public counterpart that tells."""
    return config._attn_implementation


def set_own_attention(config: PreTrainedConfig, implementation: str | None) -> None:
    """Set the attention of one part of a model; the property of that name sets those of all sub-configs too."""
    config._attn_implementation_internal = implementation


# What the next functions ask for belongs to some models only; configs and modules of the others lack the attribute.


def attention_shape(config: PreTrainedConfig) -> list[int | None]:
    """Query heads, key-value heads and head dimension; None what a config leaves to the model, as GPT-2's does."""
    return [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")]


def has_latent_attention(config: PreTrainedConfig) -> bool:
    """Whether a model caches latents of its keys and values (DeepSeek and kin); no other sign of it is common to them."""
    return getattr(config, "kv_lora_rank", None) is not None


def layers_read_by_others(config: PreTrainedConfig) -> set[int]:
    """Layers whose keys and values later layers read, or an assistant model; only Gemma 3n, Gemma 4 and kin have such."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    return {index for index, mode in enumerate(modes) if mode == "store"}


def reads_other_keys(module: Module) -> bool:
    """Whether an attention module reads the keys of another; those of Gemma 3n, Gemma 4 and kin alone say so."""
    return getattr(module, "is_kv_shared_layer", False)


def is_causal_module(module: Module) -> bool:
    """Whether an attention module is causal; `sdpa` takes one that does not say so, such as Doge's, to be."""
    return getattr(module, "is_causal", True)


# -- TRL, for hf_ext.trainers.overtone (imported inside the functions: `import hf_ext` must not import trl) ------------


def fused_lm_head_output() -> type:
    """What `model(..., fused_lm_head=True)` returns to a TRL trainer; TRL exports the patch but not the output class."""
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput


def gathered_lm_head(*parameters):
    """A context in which parameters partitioned by DeepSpeed ZeRO-3 are whole; TRL's own helper, not exported by it.

    Reading `lm_head.weight` without calling the module bypasses the hook that would gather it.
    """
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


@contextlib.contextmanager
def without_appended_eos(trainer):
    """Let `SFTTrainer._prepare_dataset` append no end token: TRL 1.16 has no option for it.

    The method appends `self._tokenizer.eos_token` unless the text already ends with it, and reads nothing else from that
    attribute; every text ends with the empty string. Another use would fail loudly on the stand-in.
    """
    tokenizer = trainer._tokenizer
    trainer._tokenizer = types.SimpleNamespace(eos_token="")
    try:
        yield
    finally:
        trainer._tokenizer = tokenizer


# -- datasets --------------------------------------------------------------------------------------------------------


def dataset_fingerprint(dataset: Any) -> str | None:
    """The hash by which `datasets` tells one state of a `Dataset` from another, which has no public name; `None` for a stream or anything else."""
    return getattr(dataset, "_fingerprint", None) if hasattr(dataset, "cache_files") else None


# -- TRL, for hf_ext.trainers.flat ------------------------------------------------------------------------------------


def tokenise_for_trl(processing_class, text, **chat_options) -> list[int]:
    """Token ids of a prompt as TRL's trainers make them: a string, or messages through the chat template.

    TRL's function also unwraps the batch dimension that processors add; it is not exported.
    """
    from trl.data_utils import _tokenize

    return _tokenize(processing_class, text, **chat_options)["input_ids"]


def shared_prefix(ids: list[int], other_ids: list[int]) -> int:
    """Number of leading tokens that two sequences share: where TRL lets the completion begin. Not exported by TRL."""
    from trl.data_utils import common_prefix_length

    return common_prefix_length(ids, other_ids)


# -- diffusers, for hf_ext.pipelines.dice (imported inside the functions: `import hf_ext` must not import diffusers) ----


def register_pipeline(cls: type) -> None:
    """Let `DiffusionPipeline.from_pretrained` find a pipeline: it looks for names in the module `diffusers`, and offers no registry. A name that is there stays."""
    import diffusers

    existing = getattr(diffusers, cls.__name__, None)
    if existing is None:
        setattr(diffusers, cls.__name__, cls)
    elif existing is not cls:
        warnings.warn(
            f"diffusers has a {cls.__name__} of its own, which DiffusionPipeline.from_pretrained loads. Ours is {cls.__module__}.{cls.__qualname__}.",
            stacklevel=3,
        )


def has_amused_parts() -> bool:
    """Whether diffusers still has what masked image models are made of: it has stopped to look after the pipelines that use them, since 0.33.1."""
    return _has_parts("AmusedScheduler", "UVit2DModel", "VQModel")


def has_vq_diffusion_parts() -> bool:
    """Whether diffusers still has what VQ-Diffusion is made of; its pipeline is deprecated."""
    where = "diffusers.pipelines.deprecated.vq_diffusion"
    return _has_parts("Transformer2DModel", "VQDiffusionScheduler", "VQModel") and bool(
        importlib.util.find_spec(where)
    )


def _has_parts(*names: str) -> bool:
    import diffusers

    return set(names) <= set(dir(diffusers))
