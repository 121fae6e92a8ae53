"""`python -m experiments.alternation.run`, the same as `codi alternation`."""

from experiments.cli import run_module

run_module("experiments.alternation.run")
