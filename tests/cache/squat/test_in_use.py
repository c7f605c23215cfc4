"""Two calls that use a cache at once are refused, and so is one after an interrupted call."""

import threading

import pytest
import torch

from hf_ext.cache.squat import SQuatCache, squat_attention
from tests.cache.squat import models
from tests.cache.squat.decoding import EIGHT, expected, generate, model_named, prompt

CLASH = "used by two calls at once"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_interleaved_forward_passes_are_refused(name, tokens):
    model = models.build(name)
    cache = SQuatCache(model.config, **EIGHT)

    def other(*_):
        hook.remove()
        with pytest.raises(RuntimeError, match=CLASH):
            model(prompt(1), past_key_values=cache)

    with squat_attention(model):
        model(prompt(56), past_key_values=cache)
        hook = model.model.layers[0].register_forward_hook(other)
        with pytest.raises(RuntimeError, match=CLASH):
            model(prompt(tokens), past_key_values=cache)


def test_an_interrupted_forward_pass_is_noticed_and_reset_helps():
    model = models.build("llama")
    cache = SQuatCache(model.config, **EIGHT)

    def stop(*_):
        hook.remove()
        raise KeyboardInterrupt

    with squat_attention(model):
        hook = model.model.layers[0].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            generate(model, cache, prompt(30))
        with pytest.raises(RuntimeError, match=r"interrupted.*cache\.reset\(\)"):
            generate(model, cache, prompt(56))
        cache.reset()
        assert torch.equal(generate(model, cache, prompt(56)), expected("llama", "greedy"))


def test_an_update_within_an_update_is_refused(monkeypatch):
    cache = SQuatCache(model_named("llama").config)
    new = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    monkeypatch.setattr(cache.layers[0], "lazy_initialization", lambda *_: cache.update(*new, 0))
    with pytest.raises(RuntimeError, match=CLASH):
        cache.update(*new, 0)
    monkeypatch.undo()
    cache.update(*new, 0)


def test_keys_of_an_earlier_pass_are_refused():
    cache = SQuatCache(model_named("llama").config)
    keys, _ = cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    assert keys.sum().isfinite()
    cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    with pytest.raises(RuntimeError, match=CLASH):
        keys.sum()


def test_two_threads_on_one_cache_are_refused():
    model = models.build("llama")
    cache = SQuatCache(model.config, **EIGHT)
    within, over = threading.Event(), threading.Event()
    errors = {}

    def pause(*_):
        """The first thread waits in the middle of its first pass until the second has given up."""
        if threading.current_thread().name == "first" and not within.is_set():
            within.set()
            over.wait(30)

    def run(ids):
        with pytest.raises(RuntimeError, match=CLASH) as caught:
            generate(model, cache, ids)
        errors[threading.current_thread().name] = caught.value

    model.model.layers[0].register_forward_hook(pause)
    with squat_attention(model):
        threads = [
            threading.Thread(target=run, args=(prompt(length),), name=name)
            for length, name in ((40, "first"), (56, "second"))
        ]
        threads[0].start()
        assert within.wait(30)
        threads[1].start()
        threads[1].join(30)
        over.set()
        threads[0].join(30)
    assert set(errors) == {"first", "second"}
