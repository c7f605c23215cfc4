"""Texts, edited with a masked language model: a prompt says what the text is, another what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext._modes import evaluating
from hf_ext.pipelines.dice.editing import Condition, DiceEditing, check_generators, per_row
from hf_ext.pipelines.dice.noise import Generators, lengths_of, uniform_rows
from hf_ext.pipelines.dice.trace import NOISES, DiceSettings, DiceTrace, MaskedTrace, one_of

# What a value must not reach in any step: finite, so that differences of it are.
NEVER = -1e4


@dataclass
class DiceTextOutput(BaseOutput):
    """What an edit made.

    Attributes:
        texts: one for each row; None with `output_type="seq"`.
        sequences: int64 `(B, N)`, the tokens; padding as in the trace.
        trajectory: what each step predicted, first the noisiest: texts by step and row, or int64 `(S, B, N)`.
    """

    texts: list[str] | None
    sequences: Tensor
    trajectory: Any = None


class TextEditing(DiceEditing):
    """Texts of different lengths in a batch, and noise of their vocabulary."""

    _output_types: ClassVar[tuple[str, ...]] = ("text", "seq")
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def _denoiser(self) -> nn.Module:
        return self.model

    def _encoded(self, texts: list[str], prompts: list[str | None]) -> tuple[Condition, Tensor, Tensor]:
        """The condition, tokens `(B, N)` of the texts, and which of them are texts."""
        raise NotImplementedError

    def _ordinary_ids(self) -> Tensor:
        """Tokens that may stand in a text."""
        special = set(self.tokenizer.all_special_ids)
        return torch.tensor([each for each in range(len(self.tokenizer)) if each not in special])

    def _usable(self, logits: Tensor) -> Tensor:
        """Logits in float32, with nothing but ordinary tokens to be predicted."""
        forbidden = torch.ones(logits.shape[-1], dtype=torch.bool)
        forbidden[self._ordinary_ids()] = False
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.masked_fill(forbidden.to(logits.device), NEVER)

    @torch.no_grad()
    def invert(
        self,
        text: str | Sequence[str],
        source_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        tau: float | None = None,
        mask_schedule: str = "linear",
        temperatures: tuple[float, float] = (1.0, 1.0),
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        anchor: str = "auto",
        anchor_floor: float | None = None,
        noise_map: Tensor | None = None,
        generator: Generators = None,
        store_residuals: bool = False,
    ) -> MaskedTrace:
        """Record how the model, told `source_prompt`, would have to be corrected to write `text`.

        Args:
            text: what is to be edited; one or several.
            source_prompt: says what the text is; stands before it. One for all texts, or one for each.
            num_inference_steps: by default the number of tokens of the longest text, as the authors.
            tau: share of noise in the last state, in (0, 1]; by default that of the pipeline.
            mask_schedule, temperatures, anchor, anchor_floor: see `DiceSettings`.
            guidance_scale: of classifier-free guidance against `negative_prompt`; 1 is none.
            noise_map: int64 `(B, N)`, the tokens that noise consists of; drawn by default.
            generator: of the noise; a list has one for each text, whose noise then does not depend on other texts.
            store_residuals: keep the residuals instead of computing them again in every replay.

        Raises:
            ValueError: an argument is out of range, a text is empty, too long, or has special tokens.
        """
        texts = [text] if isinstance(text, str) else list(text)
        prompts = per_row("source_prompt", source_prompt, len(texts))
        check_generators(generator, len(texts))
        device = self._execution_device
        with evaluating(self.model):
            source, tokens, editable = self._encoded(texts, prompts)
            lengths = lengths_of(editable)
            settings = DiceSettings(
                num_inference_steps=max(lengths) if num_inference_steps is None else num_inference_steps,
                tau=self.config.tau if tau is None else tau,
                mask_schedule=mask_schedule,
                temperatures=temperatures,
                guidance_scale=guidance_scale,
                anchor=anchor,
                anchor_floor=anchor_floor,
            )
            uniforms, choices = uniform_rows(lengths, tokens.shape[1], 2, generator, device).unbind(-1)
            negative = self._encoded(texts, [negative_prompt] * len(texts))[0] if settings.guided else {}
            trace = MaskedTrace(
                tokens=tokens,
                editable=editable,
                settings=settings,
                source=source,
                negative=negative,
                recorded_with=self._about(),
                notes={"texts": texts, "source_prompts": prompts},
                noise=self._noise(choices) if noise_map is None else self._checked(noise_map, tokens),
                uniforms=uniforms,
                onehot=torch.zeros(len(texts), dtype=torch.bool, device=device),
            )
            trace = self._with_anchor(trace, masks=self.config.noise == "mask")
            if store_residuals:
                trace = self._with_residuals(trace)
        self.maybe_free_model_hooks()
        return trace

    @torch.no_grad()
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        source_prompt: str | Sequence[str] | None = None,
        target_prompt: str | Sequence[str] | None = None,
        *,
        trace: DiceTrace | None = None,
        generator: Generators = None,
        **options: Any,
    ) -> DiceTextOutput | tuple:
        """Edit texts: `invert`, then `edit`.

        Args:
            trace: edit this instead of a text.
            options: further arguments of `invert` and `edit`.

        Raises:
            ValueError: both or neither of `text` and `trace` are given.
        """
        return self._from_source("text", text, source_prompt, target_prompt, trace, generator, options)

    def _noise(self, choices_BN: Tensor) -> Tensor:
        """Tokens from uniform numbers."""
        if self.config.noise == "mask":
            return torch.full_like(choices_BN, self.tokenizer.mask_token_id, dtype=torch.int64)
        usual = self._ordinary_ids().to(choices_BN.device)
        return usual[(choices_BN * len(usual)).long()]

    def _checked(self, noise_map: Tensor, tokens_BN: Tensor) -> Tensor:
        if noise_map.shape != tokens_BN.shape or noise_map.dtype != torch.int64:
            raise ValueError(
                f"noise_map is {noise_map.dtype} {tuple(noise_map.shape)}; give torch.int64 {tuple(tokens_BN.shape)}, a token for each position."
            )
        if not ((noise_map >= 0) & (noise_map < len(self.tokenizer))).all():
            raise ValueError(f"noise_map has tokens outside of the vocabulary of {len(self.tokenizer)}.")
        return noise_map.to(tokens_BN.device)

    def _conditions(self, trace: DiceTrace, prompts: list[str | None]) -> Condition:
        texts = trace.notes["texts"] * (len(prompts) if trace.rows == 1 else 1)
        condition, tokens, _ = self._encoded(texts, per_row("target_prompt", prompts, len(texts)))
        if tokens.shape[1] != trace.tokens.shape[1] or not torch.equal(tokens, trace.tokens.expand_as(tokens)):
            raise ValueError(
                "the trace was recorded with another tokenizer: its texts have other tokens here. Invert again."
            )
        return condition

    def _output(self, trace: DiceTrace, tokens_BN: Tensor, steps_SBN: Tensor | None, kind: str) -> DiceTextOutput:
        if kind == "seq":
            return DiceTextOutput(None, tokens_BN, steps_SBN)
        steps = None if steps_SBN is None else [self._texts(trace, each) for each in steps_SBN]
        return DiceTextOutput(self._texts(trace, tokens_BN), tokens_BN, steps)

    def _texts(self, trace: DiceTrace, tokens_BN: Tensor) -> list[str]:
        kept = zip(tokens_BN, trace.editable.expand_as(tokens_BN), strict=True)
        return self.tokenizer.batch_decode([row[own] for row, own in kept], skip_special_tokens=True)


class DiceTextEditPipeline(TextEditing, DiffusionPipeline):
    """Edits texts with any `AutoModelForMaskedLM`: `<s> prompt </s></s> text </s>`, of which the text is edited (https://huggingface.co/papers/2410.08207).

    Args:
        model: a masked language model, `AutoModelForMaskedLM`.
        tokenizer: its fast tokenizer.
        tau: share of noise in the last state, if `invert` is not told.
        lambda1: strength of the residual, if `edit` is not told.
        noise: `"random"` tokens, for models that were trained on some (BERT and its kin), or `"mask"`.

    Raises:
        ValueError: the tokenizer is slow, or has no mask token and `noise="mask"`.
    """

    model_cpu_offload_seq = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tau: float = 0.9,
        lambda1: float = 0.7,
        noise: str = "random",
    ) -> None:
        super().__init__()
        one_of("noise", noise, NOISES)
        if noise == "mask" and tokenizer.mask_token_id is None:
            raise ValueError("noise='mask', and the tokenizer has no mask token; take noise='random', or set one.")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is slow and cannot say where the text begins; load it with use_fast=True."
            )
        self.register_modules(model=model, tokenizer=tokenizer)
        self.register_to_config(tau=tau, lambda1=lambda1, noise=noise)

    def _encoded(self, texts: list[str], prompts: list[str | None]) -> tuple[Condition, Tensor, Tensor]:
        pairs = (texts,) if prompts[0] is None else (prompts, texts)
        found = self.tokenizer(*pairs, padding=True, return_tensors="pt")
        own = torch.tensor([[each == len(pairs) - 1 for each in found.sequence_ids(row)] for row in range(len(texts))])
        ids, lengths = found["input_ids"], own.sum(-1)
        self._check_length(ids.shape[1])
        special = set(self.tokenizer.all_special_ids)
        for row, text in enumerate(texts):
            inside = ids[row][own[row]].tolist()
            if not inside:
                raise ValueError(f"text {row} is empty: {text!r}.")
            if special & set(inside):
                names = self.tokenizer.convert_ids_to_tokens(sorted(special & set(inside)))
                raise ValueError(f"text {row} has the special tokens {names}, which cannot be edited: {text!r}.")
        # Padding stands behind the last place.
        places = torch.full((len(texts), int(lengths.max())), ids.shape[1])
        editable = torch.arange(places.shape[1]) < lengths[:, None]
        places[editable] = own.nonzero()[:, 1]
        tokens = pad(ids, (0, 1)).gather(1, places)
        device = self._execution_device
        condition = {name: each.to(device) for name, each in found.items()}
        return {**condition, "places": places.to(device)}, tokens.to(device), editable.to(device)

    def _check_length(self, length: int) -> None:
        limits = [self.tokenizer.model_max_length, self.model.config.to_dict().get("max_position_embeddings", length)]
        if length > min(limits):
            raise ValueError(f"prompt and text have {length} tokens, and the model reads {min(limits)}; shorten them.")

    def _denoise(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, time: float) -> Tensor:
        inputs = dict(condition)
        places, ids = inputs.pop("places"), inputs.pop("input_ids")
        length = ids.shape[1]
        ids = pad(ids, (0, 1)).scatter(1, places, tokens_BN)[:, :length]
        logits = self.model(input_ids=ids, **inputs).logits
        places = places.clamp(max=length - 1)[..., None]
        return self._usable(logits.take_along_dim(places, 1))
