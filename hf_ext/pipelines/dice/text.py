"""What pipelines of texts share: texts of different lengths in a batch, noise of their vocabulary, outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_ext._modes import evaluating
from hf_ext.pipelines.dice.arguments import per_row, row_generators
from hf_ext.pipelines.dice.editing import Condition, DiceEditing
from hf_ext.pipelines.dice.noise import Generators, lengths_of, uniform_rows
from hf_ext.pipelines.dice.trace import NOISES, DiceSettings, DiceTrace, MaskedTrace, one_of

# The least that a logit is taken for: finite, so that differences are.
LOWEST = -1e4


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
    """A prompt says what a text is, another what it should be."""

    _output_types: ClassVar[tuple[str, ...]] = ("text", "seq")
    _guidable: ClassVar[bool] = True
    _prepared_for: tuple[Any, int] | None = None
    tokenizer: Any
    model: Any

    def _set_up(self, model: Any, tokenizer: Any, tau: float | None, lambda1: float, noise: str) -> None:
        """
        Raises:
            ValueError: noise is neither kind, or a mask that the tokenizer does not have.
        """
        one_of("noise", noise, NOISES)
        if noise == "mask" and tokenizer.mask_token_id is None:
            raise ValueError(
                "noise='mask', and the tokenizer has no mask token; set tokenizer.mask_token, or take noise='random'."
            )
        self.register_modules(model=model, tokenizer=tokenizer)
        self.register_to_config(tau=NOISES[noise] if tau is None else tau, lambda1=lambda1, noise=noise)

    def _denoiser(self) -> nn.Module:
        return self.model

    def _encoded(self, texts: list[str], prompts: list[str | None]) -> tuple[Condition, Tensor, Tensor]:
        """The condition, tokens `(B, N)` of the texts, and which of them are texts."""
        raise NotImplementedError

    @property
    def _masks(self) -> bool:
        """Whether noise is a mask, not random tokens."""
        return self.config.noise == "mask"

    def _placed(
        self, texts: list[str], ids_BL: Tensor, own_BL: Tensor, others: Condition
    ) -> tuple[Condition, Tensor, Tensor]:
        """Of prompts and texts: the condition, tokens `(B, N)` of the texts, and which of these are no padding.

        Args:
            own_BL: where the texts stand.
            others: what the model needs besides the tokens.

        Raises:
            ValueError: prompt and text are too long, or as `_check_texts`.
        """
        lengths, length = own_BL.sum(-1), ids_BL.shape[1]
        limit = min(self.tokenizer.model_max_length, self._positions() or length)
        if length > limit:
            raise ValueError(f"prompt and text have {length} tokens, and the model reads {limit}; shorten them.")
        self._check_texts(texts, [ids[own].tolist() for ids, own in zip(ids_BL, own_BL, strict=True)])
        # Padding of the texts stands behind the last place.
        places = torch.full((len(texts), int(lengths.max())), length)
        editable = torch.arange(places.shape[1]) < lengths[:, None]
        places[editable] = own_BL.nonzero()[:, 1]
        tokens = pad(ids_BL, (0, 1)).gather(1, places)
        condition = {"input_ids": ids_BL, "places": places, **others}
        device = self._execution_device
        moved = {name: each.to(device) for name, each in condition.items()}
        return moved, tokens.to(device), editable.to(device)

    def _positions(self) -> int | None:
        """How many tokens the model has positions for; RoBERTa's begin behind that of padding."""
        known = self.model.config.to_dict().get("max_position_embeddings")
        for name, module in self.model.named_modules():
            if known and name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return known if module.padding_idx is None else known - module.padding_idx - 1
        return known

    def _check_texts(self, texts: list[str], ids: list[list[int]]) -> None:
        """
        Raises:
            ValueError: a text is empty or has special tokens.
        """
        special = self._special_ids()
        for row, (text, inside) in enumerate(zip(texts, ids, strict=True)):
            if not inside:
                raise ValueError(f"text {row} is empty: {text!r}.")
            if found := sorted(special & set(inside)):
                names = self.tokenizer.convert_ids_to_tokens(found)
                raise ValueError(f"text {row} has the special tokens {names}, which cannot be edited: {text!r}.")

    def _denoise(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, time: float) -> Tensor:
        inputs = dict(condition)
        places, ids = inputs.pop("places"), inputs.pop("input_ids")
        length = ids.shape[1]
        ids = pad(ids, (0, 1)).scatter(1, places, tokens_BN)[:, :length]
        logits = self.model(input_ids=ids, **inputs).logits
        return self._usable(logits.take_along_dim(places.clamp(max=length - 1)[..., None], 1))

    def _special_ids(self) -> set[int]:
        """Named special tokens, and those of chat templates and the like, which have no name."""
        added = self.tokenizer.added_tokens_decoder.items()
        return set(self.tokenizer.all_special_ids) | {number for number, token in added if token.special}

    def _prepare(self) -> None:
        if self._prepared_for != (self.tokenizer, len(self.tokenizer)):
            self._prepared_for = (self.tokenizer, len(self.tokenizer))
            # Tokens that may stand in a text.
            self._ordinary = torch.tensor(sorted(set(self.tokenizer.get_vocab().values()) - self._special_ids()))
        self._ordinary = self._ordinary.to(self._execution_device)

    def _usable(self, logits: Tensor) -> Tensor:
        """Finite logits, in float32 or wider.

        Raises:
            ValueError: the tokenizer has tokens that the model does not.
        """
        if self._ordinary[-1] >= logits.shape[-1]:
            raise ValueError(
                f"the tokenizer has the token {int(self._ordinary[-1])}, and the model {logits.shape[-1]} of them: call model.resize_token_embeddings(len(tokenizer)), or take the tokenizer that belongs to the model."
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(min=LOWEST)

    def _allowed(self, summed_BNV: Tensor) -> Tensor:
        forbidden = torch.ones(summed_BNV.shape[-1], dtype=torch.bool, device=summed_BNV.device)
        forbidden[self._ordinary] = False
        return summed_BNV.masked_fill_(forbidden, -math.inf)

    def _default_steps(self, lengths: list[int]) -> int:
        return max(lengths)

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
        negative_prompt: str | Sequence[str] = "",
        anchor: str = "auto",
        anchor_floor: float | None = None,
        carry_over: bool | None = None,
        noise_map: Tensor | None = None,
        generator: Generators = None,
        store_residuals: bool = False,
    ) -> MaskedTrace:
        """Record how the model, told `source_prompt`, would have to be corrected to write `text`.

        Args:
            text: what is to be edited; one or several.
            source_prompt: says what the text is; stands before it. One for all texts, or one for each.
            num_inference_steps: by default the number of tokens of the longest text, as the authors; with a number of one's own, what becomes of a text does not depend on the others.
            tau: share of noise in the last state, in (0, 1]; by default that of the pipeline.
            mask_schedule, temperatures, anchor, anchor_floor: see `DiceSettings`.
            carry_over: see `DiceSettings`; by default where noise is a mask.
            guidance_scale: of classifier-free guidance against `negative_prompt`; 1 is none.
            noise_map: int64 `(B, N)`, the tokens that noise consists of; drawn by default.
            generator: of the noise; a list has one for each text, whose noise then does not depend on other texts.
            store_residuals: keep the residuals instead of computing them again in every replay.

        Raises:
            ValueError: an argument is out of range, a text is empty, too long, or has special tokens.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("text is empty; give at least one.")
        prompts = per_row("source_prompt", source_prompt, len(texts))
        negatives = per_row("negative_prompt", negative_prompt, len(texts), needed=True)
        generator = row_generators(generator, len(texts))
        device = self._execution_device
        with evaluating(self.model):
            self._prepare()
            source, tokens, editable = self._encoded(texts, prompts)
            lengths = lengths_of(editable)
            settings = DiceSettings(
                num_inference_steps=self._default_steps(lengths)
                if num_inference_steps is None
                else num_inference_steps,
                tau=self.config.tau if tau is None else tau,
                mask_schedule=mask_schedule,
                temperatures=temperatures,
                guidance_scale=guidance_scale,
                anchor=anchor,
                anchor_floor=anchor_floor,
                carry_over=self._masks if carry_over is None else carry_over,
            )
            if settings.guided and not self._guidable:
                raise ValueError(
                    f"guidance_scale={guidance_scale}: {type(self).__name__} has no guidance; leave it at 1."
                )
            uniforms, choices = uniform_rows(lengths, tokens.shape[1], 2, generator, device).unbind(-1)
            negative = self._encoded(texts, negatives)[0] if settings.guided else {}
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
            trace = self._with_anchor(trace, masks=self._masks)
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
        if self._masks:
            return torch.full_like(choices_BN, self.tokenizer.mask_token_id, dtype=torch.int64)
        return self._ordinary[(choices_BN * len(self._ordinary)).long()]

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
