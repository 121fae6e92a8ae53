"""`python -m experiments.alternation`: the test of alternation, as `codi alternation`."""

from experiments.cli import run_module

run_module(__name__)
