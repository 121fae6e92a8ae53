"""`python -m experiments.evaluate`: accuracy of a model, as `codi eval`."""

from experiments.cli import run_module

run_module(__name__)
