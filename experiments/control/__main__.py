"""`python -m experiments.control`: control vectors of language models, as `codi control`."""

from experiments.cli import run_module

run_module(__name__)
