"""DICE: inversion and editing of tokens, with masked models and with multinomial diffusion (https://huggingface.co/papers/2410.08207).

Importing this package tells diffusers the names of its pipelines, so that `DiffusionPipeline.from_pretrained` finds them.
"""

from hf_ext._compat import has_amused_parts, has_vq_diffusion_parts, register_pipeline
from hf_ext._lazy import optional_import

optional_import("diffusers", "diffusers")

from hf_ext.pipelines.dice.block_text import DiceDiffusionGemmaPipeline  # noqa: E402
from hf_ext.pipelines.dice.diffusion_text import DiceDiffusionTextPipeline  # noqa: E402
from hf_ext.pipelines.dice.masked_text import DiceTextEditPipeline  # noqa: E402
from hf_ext.pipelines.dice.trace import DiceSettings, DiceTrace  # noqa: E402

__all__ = [
    "DiceDiffusionGemmaPipeline",
    "DiceDiffusionTextPipeline",
    "DiceSettings",
    "DiceTextEditPipeline",
    "DiceTrace",
]

register_pipeline(DiceTextEditPipeline)
register_pipeline(DiceDiffusionTextPipeline)
register_pipeline(DiceDiffusionGemmaPipeline)

if has_amused_parts():
    from hf_ext.pipelines.dice.masked_image import DiceMaskedImagePipeline

    __all__ += ["DiceMaskedImagePipeline"]
    register_pipeline(DiceMaskedImagePipeline)

if has_vq_diffusion_parts():
    from hf_ext.pipelines.dice.vq_diffusion import DiceVQDiffusionPipeline

    __all__ += ["DiceVQDiffusionPipeline"]
    register_pipeline(DiceVQDiffusionPipeline)
