"""`python -m experiments.train`: train a CODI model, as `codi train`; accelerate and torchrun start it like this."""

from experiments.cli import run_module

run_module(__name__)
