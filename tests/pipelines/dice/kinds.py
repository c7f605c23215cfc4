"""The pipelines with their inputs: what the contract is tested on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from hf_ext.pipelines.dice import (
    DiceDiffusionGemmaPipeline,
    DiceDiffusionTextPipeline,
    DiceMaskedImagePipeline,
    DiceTextEditPipeline,
    DiceVQDiffusionPipeline,
)
from tests.pipelines.dice.models import (
    amused_parts,
    diffusion_gemma_parts,
    roberta,
    vq_diffusion_parts,
    word_tokenizer,
)

TEXTS = ["the film was so good and long .", "a movie is bad ."]


@dataclass(frozen=True)
class Kind:
    """A pipeline, with two inputs and prompts.

    Attributes:
        parts: makes its components.
        settings: arguments of the pipeline.
        inversion: arguments of `invert` that make a short trajectory.
    """

    cls: type
    parts: Callable[[], dict]
    prompts: tuple[str, str]
    settings: dict = field(default_factory=dict)
    inversion: dict = field(default_factory=dict)

    def pipeline(self) -> Any:
        pipeline = self.cls(**self.parts(), **self.settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def is_text(self) -> bool:
        return "text" in self.cls.__name__.lower() or "Gemma" in self.cls.__name__

    def sources(self) -> Any:
        """Two texts of different lengths, or the codes of two pictures."""
        return TEXTS if self.is_text else torch.randint(16, (2, 8, 8), generator=torch.Generator().manual_seed(7))


def roberta_parts() -> dict:
    tokenizer = word_tokenizer()
    return dict(model=roberta(len(tokenizer)), tokenizer=tokenizer)


WORDS = ("positive :", "negative so :")
COLOURS = ("red", "dark blue")
FEW = dict(num_inference_steps=5)
KINDS = {
    "masked text": Kind(DiceTextEditPipeline, roberta_parts, WORDS, {}, FEW),
    "masked text, masks": Kind(DiceTextEditPipeline, roberta_parts, WORDS, {"noise": "mask"}, FEW),
    "diffusion text": Kind(DiceDiffusionTextPipeline, roberta_parts, WORDS, {}, FEW),
    "DiffusionGemma": Kind(DiceDiffusionGemmaPipeline, diffusion_gemma_parts, ("positive", "negative so"), {}, FEW),
    "aMUSEd": Kind(DiceMaskedImagePipeline, amused_parts, COLOURS, {"guidance_scale": 1.0}, FEW),
    "aMUSEd, guided": Kind(DiceMaskedImagePipeline, amused_parts, COLOURS, {}, FEW),
    "aMUSEd, random": Kind(
        DiceMaskedImagePipeline, amused_parts, COLOURS, {"noise": "random", "guidance_scale": 1.0}, FEW
    ),
    "VQ-Diffusion": Kind(DiceVQDiffusionPipeline, vq_diffusion_parts, COLOURS, {"guidance_scale": 1.0}),
    "VQ-Diffusion, guided": Kind(DiceVQDiffusionPipeline, vq_diffusion_parts, COLOURS, {"tau": 0.5}),
}


@cache
def pipeline(name: str) -> Any:
    """One that tests share and leave as it is."""
    return KINDS[name].pipeline()


def seeded(count: int = 2, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def inverted(name: str, pipe: Any = None, sources: Any = None, generator: Any = None, **options: Any) -> Any:
    kind = KINDS[name]
    pipe = pipeline(name) if pipe is None else pipe
    sources = kind.sources() if sources is None else sources
    generator = seeded(len(sources)) if generator is None else generator
    return pipe.invert(sources, kind.prompts[0], generator=generator, **{**kind.inversion, **options})


def sequences(name: str, trace: Any, pipe: Any = None, **options: Any) -> torch.Tensor:
    """Tokens of an edit under the other prompt."""
    pipe = pipeline(name) if pipe is None else pipe
    options = {"generator": seeded(trace.rows, 5), "output_type": "seq", **options}
    return pipe.edit(trace, options.pop("target_prompt", KINDS[name].prompts[1]), **options).sequences


every_kind = pytest.mark.parametrize("name", KINDS)
