"""Each touch of another library's inside, so that a new version of it fails here and says where."""

import inspect
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from datasets import Dataset
from diffusers.callbacks import PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import _get_pipeline_class
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap
from transformers import AutoConfig, DeepseekV3Config, DogeConfig, DogeForCausalLM, GPT2Config, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import DPOTrainer, SFTTrainer

from hf_ext import _compat
from tests.cache.squat import models as squat_models
from tests.trainers.helpers import make_tokenizer


def test_a_request_without_an_answer():
    request = _compat.errors.HTTPError("refused")
    assert _compat.is_request_error(request) and not _compat.is_request_error(ValueError("x"))
    assert issubclass(_compat.errors.HfHubHTTPError, type(request))


def test_tensors_without_data_see_their_operators():
    """The arguments of an operator, nested ones too, arrive as given, and nothing runs before them."""

    class Seven(torch.Tensor):
        __torch_function__ = _compat.disabled_torch_function

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*_compat.map_nested(Seven, lambda _: torch.full((2,), 7.0), args), **(kwargs or {}))

    seven = _compat.wrapper_tensor(Seven, (2,), torch.float32, torch.device("cpu"))
    assert type(seven) is Seven and seven.shape == (2,)
    assert torch.cat([seven, torch.ones(1)]).tolist() == [7.0, 7.0, 1.0]


def test_enum_extension_checks_itself():
    class Stubborn(str):
        value = name = "ROSELORA"

    with pytest.raises(RuntimeError, match=r"PeftType.ROSELORA could not be added.*PeftType\(name\)"):
        _compat._check_member(Stubborn("ROSELORA"), "ROSELORA")


def test_hotswap_table_is_where_we_expect_it():
    assert hotswap.CONFIG_KEYS_TO_CHECK[PeftType.ROSELORA] == hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]


def test_places_of_tensors_are_where_modules_look_them_up():
    layer = torch.nn.BatchNorm1d(2)
    parameters, buffers = _compat.tensor_places(layer)
    assert parameters["weight"] is layer.weight and buffers["running_mean"] is layer.running_mean
    layer.weight = torch.nn.Parameter(torch.zeros(2))
    assert parameters["weight"] is layer.weight


def test_layers_say_what_goes_in_and_out():
    assert _compat.layer_features(torch.nn.Linear(3, 5)) == (3, 5)
    assert _compat.layer_features(torch.nn.Conv2d(2, 4, 3)) == (2, 4)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="a layer of type ReLU does not say how many inputs"),
    ):
        _compat.layer_features(torch.nn.ReLU())


def test_buffers_of_adapters_are_saved():
    buffers = _compat.saved_buffers()
    buffers["default"] = torch.ones(())
    assert list(buffers.state_dict()) == ["default"]


def test_an_unregistered_type_is_named():
    with pytest.raises(RuntimeError, match=r"PeftType.UNKNOWN is not registered; call hf_ext.tuners.register"):
        _compat.peft_type("UNKNOWN")


def test_injected_adapters_are_seen(tiny_llama):
    assert not _compat.has_injected_adapters(tiny_llama)
    tiny_llama.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert _compat.has_injected_adapters(tiny_llama)


def test_the_attention_of_one_config_is_set_and_not_saved():
    config = AutoConfig.for_model("gemma3")
    config._attn_implementation = "sdpa"
    _compat.set_own_attention(config, "eager")
    assert [_compat.attention_name(part) for part in (config, config.text_config)] == ["eager", "sdpa"]
    assert not [name for name in config.to_dict() if "attn_implementation" in name]


def test_shapes_that_configs_state_and_leave_out():
    assert _compat.attention_shape(LlamaConfig(num_key_value_heads=8)) == [32, 8, 128]
    assert _compat.attention_shape(GPT2Config()) == [12, None, None]


