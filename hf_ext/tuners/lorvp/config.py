"""Configuration of LoR-VP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from transformers import ProcessorMixin

from hf_ext._compat import peft_type
from hf_ext.tuners.ranges import is_count

PROMPTS = ("low_rank", "low_rank_shared", "frame", "tile", "free")
HEADS = ("linear", "output_map", "label_map", "none")


@dataclass
class LorVpConfig(PeftConfig):
    """Configuration of a LoR-VP adapter: one learnt picture of low rank is added to every input of a frozen image model.

    Source: https://huggingface.co/papers/2502.00896.

    Args:
        r (`int`): rank of the prompt in every colour. Default 4, the authors'.
        prompt (`str`): what the prompt is made of: `"low_rank"` (default), a product of two factors for each colour; `"low_rank_shared"`, the same
            factors for all colours, with a weight for each; or what the paper compares with: `"frame"`, free in a border of `width` pixels, `"tile"`,
            one square of `width` pixels again and again, `"free"`, every pixel for itself.
        width (`int`, *optional*): pixels, for the prompts `"frame"` and `"tile"`.
        image_size (`int` or `list[int]`, *optional*): height and width of the prompt. Default: those in the model's configuration.
        pixel_scale (`float`, `list[float]` or `"auto"`): what a prompt for pixels in [0, 1] is multiplied with where the model gets normalised ones: 1 / std, for
            each colour. `"auto"` (default) reads it from the image processor that lies beside the model, and is 1, with a warning, if there is none.
            `LorVpConfig.from_processor` reads it from the one you use.
        init_std (`float`): standard deviation of the right factor at the start; the left one is zero. Default 0.01, the authors'.
        init_weights (`bool`): begin without any effect. Default True; False takes random values, for tests.
        head (`str`): what makes classes of the new task: `"linear"` (default), the classifier is trained with the prompt and saved with it; `"output_map"`, a trained
            linear map of the source classes; `"label_map"`, nothing is trained: each class is given a source class
            ([`LabelMappingCallback`], [`fit_label_map`]), at first the one of its number; `"none"`, outputs stay as they are.
        num_labels (`int`, *optional*): classes of the new task, for the heads `"output_map"` and `"label_map"`.
        id2label (`dict[int, str]`, *optional*): their names, for the same heads; sets `num_labels`.
        resize_prompt (`bool`): resize the prompt to images of another size. Default False: they are refused.
        freeze_norm (`bool`): keep what is frozen in eval mode while training: no dropout, and statistics of BatchNorm stay. Default True.
        target_modules (`str` or `list[str]`, *optional*): name of the convolution that reads the pixels. Default: the first that reads as many channels as pictures
            have. A configuration that has been used holds what was found for its model: names, sizes and scales; make another one for another model.
        exclude_modules (`str` or `list[str]`, *optional*): names that are left out of `target_modules`.
        modules_to_save (`list[str]`, *optional*): modules that are trained whole and saved with the adapter, besides the classifier of the head `"linear"`.

    Raises:
        ValueError: a field is out of its range, or two of them contradict each other.
    """

    r: int = field(default=4, metadata={"help": "Rank of the prompt in every colour."})
    prompt: str = field(default="low_rank", metadata={"help": f"One of {', '.join(PROMPTS)}."})
    width: int | None = field(default=None, metadata={"help": "Pixels of the frame or the tile."})
    image_size: int | list[int] | None = field(default=None, metadata={"help": "Height and width of the prompt."})
    pixel_scale: float | list[float] | str = field(
        default="auto", metadata={"help": "1 / std of the image processor, for each colour."}
    )
    init_std: float = field(default=0.01, metadata={"help": "Size of the right factor at the start."})
    init_weights: bool = field(default=True, metadata={"help": "Begin without any effect."})
    head: str = field(default="linear", metadata={"help": f"One of {', '.join(HEADS)}."})
    num_labels: int | None = field(default=None, metadata={"help": "Classes, for output_map and label_map."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Names of these classes."})
    resize_prompt: bool = field(default=False, metadata={"help": "Resize the prompt to images of another size."})
    freeze_norm: bool = field(default=True, metadata={"help": "Keep what is frozen in eval mode while training."})
    target_modules: str | list[str] | set[str] | None = field(
        default=None, metadata={"help": "Name of the convolution that reads the pixels."}
    )
    exclude_modules: str | list[str] | set[str] | None = field(
        default=None, metadata={"help": "Names that are left out of target_modules."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("LORVP")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if not isinstance(self.pixel_scale, (str, int, float)):
            self.pixel_scale = [float(each) for each in self.pixel_scale]
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        elif self.image_size is not None:
            self.image_size = list(self.image_size)
        if self.id2label is not None:
            # Keys of JSON are strings.
            self.id2label = {int(number): name for number, name in self.id2label.items()}
            self.num_labels = self.num_labels or len(self.id2label)
        self._check()

    def _check(self) -> None:
        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}.")

        def counts(*values: Any) -> bool:
            return all(is_count(value) and value > 0 for value in values)

        require(counts(self.r), "r", "give a positive rank")
        require(self.prompt in PROMPTS, "prompt", f"choose one of {', '.join(map(repr, PROMPTS))}")
        if self.prompt in ("frame", "tile"):
            require(counts(self.width), "width", f"prompt={self.prompt!r} needs it: give a positive number of pixels")
        else:
            require(self.width is None, "width", f"prompt={self.prompt!r} has no use for it; leave it out")
        size = self.image_size
        if size is not None:
            require(isinstance(size, list) and len(size) == 2 and counts(*size), "image_size", "give height and width")
        scales: list[Any] = self.pixel_scale if isinstance(self.pixel_scale, list) else [self.pixel_scale]
        require(
            self.pixel_scale == "auto"
            or (bool(scales) and all(isinstance(s, (int, float)) and math.isfinite(s) and s > 0 for s in scales)),
            "pixel_scale",
            "give 1 / std of the image processor, a positive number for each colour, or 'auto'",
        )
        require(
            self.init_std > 0, "init_std", "give a positive standard deviation; at zero both factors would stay there"
        )
        require(self.head in HEADS, "head", f"choose one of {', '.join(map(repr, HEADS))}")
        if self.head in ("output_map", "label_map"):
            require(counts(self.num_labels), "num_labels", f"head={self.head!r} needs the number of classes")
        else:
            require(
                self.num_labels is None,
                "num_labels",
                f"head={self.head!r} has the classes of the model; load that with num_labels instead",
            )
        if self.id2label is not None:
            require(
                sorted(self.id2label) == list(range(self.num_labels or 0)),
                "id2label",
                f"give the numbers 0 to {(self.num_labels or 0) - 1} a name each",
            )

    @classmethod
    def from_processor(cls, processor: Any, **options: Any) -> LorVpConfig:
        """A configuration with the `pixel_scale` of an image processor of transformers."""
        return cls(pixel_scale=scale_of(processor), **options)


def scale_of(processor: Any) -> float | list[float]:
    """What a step of 1 in pixels of [0, 1] is in the outputs of an image processor, or of a processor that has one, for each colour.

    Raises:
        ValueError: it does not say how it normalises.
    """
    if isinstance(processor, ProcessorMixin):
        processor = processor.image_processor
    try:
        step = processor.rescale_factor * 255 if processor.do_rescale else 255.0
        std = processor.image_std if processor.do_normalize else 1.0
    except AttributeError as error:
        raise ValueError(
            f"processor: {type(processor).__name__} does not say how it normalises ({error}); give pixel_scale."
        ) from error
    return [step / each for each in std] if isinstance(std, (list, tuple)) else step / std
