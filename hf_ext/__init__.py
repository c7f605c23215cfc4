"""hf_ext: published methods as drop-in parts of the Hugging Face libraries.

Importing the package registers its PEFT types, so that `get_peft_model`, `PeftModel.from_pretrained` and
`model.load_adapter` know them, and its task for `transformers.pipeline`. Every other name is imported when it is first used.
Set `HF_EXT_AUTO_REGISTER=0` to register explicitly with `hf_ext.tuners.register()` and
`hf_ext.pipelines.roserag.pipeline.register()` instead.
"""

from __future__ import annotations

import os

from hf_ext._lazy import lazy_attributes
from hf_ext.registry import public_names

__version__ = "0.1.0"

_LAZY = {
    **public_names(),
    "KnowledgeEditingEvaluator": "hf_ext.metrics.editing",
    "disaggregate": "hf_ext.metrics.disaggregation",
    "evaluate_rag": "hf_ext.metrics.rag",
    "load_edits": "hf_ext.metrics.editing",
    "run_editing": "hf_ext.metrics.editing",
    "SweepAdvisor": "hf_ext.trainers.sft_recipe",
    "plan_batch": "hf_ext.trainers.sft_recipe",
    "sft_recipe": "hf_ext.trainers.sft_recipe",
    "build_card": "hf_ext.model_cards",
    "publish": "hf_ext.model_cards",
}
__all__ = ["__version__", *sorted(_LAZY)]
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)

if os.environ.get("HF_EXT_AUTO_REGISTER", "1") != "0":
    from hf_ext.pipelines.roserag.pipeline import register as register_pipeline
    from hf_ext.tuners import register as register_tuners

    register_tuners()
    register_pipeline()
