"""`python -m experiments.lens.run`, the same as `codi lens`."""

from experiments.cli import run_module

run_module("experiments.lens.run")
