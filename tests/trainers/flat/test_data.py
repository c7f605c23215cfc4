"""Refusals, prepared rows, the draw of variants and retain rows, and every input that is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from hf_ext._compat import dataset_fingerprint
from hf_ext.trainers.flat import UnlearnTrainer
from hf_ext.trainers.flat.data import DEFAULT_TEMPLATES, UnlearnCollator, load_templates, sequences, stack_sequences
from tests.conftest import make_tiny_llama
from tests.trainers.flat.helpers import REFUSALS, make_args, make_forget, make_preference, make_retain, make_trainer
from tests.trainers.helpers import make_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def rows_of(folder, data=None, overrides=None, **kwargs) -> list[dict]:
    return list(make_trainer(folder, data=data, overrides=overrides, **kwargs).train_dataset)


def words(ids: list[int]) -> str:
    return make_tokenizer().decode(ids)


def test_rows_are_tokenised_anew_when_anything_that_decides_on_them_changes(tmp_path):
    """Rows on disk, where datasets keeps what it made of them."""
    make_forget().save_to_disk(tmp_path / "rows")

    def tokens(change=None, data=None, refusals=REFUSALS) -> list:
        tokenizer = make_tokenizer()
        if change is not None:
            change(tokenizer)
        rows = load_from_disk(tmp_path / "rows") if data is None else data
        args = make_args(tmp_path, template_answers=refusals)
        trainer = UnlearnTrainer(make_tiny_llama(), args, train_dataset=rows, processing_class=tokenizer)
        return [dataset_fingerprint(trainer.train_dataset), *sequences(trainer.train_dataset[0])]

    def merged(tokenizer):
        tokenizer.add_tokens(["w0 w1"])

    def templated(tokenizer):
        tokenizer.chat_template = "{{ messages }}"

    first = tokens()
    assert tokens() == first
    assert tokens(merged)[1:] != first[1:]
    changes = tokens(templated), tokens(data=make_forget(7)), tokens(refusals=REFUSALS[:2])
    assert len({first[0], *(found[0] for found in changes)}) == 4


def test_own_sentences_are_distinct():
    assert len(set(DEFAULT_TEMPLATES)) == 20 and load_templates(None) == list(DEFAULT_TEMPLATES)
    assert all(sentence.strip() == sentence and sentence.endswith(".") for sentence in DEFAULT_TEMPLATES)


def test_templates_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("I don't know.\n\n  No idea. \n")
    (tmp_path / "a.jsonl").write_text('{"answer": "I don\'t know."}\n{"answer": "No idea.", "id": 3}\n')
    for name in ("a.txt", "a.jsonl"):
        assert load_templates(str(tmp_path / name)) == ["I don't know.", "No idea."]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "\n", "is empty: give at least one refusal"),
        ("a.csv", "x", r"is not a \.txt or \.jsonl file"),
        ("a.jsonl", "I don't know", r"a\.jsonl, line 1: expected an object with the key `answer`"),
        ("a.jsonl", '{"answer": "x"}\n{"text": "y"}', r"a\.jsonl, line 2"),
        ("a.jsonl", '{"answer": 3}', "entry 0 is 3, which is no sentence"),
    ],
)
def test_bad_template_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_templates(str(tmp_path / name))


def test_bad_template_lists(tmp_path):
    with pytest.raises(ValueError, match="entry 1 is '  ', which is no sentence"):
        load_templates(["x", "  "])
    with pytest.raises(FileNotFoundError):
        load_templates(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="templates_per_example=4 exceeds the 3 refusals of template_answers"):
        rows_of(tmp_path, overrides={"templates_per_example": 4})


def test_preference_rows_are_tokenised_as_by_dpo(tmp_path):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    peer = DPOTrainer(
        make_tiny_llama(),
        ref_model=make_tiny_llama(),
        args=args,
        train_dataset=make_preference(),
        processing_class=make_tokenizer(),
    )
    rows = rows_of(tmp_path, make_preference(), {"template_answers": None})
    for ours, theirs in zip(rows, peer.train_dataset, strict=True):
        assert ours["prompt_ids"] == theirs["prompt_ids"]
        assert ours["template_ids"] == [theirs["chosen_ids"]] and ours["forget_ids"] == theirs["rejected_ids"]


def test_completions_get_refusals_with_their_leading_space(tmp_path):
    data = Dataset.from_list([{"prompt": "w1 w2", "completion": " w3"}])
    (row,) = rows_of(tmp_path, data, {"templates_per_example": 3})
    assert words(row["prompt_ids"]) == "w1 w2" and words(row["forget_ids"]) == "w3 </s>"
    assert sorted(words(ids) for ids in row["template_ids"]) == [f"{text} </s>" for text in REFUSALS]


def test_methods_without_refusals_read_only_the_answer(tmp_path):
    overrides = {"loss_type": "wga"}
    for data in (make_forget(), make_preference(), make_preference().remove_columns("chosen")):
        rows = rows_of(tmp_path, data, overrides)
        assert all(row["template_ids"] == [] for row in rows)
        assert [words(row["forget_ids"]) for row in rows] == [f"{row['completion']} </s>" for row in make_forget()]


def test_conversations(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [
        {
            "prompt": [{"role": "user", "content": "w1 w2"}],
            "completion": [{"role": "assistant", "content": f"w{3 + i} w{4 + i}"}],
        }
        for i in range(2)
    ]
    trainer = UnlearnTrainer(
        make_tiny_llama(), make_args(tmp_path), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    row = trainer.train_dataset[1]
    assert words(row["prompt_ids"]) == "<unk> w1 w2 </s> <unk>"
    assert words(row["forget_ids"]) == "w4 w5 </s>" and words(row["template_ids"][0])[:-5] in REFUSALS
    trainer.train()
    refused = [{**rows[0], "completion": [{"role": "assistant", "content": ""}]}]
    with pytest.raises(ValueError, match="train_dataset, row 0: the column completion holds"):
        UnlearnTrainer(
            make_tiny_llama(),
            make_args(tmp_path),
            train_dataset=Dataset.from_list(refused),
            processing_class=tokenizer,
        )


def test_implicit_prompt(tmp_path):
    data = make_preference().map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )
    kept = {"template_answers": None}
    for ours, whole in zip(rows_of(tmp_path, data, kept), rows_of(tmp_path, make_preference(), kept), strict=True):
        assert ours["prompt_ids"] + ours["forget_ids"] == whole["prompt_ids"] + whole["forget_ids"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "w1"}], r"train_dataset has the columns \['text'\]: it needs `prompt` and `completion`"),
        ([{"question": "w1", "answer": "w2"}], "Rename yours with dataset.rename_columns"),
        ([{"prompt": "w1", "chosen": "w2"}], "it needs `prompt` and `completion`"),
        ([{"rejected": "w2"}], "`prompt` is missing, the question to each answer"),
        ([{"prompt": "w1", "rejected": "w2"}], "`chosen` is missing, the refusal to each prompt"),
        (
            [{"prompt": "w1 ", "completion": "w2"}, {"prompt": "w1 ", "completion": " "}],
            "row 1: the column completion",
        ),
        ([{"prompt": "w1 ", "completion": None}], "row 0: the column completion holds None"),
        ([{"prompt": "w1 ", "chosen": "", "rejected": "w2"}], "row 0: the column chosen"),
        (
            [{"prompt": "w1 ", "chosen": "w2 ", "rejected": "w2"}],
            r"row 0: .*chosen is the answer to forget .*\('w2'\)",
        ),
        ([{"prompt": "w1 ", "completion": "w83 w84"}], "refusal in template_answers is the answer to forget"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    templates = None if "chosen" in rows[0] and "rejected" in rows[0] else ["w83 w84"]
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, Dataset.from_list(rows), {"template_answers": templates})


MESSAGES = [{"role": "assistant", "content": "w2"}]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": None, "completion": "w2"},
            "row 0: the column prompt holds None, which is no prompt: give text or",
        ),
        ({"prompt": [], "completion": MESSAGES}, r"row 0: the column prompt holds \[\]"),
        ({"prompt": 3, "completion": "w2"}, "row 0: the column prompt holds 3"),
        (
            {"prompt": "w1 ", "completion": MESSAGES},
            "row 0: of prompt and completion one is text and the other messages",
        ),
        ({"prompt": "w1 ", "rejected": "w5", "chosen": MESSAGES}, "row 0: of prompt and chosen one is text"),
        ({"chosen": None, "rejected": "w1 w2"}, "row 0: the column chosen holds None"),
        # Different strings of the same tokens.
        ({"prompt": "w1 ", "chosen": "w2 </s>", "rejected": "w2"}, r"row 0: .*chosen is the answer to forget"),
        (
            {"prompt": "w1 ", "chosen": "w80", "rejected": "</s>"},
            "row 0: an answer has no tokens of its own; check reject",
        ),
        ({"prompt": "w1 ", "chosen": "</s> </s>", "rejected": "w2"}, "row 0: an answer has no tokens of its own"),
    ],
)
def test_bad_prompts_and_tokens_are_named(tmp_path, row, message):
    templates = None if "chosen" in row else ["w83 w84"]
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, Dataset.from_list([row]), {"template_answers": templates})


def merging_tokenizer(**merges) -> PreTrainedTokenizerFast:
    """One token per character, and one for each given pair."""
    characters = "QAabcd: "
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *characters, *merges.values()])}
    pairs = [(value[0], value[1]) for value in merges.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab, pairs)), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def merged_rows(folder, tokenizer, rows, **overrides) -> list[dict]:
    args = make_args(folder, **overrides)
    data = Dataset.from_list(rows)
    trainer = UnlearnTrainer(make_tiny_llama(), args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return list(trainer.train_dataset)


def halves(tokenizer, *pairs) -> set[str]:
    """prompt|answer of each pair."""
    return {"|".join(tokenizer.decode(ids).replace(" ", "") for ids in pair) for pair in pairs}


def test_tokens_that_merge_with_the_prompt_are_told(tmp_path):
    tokenizer = merging_tokenizer(colon=":a")
    rows = [{"prompt": "Q:", "completion": "ab"}, {"prompt": "Q:", "completion": "bb"}]
    with pytest.warns(
        UserWarning, match=r"in 1 of 2 rows the end of the prompt .*, e\.g\. ':' in row 0: .*put the space"
    ):
        first, second = merged_rows(tmp_path, tokenizer, rows, loss_type="wga")
    assert halves(tokenizer, *sequences(first)) == {"Q|:ab</s>"}
    assert halves(tokenizer, *sequences(second)) == {"Q:|bb</s>"}


def test_a_refusal_that_merges_shortens_no_other_prompt(tmp_path):
    tokenizer = merging_tokenizer(colon=":a")
    options = {"template_answers": ["ab", "cd"], "templates_per_example": 2, "loss_type": "idk_dpo"}
    with pytest.warns(UserWarning, match="in 1 of 1 rows the end of the prompt"):
        (row,) = merged_rows(tmp_path, tokenizer, [{"prompt": "Q:", "completion": "bb"}], **options)
    assert halves(tokenizer, *sequences(row)) == {"Q:|bb</s>", "Q|:ab</s>", "Q:|cd</s>"}


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_prompt_that_merges_entirely_is_refused(tmp_path, start):
    tokenizer = merging_tokenizer(colon=":a")
    rows = [{"prompt": start + ":", "completion": "ab"}]
    with pytest.raises(
        ValueError, match=r"train_dataset, row 0: nothing is left of the prompt, .*e\.g\. put the space"
    ):
        merged_rows(tmp_path, tokenizer, rows, loss_type="wga")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged_rows(tmp_path, tokenizer, [{"prompt": start + ":", "completion": " ab"}], loss_type="wga")
    assert not [warning for warning in caught if "the end of the prompt" in str(warning.message)]


def test_the_end_of_long_rows_can_be_kept(tmp_path):
    data = Dataset.from_list([{"prompt": "w1 w2 w3 w4 w5 ", "completion": "w6 w7"}])
    overrides = {"loss_type": "npo", "max_length": 5, "truncation_mode": "keep_end", "max_steps": 1}
    with pytest.warns(UserWarning, match="0 of 1 rows were dropped .* and 1 were truncated"):
        trainer = make_trainer(tmp_path, data=data, overrides=overrides)
    batch = next(iter(trainer.get_train_dataloader()))
    assert words(batch["input_ids"][0]) == "w4 w5 w6 w7 </s>"
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1]]
    trainer.train()


def test_bad_datasets(tmp_path):
    with pytest.raises(TypeError, match="train_dataset is a IterableDataset: rows are drawn by their number"):
        rows_of(tmp_path, make_forget().to_iterable_dataset())
    with pytest.raises(ValueError, match="have no effect on preference data"):
        rows_of(tmp_path, make_preference())
    with pytest.raises(ValueError, match=r"retain_dataset has the columns \['text'\]"):
        rows_of(tmp_path, retain_dataset=Dataset.from_list([{"text": "w1"}]))
    with pytest.raises(ValueError, match="retain_dataset has images, which are not supported there"):
        rows_of(tmp_path, retain_dataset=Dataset.from_list([{"prompt": "w1", "completion": "w2", "images": ["x"]}]))
    with pytest.raises(ValueError, match=r"eval_dataset\['other'\], row 0: the column completion"):
        rows_of(tmp_path, eval_dataset={"other": Dataset.from_list([{"prompt": "w1 ", "completion": ""}])})
    with pytest.raises(ValueError, match="no eos_token"):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        UnlearnTrainer(make_tiny_llama(), make_args(tmp_path), train_dataset=make_forget(), processing_class=tokenizer)


def test_rows_without_room_are_counted(tmp_path):
    data = Dataset.from_list(
        [
            {"prompt": "w1 ", "completion": "w2"},
            {"prompt": "w1 w2 w3 w4 ", "completion": "w5"},
            {"prompt": "w1 w2 w3 ", "completion": "w2"},
        ]
    )
    overrides = {"loss_type": "wga", "max_length": 4}
    with pytest.warns(UserWarning, match="train_dataset: 1 of 3 rows were dropped .*max_length=4 tokens, and 1 were"):
        assert [row["row"] for row in rows_of(tmp_path, data, overrides)] == [0, 2]
    with pytest.raises(ValueError, match=r"every prompt fills max_length=1 .*the longest row has 6 tokens"):
        rows_of(tmp_path, data, overrides | {"max_length": 1})


def test_stacking():
    pairs = [([5, 6], [7]), ([5], [8, 9, 10])]
    batch = stack_sequences(pairs, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert stack_sequences(pairs, 0, pad_to_multiple_of=8)["input_ids"].shape == (2, 8)
    assert stack_sequences(pairs, 0, max_length=3)["input_ids"].tolist() == [[5, 6, 7], [5, 8, 9]]
    assert stack_sequences(pairs, 0, 2, "keep_end")["input_ids"].tolist() == [[6, 7], [9, 10]]


def collator_with(trainer) -> tuple[UnlearnCollator, list[dict]]:
    return trainer.data_collator, list(trainer.train_dataset)


def test_groups_are_what_the_loss_reads(tmp_path):
    for loss_type, retain, count in (
        ("flat", None, 2),
        ("flat", make_retain(), 3),
        ("wga", None, 1),
        ("npo", make_retain(), 2),
    ):
        collate, rows = collator_with(
            make_trainer(tmp_path, overrides={"loss_type": loss_type}, retain_dataset=retain)
        )
        assert collate(rows[:3])["input_ids"].shape[0] == 3 * count


def test_draws_depend_on_seed_epoch_and_row_alone(tmp_path):
    overrides = {"templates_per_example": 3}
    collate, rows = collator_with(make_trainer(tmp_path, overrides=overrides, retain_dataset=make_retain()))

    def draws(collate, rows) -> dict[int, tuple]:
        return {row["row"]: (collate.variant(row), tuple(collate.retain_row(row)["forget_ids"])) for row in rows}

    first = draws(collate, rows)
    assert draws(collate, rows[::-1]) == first and draws(collate, rows[2:5]) == {i: first[i] for i in (2, 3, 4)}
    by_epoch = []
    for epoch in range(12):
        collate.set_epoch(epoch)
        by_epoch.append(draws(collate, rows))
    assert len({json.dumps(draw) for draw in by_epoch}) > 10
    assert {draw[0][0] for draw in by_epoch} == {0, 1, 2}
    # Six retain rows are dealt out completely before one is used twice.
    assert all(len({draw[row][1] for row in range(6)}) == 6 for draw in by_epoch)
    collate.set_epoch(0)
    assert draws(collate, rows) == first
    other, other_rows = collator_with(
        make_trainer(tmp_path, overrides=overrides | {"seed": 7}, retain_dataset=make_retain())
    )
    assert draws(other, other_rows) != first


def test_workers_follow_the_epoch(tmp_path):
    trainer = make_trainer(tmp_path, overrides={"templates_per_example": 3}, retain_dataset=make_retain())
    collate, rows = collator_with(trainer)
    loader = DataLoader(rows, 4, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 3):
        collate.set_epoch(epoch)
        for start, batch in zip((0, 4), loader, strict=True):
            assert torch.equal(batch["input_ids"], collate(rows[start : start + 4])["input_ids"])


def test_evaluation_rows_do_not_change_with_the_epoch(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_forget(), retain_dataset=make_retain())
    rows = list(trainer.eval_dataset)
    before = trainer.data_collator(rows)["input_ids"]
    trainer.data_collator.set_epoch(5)
    assert torch.equal(trainer.data_collator(rows)["input_ids"], before)
