"""Writers and scorers: a model in memory, a server that misbehaves, TRL's client of a vLLM server."""

from __future__ import annotations

import json
import time

import pytest
import requests
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, BloomConfig
from trl.generation.vllm_client import VLLMClient

from hf_ext.metrics.rag import AnswerMatcher
from hf_ext.pipelines.roserag.prompts import Answer, RagPrompts
from hf_ext.trainers.roserag import EndpointBackend, RoseRAGDatasetBuilder, TransformersBackend, VLLMBackend
from hf_ext.trainers.roserag.backends import BackendError, TooLong
from hf_ext.trainers.roserag.sampling import DrawByRow, Sampling, seed_of
from hf_ext.trainers.roserag.servers import Retries
from tests.pipelines.roserag.helpers import CHAT, NO_SYSTEM, word_tokenizer
from tests.trainers.roserag.helpers import ScriptedBackend, preference_rows, question_rows, tiny_policy
from tests.trainers.roserag.server import ChatServer, message
from tests.trainers.roserag.test_trainer import trained


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The loopback is reached in offline mode by nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


PROMPTS = RagPrompts()
SHORT = Sampling(max_new_tokens=12)


def conversations(count: int = 3):
    return [[{"role": "user", "content": " ".join(f"w{m}" for m in range(5 * n + 1))}] for n in range(count)]


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_draws_follow_the_distribution(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    count = 4000
    draw = DrawByRow(range(count), Sampling(temperature, top_p))
    tokens = draw(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1)).argmax(-1)
    expected = (logits / temperature).softmax(0)
    if top_p < 1:
        # The smallest set that has the mass.
        expected = torch.where(torch.arange(5) < 2, expected, 0.0)
        expected = expected / expected.sum()
    observed = torch.bincount(tokens, minlength=5)
    possible = expected > 1e-3
    assert int(observed[expected == 0].sum()) == 0
    shares = expected[possible].double() / expected[possible].double().sum()
    assert chisquare(observed[possible], shares * observed[possible].sum()).pvalue > 1e-3


def test_likely_tokens_are_found_however_many_they_are():
    """A peaked row, a middling one and a flat one: each draws from its own nucleus, and as it would alone."""
    spreads, vocabulary = (8.0, 2.0, 0.0), 5000
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)) * torch.tensor(spreads)[:, None]
    probabilities = logits.softmax(-1)
    for seed in range(20):
        batch = DrawByRow([seed] * 3, Sampling(1.0, 0.9))(torch.zeros(3, 1), logits).argmax(-1)
        for row, token in enumerate(batch):
            alone = DrawByRow([seed], Sampling(1.0, 0.9))(torch.zeros(1, 1), logits[row : row + 1]).argmax(-1)
            assert token == alone
            likelier = probabilities[row][probabilities[row] > probabilities[row, token]]
            assert likelier.sum() < 0.9


def test_seeds_are_the_same_everywhere():
    assert seed_of(0, "q1", "hinted", 3) == 1118331381 != seed_of(0, "q1", "hinted", 4)
    assert seed_of("é") < 2**31


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_sampling(options, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**options)


# -- a model in memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_depends_on_its_own_seed_alone(temperature):
    sampling = Sampling(temperature, 0.9, 12)
    seeds = [[10 * n + m for m in range(4)] for n in range(3)]
    together = TransformersBackend(*tiny_policy(), batch_size=16).write(conversations(), seeds, sampling, PROMPTS)
    alone = TransformersBackend(*tiny_policy(), batch_size=1)
    for n, messages in enumerate(conversations()):
        for m in range(4):
            assert alone.write([messages], [[seeds[n][m]]], sampling, PROMPTS) == [[together[n][m]]]
    assert len({text for texts in together for text in texts}) > (3 if temperature else 0)


def test_a_prompt_is_read_once_for_all_its_samples():
    backend = TransformersBackend(*tiny_policy(), batch_size=8)
    read = []
    backend.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    backend.write(conversations(2), [[1, 2, 3, 4], [5, 6, 7, 8]], SHORT, PROMPTS)
    assert read[0][0] == 2 and all(shape == (8, 1) for shape in read[1:])


