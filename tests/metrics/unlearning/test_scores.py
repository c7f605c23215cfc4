"""One teacher-forced pass: equal to plain forward passes, whatever the batch, and strict about its rows."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch.nn import functional as F

from hf_ext.metrics.unlearning import PromptFormat, answer_scores
from hf_ext.metrics.unlearning import scores as scores_module
from hf_ext.metrics.unlearning.rows import read_rows, refuse_overlap
from tests.conftest import make_tiny_llama
from tests.metrics.editing.conftest import bpe_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What stands between the generation prompt and the answer, as in templates of Llama 2 and of thinking models.
BLANK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% else %}<assistant> <think> </think> {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def plain_log_probs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1), torch.tensor(answer)


def test_equals_plain_forward_passes(full, island_tok, splits):
    rows = splits["forget"][:6]
    for row, found in zip(rows, answer_scores(full, island_tok, rows, moments=True), strict=True):
        prompt = island_tok(row["prompt"])["input_ids"]
        for text, scores in ((row["answer"], found.answer), *zip(row["perturbed"], found.perturbed, strict=True)):
            ids = [*island_tok(text, add_special_tokens=False)["input_ids"], island_tok.eos_token_id]
            with torch.no_grad():
                log_probs, labels = plain_log_probs(full, prompt, ids)
            np.testing.assert_allclose(scores.log_probs, log_probs.gather(-1, labels[:, None])[:, 0], atol=1e-5)
            assert (scores.hits == (log_probs.argmax(-1) == labels).numpy()).all()
            assert scores.closing == 1 and len(scores.content.log_probs) == len(ids) - 1
            assert scores.nll == pytest.approx(F.nll_loss(log_probs, labels).item(), abs=1e-5)
        with torch.no_grad():
            ids = [*island_tok(row["answer"], add_special_tokens=False)["input_ids"], island_tok.eos_token_id]
            log_probs, _ = plain_log_probs(full, prompt, ids)
        mean = (log_probs.exp() * log_probs).sum(-1)
        variance = (log_probs.exp() * log_probs.square()).sum(-1) - mean.square()
        np.testing.assert_allclose(found.answer.mean, mean, atol=1e-4)
        np.testing.assert_allclose(found.answer.variance, variance, atol=1e-4)
        assert found.perturbed[0].mean is None


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batching_and_padding_change_nothing(retrained, island_tok, splits, batch_size, padding_side):
    expected = answer_scores(retrained, island_tok, splits["forget"], moments=True)
    tokenizer = copy.deepcopy(island_tok)
    tokenizer.padding_side = padding_side
    found = answer_scores(retrained, tokenizer, splits["forget"], batch_size=batch_size, moments=True)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip((one.answer, *one.perturbed), (other.answer, *other.perturbed), strict=True):
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
            assert (a.hits == b.hits).all()
        np.testing.assert_allclose(one.answer.variance, other.answer.variance, atol=1e-4)


def test_pieces_of_a_long_answer_are_the_whole(retrained, island_tok, splits, monkeypatch):
    text = " ".join(row["answer"] for row in splits["forget"][:8])
    rows = [{"prompt": "When was Dusias founded ?", "answer": text}]
    whole = answer_scores(retrained, island_tok, rows, moments=True)[0].answer
    monkeypatch.setattr(scores_module, "_PIECE", 7)
    pieces = answer_scores(retrained, island_tok, rows, moments=True)[0].answer
    assert len(whole.log_probs) > 40
    np.testing.assert_allclose(whole.log_probs, pieces.log_probs, atol=1e-5)
    np.testing.assert_allclose(whole.variance, pieces.variance, atol=1e-4)
    assert (whole.hits == pieces.hits).all() and pieces.closing == 1


def test_the_head_sees_few_rows_at_a_time(full, island_tok, splits):
    sizes = []
    hook = full.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:2].numel()))
    answer_scores(full, island_tok, splits["forget"] * 1, batch_size=64)
    hook.remove()
    assert max(sizes) <= 256


def test_no_end_token(full, island_tok, splits):
    rows = splits["forget"][:3]
    ended = answer_scores(full, island_tok, rows)
    plain = answer_scores(full, island_tok, rows, format=PromptFormat(append_eos=False))
    for one, other in zip(ended, plain, strict=True):
        assert other.answer.closing == 0
        np.testing.assert_allclose(one.answer.content.log_probs, other.answer.log_probs, atol=1e-6)
        assert other.answer.content is other.answer


def test_model_is_left_as_it_was(full, island_tok, splits):
    full.train()
    full.model.layers[1].eval()
    state = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    answer_scores(full, island_tok, splits["forget"][:2])
    assert all(torch.equal(tensor, state[name]) for name, tensor in full.state_dict().items())
    assert full.training and not full.model.layers[1].training
    assert all(weight.grad is None for weight in full.parameters())


def test_adapters(full, island_tok, splits):
    rows = splits["forget"][:4]
    expected = answer_scores(full, island_tok, rows)
    tuned = get_peft_model(copy.deepcopy(full), LoraConfig(r=2, target_modules=["q_proj"]))
    virtual = get_peft_model(full, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    for one, other in zip(expected, answer_scores(tuned, island_tok, rows), strict=True):
        np.testing.assert_allclose(one.answer.log_probs, other.answer.log_probs, atol=1e-5)
    assert len(answer_scores(virtual, island_tok, rows)[0].answer.log_probs) == len(expected[0].answer.log_probs)
    with virtual.disable_adapter():
        off = answer_scores(virtual, island_tok, rows)
    np.testing.assert_allclose(expected[0].answer.log_probs, off[0].answer.log_probs, atol=1e-6)


def test_bfloat16_is_scored_in_float32(full, island_tok, splits):
    scores = answer_scores(full.bfloat16(), island_tok, splits["forget"][:2])[0].answer
    assert scores.log_probs.dtype == np.float64 and np.isfinite(scores.log_probs).all()


# -- Conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_tok():
    texts = ["[INST] Where does Ada live ? [/INST] Ada lives in Lomak . Lomak . <think> </think> Lomak ."]
    tokenizer = bpe_tokenizer(texts, kind="byte_level")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def encoded(tokenizer, prompt, answer="Lomak", **options):
    encoder = scores_module.RowEncoder(tokenizer, PromptFormat(**options))
    row = read_rows([{"prompt": prompt, "answer": answer}], "rows")[0]
    return encoder.prompt(row), *encoder.pair(row, answer)


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def conversation_ids(tokenizer, turns, answer):
    """As a trainer tokenises it."""
    turns = [*turns, {"role": "assistant", "content": answer}]
    return tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]


QUESTION = [{"role": "user", "content": "Where does Ada live ?"}]


def test_conversations_go_through_the_template(chat_tok):
    turns = [{"role": "system", "content": "be brief"}, *QUESTION]
    prompt, prompt_ids, answer_ids, closing = encoded(chat_tok, turns)
    rendered = "<system> be brief <eos> <user> Where does Ada live ? <eos> <assistant>"
    assert prompt == prompt_ids == chat_tok(rendered, add_special_tokens=False)["input_ids"]
    assert closing == 2 and chat_tok.decode(answer_ids) == " Lomak <eos>"
    assert chat_tok.decode(answer_ids[:-closing]) == " Lomak"


def test_plain_prompts_can_be_wrapped(chat_tok):
    wrapped = encoded(chat_tok, "Where does Ada live ?", chat_template=True)
    assert wrapped == encoded(chat_tok, QUESTION)
    assert wrapped != encoded(chat_tok, "Where does Ada live ?")


def test_the_turn_ends_with_the_token_of_the_template(chat_tok):
    tokenizer = with_template(chat_tok, CHAT.replace(" <eos>", "<turn>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>", "<turn>"]})
    *_, answer_ids, closing = encoded(tokenizer, [{"role": "user", "content": "Where ?"}])
    assert closing == 1 and answer_ids[-1] == tokenizer.convert_tokens_to_ids("<turn>")
    endless = with_template(chat_tok, CHAT.replace("<eos>", ""))
    *_, answer_ids, closing = encoded(endless, [{"role": "user", "content": "Where ?"}])
    assert closing == 1 and answer_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "given"),
    [
        (BLANK, "[INST] Where does Ada live ? [/INST]"),
        (THINKING, "<user> Where does Ada live ? <assistant> <think> </think>"),
    ],
)
def test_answers_are_cut_out_of_the_rendered_conversation(chat_tok, template, given):
    tokenizer = with_template(chat_tok, template)
    expected = conversation_ids(tokenizer, QUESTION, "Lomak .")
    prompt, prompt_ids, answer_ids, closing = encoded(tokenizer, QUESTION, "Lomak .")
    assert prompt_ids + answer_ids == expected and expected[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt_ids) == given and prompt_ids[: len(prompt)] == prompt
    assert tokenizer.decode(answer_ids[:-closing]) == " Lomak ."
    _, short_prompt, short, none = encoded(tokenizer, QUESTION, "Lomak .", append_eos=False)
    assert (short_prompt, short, none) == (prompt_ids, answer_ids[:-closing], 0)


@pytest.mark.parametrize("template", [BLANK, THINKING])
def test_a_memorised_conversation_reads_as_memorised(chat_tok, template):
    tokenizer = with_template(chat_tok, template)
    model = make_tiny_llama(vocab_size=len(tokenizer))
    ids = torch.tensor([conversation_ids(tokenizer, QUESTION, "Lomak .")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = answer_scores(model, tokenizer, [{"prompt": QUESTION, "answer": "Lomak ."}])[0].answer
    assert math.exp(-scores.nll) > 0.9 and scores.hits.all()


def test_a_template_must_not_change_the_answer(chat_tok):
    tokenizer = with_template(chat_tok, CHAT.replace("m['content']", "m['content'] | upper"))
    row = {"prompt": QUESTION, "answer": "Lomak"}
    with pytest.raises(ValueError, match="row '0': the chat template changes the answer 'Lomak'"):
        answer_scores(make_tiny_llama(vocab_size=len(tokenizer)), tokenizer, [row])


# -- Bad rows ---------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Where ?", "answer": "here", "perturbed": ["there", "nowhere"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", r"split 'forget', row 1: this is a str; give a dict"),
        (
            {"question": "Where ?", "answer": "here"},
            r"row 1: no 'prompt' among the columns \['answer', 'question'\]; rename",
        ),
        ({"prompt": "Where ?"}, r"row 1: no 'answer' among the columns"),
        (
            {"prompt": "Where ?", "answer": " "},
            r"split 'forget', row 1: answer=' ' is empty; write it, or drop the row",
        ),
        ({"prompt": "Where ?", "answer": 3}, r"answer=3: give a string"),
        ({"prompt": 3, "answer": "here"}, r"prompt=3: give a string or a list of messages"),
        ({"prompt": [], "answer": "here"}, r"prompt=\[\]: give a string or a list of messages"),
        ({"prompt": [{"role": "user"}], "answer": "here"}, r"lacks one of the strings 'role' and 'content'"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "answer": "here"},
            r"ends with the role 'assistant'; end it with the user",
        ),
        ({**GOOD, "perturbed": "there"}, r"perturbed='there': give a list of strings"),
        ({**GOOD, "perturbed": ["there", ""]}, r"perturbed\[1\]='' is empty"),
        ({**GOOD, "perturbed": ["there"]}, r"row 1 \(id '1'\): 1 perturbed answers, but row 0 has 2; give every row"),
        ({**GOOD, "perturbed": ["there", "here"]}, r"the perturbed answer 'here' is the right answer; replace it"),
        ({**GOOD, "paraphrase": "there"}, r"the perturbed answer 'there' is the right answer"),
        ({**GOOD, "id": "0"}, r"row 1 \(id '0'\): the id already belongs to row 0; give every row its own, or none"),
    ],
)
def test_broken_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_rows([GOOD, row], "forget")


def test_no_rows():
    with pytest.raises(ValueError, match="split 'retain' has no rows; leave it out"):
        read_rows([], "retain")


def test_overlap_ignores_case_and_punctuation():
    forget = read_rows([{**GOOD, "id": "a"}], "forget")
    other = read_rows(
        [{"id": "x", "prompt": "elsewhere?", "answer": "no"}, {"id": "y", "prompt": "WHERE", "answer": "Here!"}], "h"
    )
    with pytest.raises(ValueError, match="split 'holdout', row 'y' is also row 'a' of split 'forget'; take it out"):
        refuse_overlap(other, "holdout", forget, "forget")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("C++", "C#"),
        ("it is -5 °C", "it is 5 °C"),
        ("A*", "A"),
        ("5 %", "5"),
        ("5 €", "5 $"),
        ("!!!", "?!"),
        ("की", "का"),
    ],
)
def test_symbols_tell_rows_apart(first, second):
    rows = [
        read_rows([{"prompt": "Which ?", "answer": answer}], name) for answer, name in ((first, "a"), (second, "b"))
    ]
    refuse_overlap(rows[0], "a", rows[1], "b")
    same = read_rows([{"prompt": "which:", "answer": f"({first.upper()}) "}], "c")
    with pytest.raises(ValueError, match="is also row"):
        refuse_overlap(rows[0], "a", same if first != "!!!" else rows[0], "c")


def test_broken_models_are_named(full, island_tok, splits):
    rows = splits["forget"][:2]
    with torch.no_grad():
        full.lm_head.weight.data = full.lm_head.weight.data.clone()
        full.lm_head.weight[5] = math.nan
    with pytest.raises(
        ValueError, match=r"split 'rows', row 'Dusias-flag': a log-probability .* is nan; load the model in float32"
    ):
        answer_scores(full, island_tok, rows)


def test_masked_answers_are_named(full, island_tok, splits):
    orange = island_tok.convert_tokens_to_ids("orange")

    def mask(module, args, output):
        output[..., orange] = -torch.inf

    full.lm_head.register_forward_hook(mask)
    with pytest.raises(ValueError, match=r"row 'Dusias-flag'.* is -inf; a logit is masked with −∞"):
        answer_scores(full, island_tok, splits["forget"][:2])


def test_rows_that_do_not_fit(full, island_tok):
    row = {"id": "long", "prompt": "Dusias " * 130, "answer": "orange"}
    with pytest.raises(ValueError, match="ends in white space and the separator adds more"):
        answer_scores(full, island_tok, [row])
    with pytest.raises(
        ValueError, match=r"row 'long': 131 prompt and 2 answer tokens do not fit into the context of 128"
    ):
        answer_scores(full, island_tok, [{**row, "prompt": row["prompt"].strip()}])


def test_a_prompt_needs_a_token(full):
    tokenizer = bpe_tokenizer(["orange"], kind="byte_level")
    with pytest.raises(ValueError, match="the prompt has no token"):
        answer_scores(full, tokenizer, [{"prompt": "", "answer": "orange"}], format=PromptFormat(separator=""))
