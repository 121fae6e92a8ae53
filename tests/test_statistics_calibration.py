"""Calibration on the draws: the level holds on skewed nulls where the rule with a normal curve does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments.statistics.calibration import (
    extremes,
    gains_and_losses,
    last_places,
    least_draws,
    maximum_p,
    members,
    null_counts,
    paired_excess,
    rank_p,
)
from experiments.statistics.distinct import distinct_edits, overlap
from experiments.statistics.paired import benjamini_hochberg

PAIRS, PLACES, PROMPTS, BASELINE = 8, 9, 200, 0.8
STRATA = np.tile(np.arange(PLACES), PAIRS)
BLOCKS = np.repeat(np.arange(PAIRS), PLACES)


def skewed(rng: np.random.Generator, draws: int, stronger: float = 1.0) -> np.ndarray:
    """(cell, 1 + draw) accuracies under the null: most vectors do nothing, few do much, at all places of their pair."""
    severity = rng.lognormal(-2.0, 1.3, size=(PAIRS, 1, 1 + draws))
    severity[:, :, 0] *= stronger
    place = rng.lognormal(0.0, 0.4, size=(PAIRS, PLACES, 1 + draws)) * np.linspace(0.2, 1.2, PLACES)[None, :, None]
    level = BASELINE * np.exp(-0.5 * severity * place)
    return rng.binomial(PROMPTS, level).reshape(PAIRS * PLACES, 1 + draws) / PROMPTS


def old_rule(values: np.ndarray) -> int:
    """The rule that is replaced: BH of max(p, normal prediction test), and outside all draws. Number of harms."""
    own, draws = values[:, 0], values[:, 1:]
    number = draws.shape[1]
    own_variance = draws.var(1, ddof=1)
    pooled = np.array([own_variance[STRATA == stratum].mean() for stratum in STRATA])
    spread = np.sqrt(np.maximum(np.maximum(own_variance, pooled), (0.5 / PROMPTS) ** 2) * (1 + 1 / number))
    t_p = 2 * scipy_stats.t.sf(np.abs((own - draws.mean(1)) / spread), number - 1)
    lost = np.round((BASELINE - own) * PROMPTS)
    p = np.where(lost > 0, np.minimum(1.0, 2 * 0.5 ** np.maximum(lost, 0)), 1.0)
    outside = (draws > own[:, None]).all(1)
    return int(((benjamini_hochberg(np.maximum(p, t_p)) < 0.05) & outside & (own < draws.mean(1))).sum())


def new_rule(values: np.ndarray, planted: bool = False) -> int:
    extreme = extremes(values, 1 / PROMPTS, "harm", STRATA)
    return int((maximum_p(extreme, BLOCKS, quick=not planted).p <= 0.05).sum())


# --- Level ------------------------------------------------------------------------------------------------------------


def test_on_skewed_nulls_the_old_rule_breaks_its_level_and_the_new_one_holds_it_and_still_finds_harm() -> None:
    rng = np.random.default_rng(0)
    runs, old, new, found = 300, 0, 0, 0
    for _ in range(runs):
        values = skewed(rng, 39)
        old += old_rule(values) > 0
        new += new_rule(values) > 0
        planted = values.copy()
        planted[:9, 0] = 0.02  # the first pair destroys the answers at all of its places
        found += new_rule(planted) > 0
    bound = 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert old / runs > 2 * bound
    assert new / runs <= bound
    assert found / runs > 3 * bound  # the control: the new rule is not merely silent


def shared_draws(rng: np.random.Generator, draws: int, sharing: int, pools: int) -> tuple[np.ndarray, ...]:
    """A null in which `sharing` directions of each pool meet the same draws: values, blocks, pools, strata."""
    number = sharing + draws
    severity = rng.lognormal(-2.0, 1.3, size=(pools, number, 1))
    place = rng.lognormal(0.0, 0.4, size=(pools, number, PLACES)) * np.linspace(0.2, 1.2, PLACES)
    found = rng.binomial(PROMPTS, BASELINE * np.exp(-0.5 * severity * place)) / PROMPTS
    own = found[:, :sharing].transpose(0, 1, 2).reshape(-1, 1)
    others = np.repeat(found[:, sharing:].transpose(0, 2, 1)[:, None], sharing, axis=1).reshape(len(own), draws)
    blocks = np.repeat(np.arange(pools * sharing), PLACES)
    return np.concatenate([own, others], axis=1), blocks, blocks // sharing, np.tile(np.arange(PLACES), pools * sharing)


@pytest.mark.parametrize(("draws", "sharing", "pools"), [(20, 2, 15), (40, 2, 15), (100, 10, 1)])
def test_directions_that_share_draws_keep_the_level_only_as_members_of_one_pool(
    draws: int, sharing: int, pools: int
) -> None:
    rng = np.random.default_rng(8)
    runs, apart, together, found = 250, 0, 0, 0
    for _ in range(runs):
        values, blocks, pool, strata = shared_draws(rng, draws, sharing, pools)
        extreme = extremes(values, 1 / PROMPTS, "harm", strata)
        apart += (maximum_p(extreme, blocks, quick=True).p <= 0.05).any()
        together += (maximum_p(extreme, blocks, pools=pool, quick=True).p <= 0.05).any()
        values[:PLACES, 0] = 0.0
        extreme = extremes(values, 1 / PROMPTS, "harm", strata)
        found += (maximum_p(extreme, blocks, pools=pool, quick=True).p <= 0.05).any()
    assert together / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    if draws == 40:
        assert found / runs > 0.2  # the control: it is not merely silent
    else:  # too few draws for so many directions
        assert apart / runs > 0.065 and together == found == 0


def test_pools_by_enumeration() -> None:
    """Any two of the 2 + 3 members of pool 0, and any one of the 1 + 3 of pool 1, could be the directions."""
    rng = np.random.default_rng(9)
    draws = rng.normal(size=(2, 3))
    own = np.array([1.4, -0.2, 0.3])
    extreme = np.concatenate([own[:, None], draws[[0, 0, 1]]], axis=1)
    first, second = [*own[:2], *draws[0]], [own[2], *draws[1]]
    ways = list(itertools.product(itertools.combinations(first, 2), second))
    test = maximum_p(extreme, np.arange(3), pools=np.array([0, 0, 1]))
    assert test.p[0] == pytest.approx(np.mean([max(*pair, other) >= 1.4 - 1e-12 for pair, other in ways]))
    assert test.least_p == pytest.approx(2 / 5)
    np.testing.assert_allclose(
        maximum_p(extreme, np.arange(3), pools=np.arange(3)).p, maximum_p(extreme, np.arange(3)).p
    )
    assert least_draws(0.05, shared=2) == 38 and least_draws(0.05, shared=30) == 570
    assert least_draws(0.05, 3, shared=2) == 118
    with pytest.raises(ValueError, match="one pool"):
        maximum_p(extreme, np.array([0, 0, 0]), pools=np.array([0, 1, 1]))


def test_null_families_of_shared_draws_play_different_ones_and_leave_the_same_controls() -> None:
    values = np.tile(np.arange(6.0), (4, 1))  # column number as value: 0 the direction, 1 to 5 the draws
    seen = []
    blocks, pools = np.array([0, 0, 1, 1]), np.zeros(4, int)
    null_counts(values, lambda played, playing: seen.append((played.copy(), playing.copy())) or 0, blocks, pools)
    assert len(seen) == 5
    for played, playing in seen:
        assert played.shape == (4, 1 + 5 - 2) and (played[:, 0] == playing).all()
        assert playing[0] == playing[1] != playing[2] == playing[3]
        assert (played[:, 1:] == played[0, 1:]).all()  # column by column the same draws
        assert set(played[0, 1:]) == set(range(1, 6)) - set(playing)
    assert {int(playing[0]) for _, playing in seen} == {1, 2, 3, 4, 5}
    with pytest.raises(ValueError, match="none is left over"):
        null_counts(values[:, :3], lambda *_: 0, blocks, pools)


def test_nineteen_draws_are_enough_for_five_per_cent_to_the_last_digit() -> None:
    values = np.r_[0.1, np.linspace(0.7, 0.8, 19)][None]
    assert maximum_p(extremes(values, 0.005, "harm")).p[0] <= 0.05
    assert maximum_p(extremes(values[:, :-1], 0.005, "harm")).p[0] > 0.05


@pytest.mark.parametrize("tail", ["harm", "gain"])
def test_ranks_and_maxima_are_exact_whatever_the_shape_and_with_many_ties(tail: str) -> None:
    rng = np.random.default_rng(1)
    runs, draws = 1200, 19
    values = np.round(np.exp(-rng.lognormal(0, 1, size=(runs, 6, 1 + draws))), 1)  # ties: 11 possible values
    ranks = np.array([rank_p(run, tail)[0] for run in values])  # type: ignore[arg-type]
    maxima = np.array([maximum_p(extremes(run, 0.01, tail), [0, 0, 1, 1, 2, 2]).p.min() for run in values])  # type: ignore
    for p in (ranks, maxima):
        for alpha in (0.05, 0.1, 0.25):
            assert (p <= alpha + 1e-12).mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert (maxima <= 0.1 + 1e-12).mean() > 0.05  # and is not far below where p is nearly continuous


def test_aggregate_has_its_level_and_finds_many_small_harms_that_no_cell_shows() -> None:
    rng = np.random.default_rng(2)
    runs, null, found, single = 200, 0, 0, 0
    for _ in range(runs):
        values = skewed(rng, 20)
        null += last_places(values, "harm", BLOCKS).p <= 0.05
        values = skewed(rng, 20, stronger=4.0)
        found += last_places(values, "harm", BLOCKS).p <= 0.05
        single += new_rule(values) > 0
    assert null / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert found / runs > 1.5 * single / runs and found / runs > 0.4


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    values = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5], [0.9, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(rank_p(values, "harm"), [1 / 4, 2 / 4, 1, 1])
    np.testing.assert_allclose(rank_p(values, "gain"), [1, 1, 1, 1 / 4])
    with pytest.raises(ValueError, match="harm or gain"):
        rank_p(values, "both")  # type: ignore[arg-type]


def test_members_and_paired_excess_by_hand() -> None:
    direction = np.array([[1, 0, 0, 1]])
    draws = np.array([[[1, 1, 0, 1], [1, 0, 0, 0]]])
    np.testing.assert_allclose(members(direction, draws), [[0.5, 0.75, 0.25]])
    np.testing.assert_allclose(paired_excess(direction, draws), [[0, -0.5, 0, 0.5]])
    with pytest.raises(ValueError, match="cell, draw, prompt"):
        members(direction, draws[:, :, :3])


def test_an_extreme_is_the_distance_from_the_others_in_their_own_spread() -> None:
    values = np.array([[0.1, 0.6, 0.7, 0.8]])
    found = extremes(values, 1e-6, "harm", prior_df=0.0)[0]
    for i, others in enumerate(np.delete(values[0], j) for j in range(4)):
        expected = (others.mean() - values[0, i]) / (others.std(ddof=1) * np.sqrt(1 + 1 / 3))
        assert found[i] == pytest.approx(expected)
    np.testing.assert_allclose(
        extremes(values, 1e-6, "gain", prior_df=0.0), -extremes(values, 1e-6, "harm", prior_df=0.0)
    )
    flat = extremes(np.full((1, 4), 0.5), 0.01, "harm")
    np.testing.assert_allclose(flat, 0.0)  # nothing moved: no member is extreme


def test_maximum_is_the_randomisation_distribution_over_all_ways_to_play_the_direction() -> None:
    """By enumeration: block b's member i_b plays, 4 ** 3 ways; the share whose maximum reaches the observed one."""
    rng = np.random.default_rng(3)
    blocks = np.array([0, 0, 1, 1, 2])
    extreme = rng.normal(size=(5, 4))
    largest = extreme[:, 0].max()
    maxima = np.stack([extreme[blocks == b].max(0) for b in range(3)])
    ways = list(itertools.product(range(4), repeat=3))
    share = np.mean([max(maxima[b, i] for b, i in enumerate(way)) >= largest - 1e-12 for way in ways])
    test = maximum_p(extreme, blocks)
    assert test.p.min() == pytest.approx(share)
    one = maximum_p(extreme)  # one block: whole families of draws
    assert one.p.min() == pytest.approx((extreme.max(0) >= largest - 1e-12).mean())
    order = np.argsort(-extreme[:, 0])
    assert (np.diff(test.p[order]) >= -1e-12).all()  # step-down keeps the order


