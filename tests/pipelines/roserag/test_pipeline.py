"""`pipeline("rag-question-answering")`: what goes in, what comes out, and what travels with a model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, pipeline

import hf_ext  # noqa: F401 - registers the task
from hf_ext.metrics.rag import Condition, evaluate_rag
from hf_ext.pipelines.roserag import RagPipeline, RagPrompts
from hf_ext.pipelines.roserag.pipeline import register
from tests.trainers.roserag.helpers import CHAT, question_rows, tiny_policy

TASK = "rag-question-answering"
DOCUMENTS = [{"title": "France", "text": "Paris is large."}, {"title": "Italy", "text": "Rome is old."}]


class Say(LogitsProcessor):
    """Makes any model say a text, and then others."""

    def __init__(self, tokenizer, text):
        self.tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        self.start = None

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        token = self.tokens[min(input_ids.shape[1] - self.start, len(self.tokens) - 1)]
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)


def reader(template=CHAT, **options):
    model, tokenizer = tiny_policy(template=template)
    return pipeline(TASK, model=model, tokenizer=tokenizer, max_new_tokens=32, **options)


def saying(pipe, text):
    return {"logits_processor": LogitsProcessorList([Say(pipe.tokenizer, text)])}


@pytest.mark.parametrize("template", [CHAT, None])
def test_answers_come_with_their_sources(template):
    pipe = reader(template)
    assert isinstance(pipe, RagPipeline)
    text = "Reason because [2] [2] [1]\nAnswer: Rome\nReason"
    found = pipe("What is old?", DOCUMENTS, **saying(pipe, text))
    assert found["answer"] == "Rome"
    assert found["citations"] == [DOCUMENTS[1], DOCUMENTS[0]] and found["documents"] == DOCUMENTS
    # It ends with the line of the answer.
    assert found["generated_text"].endswith("Rome") and "Reason because" in found["rationale"]


def test_a_passage_that_is_not_there_is_not_cited():
    pipe = reader()
    found = pipe("What is old?", DOCUMENTS[:1], **saying(pipe, "Reason [2]\nAnswer: Rome\n"))
    assert found["citations"] == [] and found["answer"] == "Rome"


def test_many_at_once_are_as_one_by_one():
    pipe = reader()
    rows = [{"question": f"w{n} " * (n + 1), "documents": DOCUMENTS[: n % 3]} for n in range(5)]
    alone = [pipe(row) for row in rows]
    assert pipe(rows, batch_size=3) == alone
    assert [found["documents"] for found in alone] == [row["documents"] for row in rows]
    assert pipe([]) == []


def test_sampling_is_asked_for():
    pipe = reader()
    assert pipe("w1", DOCUMENTS) == pipe("w1", DOCUMENTS)
    torch.manual_seed(0)
    drawn = {pipe("w1", DOCUMENTS, do_sample=True, temperature=5.0)["generated_text"] for _ in range(4)}
    assert len(drawn) > 1


def test_a_model_that_was_trained_writes_with_its_cache():
    pipe, widths = reader(), []
    pipe.model.config.use_cache = False
    pipe.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    pipe("What is old?", DOCUMENTS, **saying(pipe, "Reason because\nAnswer: Rome\n"))
    assert len(widths) > 2 and set(widths[1:]) == {1}


def test_a_model_that_a_trainer_holds_answers_as_ever(caplog):
    """In training mode, with an adapter and with gradient checkpointing, in which layers forget their cache."""
    model, tokenizer = tiny_policy()
    model = get_peft_model(model, LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    pipe = pipeline(TASK, model=model.eval(), tokenizer=tokenizer, max_new_tokens=12)
    expected = pipe("What is old?", DOCUMENTS)
    model.gradient_checkpointing_enable()
    model.train()
    model.base_model.model.lm_head.eval()
    with caplog.at_level("WARNING"):
        pipe = pipeline(TASK, model=model, tokenizer=tokenizer, max_new_tokens=12)
        assert pipe("What is old?", DOCUMENTS) == expected
    assert not caplog.records
    assert model.training and not model.base_model.model.lm_head.training


class Shelf:
    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        return [DOCUMENTS[:k] for _ in queries]


def test_passages_are_retrieved_at_once():
    shelf = Shelf()
    pipe = reader(retriever=shelf, n_docs=1)
    found = pipe(["w1", {"question": "w2", "documents": DOCUMENTS}, "w3"])
    assert shelf.asked == [(["w1", "w3"], 1)]
    assert [len(row["documents"]) for row in found] == [1, 2, 1]


def test_it_is_a_reader_for_the_evaluation():
    pipe = reader()
    report = evaluate_rag(pipe, question_rows(), [Condition(), Condition(distractors=1), Condition(gold=False)])
    assert len(report.records) == 12


def test_prompts_travel_with_the_model(tmp_path):
    prompts = RagPrompts(system="Du antwortest aus den Texten.", marker="Antwort:")
    reader(prompts=prompts).save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path))
    assert loaded.prompts == prompts
    script = (
        "import sys, transformers, hf_ext\n"
        f"pipe = transformers.pipeline({TASK!r}, model=sys.argv[1], max_new_tokens=4)\n"
        "assert pipe.prompts.marker == 'Antwort:', pipe.prompts\n"
        "print(pipe('w1', [{'text': 'w2'}])['documents'])\n"
    )
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "w2" in out.stdout and "already registered" not in out.stderr
    assert reader().prompts == RagPrompts()


def test_prompts_beside_an_adapter_are_found(tmp_path):
    model, tokenizer = tiny_policy()
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    RagPrompts(marker="Antwort:").save_pretrained(tmp_path / "adapter")
    # Of an adapter's folder, `pipeline` hands on the base model; the tokenizer is what is left of it.
    folder = str(tmp_path / "adapter")
    assert pipeline(TASK, model=folder, tokenizer=folder).prompts.marker == "Antwort:"


def test_registering_twice_is_silent(caplog):
    register()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda pipe: pipe("w1"), "has no documents, and the pipeline no retriever"),
        (lambda pipe: pipe(" ", DOCUMENTS), "question=' '"),
        (lambda pipe: pipe({"documents": DOCUMENTS}), "question=None"),
        (lambda pipe: pipe("w1", [{"title": "x"}]), "passage 0 is"),
        (lambda pipe: pipe("w1", ["text"]), "passage 0 is 'text'"),
        (lambda pipe: pipe("w1", DOCUMENTS, num_return_sequences=2), "num_return_sequences has no effect"),
        (lambda pipe: pipe(["w1"], DOCUMENTS), "give those of several questions with each"),
        (lambda pipe: pipe("w1", [{"text": "w2 " * 1100}]), "and the model reads 1024. Lower n_docs"),
    ],
)
def test_bad_input(call, named):
    with pytest.raises(ValueError, match=named):
        call(reader())


def test_bad_settings():
    with pytest.raises(ValueError, match="n_docs=0"):
        reader(n_docs=0)
