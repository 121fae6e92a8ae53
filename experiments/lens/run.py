"""`codi lens`: logit lens and tuned lens on latents.

    codi lens train                        # every latent × layer, in one pass over streamed rollouts -> runs/lens
    codi lens show --text "…"              # heatmap of the most probable tokens of one prompt
    codi lens detect                       # are intermediates and answers among the top k? beside a chance level
    codi lens difference                   # the lens on mean_A − mean_B, all pairs and layers
    codi lens transfer                     # lenses of latents on text tokens, and the reverse
    codi lens causal                       # ablate what the lens reads, inside the model, beside random directions

Each command writes one folder (tables as CSV, figures as PNG and PDF, result.json) and prints a short summary. Lenses:
"plain" (logit lens), "each" (one tuned lens per position) or the name of one tuned lens, used everywhere; the names are
those of `lenses.lens_positions`, with the published 0-based reading under "published …".

Here only which module runs which options; runs as `codi lens` or `python -m experiments.lens`.
"""

from __future__ import annotations

import importlib

from experiments.lens.options import (
    CausalOptions,
    DetectOptions,
    DifferenceOptions,
    ShowOptions,
    TrainOptions,
    TransferOptions,
)

__all__ = ["main"]


def main(
    options: TrainOptions | ShowOptions | DetectOptions | DifferenceOptions | TransferOptions | CausalOptions,
) -> None:
    """Run the command that the options belong to; its module is named after it."""
    importlib.import_module(f"experiments.lens.{options.COMMAND.split()[-1]}").main(options)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
