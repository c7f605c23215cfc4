"""Hot loops, one folder per operator: `reference.py` is the truth, the other files must agree with it."""
