"""Pictures, edited with VQ-Diffusion: multinomial diffusion over the codes of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers.pipelines
import torch
from diffusers import DiffusionPipeline, Transformer2DModel, VQDiffusionScheduler, VQModel
from diffusers.pipelines.deprecated import vq_diffusion
from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import LearnedClassifierFreeSamplingEmbeddings
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModel, CLIPTokenizer

from hf_ext._modes import evaluating
from hf_ext.pipelines.dice.arguments import per_row, row_generators
from hf_ext.pipelines.dice.editing import Condition, expanded
from hf_ext.pipelines.dice.noise import Generators, uniform_rows
from hf_ext.pipelines.dice.picture import PictureEditing
from hf_ext.pipelines.dice.reference import LEAST, Kernel, guided, gumbel, log_noised, truncated
from hf_ext.pipelines.dice.trace import DiceSettings, DiceTrace, MultinomialTrace

# Published checkpoints name the module of the learned embeddings as it was before diffusers moved it, and newly saved ones say that diffusers exports the class. Neither can be loaded without these names; they are set
# here and not in `_compat`, since this module is copied.
vars(diffusers.pipelines).setdefault("vq_diffusion", vq_diffusion)
vars(diffusers).setdefault("LearnedClassifierFreeSamplingEmbeddings", LearnedClassifierFreeSamplingEmbeddings)


class DiceVQDiffusionPipeline(PictureEditing, DiffusionPipeline):
    """Edits pictures with VQ-Diffusion; it takes the parts of `VQDiffusionPipeline`, also by `from_pipe` (https://huggingface.co/papers/2410.08207, section on multinomial diffusion).

    Each state is drawn from the forward process on its own; a residual is what the next state has beyond the posterior. Scores are log-probabilities with the mask as the last value.

    Args:
        vqvae, text_encoder, tokenizer, transformer, scheduler, learned_classifier_free_sampling_embeddings: those of `VQDiffusionPipeline`; without the last, guidance leads away from an empty prompt.
        tau: share of the scheduler's time up to the last state, if `invert` is not told.
        lambda1: strength of the residual, if `edit` is not told; 0.2 in the paper.
        guidance_scale: of classifier-free guidance, if `invert` is not told; 5 in the paper.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    # Its codebook is read beside its forward pass, which offloading hooks do not see.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["vqvae", "learned_classifier_free_sampling_embeddings"]
    _optional_components: ClassVar[list[str]] = ["learned_classifier_free_sampling_embeddings"]
    _symmetric = True
    learned_classifier_free_sampling_embeddings: Any

    def __init__(
        self,
        vqvae: VQModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        transformer: Transformer2DModel,
        scheduler: VQDiffusionScheduler,
        learned_classifier_free_sampling_embeddings: LearnedClassifierFreeSamplingEmbeddings | None = None,
        tau: float = 1.0,
        lambda1: float = 0.2,
        guidance_scale: float = 5.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vqvae=vqvae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
            learned_classifier_free_sampling_embeddings=learned_classifier_free_sampling_embeddings,
        )
        self.register_to_config(tau=tau, lambda1=lambda1, guidance_scale=guidance_scale)
        self._set_up_pictures()

    def _about(self) -> dict[str, Any]:
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        return {**super()._about(), "scheduler": config}

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        source_prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        tau: float | None = None,
        guidance_scale: float | None = None,
        anchor_floor: float | None = None,
        truncation_rate: float = 1.0,
        generator: Generators = None,
        store_residuals: bool = False,
    ) -> MultinomialTrace:
        """Record how the model, told `source_prompt`, would have to be corrected to paint `image`.

        Args:
            image: PIL pictures, arrays or tensors in [0, 1], all of one size; or int64 codes `(B, h, w)`.
            source_prompt: says what the picture shows; one for all, or one for each.
            negative_prompt: what guidance leads away from; by default the learned embeddings if there are any, or an empty prompt.
            tau: share of the scheduler's time up to the last state, in (0, 1]; by default that of the pipeline. The trace holds the codes of each state.
            guidance_scale: of classifier-free guidance; 1 is none. By default that of the pipeline.
            anchor_floor: log-probability of other values in the anchor; log 1e-30 by default, as the authors. The lower, the closer the result stays.
            truncation_rate: share of the probability that is kept, the likeliest values first.
            generator: of the noise; a list has one for each picture, whose noise then does not depend on other pictures.
            store_residuals: keep the residuals instead of computing them again in every replay.

        Raises:
            ValueError: an argument is out of range.
        """
        tau = self.config.tau if tau is None else tau
        times = self.scheduler.config.num_train_timesteps
        settings = DiceSettings(
            num_inference_steps=max(1, round(times * tau)),
            tau=tau,
            guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
            anchor="onehot",
            anchor_floor=anchor_floor,
            truncation_rate=truncation_rate,
        )
        codes = self.codes(image)
        rows, *grid = codes.shape
        if grid != [self.transformer.height, self.transformer.width]:
            expected = self.transformer.height, self.transformer.width
            raise ValueError(f"image has {tuple(grid)} codes and the model paints {expected}; resize the picture.")
        prompts = per_row("source_prompt", source_prompt, rows, needed=True)
        generator = row_generators(generator, rows)
        tokens = codes.flatten(1)
        states = [self._state(tokens, time, generator) for time in range(settings.num_inference_steps)]
        trace = MultinomialTrace(
            tokens=tokens,
            editable=torch.ones_like(tokens, dtype=torch.bool),
            settings=settings,
            source=self._condition(prompts),
            negative=self._null(negative_prompt, rows) if settings.guided else {},
            recorded_with=self._about(),
            notes={"grid": grid, "source_prompts": prompts},
            trajectory=torch.stack(states),
        )
        if store_residuals:
            with evaluating(self.transformer):
                trace = self._with_residuals(trace)
        self.maybe_free_model_hooks()
        return trace

    def _state(self, tokens_BN: Tensor, time: int, generator: Generators) -> Tensor:
        """A draw from q(x_t | x_0)."""
        steps = self.scheduler
        logs = (
            steps.log_at,
            steps.log_bt,
            steps.log_ct,
            steps.log_cumprod_at,
            steps.log_cumprod_bt,
            steps.log_cumprod_ct,
        )
        kernel = Kernel(*(each.double().exp().to(tokens_BN.device) for each in logs))
        values = self.transformer.config.num_vector_embeds
        log_BNV = log_noised(tokens_BN, time, kernel, values).float()
        rows, count = tokens_BN.shape
        return (log_BNV + gumbel(uniform_rows([count] * rows, count, values, generator, log_BNV.device))).argmax(-1)

    def _condition(self, prompts: list[str]) -> Condition:
        states = self.text_encoder(self._token_ids(prompts))[0]
        return {"encoder_hidden_states": states / states.norm(dim=-1, keepdim=True)}

    def _null(self, prompt: str | Sequence[str] | None, rows: int) -> Condition:
        learned = self.learned_classifier_free_sampling_embeddings
        if prompt is None and learned is not None and learned.config.learnable:
            return expanded({"encoder_hidden_states": learned.embeddings[None].to(self._execution_device)}, rows)
        return self._condition(per_row("negative_prompt", "" if prompt is None else prompt, rows, needed=True))

    def _conditions(self, trace: DiceTrace, prompts: list[str | None]) -> Condition:
        return self._condition(
            per_row("target_prompt", prompts, len(prompts) if trace.rows == 1 else trace.rows, needed=True)
        )

    def _denoise(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, time: float) -> Tensor:
        """log p(x_0 | x_t), `(B, N, K)`."""
        step = torch.tensor(time, device=tokens_BN.device)
        log_BKN = self.transformer(tokens_BN, timestep=step, **condition).sample
        return log_BKN.mT.to(torch.promote_types(log_BKN.dtype, torch.float32))

    def _scores(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, number: int) -> Tensor:
        """log p(x_{t-1} | x_t), `(B, N, K + 1)`, at least -70."""
        settings = trace.settings
        log_x0_BNK = self._denoise(trace, tokens_BN, condition, number)
        if settings.guided:
            null = self._denoise(trace, tokens_BN, expanded(trace.negative, len(tokens_BN)), number)
            log_x0_BNK = guided(log_x0_BNK, null, settings.guidance_scale).log_softmax(-1)
        log_x0_BNK = truncated(log_x0_BNK, settings.truncation_rate)
        if number == 0:
            return pad(log_x0_BNK, (0, 1), value=LEAST)
        self.scheduler.set_timesteps(self.scheduler.config.num_train_timesteps, device=tokens_BN.device)
        return self.scheduler.q_posterior(log_x0_BNK.mT, tokens_BN, number).mT.clamp(LEAST, 0.0)
