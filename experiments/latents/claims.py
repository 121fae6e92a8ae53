"""Published claims about latents that several studies can judge. Knows nothing about how the numbers were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.study.claims import Claim, effect_claim, judge

__all__ = ["MARGIN", "number_claims"]

MARGIN = 0.02
"""A loss of less than this (two points) counts as no harm in claims of no effect."""


def number_claims(step: Callable[[int], Mapping[str, Any]], n: int) -> list[Claim]:
    """C1, from paired changes of accuracy per latent.

    Args:
        step: k -> the row (difference, lower, upper, n, n_clusters) of accuracy(k latents) − accuracy(k − 1).
        n: latents of the model.
    """
    if n != 6:
        note = f"the claim is about 6 latents, this model has {n}"
        return [Claim("C1", "accuracy peaks at 5 latents", "", "not testable", note=note)]
    jump, sixth = step(5), step(6)
    return [
        effect_claim(
            "C1 (jump)",
            "accuracy jumps from 4 to 5 latents",
            "accuracy(5) − accuracy(4) is above 0",
            judge(jump["lower"], jump["upper"], above=0.0),
            jump,
        ),
        effect_claim(
            "C1 (sixth)",
            "the sixth latent adds nothing",
            f"accuracy(6) − accuracy(5) is below {MARGIN}",
            judge(sixth["lower"], sixth["upper"], below=MARGIN),
            sixth,
        ),
    ]
