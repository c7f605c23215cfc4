"""Small image models of the families that LoR-VP is for."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZE = 32
_VIT: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=SIZE,
    patch_size=8,
)
_SWIN: dict[str, Any] = dict(
    image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
)
_CLIP = hf.CLIPVisionConfig(**_VIT).to_dict()
_SIGLIP = hf.SiglipVisionConfig(**_VIT).to_dict()
_TEXT: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
CLASSES = 5

BUILD: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VIT, num_labels=CLASSES)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**_VIT, num_labels=CLASSES)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**{**_VIT, "mlp_ratio": 2}, num_labels=CLASSES)
    ),
    "beit": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**_VIT, use_absolute_position_embeddings=True, num_labels=CLASSES)
    ),
    "clip": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=_CLIP, num_labels=CLASSES)),
    "siglip": lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=_SIGLIP, num_labels=CLASSES)),
    "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**_SWIN, num_labels=CLASSES)),
    "swin, positions": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(**_SWIN, use_absolute_embeddings=True, num_labels=CLASSES)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(image_size=SIZE, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    ),
    "resnet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
        )
    ),
    "efficientnet": lambda: hf.EfficientNetForImageClassification(
        hf.EfficientNetConfig(
            image_size=SIZE, in_channels=[32, 16], out_channels=[16, 24], kernel_sizes=[3, 3], strides=[1, 2],
            num_block_repeats=[1, 1], expand_ratios=[1, 6], depthwise_padding=[], width_coefficient=1.0, batch_norm_eps=1e-12, hidden_dim=1280, num_labels=CLASSES,
        )
    ),
    "clip, two towers": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=_TEXT, vision_config=_CLIP)),
}  # fmt: skip
FOLDS = ("vit", "deit", "dinov2", "beit", "clip", "siglip", "clip, two towers")
TEXTS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILD[family]().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # EfficientNet's own start leaves nothing of a picture
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Models start with positions of zero, and with statistics and scales of one.
            if "position" in name or "layer_scale" in name:
                parameter.normal_(std=0.5)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            scores(model.train(), pictures(8), family)
    return model.eval()


def pictures(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def scores(model: nn.Module, pixels: Tensor, family: str, **more: Any) -> Tensor:
    if family == "clip, two towers":
        return model(pixel_values=pixels, input_ids=TEXTS, **more).logits_per_image
    return model(pixel_values=pixels, **more).logits