def test_models_whose_cache_cannot_be_copied_write_too():
    tokenizer = word_tokenizer(CHAT)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2, eos_token_id=2, pad_token_id=0
    )
    backend = TransformersBackend(AutoModelForCausalLM.from_config(config), tokenizer)
    found = backend.write(conversations(2), [[1, 2], [3, 4]], SHORT, PROMPTS)
    assert [len(texts) for texts in found] == [2, 2]
    prompt = conversations(1)[0]
    assert len(backend.score(prompt, ["w1 w2", "w3"], PROMPTS)) == 2


@pytest.mark.parametrize("template", [CHAT, None])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_are_those_of_the_trainer(tmp_path, template, batch_size):
    model, tokenizer = tiny_policy(template=template)
    backend = TransformersBackend(model, tokenizer, batch_size=batch_size)
    messages = PROMPTS.inference("w5 w6", [{"title": "w7", "text": "w8 w9"}])
    prompt = backend.prompt(messages, PROMPTS)
    texts = ["Reason w1.\nAnswer: Paris", "Answer: Rome", "w3 w3 w3 w3"]
    before = " " if template is None else ""
    found = backend.score(prompt, [before + text for text in texts], PROMPTS)
    sides = [before + text if template is None else [{"role": "assistant", "content": text}] for text in texts]
    rows = [{"prompt": prompt, "chosen": sides[0], "rejected": side} for side in sides[1:]]
    trainer = trained(
        tmp_path, model=model, tokenizer=tokenizer, rows=rows, train=False, per_device_train_batch_size=2
    )
    trainer.evaluate(Dataset.from_list(rows[:1]))
    recorded = trainer.state.log_history[-1]
    assert sum(found[0]) == pytest.approx(recorded["eval_logps/chosen"], rel=1e-5)
    assert sum(found[1]) == pytest.approx(recorded["eval_logps/rejected"], rel=1e-5)


THINKS = CHAT.replace("<assistant> {%", "<assistant> {% if quiet %}w98 {% endif %}{%").replace(
    "{{ m.content }}", "{% if m.role == 'assistant' and quiet %}w98 {% endif %}{{ m.content }}"
)


def test_options_of_the_chat_template_are_those_everywhere(tmp_path):
    quiet = RagPrompts(chat_template_kwargs={"quiet": True})
    model, tokenizer = tiny_policy(template=THINKS)
    backend = TransformersBackend(model, tokenizer)
    assert backend.write(conversations(), [[0]] * 3, SHORT, quiet) != backend.write(
        conversations(), [[0]] * 3, SHORT, PROMPTS
    )
    scores = [backend.score(conversations(1)[0], ["w1 w2"], prompts) for prompts in (quiet, PROMPTS)]
    assert scores[0] != scores[1]
    data = RoseRAGDatasetBuilder(ScriptedBackend(), prompts=quiet).build(question_rows(), tmp_path / "pairs")
    assert data[0]["chat_template_kwargs"] == {"quiet": True}
    rows = [{**row, "chat_template_kwargs": {"quiet": True}} for row in preference_rows(4)]
    trainer = trained(tmp_path, model=model, tokenizer=tokenizer, rows=rows, train=False)
    assert "w98" in tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])
    quiet.save_pretrained(tmp_path)
    assert RagPrompts.from_file(tmp_path / "rag_config.json") == quiet
    with ChatServer(lambda request, before: message("w1")) as server:
        EndpointBackend(server.url, "m").write(conversations(1), [[1]], SHORT, quiet)
    assert server.requests[0]["chat_template_kwargs"] == {"quiet": True}


def test_scoring_leaves_the_model_as_it_was():
    model, tokenizer = tiny_policy()
    model.train()
    backend = TransformersBackend(model, tokenizer)
    backend.score(conversations(1)[0], ["w1"], PROMPTS)
    assert "forward" not in vars(model) and model.training


