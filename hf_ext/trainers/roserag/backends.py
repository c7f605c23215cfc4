"""What writes and scores responses, and a model in memory that does both; servers that write are in `servers`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_ext._modes import evaluating
from hf_ext.pipelines.roserag.pipeline import room_of
from hf_ext.pipelines.roserag.prompts import Messages, RagPrompts, for_template, render
from hf_ext.pipelines.roserag.stopping import AnswerComplete
from hf_ext.trainers.output_layer import base_of, fused_head, score_answers
from hf_ext.trainers.roserag.sampling import DrawByRow, Sampling
from hf_ext.trainers.shared_prefix import can_share_prefix, score_groups


class BackendError(RuntimeError):
    """A response could not be had; the reason is its text."""


class TooLong(BackendError):
    """Prompt and response do not fit into the model."""


@runtime_checkable
class Writer(Protocol):
    """Writes responses."""

    @property
    def identity(self) -> str:
        """Names the model and its weights."""
        ...

    def write(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: RagPrompts,
    ) -> list[list[str] | BackendError]:
        """Responses to every conversation, one per seed, or why there are none."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Scores responses as the trainer will read them."""

    @property
    def identity(self) -> str: ...

    def prompt(self, messages: Messages, prompts: RagPrompts) -> Messages | str:
        """The prompt as it goes into the dataset: a conversation, or a text for models without a chat template."""
        ...

    def score(
        self, prompt: Messages | str, responses: Sequence[str], prompts: RagPrompts
    ) -> list[list[float]] | BackendError:
        """Log-probabilities of the tokens of every response."""
        ...


