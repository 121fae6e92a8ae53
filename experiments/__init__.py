"""The studies: thin entry points over pure functions.

Every module here that has a `main` and a configuration dataclass is a subcommand of `codi` (see experiments/cli.py) and
also runs as `python -m experiments.<name>`. Imports point one way: experiments may import codi, steering and lenses;
they never import it.
"""
