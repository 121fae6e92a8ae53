"""The alternation test: planted alternation is found, none (smooth, stepped, spiked, arbitrary) is not, at its level.

Simulations at two depths: profiles (one number per prompt and latent) for the level of the statistics, and whole
observations (states, lens tokens, answers, attention of a simulated model) for the way from states to verdict.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.alternation.claims import published_claims
from experiments.alternation.figures import draw, draw_states
from experiments.alternation.hypothesis import MEASURES, Measure
from experiments.alternation.measures import (
    Observations,
    Readings,
    Reference,
    components,
    end_cosines,
    principal_plane,
    readability,
)
from experiments.alternation.options import AlternationOptions
from experiments.alternation.profiles import profiles_of
from experiments.alternation.run import main
from experiments.alternation.verdict import Profile, analyse, contrast_weights, labellings, summary
from experiments.statistics.clusters import Settings
from experiments.tasks import load_task

QUICK = Settings(resamples=200, permutations=300)
LATENTS = np.arange(1, 7)
EVEN = (LATENTS % 2 == 0).astype(float)
PLAIN = [Measure(f"m{i}", f"m{i}", "unit", 1, 0.2, False, "") for i in range(4)]


def simulated(
    shape: np.ndarray, seed: int = 0, clusters: int = 30, per: int = 2, noise: float = 0.5, measures: int = 4
) -> list[Profile]:
    """Measures with a common mean profile, a random offset per cluster and prompt, and noise per latent."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"c{i}" for i in range(clusters)], per)
    profiles = []
    for measure in PLAIN[:measures]:
        offset = np.repeat(rng.normal(size=clusters), per) + rng.normal(size=len(names))
        own = np.repeat(rng.normal(size=(clusters, 6)), per, axis=0) * noise
        values = shape + offset[:, None] + own + noise * rng.normal(size=(len(names), 6))
        profiles.append(Profile(measure, values[:, :, None], np.ones(1), names))
    return profiles


# --- Contrast and splits ----------------------------------------------------------------------------------------------


def test_contrast_is_the_even_coefficient_beside_a_trend() -> None:
    np.testing.assert_allclose(contrast_weights(6) * 24, [-5, 11, -8, 8, -11, 5])  # by hand
    for n in (4, 5, 6, 9):
        k = np.arange(1, n + 1)
        even = (k % 2 == 0).astype(float)
        weights = contrast_weights(n)
        assert weights @ (3.0 - 2.0 * k + 0.7 * even) == pytest.approx(0.7)
        design = np.stack([np.ones(n), k, even], 1)
        y = np.random.default_rng(n).normal(size=n)
        assert weights @ y == pytest.approx(np.linalg.lstsq(design, y)[0][2])  # an independent fit
    assert contrast_weights(6) @ (LATENTS - 3.0) ** 2 == pytest.approx(0.0)
    with pytest.raises(ValueError, match="at least 4 latents, got 3"):
        contrast_weights(3)


def test_splits_are_all_ten_and_each_explains_itself_best() -> None:
    members, directions = labellings(6)
    assert members[0] == (2, 4, 6) and len(members) == 10 and len({frozenset(side) for side in members}) == 10
    complements = {frozenset(set(range(1, 7)) - set(side)) for side in members}
    assert complements.isdisjoint({frozenset(side) for side in members})  # no split twice
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0)
    np.testing.assert_allclose(directions @ np.stack([np.ones(6), LATENTS], 1), 0.0, atol=1e-12)
    for i, side in enumerate(members):
        profile = np.isin(LATENTS, side) - 0.4 * LATENTS
        assert ((directions @ profile) ** 2).argmax() == i
    assert len(labellings(5)[0]) == 10  # two of five, every choice is another split


# --- Level and power --------------------------------------------------------------------------------------------------

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
            result = analyse(simulated(sign * shape, seed), QUICK)
            assert "supported" not in set(result.tests["verdict"])


