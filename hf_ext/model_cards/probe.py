"""What a model answers to 32 inputs that everybody can make: whoever loads it later can tell whether it is the same."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext._modes import evaluating

EXAMPLES, TOKENS = 32, 16
# Examples at once: 32 whole rows of logits over a large vocabulary would take gigabytes.
_AT_ONCE = 4
# Two machines, or two sizes of a batch, round differently; a model in 16 bits far more than one in 32.
_RELATIVE = {"float32": 1e-3, "float64": 1e-3}
_RELATIVE_LOW = 3e-2
_MAY_DIFFER = 2
# Logits of a classifier are recorded where they are few, and may differ by this share of how much they vary over the examples.
_FEW = 64
_SHARE, _SHARE_LOW = 0.05, 0.2


@dataclass(frozen=True)
class Probe:
    """Recorded answers.

    Attributes:
        inputs: token ids of every example, or `None` for pictures drawn from `seed`.
        seed: of the drawn inputs.
        shape: (channels, height, width) of pictures.
        dtype: of the weights that answered.
        metric: name of `value`.
        value: mean over the examples.
        predictions: the most probable token or class of every example, at its last position.
        digest: sha256 of the logits in float32, for a comparison bit by bit on one machine.
        logits: of every example at its last position, in 4 significant digits; `None` for a model that writes, or of many classes.
    """

    inputs: list[list[int]] | None
    seed: int
    shape: list[int] | None
    dtype: str
    metric: str
    value: float
    predictions: list[int]
    digest: str
    logits: list[list[float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with a line for every example."""
        lines = {
            key: None if rows is None else [" ".join(map(str, row)) for row in rows]
            for key, rows in (("inputs", self.inputs), ("logits", self.logits))
        }
        return {**asdict(self), **lines, "predictions": " ".join(map(str, self.predictions))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Probe:
        """What `to_dict` gave.

        Raises:
            ValueError: it is something else; the message names the key.
        """
        try:
            numbers: dict[str, Any] = {"predictions": [int(word) for word in data["predictions"].split()]}
            if data["inputs"] is not None:
                numbers["inputs"] = [[int(word) for word in row.split()] for row in data["inputs"]]
            if data.get("logits") is not None:
                numbers["logits"] = [[float(word) for word in row.split()] for row in data["logits"]]
            probe = cls(**{**data, **numbers})
            damaged = probe._damaged()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the recorded probe is damaged ({error!r}); fetch the files again.") from None
        if damaged:
            raise ValueError(
                f"the recorded probe is damaged: {damaged!r} is {data[damaged]!r:.80}; fetch the files again."
            )
        return probe

    def _damaged(self) -> str | None:
        """The first key whose value cannot have been recorded."""
        pictures = isinstance(self.shape, list) and len(self.shape) == 3 and all(size > 0 for size in self.shape)
        rows = self.inputs
        sound = {
            "inputs": pictures if rows is None else bool(rows) and all(row and min(row) >= 0 for row in rows),
            "seed": isinstance(self.seed, int),
            "dtype": isinstance(getattr(torch, str(self.dtype), None), torch.dtype),
            "metric": isinstance(self.metric, str),
            "value": isinstance(self.value, int | float) and math.isfinite(self.value),
            "predictions": len(self.predictions) == (EXAMPLES if rows is None else len(rows)),
            "digest": isinstance(self.digest, str),
            "logits": self.logits is None
            or (len(self.logits) == len(self.predictions) and len({len(row) for row in self.logits}) == 1),
        }
        return next((key for key, is_sound in sound.items() if not is_sound), None)

    def differences(self, other: Probe) -> list[str]:
        """In what `other`, answered again, differs by more than rounding."""
        found = []
        relative = max(_RELATIVE.get(name, _RELATIVE_LOW) for name in (self.dtype, other.dtype))
        if not math.isclose(self.value, other.value, rel_tol=relative, abs_tol=relative):
            found.append(f"{self.metric} is {other.value:.6g}, the card has {self.value:.6g}")
        changed = sum(ours != theirs for ours, theirs in zip(self.predictions, other.predictions, strict=True))
        if changed > _MAY_DIFFER:
            found.append(f"{changed} of {len(self.predictions)} predictions differ")
        if self.logits is not None:
            changed = _far(torch.tensor(self.logits), torch.tensor(other.logits or []), relative)
            if changed > _MAY_DIFFER:
                found.append(f"the logits of {changed} of {len(self.predictions)} examples differ")
        return found


def _far(recorded: Tensor, answered: Tensor, relative: float) -> int:
    """How many of the examples, (n, classes) both, have a logit that differs by more than rounding."""
    if recorded.shape != answered.shape:
        return len(recorded)
    spread = (recorded.amax(0) - recorded.amin(0)).max()
    allowed = relative * recorded.abs() + (_SHARE_LOW if relative == _RELATIVE_LOW else _SHARE) * spread
    return int((~((recorded - answered).abs() <= allowed)).any(-1).sum())


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Texts that may be published, as the inputs of a probe: at most 32 of at most 16 tokens.

    Raises:
        ValueError: there is no tokenizer, no text, or a text without two tokens.
    """
    if tokenizer is None:
        raise ValueError("probe= needs a tokenizer: publish the trainer that has one, or leave probe= out.")
    rows = [list(tokenizer(text)["input_ids"])[:TOKENS] for text in list(texts)[:EXAMPLES]]
    short = [text for text, row in zip(texts, rows, strict=False) if len(row) < 2]
    if not rows or short:
        raise ValueError(f"probe={short[:1] or list(texts)!r}: give texts of at least two tokens each.")
    return rows


def record(model: nn.Module, inputs: list[list[int]] | None = None, seed: int = 0) -> Probe | None:
    """Ask the model; `None` for a model that takes neither token ids nor pictures, or answers with no logits.

    A model that cannot be asked, because it needs other arguments or more memory, gives `None` and a warning with the reason.

    Args:
        model: a transformers model or a `PeftModel`, on any device.
        inputs: token ids; drawn from the vocabulary if absent.
        seed: of what is drawn.
    """
    try:
        return _recorded(model, inputs, seed)
    except Exception as error:  # whatever a forward pass raises: without answers a model can still be published
        warnings.warn(
            f"no answers of this {type(model).__name__} were recorded, so `verify` cannot compare them: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            stacklevel=2,
        )
        return None


def _recorded(model: Any, inputs: list[list[int]] | None, seed: int) -> Probe | None:
    config = model.config
    shape = None
    if main_input(model) == "pixel_values" and isinstance(config.to_dict().get("image_size"), int):
        shape = [config.num_channels, config.image_size, config.image_size]
    elif main_input(model) != "input_ids" or config.is_encoder_decoder:
        return None
    elif inputs is None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = config.get_text_config().vocab_size
        inputs = torch.randint(vocabulary, (EXAMPLES, TOKENS), generator=generator).tolist()
    return _asked(model, inputs, shape, seed)


def repeat(model: nn.Module, probe: Probe) -> Probe | None:
    """The same questions again.

    Raises:
        ValueError: the model does not know a token of the probe.
    """
    known = cast(Any, model).config.get_text_config().to_dict().get("vocab_size", math.inf)
    highest = max(map(max, probe.inputs or [[0]]))
    if highest >= known:
        raise ValueError(f"the recorded probe asks for token {highest}, and the model has {known}")
    return _asked(model, probe.inputs, probe.shape, probe.seed)


def main_input(model: Any) -> str:
    """The name of what the model reads."""
    return _core(model).main_input_name


def _core(model: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


@torch.no_grad()
def _asked(model: Any, inputs: list[list[int]] | None, shape: list[int] | None, seed: int) -> Probe | None:
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    writes = _core(model).can_generate()
    values: list[float] = []
    predictions: list[int] = []
    last: list[list[float]] = []
    digest = hashlib.sha256()
    with evaluating(model):
        for batch in _batches(inputs, shape, seed, weight, _at_once(model, inputs, writes)):
            logits = model(**batch).get("logits")
            if not isinstance(logits, Tensor):
                return None
            if logits.ndim not in (2, 3):
                raise ValueError(
                    f"it answers with logits of shape {tuple(logits.shape)}, not with a class or with tokens"
                )
            logits = logits.float().cpu()
            if logits.ndim == 3 and inputs is not None:
                # Prompt tuning and its kin put virtual tokens in front.
                logits = logits[:, -batch["input_ids"].shape[1] :]
            digest.update(logits.contiguous().numpy().tobytes())
            values += _losses(logits, batch["input_ids"].cpu()) if writes else logits.logsumexp(-1).flatten().tolist()
            final = logits[:, -1] if logits.ndim == 3 else logits
            predictions += final.argmax(-1).tolist()
            if not writes and final.shape[-1] <= _FEW:
                last += [[float(f"{logit:.4g}") for logit in row] for row in final.tolist()]
    value = sum(values) / len(values)
    if not math.isfinite(value):
        raise ValueError(f"its mean answer is {value}")
    return Probe(
        inputs=inputs,
        seed=seed,
        shape=shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        metric="loss of the next token" if writes else "log-sum-exp of the logits",
        value=float(f"{value:.6g}"),
        predictions=predictions,
        digest=digest.hexdigest(),
        logits=last or None,
    )


def _at_once(model: Any, inputs: list[list[int]] | None, writes: bool) -> int:
    """How many examples a batch holds. Rows go one by one where they would have to be padded, or where a classifier looks for padding."""
    if inputs is None:
        return _AT_ONCE
    pads = writes or model.config.get_text_config().to_dict().get("pad_token_id") is not None
    return _AT_ONCE if pads and len({len(row) for row in inputs}) == 1 else 1


def _batches(
    inputs: list[list[int]] | None, shape: list[int] | None, seed: int, weight: Tensor, at_once: int
) -> Iterator[dict[str, Tensor]]:
    if inputs is not None:
        for start in range(0, len(inputs), at_once):
            tokens = torch.tensor(inputs[start : start + at_once], device=weight.device)
            yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return
    pictures = torch.randn(EXAMPLES, *(shape or ()), generator=torch.Generator().manual_seed(seed))
    for batch in pictures.split(at_once):
        yield {"pixel_values": batch.to(weight.device, weight.dtype)}


def _losses(logits: Tensor, tokens: Tensor) -> list[float]:
    """Mean loss of the next token, of every example."""
    loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return loss.mean(-1).tolist()
