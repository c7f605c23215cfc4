"""Pictures, edited with a masked image model: aMUSEd and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AmusedScheduler, DiffusionPipeline, UVit2DModel, VQModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from hf_ext._modes import evaluating
from hf_ext.pipelines.dice.arguments import per_row, row_generators
from hf_ext.pipelines.dice.editing import Condition
from hf_ext.pipelines.dice.noise import Generators, uniform_rows
from hf_ext.pipelines.dice.picture import PictureEditing
from hf_ext.pipelines.dice.trace import NOISES, DiceSettings, DiceTrace, MaskedTrace, one_of


class DiceMaskedImagePipeline(PictureEditing, DiffusionPipeline):
    """Edits pictures with a masked image model such as aMUSEd; it takes the parts of `AmusedPipeline`, also by `from_pipe` (https://huggingface.co/papers/2410.08207).

    Args:
        vqvae, tokenizer, text_encoder, transformer, scheduler: those of `AmusedPipeline`; of the scheduler, its mask token is used.
        tau: share of noise in the last state, if `invert` is not told; by default 1 with masks, 0.9 with random codes.
        lambda1: strength of the residual, if `edit` is not told; without guidance, 0.7 does better.
        guidance_scale: of classifier-free guidance, if `invert` is not told.
        noise: `"mask"`, or `"random"` codes, for models that were trained on some.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    # Its codebook is read beside its forward pass, which offloading hooks do not see.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vqvae"]
    _symmetric = False

    def __init__(
        self,
        vqvae: VQModel,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        transformer: UVit2DModel,
        scheduler: AmusedScheduler,
        tau: float | None = None,
        lambda1: float = 0.5,
        guidance_scale: float = 3.0,
        noise: str = "mask",
    ) -> None:
        super().__init__()
        one_of("noise", noise, NOISES)
        self.register_modules(
            vqvae=vqvae, tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler
        )
        tau = NOISES[noise] if tau is None else tau
        self.register_to_config(tau=tau, lambda1=lambda1, guidance_scale=guidance_scale, noise=noise)
        self._set_up_pictures()

    def _about(self) -> dict[str, Any]:
        return {**super()._about(), "mask token of the scheduler": self.scheduler.config.mask_token_id}

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        source_prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 32,
        tau: float | None = None,
        mask_schedule: str = "linear",
        temperatures: tuple[float, float] = (1.0, 1.0),
        guidance_scale: float | None = None,
        anchor: str = "auto",
        anchor_floor: float | None = None,
        carry_over: bool | None = None,
        micro_conditioning_aesthetic_score: int = 6,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
        generator: Generators = None,
        store_residuals: bool = False,
    ) -> MaskedTrace:
        """Record how the model, told `source_prompt`, would have to be corrected to paint `image`.

        Args:
            image: PIL pictures, arrays or tensors in [0, 1], all of one size; or int64 codes `(B, h, w)`.
            source_prompt: says what the picture shows; one for all, or one for each.
            negative_prompt: what guidance leads away from.
            num_inference_steps: S, number of states.
            tau: share of noise in the last state, in (0, 1]; by default that of the pipeline.
            mask_schedule, temperatures, anchor, anchor_floor: see `DiceSettings`.
            carry_over: see `DiceSettings`; by default where noise is a mask.
            guidance_scale: of classifier-free guidance; 1 is none. By default that of the pipeline.
            micro_conditioning_aesthetic_score, micro_conditioning_crop_coord: as in `AmusedPipeline`.
            generator: of the noise; a list has one for each picture, whose noise then does not depend on other pictures.
            store_residuals: keep the residuals instead of computing them again in every replay.

        Raises:
            ValueError: an argument is out of range.
        """
        settings = DiceSettings(
            num_inference_steps=num_inference_steps,
            tau=self.config.tau if tau is None else tau,
            mask_schedule=mask_schedule,
            temperatures=temperatures,
            guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
            anchor=anchor,
            anchor_floor=anchor_floor,
            carry_over=self.config.noise == "mask" if carry_over is None else carry_over,
        )
        codes = self.codes(image)
        rows, height, width = codes.shape
        prompts = per_row("source_prompt", source_prompt, rows, needed=True)
        generator = row_generators(generator, rows)
        tokens = codes.flatten(1)
        uniforms, choices = uniform_rows([height * width] * rows, height * width, 2, generator, tokens.device).unbind(
            -1
        )
        scale = self.image_processor.config.vae_scale_factor
        micro = [width * scale, height * scale, *micro_conditioning_crop_coord, micro_conditioning_aesthetic_score]
        notes = {"grid": [height, width], "micro_conditioning": micro, "source_prompts": prompts}
        negative = per_row("negative_prompt", negative_prompt, rows, needed=True)
        with evaluating(self.transformer):
            trace = MaskedTrace(
                tokens=tokens,
                editable=torch.ones_like(tokens, dtype=torch.bool),
                settings=settings,
                source=self._condition(prompts, micro),
                negative=self._condition(negative, micro) if settings.guided else {},
                recorded_with=self._about(),
                notes=notes,
                noise=self._noise(choices),
                uniforms=uniforms,
                onehot=torch.zeros(rows, dtype=torch.bool, device=tokens.device),
            )
            trace = self._with_anchor(trace, masks=self.config.noise == "mask")
            if store_residuals:
                trace = self._with_residuals(trace)
        self.maybe_free_model_hooks()
        return trace

    def _noise(self, choices_BN: Tensor) -> Tensor:
        if self.config.noise == "mask":
            return torch.full_like(choices_BN, self.scheduler.config.mask_token_id, dtype=torch.int64)
        return (choices_BN * self.vqvae.config.num_vq_embeddings).long()

    def _condition(self, prompts: list[str], micro: list[int]) -> Condition:
        found = self.text_encoder(self._token_ids(prompts), return_dict=True, output_hidden_states=True)
        states = found.hidden_states[-2]
        sizes = torch.tensor(micro, dtype=states.dtype, device=states.device).expand(len(prompts), -1)
        return {"encoder_hidden_states": states, "pooled_text_emb": found.text_embeds, "micro_conds": sizes}

    def _conditions(self, trace: DiceTrace, prompts: list[str | None]) -> Condition:
        rows = len(prompts) if trace.rows == 1 else trace.rows
        return self._condition(per_row("target_prompt", prompts, rows, needed=True), trace.notes["micro_conditioning"])

    def _denoise(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, time: float) -> Tensor:
        logits = self.transformer(tokens_BN.unflatten(-1, trace.notes["grid"]), **condition).flatten(2).mT
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