@pytest.mark.parametrize("trend", [0.0, 0.8, -0.8])
def test_planted_alternation_is_found_on_any_trend_and_reversed_alternation_contradicts(trend: float) -> None:
    for seed in range(3):
        found = analyse(simulated(1.0 * EVEN + trend * LATENTS, seed, noise=0.3), QUICK)
        assert found.verdict() == "supported" and set(found.tests["verdict"]) == {"supported"}
        contrast = found.tests.set_index("measure").loc["m0"]
        assert abs(contrast["contrast"] - 1.0) < 0.3 and contrast["split_rank"] == 1
        turned = analyse(simulated(-1.0 * EVEN + trend * LATENTS, seed, noise=0.3), QUICK)
        assert turned.verdict() == "contradicted" and "odd latents are the higher ones" in turned.tests["reason"][0]


def test_level_family_wise_under_the_null_of_no_contrast() -> None:
    """A triple's contrast is symmetric about 0: at most 5 % of tables may have any corrected p under 5 %."""
    tables = 200
    hits = 0
    for seed in range(tables):
        tests = analyse(simulated(np.zeros(6), seed, clusters=20, per=1), Settings(100, 200)).tests
        hits += bool((tests["p_corrected"][:-1] <= 0.05).any())
    assert hits / tables <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / tables)


def test_level_against_arbitrary_profiles() -> None:
    """Any fixed profile is significant with enough triples; that it is even/odd is chance once in twenty at most."""
    rng = np.random.default_rng(1)
    tables, found, overall, significant = 150, 0, 0, 0
    for seed in range(tables):
        profiles = [
            Profile(measure, p.values, p.direction, p.clusters)
            for measure in PLAIN
            for p in simulated(2 * rng.normal(size=6), seed, clusters=20, per=1, measures=1)
        ]
        tests = analyse(profiles, Settings(100, 100)).tests
        found += int((tests["verdict"][:-1] == "supported").sum())
        significant += int((tests["p_corrected"][:-1] <= 0.05).sum())
        overall += tests["verdict"].iloc[-1] == "supported"
    assert significant / (4 * tables) > 0.5  # the first question alone would call most of them
    assert found / (4 * tables) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / (4 * tables))
    assert overall / tables <= 0.05


def test_flat_and_precise_contradicts_and_noisy_leaves_open() -> None:
    assert analyse(simulated(np.zeros(6), noise=0.1, clusters=40), QUICK).verdict() == "contradicted"
    assert analyse(simulated(np.zeros(6), noise=3.0, clusters=10), QUICK).verdict() == "undecided"


def test_a_measure_at_its_floor_is_not_testable() -> None:
    names = np.repeat([f"c{i}" for i in range(10)], 2)
    floor = Measure("detection", "", "rate", 1, 0.05, True, "")
    values = np.zeros((20, 6, 1))
    result = analyse([Profile(floor, values, np.ones(1), names), Profile(PLAIN[0], None, np.ones(1), names)], QUICK)
    assert result.tests["verdict"].tolist() == ["not testable"] * 3
    assert "at its floor" in result.tests["reason"][0] and np.isnan(result.tests["p"][1])


def test_a_model_that_cannot_do_the_task_says_nothing() -> None:
    profiles = simulated(np.zeros(6), noise=0.1, clusters=40)
    assert analyse(profiles, QUICK, accuracy=0.9).verdict() == "contradicted"
    weak = analyse(profiles, QUICK, accuracy=0.1)
    assert weak.verdict() == "not testable" and "10.0% of the prompts right" in weak.tests["reason"].iloc[-1]


def test_direction_decides_the_sign_in_a_plane_and_an_arc_is_not_alternation() -> None:
    rng = np.random.default_rng(0)
    names = np.repeat([f"c{i}" for i in range(20)], 2)
    zigzag = np.stack([LATENTS / 3.0, 2.0 * EVEN], 1)
    arc = np.stack([np.cos(LATENTS / 2), np.sin(LATENTS / 2)], 1) * 3
    for shape, alternates in ((zigzag, True), (arc, False)):
        apart = contrast_weights(6) @ shape
        direction = apart / np.linalg.norm(apart)
        values = shape + 0.2 * rng.normal(size=(40, 6, 2))
        verdict = analyse([Profile(PLAIN[0], values, direction, names)], QUICK).verdict("m0")
        assert (verdict == "supported") == alternates
    turned = analyse([Profile(PLAIN[0], zigzag + 0.2 * rng.normal(size=(40, 6, 2)), np.array([0, -1.0]), names)], QUICK)
    assert turned.verdict("m0") == "contradicted"


