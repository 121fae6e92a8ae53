"""`codi control`: control vectors by representation engineering on ordinary language models.

    codi control derive                    # vectors of four methods at every layer, as files -> runs/control-derive
    codi control show                      # their norms, cosines, and what they say through the unembedding
    codi control sweep                     # steer: layers × alphas × vectors, beside random directions
    codi control transfer                  # the vector of each task on every other one

Each command writes one folder (tables as CSV, figures as PNG and PDF, result.json) and prints a short summary.

Here only which module runs which options; runs as `codi control` or `python -m experiments.control`.

Source: Højer, Jarvis, Heinrich 2025, Improving reasoning performance in large language models via representation
engineering, arXiv 2504.19483.
"""

from __future__ import annotations

import importlib

from experiments.control.options import DeriveOptions, ShowOptions, SweepOptions, TransferOptions

__all__ = ["main"]


def main(options: DeriveOptions | SweepOptions | ShowOptions | TransferOptions) -> None:
    """Run the command that the options belong to; its module is named after it."""
    importlib.import_module(f"experiments.control.{options.COMMAND.split()[-1]}").main(options)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
