"""Every claim on control vectors comes out as held, not held, undecided and not testable where it should."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from simulated_control import Effect, both

from experiments.control.claims import claims_of
from experiments.statistics.clusters import Settings
from experiments.study.claims import ClaimsTable

SETTINGS = Settings(resamples=1000, permutations=200)


def judged(effect: Effect, layers: Sequence[int] = (2,), middle: int = 2, **options: object) -> ClaimsTable:
    validation, test = both(effect, layers=layers, **options)
    return claims_of(validation, test, layers, middle, SETTINGS)


def helpful(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
    """The vector helps with one sign and harms with the other; random directions do a little of both."""
    if kind == "vector":
        return {"correct": 0.3 * alpha, "p_right": 0.2 * alpha, "entropy": -0.5 * alpha, "kl": alpha**2}
    return {"correct": 0.02 * (draw % 5 - 2) * alpha, "kl": alpha**2}


def nothing(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
    return {"kl": alpha**2}


def any_direction(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
    """Whatever is added helps, with either sign: the direction is not what helps."""
    return {"correct": 0.3 * abs(alpha), "p_right": 0.2 * abs(alpha), "entropy": 0.4 * abs(alpha), "kl": alpha**2}


def test_a_direction_that_helps() -> None:
    found = judged(helpful)
    assert {claim.name: claim.verdict for claim in found} == {
        "R1 (beyond random)": "held", "R2 (coherent)": "held", "R3 (KL)": "held",
        "R4 (middle layer)": "not testable", "R5 (both signs)": "not held",
    }  # fmt: skip
    assert "alpha 1" in found["R1 (beyond random)"].note


def test_no_effect_is_not_held_where_there_are_items_enough() -> None:
    found = judged(nothing, n=600)
    for name in ("R1 (beyond random)", "R2 (coherent)", "R5 (both signs)"):
        assert found[name].verdict == "not held", found[name]
    assert found["R3 (KL)"].verdict == "held"


def test_few_items_are_undecided() -> None:
    def weak(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
        return {**nothing(kind, layer, alpha, draw), "correct": 0.1 * abs(alpha) if kind == "vector" else 0.0}

    found = judged(weak, n=24)
    assert found["R1 (beyond random)"].verdict == "undecided"
    assert found["R5 (both signs)"].verdict == "undecided"


def test_what_any_direction_does_is_not_beyond_random() -> None:
    found = judged(any_direction)
    assert found["R1 (beyond random)"].verdict == "not held"
    assert found["R2 (coherent)"].verdict == "not held"  # entropy rises
    assert found["R5 (both signs)"].verdict == "held"


def test_too_few_draws_and_a_ceiling_are_not_testable() -> None:
    assert judged(helpful, draws=18)["R1 (beyond random)"].verdict == "not testable"
    assert judged(helpful, draws=19)["R1 (beyond random)"].verdict == "held"
    found = judged(helpful, accuracy=1.0)
    for name in ("R1 (beyond random)", "R2 (coherent)", "R5 (both signs)"):
        assert found[name].verdict == "not testable" and "ceiling" in found[name].note
    assert judged(helpful, alphas=(0.0, 0.5, 1.0))["R5 (both signs)"].verdict == "not testable"


def test_a_divergence_that_falls_is_no_u() -> None:
    def saturating(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
        return {"kl": 1 - (abs(alpha) - 0.3) ** 2 if alpha > 0 else alpha**2}

    assert judged(saturating)["R3 (KL)"].verdict == "not held"
    validation, test = both(helpful)
    test.loc[(test["kind"] == "vector") & (test["alpha"] == 0), "kl"] = 1e-6
    assert claims_of(validation, test, (2,), 2, SETTINGS)["R3 (KL)"].verdict == "not held"


@pytest.mark.parametrize(("best", "verdict"), [(2, "held"), (3, "not held")])
def test_the_middle_layer(best: int, verdict: str) -> None:
    def at(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
        size = 0.3 if layer == best else 0.05
        return {"correct": size * alpha if kind == "vector" else 0.0, "kl": alpha**2}

    assert judged(at, layers=(1, 2, 3), middle=2)["R4 (middle layer)"].verdict == verdict
    assert judged(at, layers=(1, 3, 4), middle=2)["R4 (middle layer)"].verdict == "not testable"
    assert judged(nothing, layers=(1, 2, 3), middle=2)["R4 (middle layer)"].verdict == "not testable"


def test_the_same_middle_layer_is_undecided_with_few_items() -> None:
    def noisy(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
        return {"correct": 0.02 * layer * alpha if kind == "vector" else 0.0, "kl": alpha**2}

    found = judged(noisy, layers=(1, 2, 3), middle=2, n=60)
    assert found["R4 (middle layer)"].verdict in ("undecided", "not testable")
    assert np.isfinite(found["R3 (KL)"].estimate)
