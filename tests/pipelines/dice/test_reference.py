"""DICE's formulas: recorded runs of the authors' code, token by token, and the laws that they follow."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hf_ext.pipelines.dice import reference as dice
from tests.oracles import ORACLES

META = json.loads((ORACLES / "dice/meta.json").read_text())
CLOSE = dict(rtol=0, atol=1e-9)


def rows(grid: Tensor) -> Tensor:
    """`(B, V, H, W)` as `(B, H W, V)`, `(B, H, W)` as `(B, H W)`."""
    return grid.flatten(-2).movedim(1, -1) if grid.ndim == 4 else grid.flatten(-2)


def toy_grid(name: str) -> tuple[dict[str, Tensor], dict, SimpleNamespace]:
    """The recorded picture model: logits of tokens, under a condition, at a time."""
    recorded, settings = load_file(ORACLES / f"dice/{name}.safetensors"), META[name]
    model = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}

    def logits(tokens_BN: Tensor, condition: str, time: float) -> Tensor:
        h = torch.tanh(
            model["E"][tokens_BN] + model["P"] + time * model["tau"] + recorded[f"cond_{condition}"][:, None]
        )
        seen = torch.nn.functional.one_hot(tokens_BN, settings["K"]).to(h.dtype)
        return (torch.tanh(model["A"] @ h) + h) @ model["O"] + model["copy"] * seen

    def denoiser(condition: str):
        def denoise(tokens_BN: Tensor, state: dice.State) -> Tensor:
            parts = (logits(tokens_BN, each, state.time) for each in (condition, "uncond"))
            return dice.guided(*parts, settings["cfg"])

        return denoise

    return recorded, settings, SimpleNamespace(logits=logits, denoiser=denoiser)


@pytest.mark.parametrize("name", ["grid_copy", "grid_nocopy"])
def test_pictures(name):
    recorded, settings, model = toy_grid(name)
    x0, noise, u = (rows(recorded[key]) for key in ("x0", "noise", "u"))
    states = dice.trajectory(
        settings["steps"], settings["tau"], temperatures=settings["temperature_inversion"], convention="paella"
    )
    for state, mask, expected in zip(states, recorded["masks"], recorded["x_noised"], strict=False):
        assert torch.equal(u <= state.fraction, rows(mask).bool())
        assert torch.equal(dice.noised(x0, noise, u, state.fraction), rows(expected))
    y0 = model.logits(x0, "source", 0.0)
    torch.testing.assert_close(y0, rows(recorded["y0"]), **CLOSE)
    source = model.denoiser("source")
    z = [
        dice.residual(y0, source(dice.noised(x0, noise, u, state.fraction), state), state.temperature)
        for state in states
    ]
    torch.testing.assert_close(torch.stack(z), torch.stack([rows(each) for each in recorded["z"]]), **CLOSE)
    start = dice.noised(x0, noise, u, states[-1].fraction)
    assert torch.equal(start, rows(recorded["x_T"]))
    for edit, options in settings["edits"].items():
        lambdas = recorded[f"{edit}.lambda1"].tolist()
        kind = {"None": "constant"}.get(options["lambda_schedule"], options["lambda_schedule"])
        own = dice.lambda_schedule(options["lambda1"], settings["steps"], kind)
        torch.testing.assert_close(torch.tensor(own), torch.tensor(lambdas), rtol=1e-6, atol=1e-7)
        found = list(
            dice.edited(
                model.denoiser(options["prompt"]),
                z.__getitem__,
                start,
                noise,
                u,
                states,
                [(value, 1 - value) for value in lambdas],
                lambda step, edit=edit: rows(recorded[f"{edit}.gumbel"][step]),
            )
        )
        assert torch.equal(torch.stack(found), recorded[f"{edit}.trajectory"].flatten(-2)), edit
        assert torch.equal(found[-1], rows(recorded[f"{edit}.tokens"]))


def test_texts():
    recorded, settings = load_file(ORACLES / "dice/text_pair.safetensors"), META["text_pair"]
    model = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}
    count = settings["sentence_len"]

    def logits(ids_BL: Tensor) -> Tensor:
        length = ids_BL.shape[1]
        h = torch.tanh(model["E"][ids_BL] + model["P"][:length])
        seen = torch.nn.functional.one_hot(ids_BL, settings["V"]).to(h.dtype)
        return (torch.tanh(model["A"][:length, :length] @ h) + h) @ model["O"] + model["copy"] * seen

    def span(ids: Tensor) -> slice:
        """The sentence and the token that ends it, which is predicted but never noise."""
        return slice(ids.shape[-1] - count - 1, None)

    source, target = recorded["source_ids"], recorded["target_ids"]

    def denoiser(ids_BL: Tensor):
        def denoise(tokens_BN: Tensor, state: dice.State) -> Tensor:
            whole = torch.cat([ids_BL[:, : span(ids_BL).start], tokens_BN], 1)
            return logits(whole)[:, span(ids_BL)]

        return denoise

    x0, noise = source[:, span(source)], recorded["noise"][None, span(source)]
    u = torch.cat([recorded["u"], torch.tensor([2.0])])[None]
    states = dice.trajectory(settings["steps"], settings["tau"])
    for state, mask, expected in zip(states, recorded["masks_sentence"], recorded["x_noised"], strict=True):
        assert torch.equal((u <= state.fraction)[0, :count], mask.bool())
        assert torch.equal(dice.noised(x0, noise, u, state.fraction)[0], expected[span(expected)])
    y0 = logits(source)
    torch.testing.assert_close(y0, recorded["y0"], **CLOSE)
    denoise = denoiser(source)
    z = [
        dice.residual(y0[:, span(source)], denoise(dice.noised(x0, noise, u, state.fraction), state), 1.0)
        for state in states
    ]
    torch.testing.assert_close(torch.cat(z), recorded["z"], **CLOSE)
    start = dice.noised(x0, noise, u, states[-1].fraction)
    for edit, options in settings["edits"].items():
        ids = source if options["prompt"] == "source" else target
        value = options["lambda1"]
        gumbels = recorded[f"{edit}.gumbel"]
        found = list(
            dice.edited(
                denoiser(ids), z.__getitem__, start, noise, u, states, [(value, 1 - value)] * len(states),
                lambda step, gumbels=gumbels: gumbels[step][None],
            )
        )  # fmt: skip
        # Recorded after noise has been put back.
        expected = recorded[f"{edit}.trajectory"][:, span(ids)]
        assert torch.equal(torch.cat([*found[1::2], found[-1]]), expected), edit
        assert torch.equal(found[-1], recorded[f"{edit}.ids"][:, span(ids)])


def test_multinomial():
    recorded, settings = load_file(ORACLES / "dice/multinomial.safetensors"), META["multinomial"]
    kernel = dice.Kernel(*(recorded[f"schedule.{name}"] for name in ("at", "bt", "ct", "att", "btt", "ctt")))
    values = settings["K"] + 1
    # The recorded kernel is rounded to float32.
    close = dict(rtol=0, atol=1e-6)
    for time in settings["times"]:
        found = {
            name: recorded[f"t{time}.{name}"] for name in ("gumbel", "x_t", "log_p_x0", "log_posterior", "x_prev", "z")
        }
        forward = dice.log_noised(recorded["x0"], time, kernel, values)
        torch.testing.assert_close(forward, recorded[f"t{time}.log_q_xt_given_x0"].mT, **close)
        drawn = (forward + found["gumbel"].mT).argmax(-1)
        assert torch.equal(drawn[:, 3:], found["x_t"][:, 3:])  # the first were chosen by hand
        posterior = dice.log_posterior(found["log_p_x0"].mT, found["x_t"], time, kernel)
        torch.testing.assert_close(posterior, found["log_posterior"].mT, **close)
        assert posterior.isfinite().all()
        z = dice.residual(dice.log_onehot(found["x_prev"], values), posterior, 1.0)
        torch.testing.assert_close(z, found["z"].mT, **close)
        # Full strength and no noise: the recorded token comes back.
        back = dice.injected(posterior, z, torch.zeros_like(z), 1.0, 0.0).argmax(-1)
        assert torch.equal(back, found["x_prev"])


# -- laws --------------------------------------------------------------------------------------------------------------------


def random_run(seed: int, anchor: str, **options) -> tuple[Tensor, Tensor]:
    """Tokens, and what is left of them at full strength under a random model that has never seen any."""
    generator = torch.Generator().manual_seed(seed)
    values, count = 11, 8
    table, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((values, values), (count, count))
    )
    x0, noise = (torch.randint(values, (3, count), generator=generator) for _ in range(2))
    u = torch.rand(3, count, generator=generator, dtype=torch.float64)

    def denoise(tokens: Tensor, state: dice.State) -> Tensor:
        return 3 * torch.tanh(mix @ table[tokens]) + state.time

    states = dice.trajectory(**{"steps": 5, "tau": 0.9, **options})
    y0 = dice.anchor_logits(denoise(x0, dice.State(0, 0)), x0, anchor)
    z = [dice.residual(y0, denoise(dice.noised(x0, noise, u, s.fraction), s), s.temperature) for s in states]
    start = dice.noised(x0, noise, u, states[-1].fraction)
    zero = torch.zeros_like(y0)
    found = dice.edited(denoise, z.__getitem__, start, noise, u, states, [(1.0, 0.0)] * len(states), lambda step: zero)
    return x0, list(found)[-1]


@given(
    st.integers(0, 10**6),
    st.sampled_from(["corrected", "onehot"]),
    st.sampled_from(sorted(dice.MASK_SCHEDULES)),
    st.sampled_from(dice.CONVENTIONS),
    st.floats(0.05, 1.0),
)
def test_full_strength_gives_the_tokens_back(seed, anchor, schedule, convention, tau):
    x0, found = random_run(seed, anchor, tau=tau, schedule=schedule, convention=convention, temperatures=(0.2, 1.2))
    assert torch.equal(found, x0)


def test_the_published_anchor_gives_back_what_the_model_repeats():
    different = [torch.ne(*random_run(seed, "model")).float().mean().item() for seed in range(20)]
    assert sum(different) / len(different) > 0.5


@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0.05, 1.0), st.sampled_from(sorted(dice.MASK_SCHEDULES)))
def test_noise_stays_noise(seed, steps, tau, schedule):
    u = torch.rand(4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fractions = [state.fraction for state in dice.trajectory(steps, tau, schedule)]
    assert fractions == sorted(fractions) and min(fractions) >= -1e-12 and max(fractions) <= 1 + 1e-12
    masks = [u <= fraction for fraction in fractions]
    assert all((before <= after).all() for before, after in itertools.pairwise(masks))
    for mask, fraction in zip(masks, fractions, strict=True):
        assert abs(mask.float().mean().item() - fraction) < 0.05


def test_schedules_and_injections():
    assert dice.lambda_schedule(0.7, 3) == [0.7] * 3
    assert dice.lambda_schedule(0.8, 3, "linear") == pytest.approx([0.8, 0.4, 0.0])
    assert dice.lambda_schedule(0.25, 3, "exp") == pytest.approx([0.25, 0.5, 1.0])
    y, z, g = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    added = dice.injected(y, z, g, 1.0, 0.0)
    torch.testing.assert_close(dice.injected(y, z, g, 1.0, 0.0, "variance_preserving"), added)
    torch.testing.assert_close(dice.injected(y, z, g, 0.25, 0.75, "variance_preserving"), y + 0.5 * z + 0.75**0.5 * g)
    torch.testing.assert_close(dice.injected(y, z, g, 0.3, 0.7, "max"), y + torch.maximum(0.3 * z, 0.7 * g))
    torch.testing.assert_close(dice.guided(y, z, 1.0), y)
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = dice.gumbel(u)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01) and noise.isfinite().all()
    assert dice.gumbel(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all()
