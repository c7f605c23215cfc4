"""What LoR-VP's configuration and models refuse, and where the size of a pixel comes from."""

import json
import warnings

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    ConvNextImageProcessorPil,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_ext import LorVpConfig
from hf_ext.tuners.lorvp.config import scale_of
from hf_ext.tuners.lorvp.model import LorVpModel
from tests.tuners.lorvp.families import build


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0: give a positive rank"),
        ({"r": True}, "r=True"),
        ({"prompt": "border"}, "prompt='border': choose one of 'low_rank'"),
        ({"prompt": "frame"}, "width=None: prompt='frame' needs it"),
        ({"prompt": "tile", "width": 0}, "width=0"),
        ({"width": 3}, "width=3: prompt='low_rank' has no use for it"),
        ({"image_size": [32]}, r"image_size=\[32\]: give height and width"),
        ({"image_size": 0}, r"image_size=\[0, 0\]"),
        ({"pixel_scale": 0.0}, r"pixel_scale=0.0: give 1 / std"),
        ({"pixel_scale": [2.0, float("nan"), 1.0]}, "pixel_scale"),
        ({"pixel_scale": "half"}, "pixel_scale='half'"),
        ({"init_std": 0.0}, r"init_std=0.0: give a positive standard deviation"),
        ({"head": "lp"}, "head='lp': choose one of 'linear'"),
        ({"head": "label_map"}, "num_labels=None: head='label_map' needs the number of classes"),
        ({"num_labels": 3}, "num_labels=3: head='linear' has the classes of the model"),
        ({"head": "output_map", "id2label": {1: "a", 2: "b"}}, "id2label=.*: give the numbers 0 to 1 a name each"),
    ],
)
def test_fields_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LorVpConfig(**options)


def test_survives_json(tmp_path):
    config = LorVpConfig(r=2, image_size=[8, 6], pixel_scale=[2, 3, 4], head="label_map", id2label={0: "a", 1: "b"})
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LorVpConfig) and again.to_dict() == config.to_dict()
    assert again.id2label == {0: "a", 1: "b"} and again.num_labels == 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORVP"
    assert LorVpConfig().r == 4


# -- the size of a pixel ---------------------------------------------------------------------------------------------------


def test_processors_say_what_a_pixel_is_worth():
    """Checked on pictures: a step of a pixel in [0, 1], and of what the processor makes of it."""
    for processor in (
        ViTImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.2]),
        ConvNextImageProcessorPil(do_normalize=False),
        ViTImageProcessorPil(do_rescale=False, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 2.0]),
    ):
        dark, light = (torch.full((3, 224, 224), value, dtype=torch.uint8) for value in (0, 51))
        outputs = [
            processor(picture, return_tensors="pt")["pixel_values"][0, :, 100, 100] for picture in (dark, light)
        ]
        expected = scale_of(processor) if isinstance(scale_of(processor), list) else [scale_of(processor)] * 3
        torch.testing.assert_close((outputs[1] - outputs[0]) / 0.2, torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert LorVpConfig.from_processor(processor, r=2).pixel_scale == scale_of(processor)


def test_reads_the_processor_beside_the_model(tmp_path):
    model = build("vit")
    with pytest.warns(UserWarning, match="no image processor lies beside the model"):
        assert get_peft_model(model, LorVpConfig()).peft_config["default"].pixel_scale == [1.0, 1.0, 1.0]
    build("vit").save_pretrained(tmp_path)
    ViTImageProcessorPil(image_std=[0.5, 0.25, 0.125]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path), LorVpConfig())
    config = again.peft_config["default"]
    assert (config.pixel_scale, config.image_size) == ([2.0, 4.0, 8.0], [32, 32])


def test_grey_pictures():
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    base = ViTForImageClassification(ViTConfig(num_channels=1, **small))
    with pytest.raises(ValueError, match=r"pixel_scale=\[2.0, 2.0, 2.0\]: the model reads 1 channels"):
        get_peft_model(base, LorVpConfig(pixel_scale=[2.0] * 3))
    model = get_peft_model(base, LorVpConfig(pixel_scale=2.0, head="none", init_weights=False))
    assert model(pixel_values=torch.zeros(2, 1, 16, 16)).logits.isfinite().all()


# -- models that it does not fit -----------------------------------------------------------------------------------------


def _wrapped(family="vit", **options):
    return get_peft_model(build(family), LorVpConfig(**{"pixel_scale": 1.0, "image_size": 32, **options}))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: _wrapped("resnet", image_size=None), "image_size: ResNetForImageClassification does not say how large"),
        (lambda: _wrapped(target_modules=["absent"]), "matches nothing in ViTForImageClassification; name the one"),
        (lambda: _wrapped("resnet", target_modules=["convolution"]), "target_modules=.* matches .*name the one convolution"),
        (lambda: _wrapped("resnet", target_modules=r".*encoder.*stages\.1.*layer\.0\.convolution"), "reads 8 channels"),
        (lambda: _wrapped(target_modules=["vit.layernorm"]), "is a layer of type LayerNorm"),
        (lambda: _wrapped(prompt="frame", width=16), "a frame of that width is as large as the picture"),
        (lambda: _wrapped(prompt="tile", width=40), "a tile of that width"),
        (lambda: _wrapped(head="label_map", num_labels=6), "num_labels=6: the model has 5 classes"),
        (lambda: _wrapped(target_modules="all-linear"), "target_modules"),
    ],
)  # fmt: skip
def test_refuses(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_refuses_videos_and_says_so():
    config = VideoMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16
    )
    with pytest.raises(ValueError, match=r"has no nn\.Conv2d that reads pictures of 3 channels\. Models of videos"):
        get_peft_model(VideoMAEForVideoClassification(config), LorVpConfig(image_size=16))


def test_two_heads_that_do_not_go_together():
    model = _wrapped(head="linear")
    with pytest.raises(ValueError, match="'classifier' is trained by another adapter"):
        model.add_adapter("second", LorVpConfig(pixel_scale=1.0, head="label_map", num_labels=2))


def test_more_rank_than_there_is_warns():
    with pytest.warns(UserWarning, match="r=40: a prompt of .* has no higher rank than 32"):
        _wrapped(r=40)


def test_names_of_convolutions():
    name = "vit.embeddings.patch_embeddings.projection"
    for targets in (None, ["projection"], r".*patch_embeddings\.projection", [name]):
        assert _wrapped(target_modules=targets, head="none").peft_config["default"].target_modules == {name}


def test_plain_modules():
    """Neither of transformers nor with a classifier that could be found: everything is named."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 2)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.fc(self.first(pixels).mean((2, 3)))

    with pytest.raises(ValueError, match="Plain has no linear classifier outside of 'first'"):
        get_peft_model(Plain(), LorVpConfig(image_size=8, pixel_scale=1.0))
    options = dict(image_size=8, pixel_scale=1.0, head="none", modules_to_save=["fc"], init_weights=False)
    model = get_peft_model(Plain(), LorVpConfig(**options))
    assert isinstance(model.base_model, LorVpModel)
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"first", "fc"}
    model(torch.zeros(2, 3, 8, 8)).sum().backward()
