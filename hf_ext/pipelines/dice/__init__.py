"""DICE: inversion and editing of tokens, with masked models and with multinomial diffusion (https://huggingface.co/papers/2410.08207)."""
