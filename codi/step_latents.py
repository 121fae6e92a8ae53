"""Which latent learns which step of the written chain, and which is to say nothing, as `--step-latents` spells it.

What learns is the state that becomes latent k, h_{k-1}: the output at latent k - 1 (for k = 1 at the begin-of-thought
token), which lenses show as h_{k-1}. Latent n + 1 stands for the output of the last latent, which nothing is fed from.

    same            latent k learns step k
    later           latent k + 1 learns step k
    2:1,4:2         these latents learn these steps, the others nothing
    2:1,3:-,4:2     latent 3 is to say nothing: its state is to predict all tokens alike

Imports nothing: a command line can be read without torch.
"""

from __future__ import annotations

import re

from lm.errors import UserError

__all__ = ["SILENT", "parse_step_latents"]

SILENT = 0
"""Stands in place of a step where a latent is to say nothing."""
HELP = "same, later, or pairs latent:step such as 2:1,4:2 (a latent that is to say nothing: 3:-)"


def parse_step_latents(text: str, n_latents: int) -> tuple[tuple[int, int], ...]:
    """Pairs (latent, step), ascending; step SILENT: the latent is to say nothing.

    Args:
        text: as in the head of this module.
        n_latents: of the model; latents are 1..n_latents + 1.

    Raises:
        ValueError: another form, a latent that does not exist or is named twice.
    """
    if text == "same":
        return tuple((k, k) for k in range(1, n_latents + 1))
    if text == "later":
        return tuple((k + 1, k) for k in range(1, n_latents + 1))
    pairs = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*:\s*([1-9]\d*|-)\s*", part)
        if not found:
            raise UserError(f"step-latents must be {HELP}, got {text!r}")
        pairs.append((int(found[1]), SILENT if found[2] == "-" else int(found[2])))
    latents = [latent for latent, _ in pairs]
    for latent in latents:
        if not 1 <= latent <= n_latents + 1:
            raise UserError(
                f"latents of step-latents must be in 1..{n_latents + 1} ({n_latents + 1}: the output of the last "
                f"latent), got {latent}"
            )
    if len(set(latents)) < len(latents):
        raise UserError(f"step-latents names a latent twice: {text!r}")
    return tuple(sorted(pairs))