def test_with_three_draws_nothing_can_survive_and_the_threshold_is_where_p_crosses_alpha() -> None:
    values = np.array([[0.0, 0.9, 0.9, 0.9]])
    three = maximum_p(extremes(values, 0.005, "harm"))
    assert not three.can_survive and three.least_p == 0.25 and three.p[0] == 0.25
    rng = np.random.default_rng(4)
    extreme = rng.normal(size=(12, 60))
    blocks = np.repeat(np.arange(4), 3)
    test = maximum_p(extreme, blocks)
    for step, passes in ((1e-6, True), (-1e-6, False)):
        p = []
        for cell in range(12):
            case = extreme.copy()
            case[:, 0] = -9.0
            case[cell, 0] = test.threshold[cell] + step
            p.append(maximum_p(case, blocks).p.min())
        assert (max(p) <= 0.05) == passes
    assert least_draws(0.05) == 19 and least_draws(0.05, 540) == 10799 and least_draws(0.05, 540, 54) == 199
    grouped = maximum_p(extreme, blocks, groups=np.tile([0, 1, 2], 4))
    assert grouped.least_p == pytest.approx(3 / 60) and (grouped.p >= 3 / 60 - 1e-12).all()


def test_null_counts_leave_the_direction_out_and_show_what_the_old_rule_finds_in_nothing() -> None:
    rng = np.random.default_rng(5)
    values = skewed(rng, 30)
    values[:, 0] = 0.0
    seen = []

    def rule(played: np.ndarray, playing: np.ndarray) -> int:
        seen.append(playing.copy())
        assert played.shape == (72, 30) and (played > 0).all()
        np.testing.assert_allclose(played[:, 0], values[np.arange(72), playing])
        return new_rule(played)

    counts = null_counts(values, rule)
    assert [set(playing) for playing in seen] == [{j} for j in range(1, 31)]
    assert (counts > 0).sum() <= 0.05 * 30 + 1
    assert null_counts(values, lambda played, _: old_rule(played)).max() > 0  # the control
    shifted = []
    null_counts(values, lambda _, playing: shifted.append(playing) or 0, BLOCKS)  # type: ignore[func-returns-value]
    assert len(set(shifted[0])) == PAIRS


