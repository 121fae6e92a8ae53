"""`python -m experiments.cot`: chain-of-thought vectors, as `codi cot`."""

from experiments.cli import run_module

run_module(__name__)
