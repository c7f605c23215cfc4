"""Trainers: one folder per method, each a `<Method>Config`/`<Method>Trainer` pair over a TRL trainer."""