def test_latent_attention_is_known_by_its_rank():
    assert _compat.has_latent_attention(DeepseekV3Config()) and not _compat.has_latent_attention(LlamaConfig())


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_layers_that_share_their_keys_say_so(name):
    """Five layers, the last two of which read the others' keys."""
    model = squat_models.build(name)
    assert _compat.layers_read_by_others(model.config) == {1, 2}
    attention = [layer.self_attn for layer in model.model.layers]
    assert [_compat.reads_other_keys(module) for module in attention] == [False, False, False, True, True]
    assert not _compat.layers_read_by_others(LlamaConfig())
    assert not _compat.reads_other_keys(squat_models.build("llama").model.layers[0].self_attn)


def test_sdpa_takes_an_attention_for_causal_unless_it_denies_it():
    query = torch.randn(1, 2, 5, 8)
    with torch.device("meta"):
        doge = DogeForCausalLM(DogeConfig(num_hidden_layers=1, hidden_size=32)).model.layers[0].self_attn
    encoder = torch.nn.Identity()
    encoder.is_causal = False
    assert "is_causal" not in vars(doge)
    for module, causal in ((doge, True), (encoder, False)):
        assert _compat.is_causal_module(module) is causal
        ours, _ = sdpa_attention_forward(module, query, query, query, None, is_causal=None)
        right = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal)
        torch.testing.assert_close(ours, right.transpose(1, 2))


def test_datasets_have_fingerprints():
    rows = Dataset.from_dict({"a": [1, 2]})
    fingerprints = [_compat.dataset_fingerprint(each) for each in (rows, rows.map(lambda row: {"b": row["a"]}))]
    assert all(isinstance(each, str) for each in fingerprints) and fingerprints[0] != fingerprints[1]
    assert _compat.dataset_fingerprint(Dataset.from_dict({"a": [1, 2]})) == fingerprints[0]
    assert _compat.dataset_fingerprint(rows.to_iterable_dataset()) is _compat.dataset_fingerprint([1]) is None


def test_trl_tokenises_and_splits_as_the_unlearning_data_expects():
    tokenizer = make_tokenizer()
    assert _compat.tokenise_for_trl(tokenizer, "w1 w2") == [5, 6]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{{ tools or 'w9' }}"
    messages = [{"role": "user", "content": "w1"}]
    assert _compat.tokenise_for_trl(tokenizer, messages, tools=None) == [5, 13]
    assert _compat.shared_prefix([5, 6, 7], [5, 6, 8, 9]) == 2


def test_dpo_trainer_has_the_hooks_that_unlearning_overrides():
    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(DPOTrainer, name)).parameters)

    assert parameters("_prepare_dataset") == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert parameters("_compute_loss") == ["self", "model", "inputs", "return_outputs"]
    assert parameters("_set_signature_columns_if_needed") == ["self"]
    assert DPOTrainer.loss_is_scaled_for_ga is False
    source = inspect.getsource(DPOTrainer.__init__)
    for name in ("self._tokenizer =", "self._is_vision_dataset =", "self._metrics =", "self.aux_loss_enabled ="):
        assert name in source
    # A given reference keeps it from loading one and from adding the adapter "ref".
    assert "elif is_peft_model(model) and ref_model is None" in source
    assert {"log_probs", "is_top1", "aux_loss"} <= set(_compat.fused_lm_head_output().__dataclass_fields__)


def test_hooks_of_a_checkpointed_layer_run_once(tiny_llama):
    calls = []
    layers = [module for module in tiny_llama.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 2
    layers[0].register_forward_hook(lambda *_: calls.append(1))
    tiny_llama.gradient_checkpointing_enable()
    tiny_llama.train()(torch.tensor([[5, 6]])).logits.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_prepare_adapter_config", ["peft_config", "model_config"]),
        ("_prepare_model", ["peft_config", "model"]),
        ("_cast_adapter_dtype", ["adapter_name", "autocast_adapter_dtype"]),
    ],
)
def test_hooks_of_tuners(name, parameters):
    """Where PEFT lets a tuner in; `_create_and_replace` is abstract, and a renamed one would be missed at once."""
    found = [p for p in inspect.signature(getattr(BaseTuner, name)).parameters if p != "self"]
    assert found == parameters


