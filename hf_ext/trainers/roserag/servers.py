"""Servers that write responses: an OpenAI-compatible endpoint, and TRL's client of a vLLM server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_ext.pipelines.roserag.prompts import Messages, RagPrompts, for_template
from hf_ext.trainers.roserag.backends import BackendError
from hf_ext.trainers.roserag.sampling import Sampling

logger = logging.getLogger(__name__)
# Requests at once.
_CONCURRENCY = 16


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
        concurrency: int = _CONCURRENCY,
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
        def ask(messages: Messages, seed: int) -> str:
            return self._retries.call(lambda: self._ask(messages, seed, sampling, prompts), _seconds_to_wait)

        return _ask_all(conversations, seeds, ask, self._concurrency)

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
        def ask(messages: Messages, seed: int) -> str:
            try:
                reply = self._client.chat(
                    [for_template(self._tokenizer, messages)],
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    generation_kwargs={"seed": seed},
                    chat_template_kwargs=prompts.chat_template_kwargs,
                )
            except Exception as error:  # the client retries itself, and raises nothing more exact
                raise BackendError(f"{type(error).__name__}: {str(error)[:200]}") from error
            return self._tokenizer.decode(reply["completion_ids"][0], skip_special_tokens=True)

        return _ask_all(conversations, seeds, ask, _CONCURRENCY)


def _ask_all(
    conversations: Sequence[Messages],
    seeds: Sequence[Sequence[int]],
    ask: Callable[[Messages, int], str],
    concurrency: int,
) -> list[list[str] | BackendError]:
    """What `ask` gives for every conversation and each of its seeds, side by side; one that fails fails its conversation."""
    with ThreadPoolExecutor(concurrency) as executor:
        asked = [
            [executor.submit(ask, messages, seed) for seed in own]
            for messages, own in zip(conversations, seeds, strict=True)
        ]
        return [_together(futures) for futures in asked]


def _together(futures: list[Future[str]]) -> list[str] | BackendError:
    try:
        return [future.result() for future in futures]
    except BackendError as error:
        return error