class TransformersBackend:
    """A causal language model in memory; writes and scores.

    A prompt is read once for all its samples, where the model's cache can be copied.

    Args:
        model: a model or PEFT model; the one that will be trained.
        tokenizer: its tokenizer.
        batch_size: responses written or scored at once, >= 1.
        revision: told in the provenance, beside a digest of the weights.

    Raises:
        ValueError: a chat template that changes the prompt when a response follows, or an adapter on the output layer.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 16, revision: str | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give at least 1.")
        self.model, self.tokenizer, self.batch_size, self._revision = model, tokenizer, batch_size, revision
        self._base: PreTrainedModel = base_of(model)
        if isinstance(self._base.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "the output layer has an adapter, which TRL's fused head reads past: remove 'lm_head' from target_modules."
            )
        self._shares = can_share_prefix(model, self._base)
        _check_template(tokenizer)

    @property
    def identity(self) -> str:
        """Of the model as it is now."""
        name = (
            f"{self._base.config.name_or_path}@{self._revision}" if self._revision else self._base.config.name_or_path
        )
        return f"{name}@{_digest(self.model, self.tokenizer)}"

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: RagPrompts,
    ) -> list[list[str] | BackendError]:
        texts = [render(self.tokenizer, messages, prompts) for messages in conversations]
        encoded = [self._encode(text) for text in texts]
        room = room_of(self.model)
        found: list[list[str] | BackendError] = [[] for _ in texts]
        rows: list[tuple[int, int]] = []
        for number, ids in enumerate(encoded):
            if room is not None and len(ids) + sampling.max_new_tokens > room:
                found[number] = TooLong(
                    f"{len(ids)} tokens of prompt and {sampling.max_new_tokens} of response, and the model reads {room}"
                )
            else:
                rows += [(number, seed) for seed in seeds[number]]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            written = self._generate(
                [encoded[number] for number, _ in batch], [s for _, s in batch], sampling, prompts
            )
            for (number, _), text in zip(batch, written, strict=True):
                kept = found[number]
                assert isinstance(kept, list)
                kept.append(text)
        return found

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"]

    @torch.no_grad()
    def _generate(self, rows: list[list[int]], seeds: list[int], sampling: Sampling, prompts: RagPrompts) -> list[str]:
        device, width = self.model.device, max(map(len, rows))
        pad = self._pad()
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        options: dict[str, Any] = {
            # All that a checkpoint's own generation settings may say otherwise: what is not given is taken from there.
            "generation_config": GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                min_new_tokens=0,
                use_cache=True,  # a trainer leaves `use_cache=False` in the configuration of its model
                num_beams=1,
                num_return_sequences=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=pad,
                eos_token_id=self.model.generation_config.eos_token_id,
            ),
            "stopping_criteria": [AnswerComplete(self.tokenizer, prompts, width)],
        }
        if sampling.temperature > 0:
            options["logits_processor"] = [DrawByRow(seeds, sampling)]
        with evaluating(self.model):
            if self._shares and width > 1:
                options["past_key_values"] = self._prefilled(ids, mask)
            written = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        return self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)

    def _prefilled(self, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
        """The cache of all but the last token; equal rows are read once."""
        unique, owner = torch.unique(torch.cat([ids, mask], 1), dim=0, return_inverse=True)
        ids, mask = unique[:, : ids.shape[1] - 1], unique[:, ids.shape[1] : -1]
        cache = DynamicCache(config=self._base.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self._base.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache.batch_select_indices(owner)
        return cache

    def _pad(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    # -- scoring -----------------------------------------------------------------------------------------------------

    def prompt(self, messages: Messages, prompts: RagPrompts) -> Messages | str:
        if self.tokenizer.chat_template is None:
            return render(self.tokenizer, messages, prompts)
        return for_template(self.tokenizer, messages)

    @torch.no_grad()
    def score(
        self, prompt: Messages | str, responses: Sequence[str], prompts: RagPrompts
    ) -> list[list[float]] | BackendError:
        pairs = [self._tokens(prompt, response, prompts) for response in responses]
        longest, room = max(len(before) + len(after) for before, after in pairs), room_of(self.model)
        if room is not None and longest > room:
            return TooLong(f"{longest} tokens of prompt and response, and the model reads {room}")
        found: list[list[float]] = []
        with evaluating(self.model), fused_head(self._base):
            for start in range(0, len(pairs), self.batch_size):
                found += self._score(pairs[start : start + self.batch_size])
        if not all(math.isfinite(value) for values in found for value in values):
            return BackendError("a log-probability is not finite: check the model, or load it in another dtype")
        return found

    def _tokens(self, prompt: Messages | str, response: str, prompts: RagPrompts) -> tuple[list[int], list[int]]:
        """(prompt, response with its end), tokenised as `DPOTrainer` does."""
        if isinstance(prompt, str):
            before = self._encode(prompt)
            whole = self._encode(prompt + response + (self.tokenizer.eos_token or ""))
        else:
            conversation: Any = [*prompt, {"role": "assistant", "content": response}]
            options = {"return_dict": True, **prompts.chat_template_kwargs}
            before = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
            whole = self.tokenizer.apply_chat_template(conversation, **options)["input_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[:shared], whole[shared:]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        device, width = self.model.device, max(len(before) + len(after) for before, after in pairs)
        ids = torch.full((len(pairs), width), self._pad(), device=device)
        mask, answer = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (before, after) in enumerate(pairs):
            ids[row, : len(before) + len(after)] = torch.tensor(before + after, device=device)
            mask[row, : len(before) + len(after)] = 1
            answer[row, len(before) : len(before) + len(after)] = True
        if self._shares:
            outputs, where = score_groups(self.model, self._base, ids, mask, answer, len(pairs))
        else:
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            outputs, where = score_answers(self.model, self._base, inputs, answer), answer[:, 1:]
        return [values[own].tolist() for values, own in zip(outputs.log_probs.float(), where, strict=True)]


@torch.no_grad()
def _digest(model: Any, tokenizer: Any) -> str:
    """Tells models apart by sums over every weight, and by what else a response depends on."""
    digest = hashlib.sha256(str(tokenizer.chat_template).encode())
    digest.update(str(model.active_adapters if isinstance(model, PeftModel) else "").encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sums = flat.sum(dtype=torch.float64), torch.linalg.vector_norm(flat.float(), dtype=torch.float64)
        digest.update(f"{name} {parameter.dtype} {[float(value) for value in sums]}".encode())
    return digest.hexdigest()[:16]


def _check_template(tokenizer: Any) -> None:
    """Raises `ValueError` if the chat template writes a prompt differently when a response follows."""
    if tokenizer.chat_template is None:
        return
    asked = [{"role": "user", "content": "question"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "answer"}], tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"the chat template writes the prompt as {prompt[-40:]!r}, and another one when a response follows, so that training would differ from use: "
            "take a template with the generation prompt that it writes before a response."
        )
