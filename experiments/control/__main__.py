"""`python -m experiments.control`: the controles on latents, as `codi control`."""

from experiments.cli import run_module

run_module(__name__)
