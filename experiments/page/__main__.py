"""`python -m experiments.page`: every study on one model and one page, as `codi findings`."""

from experiments.cli import run_module

run_module(__name__)