def test_generation_and_forward_tell_tuners_what_they_were_called_with():
    """The hook is looked up by name on the tuner."""
    assert 'hasattr(self.base_model, "_enable_peft_forward_hooks")' in inspect.getsource(PeftModel)
    source = inspect.getsource(PeftModelForCausalLM.generate)
    assert "self._enable_peft_forward_hooks(*args, **kwargs)" in source


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_get_output_dir", ["trial"]),
        ("_clip_grad_norm", ["model"]),
        ("_get_grad_norm", ["model", "grad_norm"]),
        ("_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
        ("_prepare_dataset", ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]),
        ("create_optimizer", ["model"]),
    ],
)
def test_hooks_of_trainers_that_task_sequences_use(name, parameters):
    """Not public, but the places where `Trainer` and `SFTTrainer` let a subclass in; a renamed one would never be called."""
    found = [p for p in inspect.signature(getattr(SFTTrainer, name)).parameters if p != "self"]
    assert found == parameters


# -- diffusers -----------------------------------------------------------------------------------------------------------


def test_pipelines_are_found_by_their_name(monkeypatch):
    class DiceTestPipeline(diffusers.DiffusionPipeline):
        pass

    monkeypatch.delattr(diffusers, "DiceTestPipeline", raising=False)
    _compat.register_pipeline(DiceTestPipeline)
    _compat.register_pipeline(DiceTestPipeline)
    found = _get_pipeline_class(diffusers.DiffusionPipeline, config={"_class_name": "DiceTestPipeline"})
    assert found is DiceTestPipeline
    other = type("DiceTestPipeline", (diffusers.DiffusionPipeline,), {})
    with pytest.warns(UserWarning, match="diffusers has a DiceTestPipeline of its own"):
        _compat.register_pipeline(other)
    assert diffusers.DiceTestPipeline is DiceTestPipeline
    monkeypatch.delattr(diffusers, "DiceTestPipeline")


def test_parts_of_deprecated_pipelines(monkeypatch):
    assert _compat.has_amused_parts() and _compat.has_vq_diffusion_parts()
    kept = [name for name in dir(diffusers) if name not in ("AmusedScheduler", "VQDiffusionScheduler")]
    monkeypatch.setattr(type(diffusers), "__dir__", lambda self: kept)
    assert not _compat.has_amused_parts() and not _compat.has_vq_diffusion_parts()


@pytest.mark.parametrize("name", ["_execution_device", "_exclude_from_cpu_offload", "_optional_components"])
def test_names_that_pipelines_share_with_their_base(name):
    """With an underscore, but what every pipeline reads or sets; ours do it in place, since their code is copied into one file."""
    assert name in vars(diffusers.DiffusionPipeline)


def test_learned_embeddings_are_still_lost():
    """Once diffusers finds the class under the names that it writes down, ours need not be set."""
    for name in ("diffusers.LearnedClassifierFreeSamplingEmbeddings", "diffusers.pipelines.vq_diffusion"):
        code = f"import diffusers.pipelines; {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "AttributeError" in done.stderr, name


def test_callbacks_name_their_tensors():
    assert "_callback_tensor_inputs" in vars(diffusers.StableDiffusionPipeline)
    assert isinstance(inspect.getattr_static(PipelineCallback, "tensor_inputs"), property)


def test_no_folder_is_taken_for_a_pipeline_of_diffusers():
    """diffusers takes the folder of a component's module for the name of its pipeline."""
    folders = {path.name for path in Path(_compat.__file__).parent.rglob("*") if path.is_dir()}
    assert not {name for name in folders if hasattr(diffusers.pipelines, name)}
