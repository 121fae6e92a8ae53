"""`python -m experiments.circuit`: heads of a written chain of thought, as `codi circuit`."""

from experiments.cli import run_module

run_module(__name__)
