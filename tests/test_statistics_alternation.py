"""The alternation rule can give each of its answers, on simulated models that are known to deserve it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.statistics.alternation import (
    ANSWERS,
    Profile,
    alternation,
    contrast_weights,
    explained,
    phase_free,
    pooled,
    splits,
    verdict_of,
)
from experiments.statistics.clusters import Settings

QUICK = Settings(resamples=400, permutations=100)
LATENTS = np.arange(1, 7)
EVEN = (LATENTS % 2 == 0).astype(float)
SMALLEST = 0.2


def simulated(
    shape: np.ndarray,
    seed: int = 0,
    *,
    clusters: int = 40,
    per: int = 2,
    noise: float = 0.5,
    measures: int = 4,
    shared: float = 0.0,
    **options: object,
) -> tuple[list[Profile], np.ndarray]:
    """Measures with a mean profile, an offset per prompt and noise per latent; `shared`: noise common to measures."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"c{i}" for i in range(clusters)], per)
    common = shared * np.repeat(rng.normal(size=(clusters, 6)), per, axis=0)
    profiles = []
    for i in range(measures):
        offset = rng.normal(size=(len(names), 1))
        own = noise * np.repeat(rng.normal(size=(clusters, 6)), per, axis=0)
        values = shape + offset + own + common + noise * rng.normal(size=(len(names), 6))
        profiles.append(Profile(f"m{i}", values, 1, SMALLEST, **options))  # type: ignore[arg-type]
    return profiles, names


def answers(shape: np.ndarray, seed: int = 0, **options: object) -> tuple[str, set[str]]:
    """The pooled answer and those of the measures."""
    table = alternation(*simulated(shape, seed, **options), settings=QUICK)  # type: ignore[arg-type]
    assert table["measure"].iloc[-1] == "pooled"
    return table["answer"].iloc[-1], set(table["answer"][:-1])


# --- Contrast and splits ----------------------------------------------------------------------------------------------


def test_contrast_is_the_even_coefficient_beside_a_trend() -> None:
    np.testing.assert_allclose(contrast_weights(6) * 24, [-5, 11, -8, 8, -11, 5])  # by hand
    for n in (4, 5, 6, 9):
        k = np.arange(1, n + 1)
        even = (k % 2 == 0).astype(float)
        assert contrast_weights(n) @ (3.0 - 2.0 * k + 0.7 * even) == pytest.approx(0.7)
        design, y = np.stack([np.ones(n), k, even], 1), np.random.default_rng(n).normal(size=n)
        assert contrast_weights(n) @ y == pytest.approx(np.linalg.lstsq(design, y)[0][2])  # an independent fit
    with pytest.raises(ValueError, match="at least 4 latents, got 3"):
        contrast_weights(3)


def test_splits_are_all_ten_each_explains_itself_best_and_sums_of_squares_are_those_of_a_fit() -> None:
    sides, weights = splits(6)
    assert sides[0] == (2, 4, 6) and len(sides) == 10 and len({frozenset(side) for side in sides}) == 10
    assert len(splits(5)[0]) == 10
    trend = np.stack([np.ones(6), LATENTS], 1)
    np.testing.assert_allclose(weights @ trend, 0.0, atol=1e-12)
    y = np.random.default_rng(0).normal(size=6)
    for i, side in enumerate(sides):
        profile = np.isin(LATENTS, side) - 0.4 * LATENTS
        assert explained(profile[:, None]).argmax() == i
        full = np.column_stack([trend, np.isin(LATENTS, side)])
        less, more = (np.linalg.lstsq(design, y)[1][0] for design in (trend, full))
        assert explained(y[:, None])[i] == pytest.approx(less - more)


# --- Every answer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trend", [0.0, 0.8, -0.8])
def test_supported_and_opposite_phase_on_any_trend(trend: float) -> None:
    for seed in range(3):
        shape = 1.0 * EVEN + trend * LATENTS
        assert answers(shape, seed, noise=0.3) == ("supported", {"supported"})
        turned = answers(-1.0 * EVEN + trend * LATENTS, seed, noise=0.3)
        assert turned == ("alternates, opposite phase", {"alternates, opposite phase"})
    table = alternation(*simulated(-1.0 * EVEN, noise=0.3), settings=QUICK)
    assert (table["verdict"] == "opposite phase").all() and (table["phase_free"] == "differ").all()
    assert (table["split_rank"] == 1).all() and table["even_minus_odd"][0] == pytest.approx(-1.0, abs=0.2)


