"""SQuat: a quantised key-value cache for `generate` (https://huggingface.co/papers/2503.24358)."""

from hf_ext.cache.squat.attention import register, squat_attention
from hf_ext.cache.squat.cache import SQuatCache
from hf_ext.cache.squat.config import SQuatCacheConfig
from hf_ext.cache.squat.layer import SQuatLayer

__all__ = ["SQuatCache", "SQuatCacheConfig", "SQuatLayer", "squat_attention"]

register()
