"""Ordinary causal language models, in the open: blocks, batches, caches, hooks and the token loop. Knows no latents.

Glossary, used by every package of this repository. Axes, always in this order::

    batch       texts (prompts)
    position    tokens of a text, padding on the left
    layer       hidden states: 0..n_layers, 0 = what enters the first block, n_layers = last state, after the final norm
                (never norm it again; only `lm.residual` reads the last block's output before that norm);
                keys and values: one entry per block, index l belongs to block l + 1
    head, kv_head, d_head, d_model, vocab

Position ids count the real tokens of a text from 0, so a text gives the same numbers alone and in a padded batch.

Units: probabilities and accuracies are fractions; entropies, divergences and log-probabilities are in nats.

Names are loaded when they are first asked for, so `import lm` and `import lm.terms` do not import torch.
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
    from lm.edits import ResidualEdit, edited
    from lm.errors import UserError
    from lm.forward import Step, feed
    from lm.generate import Generated, Rules, generate, write_tokens
    from lm.load import load_lm
    from lm.model import LanguageModel
    from lm.partial import Stem, above, below
    from lm.residual import StreamingMean, mean_residual, read_residual
    from lm.steered import Cell, Steered, steer_cells
    from lm.text import EncodedBatch, left_padded

__all__ = [
    "Cell",
    "EncodedBatch",
    "Generated",
    "LanguageModel",
    "ResidualEdit",
    "Rules",
    "Steered",
    "Stem",
    "Step",
    "StreamingMean",
    "UserError",
    "above",
    "below",
    "edited",
    "feed",
    "generate",
    "left_padded",
    "load_lm",
    "mean_residual",
    "read_residual",
    "steer_cells",
    "write_tokens",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Cell": "lm.steered",
        "EncodedBatch": "lm.text",
        "Generated": "lm.generate",
        "LanguageModel": "lm.model",
        "ResidualEdit": "lm.edits",
        "Rules": "lm.generate",
        "Steered": "lm.steered",
        "Stem": "lm.partial",
        "Step": "lm.forward",
        "StreamingMean": "lm.residual",
        "UserError": "lm.errors",
        "above": "lm.partial",
        "below": "lm.partial",
        "edited": "lm.edits",
        "feed": "lm.forward",
        "generate": "lm.generate",
        "left_padded": "lm.text",
        "load_lm": "lm.load",
        "mean_residual": "lm.residual",
        "read_residual": "lm.residual",
        "steer_cells": "lm.steered",
        "write_tokens": "lm.generate",
    },
)
