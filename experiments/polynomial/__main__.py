"""`python -m experiments.polynomial`: claims about polynomial iteration, as `codi polynomial`."""

from experiments.cli import run_module

run_module(__name__)
