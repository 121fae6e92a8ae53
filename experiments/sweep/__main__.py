"""`python -m experiments.sweep.run`, the same as `codi sweep`."""

from experiments.cli import run_module

run_module("experiments.sweep.run")