def test_last_places_by_hand() -> None:
    values = np.array([[0.1, 0.5, 0.6], [0.2, 0.2, 0.7], [0.5, 0.5, 0.5], [0.9, 0.1, 0.3]])
    found = last_places(values, "harm")
    assert found.observed == 2  # strictly last, and last with one tie; not where all tie
    assert found.expected == pytest.approx((2 + 2 + 0) / 3) and sorted(found.families) == [0, 2]
    assert found.p == pytest.approx(2 / 3) and found.p_families == pytest.approx(2 / 3)
    blocks = last_places(values, "harm", np.array([0, 0, 1, 1]))  # block 0: 2, 1, 0; block 1: 0, 1, 0
    assert blocks.p == pytest.approx((3 + 1) / 9)  # (2, any) three ways, (1, 1) once


# --- Effects, not cells -----------------------------------------------------------------------------------------------


def test_nine_cells_of_three_edits_count_as_three_and_unrelated_ones_stay_apart() -> None:
    rng = np.random.default_rng(6)
    fragile = np.linspace(0.02, 0.3, 200)  # easy prompts flip under any edit
    null = rng.random((300, 200)) < fragile
    own = np.zeros((3, 200), bool)
    for edit, prompts in enumerate(np.split(rng.permutation(200)[:60], 3)):
        own[edit, prompts] = True  # twenty prompts that this edit breaks, whatever else it does
    edits = own | (rng.random((3, 200)) < fragile / 2)
    seen = np.repeat(edits, 3, axis=0) ^ (rng.random((9, 200)) < 0.02)  # the same edit at other |c| or latents
    for method in ("average", "components"):
        found = distinct_edits(seen, null, np.arange(300), method=method)  # type: ignore[arg-type]
        assert found.number == 3 and found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    alone = distinct_edits(rng.random((9, 200)) < fragile, null, np.arange(300))
    assert alone.number >= 8  # the control: nine unrelated edits
    assert 0 < found.threshold < 0.5 and found.null_pairs > 1000
    assert overlap(np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]))[0].tolist() == [1.0, 1 / 3, 0.0]
    assert distinct_edits(np.zeros((0, 5), bool), null[:, :5], np.arange(300)).number == 0


