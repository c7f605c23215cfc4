"""Fine-tuning small language models: presets of a published study, and advice on a sweep while it runs.

https://huggingface.co/papers/2412.13337. Every name is imported when it is first used.
"""

from __future__ import annotations

from hf_ext._lazy import lazy_attributes

_LAZY = {
    "PRESETS": ".presets",
    "SweepAdvisor": ".advisor",
    "plan_batch": ".presets",
    "sft_recipe": ".presets",
}
__all__ = sorted(_LAZY)
__getattr__, __dir__ = lazy_attributes(globals(), _LAZY)