def test_the_identity_is_that_of_the_model_as_it_is():
    model, tokenizer = tiny_policy()
    backend = TransformersBackend(model, tokenizer)
    identities = [backend.identity, TransformersBackend(model, tokenizer, revision="main").identity]
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 0.01
    identities.append(backend.identity)
    tokenizer.chat_template = CHAT + "{# another #}"
    identities += [backend.identity, TransformersBackend(model.bfloat16(), tokenizer).identity]
    assert len(set(identities)) == 5 and "@main@" in identities[1]


def test_scoring_while_a_trainer_has_the_model(tmp_path):
    model, tokenizer = tiny_policy()
    trainer = trained(tmp_path, model=model, tokenizer=tokenizer, train=False)
    found = TransformersBackend(model, tokenizer).score(conversations(1)[0], ["w1 w2"], PROMPTS)
    trainer.train()
    assert found == TransformersBackend(*tiny_policy()).score(conversations(1)[0], ["w1 w2"], PROMPTS)


@pytest.mark.parametrize("shares", [True, False])
def test_models_in_training_mode_write_without_dropout(shares):
    model, tokenizer = tiny_policy()
    config = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    backend = TransformersBackend(adapted, tokenizer)
    backend._shares = shares
    written = [backend.write(conversations(), [[1, 2]] * 3, SHORT, PROMPTS) for _ in range(2)]
    assert written[0] == written[1] and adapted.training
    adapted.eval()
    backend._shares = True
    assert backend.write(conversations(), [[1, 2]] * 3, SHORT, PROMPTS) == written[0]


def test_generation_settings_of_a_checkpoint_do_not_mix_in():
    model, tokenizer = tiny_policy()
    plain = TransformersBackend(model, tokenizer).write(conversations(), [[1]] * 3, SHORT, PROMPTS)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 3
    model.generation_config.temperature, model.generation_config.do_sample = 0.1, True
    assert TransformersBackend(model, tokenizer).write(conversations(), [[1]] * 3, SHORT, PROMPTS) == plain


def test_a_model_that_was_trained_writes_with_its_cache(recwarn):
    """Trainers leave `use_cache=False` behind, with which every token would read the whole text again."""
    model, tokenizer = tiny_policy()
    model.config.use_cache = False
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    TransformersBackend(model, tokenizer).write(conversations(2), [[1], [2]], SHORT, PROMPTS)
    assert len(widths) > 4 and set(widths[2:]) == {1}
    assert not recwarn.list


def test_an_adapter_on_the_output_layer_is_refused():
    model, tokenizer = tiny_policy()
    with pytest.raises(ValueError, match="remove 'lm_head'"):
        TransformersBackend(get_peft_model(model, LoraConfig(target_modules=["lm_head"])), tokenizer)


def test_scores_that_are_no_numbers_are_told():
    model, tokenizer = tiny_policy()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert isinstance(TransformersBackend(model, tokenizer).score(conversations(1)[0], ["w1"], PROMPTS), BackendError)


def test_what_does_not_fit_is_told():
    backend = TransformersBackend(*tiny_policy())
    long = [{"role": "user", "content": "w1 " * 1020}]
    short, found = backend.write([conversations(1)[0], long], [[1], [2]], SHORT, PROMPTS)
    assert isinstance(short, list) and isinstance(found, TooLong)
    assert isinstance(backend.score(long, ["w1 " * 20], PROMPTS), TooLong)
    rows = question_rows()
    rows[0]["documents"].append({"title": "long", "text": "w1 " * 1020})
    builder = RoseRAGDatasetBuilder(backend, sampling=SHORT, n_hinted=1, n_unhinted=1)
    with pytest.raises(ValueError, match="no question made a pair"):
        builder.build(rows)
    with pytest.raises(ValueError, match="give fewer or shorter passages"):
        builder.build(rows[:1])
    assert builder.report.outcomes["too_long"] == 1 and "q0" in builder.report.failures


def test_a_template_that_changes_the_prompt_is_refused():
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    model, _ = tiny_policy()
    with pytest.raises(ValueError, match="take a template with the generation prompt"):
        TransformersBackend(model, word_tokenizer(template))


class FirstWord(RagPrompts):
    """An untrained model never writes an answer line, so its first word is taken for the answer."""

    def read(self, response):
        answer, _, rationale = response.strip().partition(" ")
        return Answer(rationale, answer, ())


