"""Texts, edited with DiffusionGemma: canvas by canvas, each of which is predicted at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_ext.pipelines.dice.editing import Condition, Replay, part_of
from hf_ext.pipelines.dice.text import TextEditing
from hf_ext.pipelines.dice.trace import DiceTrace, MaskedTrace


class DiceDiffusionGemmaPipeline(TextEditing, DiffusionPipeline):
    """Edits texts with DiffusionGemma: the text is the answer to the prompt (https://huggingface.co/papers/2410.08207).

    It takes the model and the processor of `DiffusionGemmaPipeline`, also by `from_pipe`. The text is cut into canvases. Each has a trajectory of its own under the prompt and the canvases before it, which are the
    recorded ones in inversion and the edited ones in editing. What is left of the last canvas is filled with end tokens and stays. The model is not told its former predictions, on which a residual
    would depend.

    Args:
        model: a `DiffusionGemmaForBlockDiffusion`.
        processor: its processor or tokenizer, with a chat template.
        tau: share of noise in the last state, if `invert` is not told.
        lambda1: strength of the residual, if `edit` is not told.
    """

    model_cpu_offload_seq = "model"
    _masks = False
    _guidable = False
    model: Any
    processor: Any

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        tau: float = 0.9,
        lambda1: float = 0.7,
    ) -> None:
        super().__init__()
        self.register_modules(model=model, processor=processor)
        self.register_to_config(tau=tau, lambda1=lambda1)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        # diffusers takes the folder of the model's module for a pipeline of its own, and could not load it again.
        model = self.model._orig_mod if is_compiled_module(self.model) else self.model
        self.register_to_config(model=("transformers", type(model).__name__))
        super().save_pretrained(*arguments, **options)

    def _default_steps(self, lengths: list[int]) -> int:
        return min(max(lengths), self.model.config.canvas_length)

    def _encoded(self, texts: list[str], prompts: list[str | None]) -> tuple[Condition, Tensor, Tensor]:
        if None in prompts:
            raise ValueError("DiffusionGemma answers prompts: give one, be it empty.")
        rows = [self._question(str(prompt)) for prompt in prompts]
        inside = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self._check_texts(texts, inside)
        size, end = self.model.config.canvas_length, self.tokenizer.eos_token_id
        tokens = torch.full((len(texts), -(-max(map(len, inside)) // size) * size), end)
        editable = torch.zeros_like(tokens, dtype=torch.bool)
        # On the left, so that the canvases follow the prompts.
        context = torch.full((len(texts), max(map(len, rows))), end)
        mask = torch.zeros_like(context)
        for row, (ids, question) in enumerate(zip(inside, rows, strict=True)):
            tokens[row, : len(ids)] = torch.tensor(ids)
            editable[row, : len(ids)] = True
            context[row, -len(question) :] = torch.tensor(question)
            mask[row, -len(question) :] = 1
        device = self._execution_device
        condition = {"input_ids": context.to(device), "attention_mask": mask.to(device)}
        return condition, tokens.to(device), editable.to(device)

    def _question(self, prompt: str) -> list[int]:
        """Tokens in front of the text."""
        message = {"role": "user", "content": prompt}
        told = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return self.tokenizer(told, add_special_tokens=False)["input_ids"]

    # -- canvases --------------------------------------------------------------------------------------------------------

    def _canvases(self, trace: DiceTrace) -> Iterator[slice]:
        size = self.model.config.canvas_length
        return (slice(begin, begin + size) for begin in range(0, trace.tokens.shape[1], size))

    def _canvas(self, trace: DiceTrace, at: slice) -> DiceTrace:
        """The trace of one canvas, under the prompt and the recorded canvases before it."""
        assert isinstance(trace, MaskedTrace)
        parts = {name: getattr(trace, name)[:, at] for name in ("tokens", "editable", "noise", "uniforms")}
        residuals = None if trace.residuals is None else trace.residuals[:, :, at]
        return replace(
            trace, **parts, residuals=residuals, source=self._read(trace.source, trace.tokens[:, : at.start])
        )

    def _read(self, condition: Condition, before_BN: Tensor) -> Any:
        """What the decoder is told: a cache of the prompt and the canvases before."""
        ids = torch.cat([condition["input_ids"], before_BN], 1)
        mask = torch.cat([condition["attention_mask"], torch.ones_like(before_BN)], 1)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        # With a canvas of one token, whose prediction nobody reads: what moves a model to its device does so when it is called as a whole.
        canvas = torch.zeros_like(ids[:, :1])
        self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, position_ids=places, decoder_input_ids=canvas
        )
        return {"past_key_values": cache, "mask": mask}

    def _denoise(self, trace: DiceTrace, tokens_BN: Tensor, condition: Any, time: float) -> Tensor:
        mask = torch.cat([condition["mask"], torch.ones_like(tokens_BN)], 1).bool()
        places = torch.arange(mask.shape[1], device=mask.device)[None, -tokens_BN.shape[1] :]
        found = self.model(
            decoder_input_ids=tokens_BN,
            past_key_values=condition["past_key_values"],
            decoder_attention_mask=mask,
            decoder_position_ids=places,
        )
        return self._usable(found.logits)

    def _with_residuals(self, trace: Any) -> Any:
        found: list[Any] = []
        for at in self._canvases(trace):
            found.append(super()._with_residuals(self._canvas(trace, at)).residuals)
        return replace(trace, residuals=torch.cat(found, 2))

    def _replayed(
        self, trace: DiceTrace, condition: Condition, same: bool, how: Replay
    ) -> tuple[Tensor, list[Tensor]]:
        tokens = trace.tokens.expand(how.rows, -1)
        steps: list[Tensor] = []
        strengths: list[Any] = [self._lambda1, self._lambda2]
        for number, at in enumerate(self._canvases(trace)):
            mine: list[Any] = [None if each is None else part_of(each, at) for each in strengths]
            self._lambda1, self._lambda2 = mine
            told = self._read(condition, tokens[:, : at.start])
            later = replace(how, callback=_from_step(how.callback, number * len(trace.states)))
            # The same prompt is the same condition only as long as the canvases before are.
            unchanged = same and torch.equal(tokens, trace.tokens)
            found, predicted = super()._replayed(self._canvas(trace, at), told, unchanged, later)
            steps += [_replaced(tokens, at, each) for each in predicted]
            tokens = _replaced(tokens, at, found)
            # What a callback has set holds for the canvases that follow.
            now = (self._lambda1, self._lambda2)
            strengths = [each if new is old else new for each, old, new in zip(strengths, mine, now, strict=True)]
        return tokens, steps


def _replaced(tokens_BN: Tensor, at: slice, part: Tensor) -> Tensor:
    return torch.cat([tokens_BN[:, : at.start], part, tokens_BN[:, at.stop :]], 1)


def _from_step(callback: Any, first: int) -> Any:
    """A callback whose steps are counted over all canvases."""
    if callback is None:
        return None
    return lambda pipeline, step, time, given: callback(pipeline, first + step, time, given)
