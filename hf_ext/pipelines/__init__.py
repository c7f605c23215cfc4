"""Pipelines of transformers and diffusers, one folder per method."""