class EvenLength(AnswerMatcher):
    def __call__(self, answer, golds):
        return bool(answer) and len(answer) % 2 == 0


@pytest.mark.parametrize("template", [CHAT, None])
def test_a_whole_build_with_a_model(template):
    def build(batch_size):
        backend = TransformersBackend(*tiny_policy(template=template), batch_size=batch_size)
        options = {"sampling": SHORT, "n_hinted": 2, "n_unhinted": 6, "batch_size": batch_size}
        builder = RoseRAGDatasetBuilder(backend, prompts=FirstWord(), matcher=EvenLength(), **options)
        return builder.build(question_rows())

    data = build(2)
    assert len(data) >= 2 and isinstance(data[0]["prompt"], str) == (template is None)
    for one, other in zip(data, build(16), strict=True):
        assert [c["text"] for c in one["candidates"]] == [c["text"] for c in other["candidates"]]
        # Which of two candidates that an untrained model likes alike is taken, rounding decides.
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-5)


# -- a server ----------------------------------------------------------------------------------------------------------

QUICK = Retries(attempts=4, first_wait=0.01, longest_wait=0.05)


def served_by_script(request):
    """What `ScriptedBackend` would write."""
    (texts,) = ScriptedBackend().write([request["messages"]], [[request["seed"]]], None, PROMPTS)
    return message(texts[0])


def test_a_server_writes_what_a_model_would(tmp_path):
    with ChatServer(lambda request, before: served_by_script(request)) as server:
        writer = EndpointBackend(server.url, "scripted@1", api_key="key", retries=QUICK)
        data = RoseRAGDatasetBuilder(writer, ScriptedBackend(), cache_dir=tmp_path).build(question_rows())
    assert data.to_list() == RoseRAGDatasetBuilder(ScriptedBackend()).build(question_rows()).to_list()
    sampled = [request for request in server.requests if request["temperature"] > 0]
    assert {request["model"] for request in server.requests} == {"scripted@1"}
    assert len({request["seed"] for request in sampled}) == len(sampled)


