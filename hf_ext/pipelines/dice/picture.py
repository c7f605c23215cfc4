"""What pipelines of pictures share: pictures as codes of a VQ model, prompts, outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from hf_ext.pipelines.dice.editing import DiceEditing
from hf_ext.pipelines.dice.noise import Generators
from hf_ext.pipelines.dice.trace import DiceTrace


@dataclass
class DiceImageOutput(BaseOutput):
    """What an edit made.

    Attributes:
        images: PIL pictures, an array `(B, H, W, 3)` or a tensor `(B, 3, H, W)` in [0, 1]; None with `output_type="seq"`.
        sequences: int64 `(B, h, w)`, the codes.
        trajectory: what each step predicted, first the noisiest: a list of such pictures, or int64 `(S, B, h, w)`.
    """

    images: Any
    sequences: Tensor
    trajectory: Any = None


class PictureEditing(DiceEditing):
    """Pictures of one size in a batch."""

    _output_types: ClassVar[tuple[str, ...]] = ("pil", "np", "pt", "seq")
    # Whether the VQ model works in [-1, 1] instead of [0, 1].
    _symmetric: ClassVar[bool]
    vqvae: Any
    tokenizer: Any
    text_encoder: Any
    transformer: Any
    scheduler: Any

    def _denoiser(self) -> nn.Module:
        return self.transformer

    def _set_up_pictures(self) -> None:
        scale = 2 ** (len(self.vqvae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=scale, do_normalize=self._symmetric)

    def _token_ids(self, prompts: list[str]) -> Tensor:
        """Prompts as CLIP's text encoders were trained on them, `(B, length)`."""
        found = self.tokenizer(
            prompts,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
        )
        return found.input_ids.to(self._execution_device)

    @contextlib.contextmanager
    def _decoder(self) -> Iterator[Any]:
        """The VQ model, in float32 if it cannot do with less."""
        narrow = self.vqvae.dtype == torch.float16 and self.vqvae.config.force_upcast
        if narrow:
            self.vqvae.float()
        try:
            yield self.vqvae
        finally:
            if narrow:
                self.vqvae.half()

    @torch.no_grad()
    def codes(self, image: Any) -> Tensor:
        """Codes of pictures, int64 `(B, h, w)`: PIL pictures, arrays or tensors in [0, 1]. Int64 tensors of codes are taken as they are.

        Raises:
            ValueError: a code is not in the codebook.
        """
        device = self._execution_device
        if isinstance(image, Tensor) and image.dtype == torch.int64:
            size = self.vqvae.config.num_vq_embeddings
            if image.ndim != 3 or not ((image >= 0) & (image < size)).all():
                raise ValueError(f"image: codes must be int64 (B, h, w) in [0, {size}), not {tuple(image.shape)}.")
            return image.to(device)
        with self._decoder() as vqvae:
            pixels = self.image_processor.preprocess(image).to(device, vqvae.dtype)
            latents = vqvae.encode(pixels).latents
            found = vqvae.quantize(latents)[2][2]
        return found.reshape(len(latents), *latents.shape[-2:])

    @torch.no_grad()
    def pictures(self, codes_BHW: Tensor, output_type: str = "pil") -> Any:
        """Pictures of codes, as PIL pictures, an array or a tensor. What is still masked, the code behind the last, has the mean of all codes."""
        with self._decoder() as vqvae:
            width = vqvae.config.vq_embed_dim or vqvae.config.latent_channels
            shape = (*codes_BHW.shape, width)
            if not vqvae.config.lookup_from_codebook:
                masked = (codes_BHW == vqvae.config.num_vq_embeddings)[:, None]
                mean = vqvae.quantize.embedding.weight.mean(0)[:, None, None]
                known = vqvae.quantize.get_codebook_entry(codes_BHW * ~masked[:, 0], shape)
                codes_BHW = torch.where(masked, mean, known)
            pixels = vqvae.decode(codes_BHW, force_not_quantize=True, shape=shape).sample
        if not self._symmetric:
            pixels = pixels.clip(0, 1)
        return self.image_processor.postprocess(pixels.float(), output_type)

    def _output(self, trace: DiceTrace, tokens_BN: Tensor, steps_SBN: Tensor | None, kind: str) -> DiceImageOutput:
        codes = tokens_BN.unflatten(-1, trace.notes["grid"])
        steps = None if steps_SBN is None else steps_SBN.unflatten(-1, trace.notes["grid"])
        if kind == "seq":
            return DiceImageOutput(None, codes, steps)
        pictures = None if steps is None else [self.pictures(each, kind) for each in steps]
        return DiceImageOutput(self.pictures(codes, kind), codes, pictures)

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        source_prompt: str | Sequence[str] | None = None,
        target_prompt: str | Sequence[str] | None = None,
        *,
        trace: DiceTrace | None = None,
        generator: Generators = None,
        **options: Any,
    ) -> DiceImageOutput | tuple:
        """Edit pictures: `invert`, then `edit`.

        Args:
            trace: edit this instead of a picture.
            options: further arguments of `invert` and `edit`.

        Raises:
            ValueError: both or neither of `image` and `trace` are given.
        """
        return self._from_source("image", image, source_prompt, target_prompt, trace, generator, options)
