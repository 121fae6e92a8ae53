"""`python -m experiments.show`: look at a run folder, as `codi show`."""

from experiments.cli import run_module

run_module(__name__)
