"""Sizes that matter: read from planted spreads between wordings, and never 0."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.sizes import between_forms, between_halves, smallest_size


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


def test_columns_share_one_size_and_prompts_decide_how_it_is_read() -> None:
    rng = np.random.default_rng(5)
    clusters, forms = np.repeat(np.arange(40), 3), np.tile(["a", "b", "c"], 40)
    shift = np.tile([0.0, 0.3, 0.6], 40)
    values = np.stack([shift + 0.01 * rng.random(120), 0.01 * rng.random(120)], axis=1)
    one, other, both = (
        between_forms(values[:, 0], clusters, forms),
        values[:, 1],
        between_forms(values, clusters, forms),
    )
    assert both.pairs == 2 * one.pairs and both.size == pytest.approx(one.size / np.sqrt(2), rel=1e-3)
    assert smallest_size(values, clusters, forms).size == both.size
    assert "half" in smallest_size(other, clusters, np.array([""] * 120)).words  # no forms
    assert "half" in smallest_size(other, np.arange(120), forms).words  # no cluster in two forms
    nothing = smallest_size(np.zeros(120), clusters, forms)
    assert nothing.size == pytest.approx(1 / 120) and "no value differs" in nothing.words
    holes = np.where(np.arange(120)[:, None] < 60, values, np.nan)
    assert smallest_size(holes, clusters, forms).size == between_forms(values[:60], clusters[:60], forms[:60]).size
    assert "one cluster" in smallest_size(other, np.zeros(120), forms).words
    with pytest.raises(ValueError, match="no prompt has every value"):
        smallest_size(np.full(120, np.nan), clusters, forms)