def test_the_predicted_sign_of_a_measure_decides_its_phase() -> None:
    profiles, names = simulated(1.0 * EVEN, noise=0.3, measures=1)
    odd = Profile("odd", profiles[0].values, -1, SMALLEST)
    table = alternation([profiles[0], odd], names, QUICK)
    assert table["answer"][:2].tolist() == ["supported", "alternates, opposite phase"]
    assert table["contrast"][0] == pytest.approx(-table["contrast"][1])
    assert table["even_minus_odd"][0] == pytest.approx(table["even_minus_odd"][1])


@pytest.mark.parametrize(
    "shape",
    [2.0 * (LATENTS > 3), 2.0 * (LATENTS == 4), 2.0 * np.isin(LATENTS, (3, 4)), 2.0 * np.isin(LATENTS, (2, 5))],
    ids=["step", "one latent", "middle", "latents 2 and 5"],
)
def test_another_split_explains_more(shape: np.ndarray) -> None:
    for seed in range(3):
        for sign in (1.0, -1.0):
            overall, single = answers(sign * shape, seed, noise=0.3)
            assert overall == "another split explains more" and single <= {"another split explains more"}
    assert verdict_of("another split explains more") == "contradicted"


NOT_ALTERNATING = {
    "flat": np.zeros(6),
    "line": 0.8 * LATENTS,
    "saturating": 3 * (1 - np.exp(-LATENTS / 1.5)),
    "sigmoid": 3 / (1 + np.exp(-3 * (LATENTS - 3.5))),
    "hump": 2 * np.exp(-((LATENTS - 3.0) ** 2) / 2),
    **{f"step after {k}": 2.0 * (k < LATENTS) for k in range(1, 6)},
    **{f"latent {k} alone": 2.0 * (k == LATENTS) for k in range(1, 7)},
}


@pytest.mark.parametrize("shape", NOT_ALTERNATING.values(), ids=NOT_ALTERNATING.keys())
def test_what_does_not_alternate_is_not_found(shape: np.ndarray) -> None:
    for seed in range(3):
        for sign in (1.0, -1.0):
            overall, single = answers(sign * shape, seed, clusters=30)
            assert not {overall, *single} & {"supported", "alternates, opposite phase"}


def test_below_the_size_that_matters_needs_precision_and_without_it_stays_undecided() -> None:
    for seed in range(3):
        for size in (0.0, 0.05, -0.05):
            overall, single = answers(size * EVEN, seed, noise=0.1, clusters=100)
            assert overall == "below the size that matters" and single == {"below the size that matters"}
    noisy = [answers(0.05 * EVEN, seed, noise=3.0, clusters=15)[0] for seed in range(30)]
    assert noisy.count("undecided at this power") >= 24 and "below the size that matters" not in noisy
    table = alternation(*simulated(0.0 * EVEN, noise=0.1, clusters=100), settings=QUICK)
    assert set(table["phase_free"]) == {"do not differ by the size that matters"}


def test_opposite_phase_that_is_not_established_only_excludes_the_predicted_one() -> None:
    found = [answers(-0.3 * EVEN, seed, noise=1.0, clusters=40, measures=2)[0] for seed in range(30)]
    assert "not in the predicted phase" in found and "supported" not in found
    assert verdict_of("not in the predicted phase") == "contradicted"
    assert phase_free(-0.5, 0.1, 0.2) == "undecided"


def test_ceiling_floor_constant_and_unobserved_carry_nothing_and_do_not_enter_the_pool() -> None:
    profiles, names = simulated(1.0 * EVEN, noise=0.3, measures=2)
    rng = np.random.default_rng(0)
    top = np.where(rng.random((len(names), 6)) < 0.003, 0.0, 1.0)
    measures = [
        *profiles,
        Profile("top", top, 1, 0.05, bounds=(0.0, 1.0)),
        Profile("bottom", 1 - top, 1, 0.05, bounds=(0.0, 1.0)),
        Profile("flat", np.full((len(names), 6), 3.0), 1, 0.05),
        Profile("missing", None, 1, 0.05),
        Profile("unknown", np.full((len(names), 6), np.nan), 1, 0.05),
    ]
    table = alternation(measures, names, QUICK).set_index("measure")
    assert table["answer"].to_dict() == {
        "m0": "supported", "m1": "supported", "top": "not testable: ceiling", "bottom": "not testable: floor",
        "flat": "not testable: constant", "missing": "not testable: not observed",
        "unknown": "not testable: not observed", "pooled": "supported",
    }  # fmt: skip
    alone = alternation(profiles, names, QUICK).set_index("measure")
    assert table["contrast"].to_dict()["pooled"] == alone["contrast"].to_dict()["pooled"]
    assert np.isnan(table["lower"].to_dict()["top"])  # no interval for what cannot be tested
    everything = alternation(measures[2:], names, QUICK)
    assert everything["answer"].iloc[-1] == "not testable: not observed"
    needs = alternation(measures, names, QUICK, least_measures=3)
    assert needs["verdict"].iloc[-1] == "not testable"
    one = alternation(profiles, np.array(["c"] * len(names)), QUICK)
    assert set(one["answer"][:-1]) == {"not testable: too few clusters"}


