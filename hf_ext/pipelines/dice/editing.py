"""What DICE's pipelines share: a trajectory is recorded under one prompt, and replayed under another.

Source: https://huggingface.co/papers/2410.08207, Algorithm 1. Residuals are computed again in replay, from the states of the source: one more forward pass for each state, and no memory. `store_residuals=True` keeps them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from hf_ext._modes import evaluating
from hf_ext.pipelines.dice.arguments import Strength, common_rows, row_generators, strength
from hf_ext.pipelines.dice.noise import Generators, lengths_of, uniform_rows
from hf_ext.pipelines.dice.publishing import Published
from hf_ext.pipelines.dice.reference import guided, gumbel, injected, residual, scheduled
from hf_ext.pipelines.dice.trace import DiceTrace, MaskedTrace, fingerprint, one_of

INJECTIONS = ("add", "variance_preserving", "max")
LAMBDA_SCHEDULES = ("constant", "linear", "exp")

T = TypeVar("T", bound=DiceTrace)
Condition = dict[str, Tensor]
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]

# Numbers of a block of positions, whose noise and sum are made at once: 16 MiB per row each.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Replay:
    """How a trace is replayed; see `DiceEditing.edit`."""

    rows: int
    lambda_schedule: str = "constant"
    injection: str = "add"
    generator: Generators = None
    callback: Callback | None = None
    wanted: Sequence[str] = ()
    keep: bool = False


class DiceEditing(Published):
    """Base of the pipelines. Each says how prompts become conditions, how tokens become logits, and tokens an output.

    A condition is a dictionary of tensors with one row per row of tokens.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["tokens", "logits", "residual"]

    # Of `DiffusionPipeline`, which every pipeline is, too.
    progress_bar: Any
    register_modules: Any
    register_to_config: Any
    maybe_free_model_hooks: Any
    _execution_device: Any
    invert: Callable[..., Any]
    # Strengths of residual and noise; a callback may set them.
    _lambda1: float | Tensor
    _lambda2: float | Tensor | None

    def _denoise(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, time: float) -> Tensor:
        """Logits `(B, N, V)`, float32 or wider."""
        raise NotImplementedError

    def _denoiser(self) -> nn.Module:
        """The model that predicts tokens."""
        raise NotImplementedError

    def _dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(each.dtype for each in self._denoiser().parameters() if each.is_floating_point())

    def _conditions(self, trace: DiceTrace, prompts: list[str | None]) -> Condition:
        """Of new prompts: one for each row of the trace, or several for its only row."""
        raise NotImplementedError

    def _output(self, trace: DiceTrace, tokens_BN: Tensor, steps_SBN: Tensor | None, kind: str) -> Any:
        """What the user gets: tokens `(B, N)`, those of each step if they were asked for, in the form `kind`."""
        raise NotImplementedError

    def _allowed(self, summed_BNV: Tensor) -> Tensor:
        """Sums with -inf, in place, for what must not be predicted."""
        return summed_BNV

    def _prepare(self) -> None:
        """What is needed again and again while a trace is made or replayed."""

    def _about(self) -> dict[str, Any]:
        """What a trace must be replayed with."""
        return {"pipeline": type(self).__name__, "model (its weights)": fingerprint(self._denoiser())}

    # -- logits and residuals --------------------------------------------------------------------------------------------

    def _scores(self, trace: DiceTrace, tokens_BN: Tensor, condition: Condition, number: int) -> Tensor:
        """Logits of a state, guided, not divided by its temperature."""
        time = trace.states[number].time
        logits = self._denoise(trace, tokens_BN, condition, time)
        if not trace.settings.guided:
            return logits
        null = self._denoise(trace, tokens_BN, expanded(trace.negative, len(tokens_BN)), time)
        return guided(logits, null, trace.settings.guidance_scale)

    def _plain(self, trace: DiceTrace) -> Tensor:
        """Logits for the tokens without noise; neither guidance nor temperature."""
        return self._denoise(trace, trace.tokens, trace.source, 0.0)

    def _residual(self, trace: DiceTrace, number: int, scores: Tensor, plain: Tensor | None, at: slice) -> Tensor:
        """z of a state at some positions, from the scores of its tokens."""
        part = scores[:, at]
        anchor = trace.anchor(number, part if plain is None else plain[:, at], at)
        return residual(anchor, part, trace.states[number].temperature)

    def _with_anchor(self, trace: MaskedTrace, masks: bool) -> MaskedTrace:
        """The trace with the rows chosen whose anchor is one-hot.

        Args:
            masks: whether noise is a mask, so that the model may never have seen what it is to repeat.
        """
        chosen = trace.settings
        if chosen.anchor == "auto" and masks and not chosen.guided:
            repeated = (self._plain(trace).argmax(-1) == trace.tokens) | ~trace.editable
            return replace(trace, onehot=~repeated.all(-1))
        everywhere = chosen.anchor == "onehot" or (chosen.anchor == "auto" and chosen.guided)
        return replace(trace, onehot=torch.full_like(trace.onehot, everywhere))

    def _with_residuals(self, trace: T) -> T:
        """The trace with the residuals of all states, `(S, B, N, V)`."""
        plain = self._plain(trace) if trace.needs_logits() else None
        found: Any = None
        with self.progress_bar(total=len(trace.states)) as bar:
            for number in range(len(trace.states)):
                scores = self._scores(trace, trace.state(number), trace.source, number)
                z = self._residual(trace, number, scores, plain, slice(None))
                found = z.new_empty(len(trace.states), *z.shape) if found is None else found
                found[number] = z
                bar.update()
        return replace(trace, residuals=found)

    def _gumbel(self, lengths: list[int], count: int, values: int, generator: Generators, device: Any) -> Tensor:
        """Noise of `count` positions, `(B, count, values)`."""
        return gumbel(uniform_rows(lengths, count, values, generator, device))

    # -- replay ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(
        self,
        trace: DiceTrace,
        *,
        output_type: str | None = None,
        return_trajectory: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """What the recorded prompt and the whole residual lead back to: the tokens themselves, unless `anchor="model"` and the model does not repeat them.

        Args:
            output_type, return_trajectory, return_dict: as in `edit`.
        """
        self._lambda1, self._lambda2 = 1.0, 0.0
        return self._finished(trace, None, Replay(trace.rows, keep=return_trajectory), output_type, return_dict)

    @torch.no_grad()
    def edit(
        self,
        trace: DiceTrace,
        target_prompt: str | Sequence[str] | None,
        *,
        lambda1: Strength | None = None,
        lambda2: Strength | None = None,
        lambda_schedule: str = "constant",
        injection: str = "add",
        generator: Generators = None,
        output_type: str | None = None,
        return_trajectory: bool = False,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Replay a recorded trajectory with another prompt.

        A trace of one row can be edited with many prompts or many strengths at once: its residuals are computed once.

        Args:
            trace: from `invert`.
            target_prompt: one for all rows, or one for each.
            lambda1: strength of the residual; 1 stays close to the input, 0 is ordinary sampling. A number, one for each row, or a tensor `(B, N)` with one for each position. By default that of the pipeline.
            lambda2: strength of Gumbel noise; by default 1 - lambda1.
            lambda_schedule: of `lambda1` over the steps: `"constant"`, `"linear"` to 0, or `"exp"` to 1.
            injection: how residual and noise are added: `"add"`, `"variance_preserving"` (with the square roots of both strengths) or `"max"` (the larger of the two).
            generator: of the noise; a list has one for each row, whose noise then does not depend on other rows.
            output_type: what to make of the tokens, by default text or pictures; `"seq"` leaves them as they are.
            return_trajectory: also return what each step predicted.
            callback_on_step_end: called as `callback(pipeline, step, time, tensors)` after each step. It may return `{"tokens": ...}` to replace what was predicted, and may set `pipeline._lambda1` and `_lambda2`.
            callback_on_step_end_tensor_inputs: which of `tokens`, `logits` and `residual` it is given; by default the tokens.
            return_dict: False returns a tuple.

        Raises:
            ValueError: an argument is out of range, or the trace belongs to another model.
        """
        one_of("lambda_schedule", lambda_schedule, LAMBDA_SCHEDULES)
        one_of("injection", injection, INJECTIONS)
        wanted = callback_on_step_end_tensor_inputs or ["tokens"]
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            wanted = callback_on_step_end.tensor_inputs
        for name in wanted:
            one_of("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        several = not (target_prompt is None or isinstance(target_prompt, str))
        prompts = list(target_prompt) if several else [target_prompt]  # type: ignore[arg-type]
        if lambda1 is None:
            lambda1 = self.config.lambda1
        count = trace.tokens.shape[1]
        self._lambda1 = strength("lambda1", lambda1, count)
        self._lambda2 = None if lambda2 is None else strength("lambda2", lambda2, count)
        given = {"target_prompt": prompts, "lambda1": self._lambda1, "lambda2": self._lambda2}
        rows = common_rows(trace.rows, given)
        if lambda2 is None and (torch.as_tensor(self._lambda1) > 1).any():
            raise ValueError(
                f"lambda1={lambda1} is above 1, so that lambda2 = 1 - lambda1 is negative; give lambda2, too."
            )
        how = Replay(
            rows,
            lambda_schedule,
            injection,
            row_generators(generator, rows),
            callback_on_step_end,
            tuple(wanted),
            return_trajectory,
        )
        return self._finished(trace, prompts, how, output_type, return_dict)

    def _from_source(
        self,
        name: str,
        value: Any,
        source_prompt: Any,
        target_prompt: Any,
        trace: DiceTrace | None,
        generator: Generators,
        options: dict[str, Any],
    ) -> Any:
        """`invert`, then `edit`, or `edit` alone: each takes its own of the options."""
        if (value is None) == (trace is None):
            raise ValueError(f"give either {name}= or trace=, the recording of one, and not both.")
        accepted = inspect.signature(DiceEditing.edit).parameters
        inversion = {key: options.pop(key) for key in list(options) if key not in accepted}
        if trace is None:
            trace = self.invert(value, source_prompt, generator=generator, **inversion)
        elif inversion or source_prompt is not None:
            unused = ", ".join([*inversion, *(["source_prompt"] if source_prompt is not None else [])])
            raise ValueError(f"{unused}: a trace has its own. Leave it out, or give {name}= instead of trace=.")
        return self.edit(trace, target_prompt, generator=generator, **options)

    def _finished(
        self, trace: DiceTrace, prompts: list | None, how: Replay, output_type: str | None, return_dict: bool
    ) -> Any:
        kind = self._output_types[0] if output_type is None else output_type
        one_of("output_type", kind, self._output_types)
        trace.check(self._about())
        device = self._execution_device
        trace = trace.to(device, self._dtype())
        self._lambda1 = on_device(self._lambda1, device)
        self._lambda2 = None if self._lambda2 is None else on_device(self._lambda2, device)
        with evaluating(self._denoiser()):
            self._prepare()
            if prompts is None:
                condition = trace.source
            else:
                condition = self._conditions(trace, prompts * (trace.rows if len(prompts) == 1 else 1))
            tokens, predicted = self._replayed(trace, expanded(condition, how.rows), prompts is None, how)
        output = self._output(trace, tokens, torch.stack(predicted) if how.keep else None, kind)
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def _replayed(
        self, trace: DiceTrace, condition: Condition, same: bool, how: Replay
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens of the result, and those that each step predicted.

        Args:
            same: whether the condition is the recorded one.
        """
        steps = len(trace.states)
        plain = self._plain(trace) if trace.residuals is None and trace.needs_logits() else None
        tokens, predicted = trace.state(steps - 1).expand(how.rows, -1), []
        with self.progress_bar(total=steps) as bar:
            for step, number in enumerate(reversed(range(steps))):
                logits = self._scores(trace, tokens, condition, number)
                lambda1 = scheduled(self._lambda1, step, trace.settings.num_inference_steps, how.lambda_schedule)
                lambda2 = 1 - lambda1 if self._lambda2 is None else self._lambda2
                recorded = None
                if trace.residuals is None and not (is_zero(lambda1) and how.injection != "max"):
                    state = trace.state(number)
                    # The same tokens under the same condition have the same logits.
                    repeats = same and torch.equal(tokens, state)
                    recorded = logits if repeats else self._scores(trace, state, trace.source, number)
                chosen, z = self._chosen(trace, number, logits, recorded, plain, (lambda1, lambda2), how)
                tokens = torch.where(trace.changed(number), chosen, tokens)
                if how.callback is not None:
                    given = {"tokens": tokens, "logits": logits, "residual": z}
                    time = trace.states[number].time
                    answer = how.callback(self, step, time, {name: given[name] for name in how.wanted})
                    tokens = torch.where(trace.editable, (answer or {}).get("tokens", tokens), tokens)
                if how.keep:
                    predicted.append(tokens)
                if number:
                    tokens = trace.noised(tokens, number - 1)
                bar.update()
        return tokens, predicted

    def _chosen(
        self,
        trace: DiceTrace,
        number: int,
        logits: Tensor,
        recorded: Tensor | None,
        plain: Tensor | None,
        lambdas: tuple[float | Tensor, float | Tensor],
        how: Replay,
    ) -> tuple[Tensor, Tensor | None]:
        """The likeliest tokens after the injection, a block of positions at a time, and the residual if a callback wants it.

        Args:
            recorded: scores of the recorded state; None where the residual is stored, or not wanted.
        """
        count, values = logits.shape[1:]
        lengths = lengths_of(trace.editable.expand(how.rows, -1))
        width = max(1, _BLOCK // values)
        found, kept, z, noise = [], [], 0.0, 0.0  # type: tuple[list[Tensor], list[Tensor], Any, Any]
        for begin in range(0, count, width):
            at = slice(begin, min(begin + width, count))
            if recorded is not None:
                z = self._residual(trace, number, recorded, plain, at)
            elif trace.residuals is not None:
                z = trace.residuals[number][:, at]
            if "residual" in how.wanted:
                kept.append(torch.as_tensor(z, device=logits.device).expand_as(logits[:, at]))
            if not is_zero(lambdas[1]):
                used = [max(0, min(length, at.stop) - begin) for length in lengths]
                noise = self._gumbel(used, at.stop - begin, values, how.generator, logits.device)
            lambda1, lambda2 = (part_of(each, at) for each in lambdas)
            scaled = logits[:, at] / trace.states[number].temperature
            summed = injected(scaled, z, noise, lambda1, lambda2, how.injection)
            found.append(self._allowed(summed).argmax(-1))
        return torch.cat(found, 1), torch.cat(kept, 1) if kept else None


def on_device(value: float | Tensor, device: torch.device) -> float | Tensor:
    return value.to(device) if isinstance(value, Tensor) else value


def part_of(value: float | Tensor, at: slice) -> float | Tensor:
    """Strengths of some positions."""
    return value[:, at] if isinstance(value, Tensor) and value.shape[1] > 1 else value


def is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def expanded(condition: Condition, rows: int) -> Condition:
    """A condition of one row, for several."""
    return {
        name: each if len(each) == rows else each.expand(rows, *each.shape[1:]) for name, each in condition.items()
    }
