"""`python -m experiments.lens`: the lenses on latents, as `codi lens`."""

from experiments.cli import run_module

run_module(__name__)
