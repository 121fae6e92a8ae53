"""The one rule for intervals: coverage, constants, few clusters, any function of cluster sums."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import statistics
from experiments.statistics.clusters import (
    Settings,
    accuracy_interval,
    bootstrap_interval,
    cluster_codes,
    cluster_interval,
    cluster_sums,
    cluster_weights,
    interval_of,
    mean_intervals,
)
from experiments.statistics.paired import paired_interval


def test_where_all_clusters_agree_the_interval_is_exact() -> None:
    share = 1 - 0.025 ** (1 / 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (True, False):
            estimate = accuracy_interval([value] * 12, list("aabbccddeeff"))
            assert estimate.estimate == float(value) and estimate.upper - estimate.lower == pytest.approx(share)
            assert (estimate.n, estimate.n_clusters) == (12, 6) and estimate.estimate in (
                estimate.lower,
                estimate.upper,
            )
        same = paired_interval([1, 0, 1, 0], [1, 0, 1, 0], list("abcd"))
        few = 1 - 0.025 ** (1 / 4)
        assert same.estimate == 0 and (same.lower, same.upper) == pytest.approx((-few / 2, few / 2))  # half were right
    varied = accuracy_interval([True, False] * 6, list("aabbccddeeff"))  # each cluster has the same accuracy
    assert (varied.lower, varied.upper) == pytest.approx((0.5 - share / 2, 0.5 + share / 2))
    varied = accuracy_interval([True, True, False, False] * 3, list("aabbccddeeff"))
    assert varied.lower < 0.5 < varied.upper  # control: clusters differ
    sums, counts = np.array([[1.0] * 6, [1.0, 0, 1, 0, 1, 0]]), np.ones((2, 6))
    weights = cluster_weights(6, 300, seed=0)
    lower, upper = bootstrap_interval(sums, counts, weights=weights)
    assert (lower[0], upper[0]) == (1, 1)  # control: what resampling says
    low, high = cluster_interval(sums, counts, weights=weights, bounds=(0.0, 1.0))
    assert low[0] == pytest.approx(1 - share) and (low[1], high[1]) == (lower[1], upper[1])
    low, high = cluster_interval(sums, np.array([[1.0] * 6, [0.0] * 6]), weights=weights, bounds=(0.0, np.inf))
    assert high[0] == np.inf and np.isnan([low[1], high[1]]).all()  # nats have no exact bound; no data, no interval


def test_one_cluster_says_nothing_about_spread() -> None:
    estimate = accuracy_interval([True, False], ["a", "a"])
    assert (estimate.lower, estimate.upper) == (0.0, 1.0)


def test_weights_are_multinomial_and_seeded() -> None:
    weights = cluster_weights(7, 200, seed=3)
    assert (weights.sum(1) == 7).all()
    assert (weights == cluster_weights(7, 200, seed=3)).all()
    assert (weights != cluster_weights(7, 200, seed=4)).any()


def test_vectorised_bootstrap_is_the_plain_one() -> None:
    """Against drawing clusters one by one and pooling their prompts; unequal clusters, a cell with missing prompts."""
    rng = np.random.default_rng(5)
    counts = rng.integers(0, 4, size=(3, 6))
    counts[:, 0] = 2
    sums = rng.integers(0, counts + 1)
    weights = cluster_weights(6, 150, seed=0)
    lower, upper = bootstrap_interval(sums, counts, weights=weights, bounds=(0, 1))
    for cell in range(3):
        k = int((counts[cell] > 0).sum())
        pooled = []
        for row in weights.astype(int):
            drawn = np.repeat(np.arange(6), row)
            total = counts[cell][drawn].sum()
            pooled.append(sums[cell][drawn].sum() / total if total else sums[cell].sum() / counts[cell].sum())
        tail = scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, k - 1) * np.sqrt(k / (k - 1)))
        np.testing.assert_allclose([lower[cell], upper[cell]], np.quantile(pooled, [tail, 1 - tail]))


@pytest.mark.parametrize(("n_clusters", "size"), [(12, 1), (40, 3)])
def test_intervals_cover(n_clusters: int, size: int) -> None:
    """Accuracy of prompts whose clusters differ; the interval that ignores clusters must fail where they matter."""
    rng = np.random.default_rng(6)
    simulations = 600
    ability = rng.beta(2.0, 1.5, size=(simulations, n_clusters))
    correct = rng.random((simulations, n_clusters, size)) < ability[:, :, None]
    truth = 2 / 3.5
    sums, counts = correct.sum(2), np.full((simulations, n_clusters), size)
    weights = cluster_weights(n_clusters, 1000, seed=0)
    lower, upper = bootstrap_interval(sums, counts, weights=weights, bounds=(0, 1))
    covered = ((lower <= truth) & (truth <= upper)).mean()
    assert 0.925 <= covered <= 0.985
    if size > 1:
        prompts = correct.reshape(simulations, -1).astype(int)
        weights = cluster_weights(prompts.shape[1], 1000, seed=0)
        lower, upper = bootstrap_interval(prompts, np.ones_like(prompts), weights=weights, bounds=(0, 1))
        assert ((lower <= truth) & (truth <= upper)).mean() < 0.91


def test_interval_of_constants_is_exact_and_unknown_prompts_do_not_count() -> None:
    values = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, np.nan], [1.0, np.nan, np.nan], [1.0, 1.0, np.nan]])
    table = mean_intervals(values, ["a", "a", "b", "b"])  # two clusters, all right: Clopper-Pearson
    assert table.loc[0, "mean"] == 1.0
    assert table.loc[0, "lower"] == pytest.approx(0.025**0.5) and table.loc[0, "upper"] == 1.0
    assert table.loc[1, "mean"] == pytest.approx(2 / 3) and table.loc[1, "n"] == 3
    assert table.loc[2, "n"] == 0 and np.isnan(table.loc[2, "mean"])


@pytest.mark.parametrize("bad", [{"resamples": 1}, {"level": 1.0}, {"alpha": 0.0}, {"seed": -1}, {"permutations": 0}])
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Settings(**bad)


def test_cluster_sums_leave_out_what_is_not_there() -> None:
    codes, names = cluster_codes(["b", "a", "b", "c"])
    assert codes.tolist() == [1, 0, 1, 2] and names.tolist() == ["a", "b", "c"]
    values = np.array([[1.0, np.nan], [2.0, 0.5], [4.0, 3.0], [8.0, np.nan]])
    sums, counts = cluster_sums(values, codes, 3)
    assert sums.tolist() == [[2.0, 5.0, 8.0], [0.5, 3.0, 0.0]]
    assert counts.tolist() == [[1.0, 2.0, 1.0], [1.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match=r"values must be \(4 prompts, column\)"):
        cluster_sums(values[:3], codes, 3)


def test_any_function_of_cluster_sums_has_the_same_rule() -> None:
    """A mean through the general rule is a mean through the fast one; a lead is computed anew in every resample."""
    rng = np.random.default_rng(3)
    values, codes = rng.random((40, 3)), np.repeat(np.arange(10), 4)
    sums, counts = cluster_sums(values, codes, 10)
    weights = cluster_weights(10, 300, seed=1)
    rows = np.vstack([sums, counts[:1]])
    mean, lower, upper = interval_of(lambda t: t[:, :-1] / t[:, -1:], rows, weights=weights, n_clusters=10)
    low, high = bootstrap_interval(sums, counts, weights=weights)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose([lower, upper], [low, high], atol=1e-12)

    def lead(totals: np.ndarray) -> np.ndarray:
        means = totals[:, :-1] / totals[:, -1:]
        return means[:, 0] - means[:, 1:].max(1)

    estimate, lower, upper = interval_of(lead, rows, weights=weights, n_clusters=10)
    again = []
    for weight in weights.astype(int):
        drawn = np.concatenate([values[codes == cluster] for cluster in np.repeat(np.arange(10), weight)])
        again.append(drawn[:, 0].mean() - drawn[:, 1:].mean(0).max())
    tail = scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, 9) * np.sqrt(10 / 9))
    np.testing.assert_allclose([lower[0], upper[0]], np.quantile(again, [tail, 1 - tail]))
    assert lower[0] < estimate[0] < upper[0]
    assert lower[0] < np.quantile(again, 0.025) and upper[0] > np.quantile(again, 0.975)  # wider than plain percentiles


def test_a_resample_without_data_and_a_single_cluster_say_nothing() -> None:
    sums = np.array([[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]])  # all data in one of three clusters
    weights = cluster_weights(3, 200, seed=0)
    assert (weights[:, 0] == 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n_clusters, expected in ((3, [0.75, 0.75]), (1, [0.0, 1.0])):
            mean, lower, upper = interval_of(
                lambda t: t[:, 0] / t[:, 1], sums, weights=weights, n_clusters=n_clusters, bounds=(0.0, 1.0)
            )
            assert [lower[0], upper[0]] == expected and mean[0] == 0.75


def test_the_room_knows_no_files_no_models_and_no_study() -> None:
    room = Path(statistics.__file__).parent
    modules = sorted(path.stem for path in room.glob("*.py") if path.stem != "__init__")
    for name in modules:
        tree = ast.parse((room / f"{name}.py").read_text(encoding="utf-8"))
        found = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        inside = [module for module in found if module.split(".")[0] in ("experiments", "codi", "steering", "lenses")]
        assert all(module.startswith("experiments.statistics") for module in inside), (name, inside)
        assert not {"pathlib", "json", "os", "io"} & set(found), name
    code = "import sys; " + "; ".join(f"import experiments.statistics.{name}" for name in modules)
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