def test_every_answer_has_a_verdict() -> None:
    assert {verdict_of(answer) for answer in ANSWERS} == {"supported", "opposite phase", "contradicted", "undecided"}
    assert verdict_of("not testable: ceiling") == "not testable"
    with pytest.raises(ValueError, match="answer must be one of"):
        verdict_of("held")


# --- Correlated measures do not vote ----------------------------------------------------------------------------------


def mixed(seed: int, alternating: int = 5, flat: int = 6) -> tuple[list[Profile], np.ndarray]:
    """Five measures that alternate, with another wave that varies from cluster to cluster, and six flat precise ones
    that are copies of each other."""
    rng = np.random.default_rng(seed)
    profiles, names = simulated(0.0 * EVEN, seed, measures=1, noise=0.02, clusters=60)
    copies = [
        Profile(f"flat{i}", profiles[0].values + 0.01 * rng.normal(size=(120, 6)), 1, SMALLEST)  # type: ignore[operator]
        for i in range(flat)
    ]
    wave = np.repeat(rng.normal(size=(60, 6)), 2, axis=0)
    shape = 0.35 * EVEN + 0.15 * (LATENTS == 4)
    others = [Profile(f"wave{i}", shape + wave + 0.1 * rng.normal(size=(120, 6)), 1, SMALLEST)
              for i in range(alternating)]  # fmt: skip
    return [*copies, *others], names


def test_many_flat_copies_do_not_contradict_what_the_pooled_contrast_leaves_open() -> None:
    outvoted = 0
    for seed in range(10):
        table = alternation(*mixed(seed), settings=QUICK).set_index("measure")
        against = (table["verdict"][:-1] == "contradicted").sum()
        outvoted += against > 11 / 2  # the rule that is replaced: more than half of the measures contradict
        assert table["contrast"].iloc[-1] > 0
        assert table["answer"].iloc[-1] == "undecided at this power"
    assert outvoted >= 8


def test_pooled_units_and_size_by_an_independent_computation() -> None:
    """Measures that alternate by exactly their smallest size: the pooled contrast is the mean of their ratios."""
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(50), 2)
    noise = rng.normal(size=(3, 100, 6))
    noise -= np.einsum("mpk,k->mp", noise, contrast_weights(6))[:, :, None] * (EVEN - 0.5)  # no contrast of its own
    sizes = (0.1, 0.5, 2.0)
    profiles = [
        Profile(f"m{i}", sign * size * (EVEN - 0.5) + scale * noise[i], sign, size)  # type: ignore[arg-type]
        for i, (size, scale, sign) in enumerate(zip(sizes, (1.0, 2.0, 3.0), (1, -1, 1), strict=True))
    ]
    together = pooled(profiles)
    assert together is not None and together.values is not None
    centred = [p.values - p.values.mean(1, keepdims=True) for p in profiles]  # type: ignore[union-attr]
    ratios = [min(1.0, size / float(np.sqrt((line**2).mean()))) for size, line in zip(sizes, centred, strict=True)]
    assert (together.values @ contrast_weights(6)).mean() == pytest.approx(np.mean(ratios))
    assert together.smallest == pytest.approx(min(ratios))
    constant = alternation(profiles, names, QUICK)
    np.testing.assert_allclose(constant["contrast"][:3], sizes)
    assert set(constant["answer"][:-1]) == {"not testable: constant"}  # no prompt differs: no width, no verdict
    table = alternation(*simulated(EVEN), QUICK, pooled_smallest=0.7)
    assert table["smallest"].iloc[-1] == 0.7 and table["smallest"][0] == SMALLEST
    flat = pooled([*profiles, Profile("flat", 1e-6 * noise[0], 1, 0.5)])
    assert flat is not None and flat.values is not None  # a flat measure is not blown up to a standard deviation
    np.testing.assert_allclose(flat.values, 0.75 * together.values, atol=1e-4)
    assert pooled([Profile("flat", np.ones((4, 6)), 1, 0.1)]) is None


# --- Level ------------------------------------------------------------------------------------------------------------


