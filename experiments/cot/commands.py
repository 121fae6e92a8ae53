"""`codi cot`: which module runs which options. Runs as `codi cot` or `python -m experiments.cot`."""

from __future__ import annotations

import importlib

from experiments.cot.options import CotRunOptions, DeriveOptions, EvalOptions, GridOptions, ShowOptions

__all__ = ["main"]


def main(options: DeriveOptions | GridOptions | EvalOptions | ShowOptions | CotRunOptions) -> None:
    """Run the command that the options belong to; its module is named after it."""
    importlib.import_module(f"experiments.cot.{options.COMMAND.split()[-1]}").main(options)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
