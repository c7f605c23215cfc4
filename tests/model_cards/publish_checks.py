"""`publish` against the loopback Hub. Run by `test_publish.py` in a child process, see `tests.hub.fixtures`."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ext.cli import main
from hf_ext.model_cards import PublishError, build_card, check_adapter, publish
from tests.conftest import make_tiny_llama
from tests.hub.fixtures import ROOT, put_card
from tests.hub.store import Blob
from tests.model_cards.tiny import BASE, lora_model, tiny_tokenizer

TOKENS = torch.arange(3, 11)[None]
COMMIT = "POST .*/commit/"
FACTS = {"base_model": BASE, "license": "mit", "metrics": {"efficacy (teacher-forced)": 0.5}, "evaluated_on": "user/d"}
# The base of these models was never saved, so the code of their cards cannot run.
MADE_UP = {**FACTS, "run_snippet": False}


@pytest.fixture(scope="module")
def base():
    make_tiny_llama().push_to_hub(BASE)
    return BASE


@pytest.fixture
def repo_id(request):
    return f"user/{request.node.originalname}"


@pytest.fixture
def published(repo_id, hub):
    """A repository that holds an adapter."""
    publish(lora_model(), repo_id, **MADE_UP)
    return hub.repos["models", repo_id]


def test_one_commit_with_everything(hub, base, repo_id):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    ).eval()
    hub.requests.clear()
    info = publish(model, repo_id, license="mit", datasets="user/facts", metrics={"accuracy": 0.5}, evaluated_on="d")
    stored = hub.repos["models", repo_id]
    assert [c.title for c in stored.history()] == [f"Publish with hf_ext: LORA adapter for {BASE}", "initial commit"]
    assert info.oid == stored.resolve("main").sha
    files = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "hf_ext_card.json"}
    assert set(stored.files()) == files
    assert not [r for r in hub.requests if BASE in r], "publishing asked the Hub about the base model"
    remote = HfApi().model_info(repo_id)
    assert (remote.library_name, remote.pipeline_tag) == ("peft", "text-generation")
    assert remote.card_data.base_model == BASE and remote.card_data.license == "mit"
    assert remote.card_data.datasets == ["user/facts"] and remote.card_data.eval_results[0].metric_value == 0.5
    sha = hub.repos["models", base].resolve("main").sha
    assert f'from_pretrained("{BASE}", revision="{sha}")' in ModelCard.load(repo_id).text
    check_adapter(repo_id, make_tiny_llama())
    for loaded in (
        PeftModel.from_pretrained(make_tiny_llama(), repo_id),
        AutoPeftModelForCausalLM.from_pretrained(repo_id),
    ):
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)


def test_publishing_again_commits_nothing(published, repo_id):
    before = published.resolve("main").sha
    assert publish(lora_model(), repo_id, **MADE_UP).oid == before
    assert publish(lora_model(), repo_id, **{**MADE_UP, "license": "apache-2.0"}).oid != before
    changed = {path for path, data in published.files().items() if published.files(before)[path] != data}
    assert changed == {"README.md", "hf_ext_card.json"}


def test_human_edits_survive(published, repo_id):
    card = ModelCard.load(repo_id)
    card.text = (
        card.text.replace("\n<!-- hf_ext:begin", "\nRead me first.\n\n<!-- hf_ext:begin") + "\nThanks to all.\n"
    )
    card.text = card.text.replace("How to get started", "VANDALISED")
    card.data.thumbnail = "x.png"
    card.data.tags.append("mine")
    put_card(card, repo_id)
    publish(lora_model(), repo_id, **MADE_UP)
    found = ModelCard.load(repo_id)
    assert found.text.startswith("\nRead me first.\n\n<!-- hf_ext:begin") and found.text.endswith("\nThanks to all.\n")
    assert "VANDALISED" not in found.text
    assert found.data.thumbnail == "x.png" and "mine" in found.data.tags
    count = len(published.commits)
    publish(lora_model(), repo_id, **MADE_UP)
    assert len(published.commits) == count


def test_stock_card_is_replaced_and_a_written_one_is_kept(hub, repo_id):
    model = lora_model()
    model.push_to_hub(repo_id)
    publish(model, repo_id, **MADE_UP)
    assert "More Information Needed" not in ModelCard.load(repo_id).text
    written = b"---\nlanguage: en\n---\n# Written by hand\n"
    HfApi().create_repo(repo_id + "2")
    HfApi().upload_file(path_or_fileobj=written, path_in_repo="README.md", repo_id=repo_id + "2")
    publish(model, repo_id + "2", **MADE_UP)
    card = ModelCard.load(repo_id + "2")
    assert card.text.startswith("# Written by hand\n\n<!-- hf_ext:begin") and card.data.language == "en"


def test_revision_pull_request_private_and_finished_card(hub, repo_id):
    card = build_card(lora_model(), license="mit")
    publish(lora_model(), repo_id, card, revision="v2", private=True, run_snippet=False)
    stored = hub.repos["models", repo_id]
    assert stored.private and "README.md" not in stored.files() and "README.md" in stored.files("v2")
    assert f'name = "{repo_id}"' in stored.files("v2")["README.md"].decode()
    proposal = publish(lora_model(), repo_id, create_pr=True, commit_message="Please", run_snippet=False)
    assert proposal.pr_revision == "refs/pr/1" and stored.resolve("refs/pr/1").title == "Please"
    assert "README.md" not in stored.files()


def test_trainer_is_published_without_pickles(hub, repo_id, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}] * 2)
    arguments = SFTConfig(str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        make_tiny_llama(),
        arguments,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    publish(trainer, repo_id, base_model=BASE, license="mit", run_snippet=False)
    files = hub.repos["models", repo_id].files()
    assert "adapter_model.safetensors" in files and "tokenizer.json" in files
    assert not {f for f in files if f.endswith((".bin", ".pt"))}
    assert "1 optimizer steps" in ModelCard.load(repo_id).text
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_a_task_sequence_is_published(hub, repo_id, tmp_path):
    """By `publish`, and by the trainer's own `push_to_hub`: the model and the task matrix, no checkpoint."""
    from tests.trainers.adaptive_svd.helpers import make_trainer

    # A checkpoint of the first task, so that there is something that must stay at home.
    trainer = make_trainer(tmp_path / "run", save_steps=6, hub_model_id=f"{repo_id}-own")
    trainer.train()
    row = trainer.matrix.table().splitlines()[-1]
    publish(trainer, repo_id, base_model=BASE, license="mit", run_snippet=False)
    card = ModelCard.load(repo_id)
    assert (
        row in card.text and "Singular directions protected" in card.text and card.data.tags.count("adaptive_svd") == 1
    )
    scores = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert list(scores) == ["t0", "t1"] and scores["t1"] == trainer.matrix.last[1]
    trainer.push_to_hub()
    for name in (repo_id, f"{repo_id}-own"):
        files = set(hub.repos["models", name].files())
        assert {"model.safetensors", "README.md"} <= files
        assert not [file for file in files if "checkpoint" in file or file.startswith("_") or file.endswith(".pt")]
    own = ModelCard.load(f"{repo_id}-own")
    assert row in own.text and "2504.07097" in own.text and "adaptive_svd" in own.data.tags
    loaded = AutoModelForCausalLM.from_pretrained(f"{repo_id}-own").state_dict()
    assert all(value.equal(loaded[name]) for name, value in trainer.model.state_dict().items())


