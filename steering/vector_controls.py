"""What a control vector is measured against: random vectors of its size, and coefficients of equal disturbance.

Pure functions of vectors, seeds and measured numbers. Pairs whose texts were swapped at random are the third control;
they need the states, see `steering.contrasts.PairStatistics.shuffled`. Equal norms alone: `ControlVector.scaled`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from lm.errors import UserError
from steering.control_vectors import ControlVector
from steering.directions import generator

__all__ = ["equal_kl", "random_vector"]


def random_vector(like: ControlVector, draw: int, seed: int = 0) -> ControlVector:
    """A vector that points anywhere, isotropic in every layer, with the norms of `like` layer by layer.

    Args:
        like: vector to match.
        draw: which one; draws, layers and seeds are independent of each other and of what else is drawn.
        seed: of all draws.
    """
    directions = {
        layer: torch.from_numpy(generator(seed, "control vector", draw, layer).standard_normal(like.d_model))
        for layer in like.layers
    }
    a = like.origin
    origin = replace(a, method="random", tokens=None, n=None, centred=None, scale=None, explained={}, data_digest=None)
    return ControlVector(directions, origin).scaled(like)


def equal_kl(coefficients: Sequence[float], kl: Sequence[float], target: float) -> float:
    """The coefficient at which a vector disturbs the model by a given amount, from a measured grid.

    Between two coefficients the root of the divergence is taken to be a straight line, which is exact where the
    divergence grows with the square of the coefficient, as it does near 0.

    Args:
        coefficients: 0 first, then all of one sign, away from 0.
        kl: mean KL(unsteered || steered) at each, in nats: 0 first, not falling before the target is reached.
        target: nats, above 0.

    Returns:
        Coefficient of the same sign.

    Raises:
        ValueError: a grid that is not of this form, a divergence that falls before it reaches the target, or never
            reaches it.
    """
    if len(coefficients) != len(kl) or len(kl) < 2:
        raise UserError(
            f"two or more coefficients with a divergence each are needed, got {len(coefficients)}, {len(kl)}"
        )
    if not all(map(math.isfinite, (*coefficients, *kl, target))) or target <= 0:
        raise UserError(f"coefficients and divergences must be finite and the target above 0, got target {target}")
    sign = math.copysign(1.0, coefficients[-1])
    sizes = [sign * c for c in coefficients]
    if sizes[0] != 0 or any(after <= before for before, after in zip(sizes, sizes[1:], strict=False)):
        raise UserError(f"coefficients must begin at 0 and go one way, got {', '.join(f'{c:g}' for c in coefficients)}")
    if kl[0] != 0:
        raise UserError(f"the divergence at coefficient 0 must be 0, got {kl[0]:g}")
    for i in range(1, len(kl)):
        if kl[i] < kl[i - 1]:
            raise UserError(
                f"the divergence falls from {kl[i - 1]:g} to {kl[i]:g} at {coefficients[i]:g}, below {target:g}: "
                "no one coefficient stands for it"
            )
        if kl[i] >= target:
            low, high = math.sqrt(kl[i - 1]), math.sqrt(kl[i])
            share = (math.sqrt(target) - low) / (high - low)
            return sign * (sizes[i - 1] + share * (sizes[i] - sizes[i - 1]))
    raise UserError(f"the divergence reaches {kl[-1]:g} at {coefficients[-1]:g}, not {target:g}: measure larger ones")