def test_levels_where_nothing_is_there() -> None:
    """No contrast and no other structure: neither an alternation nor another split may be announced too often."""
    runs = 120
    counted: dict[str, int] = {}
    for seed in range(runs):
        overall, _ = answers(0.0 * EVEN, seed, clusters=25, per=1, noise=1.0, measures=2)
        counted[overall] = counted.get(overall, 0) + 1
    bound = 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    for answer in ("supported", "alternates, opposite phase", "another split explains more"):
        assert counted.get(answer, 0) / runs <= bound, counted


def test_level_against_arbitrary_profiles() -> None:
    """A fixed profile is there with enough prompts; that it is even/odd is chance once in ten."""
    rng = np.random.default_rng(1)
    runs = 120
    found = [answers(2 * rng.normal(size=6), seed, clusters=20, per=1, measures=1)[0] for seed in range(runs)]
    share = pd.Series(found).value_counts() / runs
    bound = 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert share.get("supported", 0) <= bound and share.get("alternates, opposite phase", 0) <= bound
    assert share["another split explains more"] > 0.4  # the control: it is not silent


def test_two_components_are_compared_along_a_given_direction() -> None:
    rng = np.random.default_rng(2)
    names = np.repeat(np.arange(30), 2)
    plane = 0.2 * rng.normal(size=(60, 6, 2))
    plane[:, :, 1] += EVEN
    up, across = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    table = alternation([Profile("up", plane, 1, 0.2, direction=up)], names, QUICK)
    assert table["answer"][0] == "supported" and table["contrast"][0] == pytest.approx(1.0, abs=0.1)
    assert alternation([Profile("across", plane, 1, 0.2, direction=across)], names, QUICK)["answer"][0] != "supported"
    with pytest.raises(ValueError, match="no direction"):
        alternation([Profile("plane", plane, 1, 0.2)], names, QUICK)
    with pytest.raises(ValueError, match="same 59 prompts"):
        alternation([Profile("up", plane, 1, 0.2, direction=up)], names[:-1], QUICK)


def test_an_arc_in_a_plane_is_not_alternation() -> None:
    rng = np.random.default_rng(0)
    names = np.repeat([f"c{i}" for i in range(20)], 2)
    zigzag = np.stack([LATENTS / 3.0, 2.0 * EVEN], 1)
    arc = np.stack([np.cos(LATENTS / 2), np.sin(LATENTS / 2)], 1) * 3
    for shape, alternates in ((zigzag, True), (arc, False)):
        apart = contrast_weights(6) @ shape
        values = shape + 0.2 * rng.normal(size=(40, 6, 2))
        profile = Profile("plane", values, 1, SMALLEST, direction=apart / np.linalg.norm(apart))
        assert (alternation([profile], names, QUICK)["answer"][0] == "supported") == alternates


def test_a_direction_chosen_by_its_own_contrast_does_not_enter_the_pool() -> None:
    """Whatever the profile is, along the direction of its own contrast it is positive."""
    rng = np.random.default_rng(3)
    profiles, names = simulated(-1.0 * EVEN, noise=0.3)
    plane = rng.normal(size=(6, 2)) + 0.1 * rng.normal(size=(len(names), 6, 2))
    apart = contrast_weights(6) @ plane.mean(0)
    own = Profile("plane", plane, 1, SMALLEST, direction=apart / np.linalg.norm(apart), enters=False)
    table = alternation([*profiles, own], names, QUICK).set_index("measure")
    alone = alternation(profiles, names, QUICK).set_index("measure")
    assert table["contrast"].to_dict()["plane"] > 0
    assert table["contrast"].to_dict()["pooled"] == alone["contrast"].to_dict()["pooled"]
    only = alternation([own], names, QUICK)
    assert only["answer"].iloc[-1] == "not testable: not observed" and only["answer"][0] != "not testable: not observed"


def test_nothing_to_test_is_refused() -> None:
    with pytest.raises(ValueError, match="no profiles"):
        alternation([], np.array(["a"]), QUICK)


def test_the_order_of_prompts_does_not_matter() -> None:
    profiles, names = simulated(0.4 * EVEN, 5)
    order = np.random.default_rng(0).permutation(len(names))
    moved = [Profile(p.name, p.values[order], p.predicted, p.smallest) for p in profiles]  # type: ignore[index]
    first, second = alternation(profiles, names, QUICK), alternation(moved, names[order], QUICK)
    for column in ("contrast", "lower", "upper", "first", "beats"):
        np.testing.assert_allclose(first[column], second[column])
    assert first["answer"].tolist() == second["answer"].tolist()
