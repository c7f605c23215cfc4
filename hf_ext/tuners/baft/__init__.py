"""BaFT: basis-level representation fine-tuning (https://huggingface.co/papers/2503.00306)."""
