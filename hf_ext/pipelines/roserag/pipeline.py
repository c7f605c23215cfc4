"""`pipeline("rag-question-answering")`: passages in or retrieved, a rationale, an answer and its sources out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteriaList, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import cached_file

from hf_ext._modes import evaluating
from hf_ext.pipelines.roserag.prompts import CONFIG_FILE, RagPrompts, render
from hf_ext.pipelines.roserag.retrievers import Retriever
from hf_ext.pipelines.roserag.stopping import AnswerComplete

logger = logging.getLogger(__name__)
TASK = "rag-question-answering"
# Of text generation, but without a meaning here: a question has one answer.
_WITHOUT_EFFECT = ("num_return_sequences", "return_full_text", "return_tensors", "return_text", "return_type")


class RagPipeline(TextGenerationPipeline):
    """Answer questions from passages with any causal language model.

    Args:
        retriever: finds the passages of questions that come without.
        n_docs: how many, >= 1.
        prompts: a `RagPrompts`; by default the `rag_config.json` beside the model, or ours.
        args, kwargs: as for `TextGenerationPipeline`. Decoding is greedy and stops with the line of the answer, unless `do_sample` says otherwise.

    Example:
        ```python
        from transformers import pipeline
        import hf_ext

        ask = pipeline("rag-question-answering", model="you/model", retriever=retriever)
        found = ask("Who wrote the book that the film is based on?")
        found["answer"], found["citations"]
        ```
    """

    tokenizer: Any

    def __init__(
        self,
        *args: Any,
        retriever: Retriever | None = None,
        n_docs: int = 5,
        prompts: RagPrompts | None = None,
        **kwargs: Any,
    ) -> None:
        if n_docs < 1:
            raise ValueError(f"n_docs={n_docs}: ask for at least one passage.")
        super().__init__(*args, **kwargs)
        self.retriever, self.n_docs = retriever, n_docs
        # An adapter has its tokenizer beside it, and the name of its base in the configuration.
        self.prompts = prompts or read_prompts(self.tokenizer.name_or_path, str(self.model.config.name_or_path))

    def check_model_type(self, supported_models: Any) -> None:
        # PEFT's wrapper is in no list, and answers as the model in it.
        if not isinstance(self.model, PeftModel):
            super().check_model_type(supported_models)

    def __call__(  # type: ignore[override]
        self,
        question: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one question or several.

        Args:
            question: a text, or `{"question", "documents"}`, or a list of these.
            documents: passages `{"title", "text"}` of a single question; None retrieves them.
            kwargs: `batch_size`, `max_new_tokens` and other options of `generate`.

        Returns:
            `{"answer", "rationale", "documents", "citations", "generated_text"}`, or a list of these. `citations` are those of the passages that the
            rationale names by number; `answer` is empty if the response has none.

        Raises:
            ValueError: no question, passages without text, or a prompt that does not fit into the model.
        """
        single = isinstance(question, (str, Mapping))
        if not single and documents is not None:
            raise ValueError("documents: give those of several questions with each, as {'question', 'documents'}.")
        asked: list[Any] = [question] if single else list(question)
        useless = [name for name in _WITHOUT_EFFECT if name in kwargs]
        if useless:
            raise ValueError(f"{useless[0]} has no effect on this task: leave it out.")
        rows = [_read(row, documents) for row in asked]
        if not rows:
            return []
        self._retrieve(rows)
        found = Pipeline.__call__(self, rows, **kwargs)
        return found[0] if single else found

    def _retrieve(self, rows: list[dict[str, Any]]) -> None:
        without = [row for row in rows if row["documents"] is None]
        if not without:
            return
        if self.retriever is None:
            raise ValueError(
                f"question {without[0]['question']!r:.80} has no documents, and the pipeline no retriever: give one of them."
            )
        found = self.retriever.search([row["question"] for row in without], self.n_docs)
        for row, passages in zip(without, found, strict=True):
            row["documents"] = passages

    def preprocess(self, inputs: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        messages = self.prompts.inference(inputs["question"], inputs["documents"])
        # A chat template writes the tokens at the beginning itself.
        kwargs.setdefault("add_special_tokens", self.tokenizer.chat_template is None)
        encoded = super().preprocess(render(self.tokenizer, messages, self.prompts), **kwargs)
        length, room = encoded["input_ids"].shape[-1], room_of(self.model)
        if room is not None and length >= room:
            raise ValueError(
                f"question {inputs['question']!r:.80}: its prompt with {len(inputs['documents'])} passages has {length} tokens, and the model "
                f"reads {room}. Lower n_docs, or split the passages."
            )
        # Carried to `postprocess`, which has no other way to know.
        encoded["prompt_text"] = inputs
        return encoded

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        complete = AnswerComplete(self.tokenizer, self.prompts, model_inputs["input_ids"].shape[1])
        given = generate_kwargs.pop("stopping_criteria", None) or []
        if "generation_config" not in generate_kwargs:
            generate_kwargs.setdefault("do_sample", False)
            # A trainer leaves `use_cache=False` in the configuration of its model.
            generate_kwargs.setdefault("use_cache", True)
        # A model in training mode may drop out, and with gradient checkpointing its layers forget their cache.
        with evaluating(self.model):
            return super()._forward(
                model_inputs, stopping_criteria=StoppingCriteriaList([*given, complete]), **generate_kwargs
            )

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        inputs = model_outputs["prompt_text"]
        kwargs.pop("return_type", None)
        tokens = model_outputs["generated_sequence"][0][0][model_outputs["input_ids"].shape[-1] :]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        found, passages = self.prompts.read(text), inputs["documents"]
        return {
            "answer": found.answer,
            "rationale": found.rationale,
            "documents": passages,
            "citations": [passages[number - 1] for number in found.cited if 1 <= number <= len(passages)],
            "generated_text": text,
        }

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Model, tokenizer and `rag_config.json`; `kwargs` as for the model's.

        Of a registered task, transformers would write the code too, and then ask whoever loads it to trust that.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        self.prompts.save_pretrained(save_directory)


def _read(row: str | Mapping[str, Any], documents: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    found = {"question": row, "documents": documents} if isinstance(row, str) else {"documents": documents, **row}
    question, passages = found.get("question"), found["documents"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question={question!r}: give a text.")
    for number, passage in enumerate(passages or ()):
        if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
            raise ValueError(
                f"question {question!r:.80}: passage {number} is {passage!r:.80}; give {{'title', 'text'}}."
            )
    return {"question": question, "documents": None if passages is None else list(passages)}


def room_of(model: Any) -> int | None:
    """Positions that a model has, where its configuration says so."""
    config = model.config.get_text_config()
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return config.to_dict().get(name)


def read_prompts(*names: str) -> RagPrompts:
    """The texts saved beside the first of these, folders or repositories, that has them; ours if none has."""
    for name in dict.fromkeys(filter(None, names)):
        if Path(name).is_dir():
            found: Any = Path(name) / CONFIG_FILE
            if not found.is_file():
                continue
        else:
            try:
                found = cached_file(name, CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
            except OSError as error:
                logger.warning("whether %s has prompts of its own (%s) is not known: %s", name, CONFIG_FILE, error)
                continue
        if found:
            return RagPrompts.from_file(found)
    return RagPrompts()


def register() -> None:
    """Make the task known to `transformers.pipeline`; a second call changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=RagPipeline, pt_model=AutoModelForCausalLM, type="text"
        )