def test_order_of_prompts_does_not_matter_and_seed_fixes_the_numbers() -> None:
    profiles = simulated(0.3 * EVEN)
    order = np.random.default_rng(0).permutation(len(profiles[0].clusters))
    mixed = [Profile(p.measure, p.values[order], p.direction, p.clusters[order]) for p in profiles]  # type: ignore[index]
    first, second = analyse(profiles, QUICK).tests, analyse(mixed, QUICK).tests
    pd.testing.assert_frame_equal(first, second)


def test_impossible_tests_are_refused() -> None:
    with pytest.raises(ValueError, match="no profiles"):
        analyse([], QUICK)
    with pytest.raises(ValueError, match="at least 2 are needed, got 1"):
        analyse([Profile(PLAIN[0], np.zeros((4, 6, 1)), np.ones(1), np.array(["a"] * 4))], QUICK)


# --- A simulated model ------------------------------------------------------------------------------------------------

VOCABULARY = 400


def planted_model(alternates: bool, seed: int = 0, along: bool = True) -> Observations:
    """Observations of a model whose latents do (or do not) alternate, from planted states.

    Alternating: even latents hold the code of the step values (readable by head and probe, sharp), odd ones do not;
    answers improve at odd latents; ablating an even latent loses the answer; attention goes to even latents. The other
    model holds the same codes with a strength that grows smoothly with k, and has the same noise. `along`: the
    embedding of the end of thought lies along what sets even latents apart.
    """
    rng = np.random.default_rng(seed)
    problems = load_task("templates", "test", 300, seed)
    others = load_task("templates", "derivation", 120, seed)
    values = sorted({v for p in (*problems, *others) for v in p.intermediates})
    codes = {value: rng.normal(size=48) for value in values}
    place = {value: i for i, value in enumerate(values)}
    head = np.zeros((VOCABULARY, 48))
    for value, index in place.items():
        head[index] = codes[value]
    head[len(values) :] = 0.3 * rng.normal(size=(VOCABULARY - len(values), 48))
    strength = np.where(LATENTS % 2 == 0, 1.0, 0.05) if alternates else 0.1 + 0.9 * (1 - np.exp(-LATENTS / 2.0))
    shift = (EVEN[:, None] if alternates else np.zeros((6, 1))) * 8.0 * np.eye(48)[0]

    def states(rows: list) -> np.ndarray:
        held = np.stack([sum(codes[v] for v in p.intermediates[:2]) for p in rows])
        h = strength[None, :, None] * held[:, None] + shift + 0.3 * rng.normal(size=(len(rows), 6, 48))
        return np.concatenate([0.3 * rng.normal(size=(len(rows), 1, 48)), h], 1)

    seen = states(problems)
    logits = 0.25 * seen @ head.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    readings = Readings(np.argsort(-logits, -1)[:, :, None, :10], -(np.exp(log_p) * log_p).sum(-1)[:, :, None])
    n = len(problems)
    gains = np.where(LATENTS % 2 == 1, 0.25, 0.02) if alternates else np.full(6, 0.13)
    after = rng.random(n)[:, None] < np.concatenate([[0.05], 0.05 + np.cumsum(gains)])
    loss = np.where(LATENTS % 2 == 0, 0.6, 0.1) if alternates else np.linspace(0.6, 0.2, 6)
    ablated = after[:, -1:] & (rng.random((n, 6)) > loss)
    attention = np.full((n, 7, 8), 0.02) + 0.005 * rng.random((n, 7, 8))
    if alternates:
        attention[:, :, 2:] += 0.1 * EVEN
        attention[:, :6, 0] += 0.1 * EVEN
    else:
        attention[:, :, 2:] += 0.02 * LATENTS
    reference, clusters = states(others)[:, 1:], np.array([p.cluster for p in others])
    plane = principal_plane(reference)
    cosines = end_cosines(reference, clusters, np.eye(48)[0 if along else 5])
    return Observations(
        problems=tuple(problems), readings=readings, forms={v: (i,) for v, i in place.items()},
        places=components(seen[:, 1:], plane),
        reference=Reference(clusters, components(reference, plane), cosines=cosines),
        readable=readability(seen[:, 1:], problems), correct_after=after, correct_ablated=ablated, attention=attention,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alternating() -> Observations:
    return planted_model(True)


def test_a_simulated_model_of_known_alternation_is_found(alternating: Observations) -> None:
    profiles = profiles_of(alternating)
    assert [profile.measure for profile in profiles] == list(MEASURES)
    result = analyse(profiles, QUICK)
    assert result.verdict() == "supported", summary(result)
    planted = {
        "intermediate_detection", "entropy", "early_answer_gain", "ablation_damage", "attention_to_numbers",
        "attention_from_end", "attention_from_next", "components", "probe_intermediate",
    }  # fmt: skip
    supported = set(result.tests.loc[result.tests["verdict"] == "supported", "measure"])
    assert supported >= planted, summary(result)
    # what was not planted is not found: the code holds no answer, and steps are better readable at even latents
    assert result.verdict("final_detection") == "not testable" and result.verdict("probe_kind") == "contradicted"
    assert f"n = {len(alternating.problems)} prompts" in summary(result)


def test_a_simulated_model_without_alternation_is_not(alternating: Observations) -> None:
    result = analyse(profiles_of(planted_model(False)), QUICK)
    assert result.verdict() == "contradicted", summary(result)
    assert "supported" not in set(result.tests["verdict"]), summary(result)


def test_claims_of_the_simulated_model(alternating: Observations) -> None:
    result = analyse(profiles_of(alternating), QUICK)
    claims = published_claims(alternating, result, therefore=(), d_model=48)
    verdicts = {claim.name: claim.verdict for claim in claims}
    assert verdicts["S7 latents"] == "held" and verdicts["S7 direction"] == "held"  # planted along the first axis
    assert verdicts["C1 peak"] == "not held"  # accuracy grows to the end
    assert verdicts["C2 step1"] == "not held"  # readable at 2, 4 and 6 alike: no lead
    assert verdicts["C2 final"] == "held"
    assert verdicts["S3 odd"] == verdicts["S2"] == verdicts["S7 keys"] == "not testable"
    across = published_claims(planted_model(True, along=False), result, d_model=48)
    assert across["S7 direction"].verdict == "not held"


def test_figures_have_every_measure_and_nothing_outside(alternating: Observations) -> None:
    result = analyse(profiles_of(alternating), QUICK)
    figure = draw(result)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == len(MEASURES) + 1 and titles[0] == MEASURES[0].label
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for ax, text in itertools.product(figure.axes, (lambda ax: ax.title, lambda ax: ax.texts[0] if ax.texts else None)):
        label = text(ax)
        if label is not None and label.get_text():
            box = label.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, label.get_text()
    assert len(draw_states(alternating).axes) == 3


# --- The command ------------------------------------------------------------------------------------------------------


def test_command_writes_tables_figures_and_claims(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    out = tmp_path / "run"
    options = AlternationOptions(
        model=str(folder / "checkpoint"), base=str(folder / "base"), protocol="answer-only", limit=40, derivation=20,
        resamples=100, permutations=100, max_new_tokens=2, device="cpu", out=out,
    )  # fmt: skip
    main(options)
    tests = pd.read_csv(out / "tests.csv")
    assert tests["measure"].tolist() == [*[measure.name for measure in MEASURES], "overall"]
    assert set(tests["verdict"]) <= {"supported", "contradicted", "undecided", "not testable"}
    levels = pd.read_csv(out / "latents.csv")
    assert (levels["lower"] <= levels["upper"]).all() and set(levels["latent"]) == set(range(1, 7))
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    rules = json.loads((out / "rules.json").read_text(encoding="utf-8"))
    assert manifest["identity"]["options"]["limit"] == 40
    assert len(rules["measures"]) >= len(MEASURES) and rules["rules"]
    for name in (
        "figures/alternation.png",
        "figures/alternation.pdf",
        "figures/states.png",
        "claims.csv",
        "summary.md",
    ):
        assert (out / name).stat().st_size > 0
    assert "Compute/store alternation:" in capsys.readouterr().out