# --- Gains and losses -------------------------------------------------------------------------------------------------


def test_losses_do_not_loosen_the_threshold_for_gains() -> None:
    sums = np.zeros((100, 60), int)
    sums[:60, :30] = -1  # sixty cells that lose 30 clusters
    sums[60, :8] = 1  # one that gains 8: p = 1 / 256 one-sided
    found = gains_and_losses(sums)
    assert found.gain_p[60] == pytest.approx(1 / 256) and found.loss_p[60] == 1
    assert found.gain_q[60] == pytest.approx(100 / 256)
    assert (found.loss_q[:60] < 1e-6).all() and (found.gain_q[:60] == 1).all()
    together = benjamini_hochberg(np.minimum(1, 2 * np.minimum(found.gain_p, found.loss_p)))
    assert together[60] < 0.05  # the control: in one family the losses let it through


def test_fdr_of_gains_holds_beside_many_losses() -> None:
    rng = np.random.default_rng(7)
    runs, hits, pooled = 400, 0, 0
    for _ in range(runs):
        sums = rng.integers(-1, 2, size=(60, 40))
        sums[:40] = -(rng.random((40, 40)) < 0.6).astype(int)
        found = gains_and_losses(sums)
        hits += bool((found.gain_q <= 0.05).any())
        both = benjamini_hochberg(np.minimum(1, 2 * np.minimum(found.gain_p, found.loss_p)))
        pooled += bool(((both <= 0.05) & (sums.sum(1) > 0)).any())
    assert hits / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert pooled / runs > 2 * 0.05  # the control: twenty nulls beside forty losses
