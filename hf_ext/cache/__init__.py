"""Caches for `generate`, and the attention functions that read them."""
