"""Sizes that matter: read from planted spreads between wordings, and never 0."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.sizes import between_forms, between_halves


def asked(spread: float, clusters: int, forms: int = 8, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Values of clusters x forms: a form's own shift of the given standard deviation, and noise per prompt."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, spread, forms)
    values = rng.normal(size=(clusters, 1)) * 3 + shift + noise * rng.normal(size=(clusters, forms))
    names = np.repeat([f"c{i}" for i in range(clusters)], forms)
    return values.ravel(), names, np.tile([f"f{j}" for j in range(forms)], clusters)


def test_planted_spread_between_wordings_is_found_without_the_noise() -> None:
    found = np.array([between_forms(*asked(0.5, 200, seed=seed)).spread for seed in range(20)])
    assert np.sqrt((found**2).mean()) == pytest.approx(0.5 * np.sqrt(2), rel=0.15)  # of a difference of two forms
    none = [between_forms(*asked(0.0, 200, seed=seed)).spread for seed in range(20)]
    assert np.mean(none) < 0.05
    few, many = (np.mean([between_forms(*asked(0.5, n, seed=s)).spread for s in range(20)]) for n in (40, 400))
    assert abs(few - many) < 0.2 * many  # it does not shrink with n …
    halves = [between_halves(*asked(0.5, n)[:2]).spread for n in (40, 400)]
    assert halves[1] < 0.5 * halves[0]  # … while that between halves does


def test_by_hand() -> None:
    values = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    found = between_forms(values, np.repeat(["a", "b", "c"], 2), np.tile(["x", "y"], 3))
    assert found.size == found.spread == 1.0 and found.pairs == 1 and "2 wordings" in found.words
    mixed = between_forms(np.array([1.0, 0, 0, 1, 1, 0]), np.repeat(["a", "b", "c"], 2), np.tile(["x", "y"], 3))
    assert mixed.spread == 0.0  # differences 1, -1, 1: mean 1/3, variance of the mean 4/9
    assert mixed.size == mixed.resolution == pytest.approx(1 / 6) and "one prompt in 6" in mixed.words


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="use between_halves"):
        between_forms(np.arange(3.0), np.arange(3), np.arange(3))
    with pytest.raises(ValueError, match="every value is the same"):
        between_halves(np.ones(6), np.arange(6))
    with pytest.raises(ValueError, match="finite"):
        between_halves(np.array([1.0, np.nan]), np.arange(2))
    with pytest.raises(ValueError, match="two clusters"):
        between_halves(np.arange(3.0), np.zeros(3))
