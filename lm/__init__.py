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
    from lm.errors import UserError
    from lm.forward import Step, feed
    from lm.generate import Generated, Rules, write_tokens
    from lm.model import LanguageModel
    from lm.residual import StreamingMean, mean_residual, read_residual
    from lm.text import EncodedBatch, left_padded

__all__ = [
    "EncodedBatch",
    "Generated",
    "LanguageModel",
    "Rules",
    "Step",
    "StreamingMean",
    "UserError",
    "feed",
    "left_padded",
    "mean_residual",
    "read_residual",
    "write_tokens",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "EncodedBatch": "lm.text",
        "Generated": "lm.generate",
        "LanguageModel": "lm.model",
        "Rules": "lm.generate",
        "Step": "lm.forward",
        "StreamingMean": "lm.residual",
        "UserError": "lm.errors",
        "feed": "lm.forward",
        "left_padded": "lm.text",
        "mean_residual": "lm.residual",
        "read_residual": "lm.residual",
        "write_tokens": "lm.generate",
    },
)
