"""What people have written into a README stays, wherever they have written it; what templates have left empty goes."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_ext.cli import main
from hf_ext.model_cards import build_card, save, validate
from hf_ext.model_cards.stock import without_template
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import WORDS, lora_model, tiny_tokenizer
from tests.model_cards.written import rules

pytestmark = pytest.mark.filterwarnings("ignore:model card")
PLACEHOLDER = "[More Information Needed]"
# Whatever people write, with parts that resemble a template's.
LINES = st.sampled_from(["# T", "## Uses", "### Deep", "words", "", "- item", "- **Label:** value", "```", "# in code", "TODO", "<!-- mine -->"])  # fmt: skip


@pytest.fixture
def stock(tmp_path):
    """An adapter with PEFT's template."""
    get_peft_model(make_tiny_llama(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def trained(folder, template):
    """A tiny adapter, trained for no step, with the card of its trainer."""
    settings = {"report_to": [], "use_cpu": True, "bf16": False, "learning_rate": 3e-4}
    model = get_peft_model(make_tiny_llama(), LoraConfig(task_type="CAUSAL_LM"))
    if template == "Trainer":
        trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=Dataset.from_list([]))
    else:
        rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}])
        trainer = SFTTrainer(
            model, SFTConfig(str(folder), **settings), train_dataset=rows, processing_class=tiny_tokenizer()
        )
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    trainer.create_model_card()


def build(folder, *words) -> str:
    assert main(["card", "build", str(folder), "--base-model", "user/base", "--license", "mit", *words]) == 0
    return (folder / "README.md").read_text()


@given(st.lists(LINES, max_size=12).map("\n".join))
def test_a_text_that_is_no_template_is_left_alone(text):
    assert without_template(text) == text


def test_an_empty_template_goes(stock):
    text = build(stock)
    assert text.split("---\n")[2].startswith("\n<!-- hf_ext:begin card") and text.endswith("end card -->\n")


def test_words_in_a_template_stay(stock):
    readme = stock / "README.md"
    text, fields = readme.read_text(), readme.read_text().count(PLACEHOLDER)
    for number in range(0, fields, 2):
        parts = text.split(PLACEHOLDER)
        keep = number // 2
        text = PLACEHOLDER.join(parts[: keep + 1]) + f"WORDS {number}." + PLACEHOLDER.join(parts[keep + 1 :])
    readme.write_text(text)
    text = build(stock)
    assert all(f"WORDS {number}." in text for number in range(0, fields, 2))
    assert PLACEHOLDER not in text and "Model ID" not in text and text.count("# LORA adapter for user/base") == 1


@pytest.mark.parametrize(
    ("template", "facts"), [("Trainer", "- learning_rate: 0.0003"), ("TRL", "This model was trained with SFT.")]
)
def test_of_a_trainers_card_the_facts_stay(tmp_path, template, facts):
    trained(tmp_path, template)
    text = build(tmp_path)
    assert facts in text and 'model="None"' not in text and "Model Card for None" not in text
    assert "placeholder" not in rules(validate(text).warnings) and "generated automatically" not in text


