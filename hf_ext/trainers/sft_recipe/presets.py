"""Named settings for `trl.SFTTrainer` from "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs"
(https://huggingface.co/papers/2412.13337, ICLR 2025).

The study fine-tuned Granite 3B and 7B, Mistral 7B and Llama 3.2 3B in full on instruction data of some 10^5 to 10^6 samples. What
it found, and what speaks against taking it as it is:

- Batches of about 4,000 samples are as good as 128 or better (MT-Bench 6.83 against 6.41 at best), but see no fewer samples
  until their peak. Its authors' later guide takes 32 to 64 below 1,000 samples and 128 below 10,000, and a study of 96 runs on an
  8B model (2506.14681) chose 32 of 32 to 256. LoRA prefers small batches.
- Low learning rates win at every batch size: 2e-5 for Granite and Llama, 1e-6 for Mistral, not scaled with the batch.
- Warm-up and cosine decay make no difference; a constant rate can be stopped and continued anywhere.
- Shuffling all data together is never worse than phases.
- On the same data, runs that end better show a lower gradient norm and a higher loss early; see `advisor`.

Most runs of the study are single ones, and differences of 0.01 are within their noise.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from trl import SFTConfig

# An epoch has at least this many optimizer steps, however large the batch of the study was.
MINIMUM_STEPS = 20


@dataclass(frozen=True)
class Preset:
    """Settings of one recipe.

    Attributes:
        summary: when to take it, with its source.
        batch: samples of an optimizer step; None chooses by the number of samples.
        learning_rate, scheduler, warmup_ratio, epochs: as in `SFTConfig`.
    """

    summary: str
    batch: int | None
    learning_rate: float
    scheduler: str
    warmup_ratio: float
    epochs: float


PRESETS = {
    "lab": Preset(
        "the study's recommendation for 10^5 samples and more: 3,840 samples a step, constant rate, no warm-up",
        3840,
        2e-5,
        "constant",
        0.0,
        10,
    ),
    "lab_8k": Preset(
        "the same with 7,680 samples a step, the study's best where it can be afforded",
        7680,
        2e-5,
        "constant",
        0.0,
        10,
    ),
    "tulu": Preset(
        "the study's baseline: 128 samples a step, linear decay, warm-up of 3 %", 128, 2e-5, "linear", 0.03, 3
    ),
    "small_data": Preset(
        "fewer than 10^5 samples: the batch grows with the data, as in the authors' later guide",
        None,
        5e-6,
        "constant",
        0.0,
        3,
    ),
}
"""Recipes of `sft_recipe` by name: summary, samples per step, learning rate, schedule, warm-up and epochs (https://huggingface.co/papers/2412.13337)."""


def batch_for(samples: int) -> int:
    """Samples of an optimizer step by the size of the data, from the guide of the study's authors."""
    return 32 if samples < 500 else 64 if samples < 1000 else 128 if samples < 10_000 else 256


def plan_batch(effective: int, world_size: int, per_device: int) -> tuple[int, int]:
    """(per_device_train_batch_size, gradient_accumulation_steps) whose product with the processes is `effective`.

    The first is the largest divisor of an equal share that is at most `per_device`.

    Raises:
        ValueError: a number below 1, or `effective` is not a multiple of the processes; the message names the nearest that is.
    """
    for name, value in (("effective", effective), ("world_size", world_size), ("per_device", per_device)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if effective % world_size:
        near = sorted({max(effective // world_size, 1) * world_size, -(-effective // world_size) * world_size})
        raise ValueError(
            f"effective={effective} samples cannot be shared by {world_size} processes: take {' or '.join(map(str, near))}."
        )
    share = effective // world_size
    size = max(divisor for divisor in range(1, min(per_device, share) + 1) if share % divisor == 0)
    return size, share // size


def sft_recipe(
    name: str, output_dir: str, samples: int, *, world_size: int = 1, per_device: int = 8, **overrides: Any
) -> SFTConfig:
    """An `SFTConfig` with the settings of a preset.

    Args:
        name: a name of `PRESETS`.
        output_dir: as in `SFTConfig`.
        samples: training examples, before packing. They limit the batch: an epoch has at least 20 steps.
        world_size: processes that train together.
        per_device: samples that fit on one device.
        overrides: fields of `SFTConfig` that replace those of the preset. Mistral 7B wants `learning_rate=1e-6`; try factors of 2
            to 5 up and down in any case, as the study did.

    Raises:
        ValueError: an unknown name, too few samples, or a batch that cannot be shared.

    Example:
        ```python
        args = sft_recipe("small_data", "tuned", samples=5_000, per_device=4)
        trainer = SFTTrainer("google/gemma-3-270m", args, train_dataset=data)
        ```
    """
    if name not in PRESETS:
        raise ValueError(f"the recipe {name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    if samples < world_size:
        raise ValueError(f"samples={samples} is less than one for each of {world_size} processes.")
    preset = PRESETS[name]
    wanted = preset.batch or batch_for(samples)
    together = world_size * per_device
    most = max(samples // MINIMUM_STEPS // world_size, 1) * world_size
    # A multiple of what fits on the devices, so that few steps are not made of many tiny batches.
    most = most // together * together or most
    if wanted > most:
        warnings.warn(
            f"{samples} samples in batches of {wanted} would be {samples / wanted:.1f} steps per epoch: the batch is {most}, so "
            f"that there are {samples // most}.",
            stacklevel=2,
        )
    size, accumulation = plan_batch(min(-(-wanted // world_size) * world_size, most), world_size, per_device)
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": preset.learning_rate,
        "lr_scheduler_type": preset.scheduler,
        "warmup_steps": preset.warmup_ratio,  # below 1 it is a share of all steps
        "num_train_epochs": preset.epochs,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    }
    return SFTConfig(**settings | overrides)