FAULTS = {
    "rate limit": (429, {"Retry-After": "0.02"}, b"{}"),
    "server error": (503, {}, b"busy"),
    "no JSON": (200, {}, b"<html>oops</html>"),
    "no choices": (200, {}, b'{"choices": []}'),
    "time-out": 0.6,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_are_tried_again(fault):
    with ChatServer(lambda request, before: FAULTS[fault] if before < 2 else served_by_script(request)) as server:
        writer = EndpointBackend(server.url, "scripted@1", timeout=0.3, retries=QUICK)
        data = RoseRAGDatasetBuilder(writer, ScriptedBackend(), n_hinted=0, n_unhinted=3).build(question_rows(2))
    expected = RoseRAGDatasetBuilder(ScriptedBackend(), n_hinted=0, n_unhinted=3).build(question_rows(2))
    assert data.to_list() == expected.to_list()
    assert set(server.seen.values()) == {3}


def test_faults_that_stay_mark_the_row_and_the_next_build_goes_on(tmp_path):
    def answer(request, before):
        broken = server_is_broken and "capital of Italy?" in json.dumps(request)
        return FAULTS["no JSON"] if broken else served_by_script(request)

    server_is_broken = True
    with ChatServer(answer) as server:
        writer = EndpointBackend(server.url, "scripted@1", retries=QUICK)
        builder = RoseRAGDatasetBuilder(writer, ScriptedBackend(), cache_dir=tmp_path)
        assert [row["question_id"] for row in builder.build(question_rows())] == ["q0", "q2", "q3"]
        assert "(attempt 4)" in builder.report.failures["q1"]
        server_is_broken = False
        count = len(server.requests)
        data = builder.build(question_rows())
        assert len(server.requests) - count == 24 and len(data) == 4


@pytest.mark.parametrize("said", ["", None])
def test_saying_nothing_is_a_response(said):
    with ChatServer(lambda request, before: message(said)) as server:
        assert EndpointBackend(server.url, "m").write(conversations(1), [[1]], SHORT, PROMPTS) == [[""]]
    assert len(server.requests) == 1


def test_half_a_character_is_replaced(tmp_path):
    with ChatServer(lambda request, before: served_by_script(request)) as server:
        body = message("Because \\ud83d.\nAnswer: Bern")
        broken = (body[0], body[1], body[2].replace(b"\\\\ud83d", b"\\ud83d"))
        with ChatServer(
            lambda request, before: broken if request["seed"] % 2 else served_by_script(request)
        ) as server:
            writer = EndpointBackend(server.url, "scripted@1", retries=QUICK)
            RoseRAGDatasetBuilder(writer, ScriptedBackend(), n_hinted=2, cache_dir=tmp_path).build(
                question_rows(), tmp_path / "d"
            )


def test_a_template_without_a_system_role_is_served_as_it_is_trained():
    asked = PROMPTS.inference("w1", [{"text": "w2"}])
    with ChatServer(lambda request, before: message("w1")) as server:
        for tokenizer in (None, word_tokenizer(NO_SYSTEM)):
            EndpointBackend(server.url, "m", tokenizer=tokenizer).write([asked], [[1]], SHORT, PROMPTS)
    roles = [[turn["role"] for turn in request["messages"]] for request in server.requests]
    assert roles == [["system", "user"], ["user"]]


def test_the_users_token_stays_at_home(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ChatServer(lambda request, before: message("w1")) as server:
        EndpointBackend(server.url, "m", retries=QUICK).write(conversations(1), [[1]], SHORT, PROMPTS)
        EndpointBackend(server.url, "m", api_key="mine", retries=QUICK).write(conversations(1), [[1]], SHORT, PROMPTS)
    assert [headers["authorization"] for headers in server.headers] == ["Bearer none", "Bearer mine"]


def test_an_error_that_is_for_good_is_not_tried_again():
    with ChatServer(lambda request, before: (401, {}, b'{"error": "no such key"}')) as server:
        (found,) = EndpointBackend(server.url, "m", retries=QUICK).write(conversations(1), [[1]], SHORT, PROMPTS)
    assert isinstance(found, BackendError) and "401" in str(found) and len(server.requests) == 1


def test_waiting_grows_and_follows_the_server(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fails():
        raise OSError("down")

    with pytest.raises(BackendError, match=r"OSError: down \(attempt 6\)"):
        Retries(6, 1.0, 5.0).call(fails, lambda error: 0.0)
    with pytest.raises(BackendError):
        Retries(2, 1.0, 5.0).call(fails, lambda error: 30.0)
    # Longer than a minute, or whatever is allowed, is waited for by nobody.
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    with pytest.raises(ValueError, match="attempts=0"):
        Retries(0)


def test_a_server_that_is_not_there(tmp_path):
    writer = EndpointBackend("http://127.0.0.1:9/v1", "m", retries=Retries(2, 0.0, 0.0))
    with pytest.raises(ConnectionError, match="16 questions in a row"):
        RoseRAGDatasetBuilder(writer, ScriptedBackend(), cache_dir=tmp_path).build(question_rows(20))


def test_trls_client(tmp_path):
    tokenizer = word_tokenizer(CHAT)

    def answer(request, before):
        ids = tokenizer("Reason w1.\nAnswer: Paris", add_special_tokens=False)["input_ids"]
        choice = {"token_ids": ids, "logprobs": None}
        return 200, {}, json.dumps({"prompt_token_ids": [1], "choices": [choice]}).encode()

    with ChatServer(answer) as server:
        # Its constructor asks for vLLM to be installed.
        client = object.__new__(VLLMClient)
        client.session, client.base_url, client.model = requests.Session(), server.url.removesuffix("/v1"), "served"
        backend = VLLMBackend(client, tokenizer)
        found = backend.write(conversations(2), [[1, 2], [3]], SHORT, PROMPTS)
    assert backend.identity == "served" and [len(texts) for texts in found] == [2, 1]
    assert found[0][0] == "Reason w1.\nAnswer: Paris"
    assert sorted(request["seed"] for request in server.requests) == [1, 2, 3]
