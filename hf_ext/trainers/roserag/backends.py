"""What writes and scores responses: a model in memory, an OpenAI-compatible endpoint, or TRL's client of a vLLM server."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
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

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Retries:
    """When a request is tried again.

    Attributes:
        attempts: in all, >= 1.
        first_wait: seconds before the second attempt, doubled for each further one.
        longest_wait: seconds, whatever the server asks for.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts={self.attempts}: give at least 1.")

    def call(self, request: Callable[[], Any], told: Callable[[Exception], float | None]) -> Any:
        """What `request` returns; `told` gives the seconds that an error asks to wait, 0 if it does not say, and None if it is for good.

        Raises:
            BackendError: the last attempt failed, or an error that is for good.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return request()
            except Exception as error:
                asked = told(error)
                if asked is None or attempt == self.attempts:
                    raise BackendError(f"{type(error).__name__}: {str(error)[:200]} (attempt {attempt})") from error
                wait = min(max(asked, self.first_wait * 2 ** (attempt - 1)), self.longest_wait)
                logger.info("attempt %d failed (%s); trying again in %.1f s", attempt, error, wait)
                time.sleep(wait)
        raise AssertionError


class Garbage(ValueError):
    """A server answered with something that is no response."""


def _seconds_to_wait(error: Exception) -> float | None:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 429 or status >= 500 or status == 408:
            asked = error.response.headers.get("Retry-After", "")
            return float(asked) if asked.replace(".", "", 1).isdigit() else 0.0
        return None
    if isinstance(error, OfflineModeIsEnabled):
        return None
    # Refused connections, time-outs and answers that are no JSON come from different libraries.
    return 0.0


class EndpointBackend:
    """An OpenAI-compatible server (vLLM, TGI, llama.cpp, a provider); writes.

    Its log-probabilities of a given text are not to be had there, so that a `TransformersBackend` of the model that will be trained scores.

    Args:
        base_url: of the server, e.g. "http://127.0.0.1:8000/v1".
        model: its name there.
        api_key: sent as a bearer token.
        concurrency: requests at once, >= 1.
        timeout: seconds for one request.
        retries: when a request is tried again.
        tokenizer: of the served model, if its chat template has no system role: the text then goes in front of the question, as in training.
        revision: told in the provenance; change it when the server's weights change, so that earlier responses are not taken for theirs.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: Retries | None = None,
        tokenizer: Any = None,
        revision: str | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: give at least 1.")
        # Without a key, the client would send the user's Hugging Face token, which is none of the server's business.
        self._client = InferenceClient(base_url=base_url, api_key=api_key or "none", timeout=timeout)
        self._model, self._concurrency, self._retries = model, concurrency, retries or Retries()
        self._tokenizer, self._identity = tokenizer, f"{model}@{revision or base_url}"

    @property
    def identity(self) -> str:
        return self._identity

    def write(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: RagPrompts,
    ) -> list[list[str] | BackendError]:
        requests = [
            (number, messages, seed)
            for number, (messages, own) in enumerate(zip(conversations, seeds, strict=True))
            for seed in own
        ]

        def ask(request: tuple[int, Messages, int]) -> str | BackendError:
            try:
                return self._retries.call(
                    lambda: self._ask(request[1], request[2], sampling, prompts), _seconds_to_wait
                )
            except BackendError as error:
                return error

        with ThreadPoolExecutor(self._concurrency) as executor:
            answers = list(executor.map(ask, requests))
        return _grouped(len(conversations), [number for number, _, _ in requests], answers)

    def _ask(self, messages: Messages, seed: int, sampling: Sampling, prompts: RagPrompts) -> str:
        reply = self._client.chat_completion(
            messages if self._tokenizer is None else for_template(self._tokenizer, messages),
            model=self._model,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            extra_body={"chat_template_kwargs": prompts.chat_template_kwargs}
            if prompts.chat_template_kwargs
            else None,
        )
        try:
            text = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise Garbage(f"the reply has no message: {str(reply)[:100]!r}") from error
        # Nothing was said, as by a model that was cut off while it thought: a response without an answer.
        return text or ""


class VLLMBackend:
    """A vLLM server through TRL's `VLLMClient`; writes.

    Args:
        client: a `trl.generation.vllm_client.VLLMClient`.
        tokenizer: of the model that the server runs.
    """

    def __init__(self, client: Any, tokenizer: Any) -> None:
        self._client, self._tokenizer = client, tokenizer

    @property
    def identity(self) -> str:
        return str(self._client.model)

    def write(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        prompts: RagPrompts,
    ) -> list[list[str] | BackendError]:
        requests = [(n, m, s) for n, (m, own) in enumerate(zip(conversations, seeds, strict=True)) for s in own]

        def ask(request: tuple[int, Messages, int]) -> str | BackendError:
            try:
                reply = self._client.chat(
                    [for_template(self._tokenizer, request[1])],
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    generation_kwargs={"seed": request[2]},
                    chat_template_kwargs=prompts.chat_template_kwargs,
                )
            except Exception as error:  # the client retries itself, and raises nothing more exact
                return BackendError(f"{type(error).__name__}: {str(error)[:200]}")
            return self._tokenizer.decode(reply["completion_ids"][0], skip_special_tokens=True)

        with ThreadPoolExecutor(16) as executor:
            answers = list(executor.map(ask, requests))
        return _grouped(len(conversations), [number for number, _, _ in requests], answers)


def _grouped(count: int, numbers: list[int], answers: list[str | BackendError]) -> list[list[str] | BackendError]:
    """Answers by conversation; one that failed fails its conversation."""
    found: list[list[str] | BackendError] = [[] for _ in range(count)]
    for number, answer in zip(numbers, answers, strict=True):
        kept = found[number]
        if isinstance(answer, BackendError):
            found[number] = answer
        elif isinstance(kept, list):
            kept.append(answer)
    return found
