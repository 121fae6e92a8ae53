"""`python -m experiments.sweep`: the steering sweep, as `codi sweep`."""

from experiments.cli import run_module

run_module(__name__)
