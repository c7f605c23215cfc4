"""Trainers: one folder per method, each a `<Method>Config`/`<Method>Trainer` pair over a TRL trainer.

They share `projection` (products with a large output layer) and `output_layer` (what is read of a model).
"""