def test_an_adapter_is_published_merged(hub, base, repo_id):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    ).eval()
    publish(model, repo_id, merged=True, method="flat", license="mit", run_snippet=False)
    stored = hub.repos["models", repo_id]
    assert "model.safetensors" in stored.files() and "adapter_config.json" not in stored.files()
    remote = HfApi().model_info(repo_id)
    assert (remote.library_name, remote.card_data.base_model) == ("transformers", BASE)
    assert {"flat", "unlearning"} < set(remote.card_data.tags)
    assert "it cannot be switched off here" in ModelCard.load(repo_id).text
    loaded = AutoModelForCausalLM.from_pretrained(repo_id)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    before = stored.resolve("main").sha
    assert publish(model, repo_id, merged=True, method="flat", license="mit", run_snippet=False).oid == before


def test_an_adapter_gives_way_to_merged_weights(hub, base, repo_id):
    """Left beside them, it would be applied once more by whoever loads the weights; files of others stay."""
    adapted = dict(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    first, second = (
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**adapted, r=r)) for r in (2, 4)
    )
    publish(first.eval(), repo_id, license="mit", run_snippet=False)
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id=repo_id)
    publish(second.eval(), repo_id, license="mit", merged=True, run_snippet=False)
    files = set(hub.repos["models", repo_id].files())
    assert "model.safetensors" in files and "theirs.txt" in files and not {f for f in files if "adapter" in f}
    loaded = AutoModelForCausalLM.from_pretrained(repo_id)
    torch.testing.assert_close(loaded(TOKENS).logits, second(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"pattern": COMMIT, "status": 500}, "the Hub answered 500.*unchanged, at commit .*try again later"),
        ({"pattern": COMMIT, "drop": "request"}, "the connection broke.*unchanged, at commit .*check the network"),
        ({"pattern": COMMIT, "status": 401}, "the Hub answered 401.*hf auth login"),
        ({"pattern": COMMIT, "status": 403}, "the Hub answered 403.*write token"),
        ({"pattern": COMMIT, "status": 412}, "the Hub answered 412.*someone else committed"),
        ({"pattern": "POST .*/objects/batch", "status": 404}, "the Hub answered 404.*check repo_id"),
        ({"pattern": "HEAD .*/README.md", "status": 500, "times": 9}, "the Hub answered 500.*nothing was uploaded"),
        ({"pattern": "HEAD .*/hf_ext_card", "status": 500, "times": 9}, "the Hub answered 500.*nothing was uploaded"),
        ({"pattern": "GET /api/models/", "status": 401}, "the Hub answered 401.*nothing was uploaded"),
        ({"pattern": "PUT /_lfs", "drop": "request", "times": 9}, "uploading failed.*unchanged"),
    ],
)
def test_failures_leave_the_repository_as_it_was(hub, published, repo_id, fault, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    before, refs = published.resolve("main"), dict(published.refs)
    hub.faults.add(**fault)
    with pytest.raises(PublishError, match=f"(?s){repo_id} was not published to {hub.endpoint}: .*{message}"):
        publish(lora_model(seed=1 + len(hub.store.lfs)), repo_id, **MADE_UP)
    assert published.resolve("main") == before and published.refs == refs


def test_a_fault_of_the_program_is_no_broken_connection(hub, published, repo_id, monkeypatch):
    monkeypatch.setattr(HfApi, "create_commit", lambda self, *arguments, **fields: {}["card"])
    with pytest.raises(KeyError, match="card"):
        publish(lora_model(), repo_id, **MADE_UP)


def test_a_damaged_manifest_is_replaced(hub, published, repo_id):
    stored = published.resolve("main")
    damaged = json.dumps({**json.loads(published.files()["hf_ext_card.json"]), "card": "x"}).encode()
    published.commit("refs/heads/main", {**stored.files, "hf_ext_card.json": Blob(damaged)}, "damaged")
    publish(lora_model(), repo_id, **MADE_UP)
    assert published.resolve("main").files == stored.files


def test_lost_answer_is_told(hub, published, repo_id):
    hub.faults.add(COMMIT, drop="response")
    with pytest.raises(PublishError, match="moved on to commit"):
        publish(lora_model(r=2), repo_id, **MADE_UP)
    count = len(published.commits)
    publish(lora_model(r=2), repo_id, **MADE_UP)
    assert len(published.commits) == count


def test_temporary_faults_are_survived(hub, published, repo_id):
    hub.faults.add("POST .*/preupload/", status=500)
    hub.faults.add("POST .*/objects/batch", status=429, headers={"Retry-After": "1"})
    publish(lora_model(r=3), repo_id, **MADE_UP)


def test_commit_by_someone_else_meanwhile(hub, published, repo_id, monkeypatch):
    original = HfApi.create_commit

    def late(self, *arguments, **fields):
        monkeypatch.setattr(HfApi, "create_commit", original)
        self.upload_file(path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id=repo_id)
        return self.create_commit(*arguments, **fields)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(PublishError, match="412"):
        publish(lora_model(r=2), repo_id, **MADE_UP)
    assert published.resolve("main").title.startswith("Upload theirs.txt")


@pytest.mark.parametrize("bad", ["a/b/c", "user/mo del", "user/--x", "user/x.git"])
def test_bad_repo_id(hub, bad):
    with pytest.raises(ValueError, match="repo_id='"):
        publish(lora_model(), bad)
    assert hub.requests == []


def test_card_errors_are_refused_before_anything_is_sent(hub, repo_id):
    with pytest.raises(ValueError, match="license: license 'free' is not one"):
        publish(lora_model(), repo_id, license="free")
    assert hub.requests == []


def test_no_token(hub, repo_id, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match=f"{repo_id} was not published to {hub.endpoint}: there is no access token"):
        publish(lora_model(), repo_id)
    assert hub.requests == []


@pytest.mark.parametrize(("token", "message"), [("hf_wrong", "answered 401"), ("hf_readonly", "answered 403")])
def test_wrong_token(hub, repo_id, token, message):
    with pytest.raises(PublishError, match=message) as caught:
        publish(lora_model(), repo_id, token=token, run_snippet=False)
    assert token not in str(caught.value)
    assert ("models", repo_id) not in hub.repos


def test_damaged_markers(published, repo_id):
    card = ModelCard.load(repo_id)
    card.text = card.text.replace("<!-- hf_ext:end card -->", "")
    put_card(card, repo_id)
    before = published.resolve("main")
    with pytest.raises(PublishError, match="restore the markers"):
        publish(lora_model(), repo_id, **MADE_UP)
    assert published.resolve("main") == before


def test_remote_card_that_is_not_yaml(hub, published, repo_id):
    stored = published.resolve("main")
    broken = published.commit("refs/heads/main", {**stored.files, "README.md": Blob(b"---\na: b: c\n---\n")}, "broken")
    with pytest.raises(PublishError, match=r"(?s)at odds with the card.*correct that"):
        publish(lora_model(), repo_id, **MADE_UP)
    assert published.resolve("main") == broken


def test_card_written_by_hand(hub, repo_id):
    written = "---\nlicense: mit\nbase_model: user/b\n---\n# By hand\n"
    for _ in range(2):
        publish(lora_model(), repo_id, ModelCard(written), run_snippet=False)
    stored = hub.repos["models", repo_id]
    assert stored.files()["README.md"].count(b"# By hand") == 1
    assert len(stored.commits) == 2


def test_the_command_on_a_repository(hub, base, repo_id, capsys):
    """A stock push, as others made it, gets a card; what we published is verified."""
    lora_model().push_to_hub(repo_id)
    assert main(["card", "validate", repo_id]) == 0
    assert "warning: placeholder" in capsys.readouterr().out
    words = ["--base-model", base, "--license", "mit", "--push"]
    assert main(["card", "build", repo_id, *words]) == 0
    assert f"{hub.endpoint}/{repo_id}" in capsys.readouterr().out
    remote = HfApi().model_info(repo_id)
    assert (remote.library_name, remote.card_data.base_model) == ("peft", base)
    assert "More Information Needed" not in ModelCard.load(repo_id).text
    publish(lora_model(), f"{repo_id}-ours", **MADE_UP)
    assert main(["card", "verify", f"{repo_id}-ours"]) == 0
    assert "32 as recorded, bit by bit" in capsys.readouterr().out
    lora_model().push_to_hub(f"{repo_id}-stock")
    assert main(["card", "verify", f"{repo_id}-stock", "--base-model", base]) == 0
    told = capsys.readouterr().out
    assert "holds: adapter: fits its base model" in told and "not checked: files: there is no hf_ext_card" in told


def test_results_of_a_benchmark(hub, repo_id):
    """Both formats: the model index, and the file that the benchmark's leaderboard reads."""
    arguments = {**MADE_UP, "evaluated_on": "cais/hle@abc", "metrics": {"accuracy": 0.5}}
    publish(lora_model(), repo_id, benchmarks={"default": "accuracy"}, **arguments)
    stored = hub.repos["models", repo_id].files()[".eval_results/results.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(stored))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("cais/hle", "default", 0.5)
    assert ModelCard.load(repo_id).data.eval_results[0].dataset_revision == "abc"
    with pytest.raises(ValueError, match=r"benchmarks\['default'\]='f1' is no result of the card"):
        publish(lora_model(), repo_id, benchmarks={"default": "f1"}, **arguments)


def test_nothing_is_left_on_disk(hub, published, repo_id, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub.faults.add(COMMIT, status=500)
    with pytest.raises(PublishError):
        publish(lora_model(r=2), repo_id, **MADE_UP)
    publish(lora_model(r=2), repo_id, **MADE_UP)
    assert list(tmp_path.iterdir()) == []


def test_example(hub, monkeypatch, capsys):
    script = ROOT / "examples" / "publish_an_adapter.py"
    monkeypatch.setattr("sys.argv", [str(script), "user/example"])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"{hub.endpoint}/user/example/commit/")
    assert b"roselora" in hub.repos["models", "user/example"].files()["README.md"]