def test_building_again_keeps_what_a_folder_does_not_tell(tmp_path, capsys):
    """The card of a save knows its author's words, results and data; a build from the files does not."""
    told = {**WORDS, "extra_sections": {"More": "Of this."}, "datasets": "user/facts"}
    measured = {"metrics": {"accuracy": 0.9}, "evaluated_on": "user/probe"}
    folder = save(lora_model(), tmp_path / "a", base_model="user/base", license="mit", **told, **measured)
    before = ModelCard.load(folder / "README.md")
    assert main(["card", "build", str(folder), "--license", "apache-2.0"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert {**before.data.to_dict(), "license": "apache-2.0"} == card.data.to_dict()
    for words in (
        *WORDS.values(),
        "## More\n\nOf this.",
        "| accuracy | 0.9 |",
        "user/facts",
        "| Licence | apache-2.0 |",
    ):
        assert words in card.text, words
    (tmp_path / "m.json").write_text(json.dumps({"accuracy": 0.5}))
    assert main(["card", "build", str(folder), "--metrics", str(tmp_path / "m.json"), "--caveats", "This alone."]) == 0
    card = ModelCard.load(folder / "README.md")
    assert "| accuracy | 0.5 |" in card.text and not card.data.eval_results and "user/probe" not in card.text
    assert "This alone." in card.text and WORDS["caveats"] not in card.text and WORDS["ethics"] in card.text
    # Other weights: what was measured and trained is not true of them.
    (folder / "adapter_model.safetensors").unlink()
    lora_model(r=2).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    assert main(["card", "build", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert "accuracy" not in card.text and WORDS["ethics"] in card.text and card.data.license == "apache-2.0"


def test_said_again_replaces_what_was_said(stock):
    build(stock, "--datasets", "user/a", "--language", "en", "--method", "roselora")
    text = build(stock, "--datasets", "user/b", "--language", "de", "--method", "neat")
    data = ModelCard(text).data
    assert (data.datasets, data.language) == (["user/b"], ["de"])
    assert "neat" in data.tags and "roselora" not in data.tags and "user/a" not in text
    assert build(stock) == text


def test_words_between_the_markers_stay(stock, tmp_path):
    """Sentences that say that nothing was stated ask for being replaced."""
    text = build(stock).replace("The authors have not stated what the model is for.", "For rockets.")
    (stock / "README.md").write_text(text)
    assert "For rockets." in build(stock)
    folder = save(lora_model(), tmp_path / "saved", base_model="user/base")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("The authors have not stated what the model is for.", "For rockets."))
    for words in ({}, {"intended_use": "For boats."}):
        save(lora_model(), folder, base_model="user/base", **words)
        assert ("For rockets." in readme.read_text()) == (not words)


def test_metadata_of_an_author_stay(stock):
    result = "model-index:\n- name: x\n  results:\n  - task: {type: a}\n    dataset: {type: b/c, name: c}\n    metrics: [{type: m, value: 0.5}]\n"
    (stock / "README.md").write_text(f"---\nlibrary_name: mlx\npipeline_tag: question-answering\n{result}---\nMine.\n")
    (stock / "m.json").write_text('{"f1": 0.25}')
    data = ModelCard(build(stock, "--metrics", str(stock / "m.json"), "--evaluated-on", "user/probe")).data
    assert (data.library_name, data.pipeline_tag) == ("mlx", "question-answering")
    assert {(each.dataset_type, each.metric_value) for each in data.eval_results} == {
        ("b/c", 0.5),
        ("user/probe", 0.25),
    }


def test_a_base_in_a_folder_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny_llama().save_pretrained("full")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("full"), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    assert ModelCard.load("adapter/README.md").data.base_model == "full"
    assert main(["card", "build", "adapter", "--license", "mit"]) == 0
    assert ModelCard.load("adapter/README.md").data.base_model is None
    assert "no-base-model" in rules(validate(tmp_path / "adapter").warnings)


@pytest.mark.parametrize(
    "text",
    [
        b"---\na: b: c\n---\n",
        b"---\n1: 2\n---\n",
        b"---\nself: 2\n---\n",
        b"---\nmodel-index: 5\n---\n",
        b"---\nmodel-index: [{name: a, results: [{task: text}]}]\n---\n",
        b"---\na: " + b"[" * 5000 + b"\n---\n",
        "caf\u00e9".encode("utf-16"),
    ],
    ids=["yaml", "number", "self", "index", "results", "nested", "utf-16"],
)
def test_what_cannot_be_read_is_not_written_over(stock, tmp_path, capsys, text):
    (stock / "README.md").write_bytes(text)
    assert main(["card", "build", str(stock)]) == 2
    assert "README.md: " in capsys.readouterr().err and (stock / "README.md").read_bytes() == text
    with pytest.raises(ValueError, match="did not write"):
        save(lora_model(), stock)
    save(lora_model(), stock, overwrite=True)
    assert "hf_ext:begin card" in (stock / "README.md").read_text()


def test_permissions_and_links_stay(stock, tmp_path):
    (stock / "README.md").rename(tmp_path / "elsewhere.md")
    (stock / "README.md").symlink_to(tmp_path / "elsewhere.md")
    (tmp_path / "elsewhere.md").chmod(0o604)
    build(stock)
    assert (stock / "README.md").is_symlink() and (tmp_path / "elsewhere.md").stat().st_mode & 0o777 == 0o604
    (stock / "README.md").unlink()
    (stock / "other.json").write_text("{}")
    build(stock)
    assert (stock / "README.md").stat().st_mode == (stock / "other.json").stat().st_mode


def test_a_template_of_ones_own_is_written_once(tmp_path):
    from hf_ext.model_cards.beside import write_card

    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(make_tiny_llama(), arguments, train_dataset=Dataset.from_list([]))
    for _ in range(3):
        write_card(trainer, tmp_path, template="# Mine\n\n{{ summary }}\n")
    assert (tmp_path / "README.md").read_text().count("# Mine") == 1


def test_text_around_ours_outlives_other_files_and_a_damaged_manifest(tmp_path):
    folder = save(lora_model(), tmp_path / "a", base_model="user/base")
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nOur note.\n")
    (folder / "plot.png").write_bytes(b"")
    save(lora_model(), folder, overwrite=True)
    assert "Our note." in readme.read_text() and not (folder / "plot.png").exists()
    (folder / "hf_ext_card.json").write_text("{}")
    save(lora_model(), folder, overwrite=True)
    assert "Our note." in readme.read_text()


def test_a_licence_of_ones_own(stock, capsys):
    more = ["--license-name", "mine", "--license-link", "LICENSE", "--repo-id", "user/here"]
    assert main(["card", "build", str(stock), "--license", "other"]) == 1
    assert main(["card", "build", str(stock), "--license", "other", *more]) == 0
    card = ModelCard.load(stock / "README.md")
    assert card.data.license_name == "mine" and '"user/here"' in card.text
    assert {"license_name", "license_link"}.isdisjoint(ModelCard(build(stock)).data.to_dict())
    assert build_card(stock, repo_id="user/here").text.count('"user/here"') == card.text.count('"user/here"')
