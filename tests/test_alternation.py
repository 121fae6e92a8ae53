"""The alternation test, from observations to verdict and claims: planted alternation is found, a smooth trend is not.

The rule itself is tested in test_statistics_alternation.py. Here are whole observations (states, lens tokens, answers,
attention of a simulated model), and hand-weighted models (tests/planted.py) that go through the whole study.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import storing_model, storing_split

from codi import CodiModel
from experiments.alternation.claims import published_claims
from experiments.alternation.figures import draw, draw_states
from experiments.alternation.hypothesis import LEAST_MEASURES, MEASURES, POOLED
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
from experiments.alternation.profiles import profiles_of, size_of
from experiments.alternation.run import main, make_plan, run
from experiments.alternation.verdict import Result, analyse, overall, summary
from experiments.statistics.alternation import Profile, alternation
from experiments.statistics.clusters import Settings
from experiments.study.prompts import JoinedSplit
from experiments.study.storage import carrying, parity
from experiments.tasks import load_task

QUICK = Settings(resamples=200, permutations=300)
LATENTS = np.arange(1, 7)
EVEN = (LATENTS % 2 == 0).astype(float)


# --- A simulated model ------------------------------------------------------------------------------------------------

VOCABULARY = 400


def planted_model(alternates: bool, seed: int = 0, along: bool = True) -> Observations:
    """Observations of a model whose latents do (or do not) alternate, from planted states.

    Alternating: even latents hold the code of the step values (readable by head and probe, sharp), odd ones do not;
    answers improve at odd latents; ablating an even slot, or an odd embedding (which carries the state before it),
    loses the answer; attention goes to even latents. The other
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
    ablated = {
        kind: after[:, -1:] & (rng.random((n, 6)) > (loss if kind == "slot" or not alternates else loss[::-1]))
        for kind in ("slot", "embedding")
    }
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
    assert [profile.name for profile in profiles] == [measure.name for measure in MEASURES]
    result = analyse(alternating, QUICK, task="templates")
    assert result.verdict() == "supported", summary(result)
    planted = {
        "intermediate_detection", "entropy", "early_answer_gain", "ablation_embedding", "ablation_slot",
        "attention_to_numbers", "attention_from_end", "attention_from_next", "components", "probe_intermediate",
    }  # fmt: skip
    supported = set(result.tests.loc[result.tests["verdict"] == "supported", "measure"])
    assert supported >= planted, summary(result)
    # what was not planted is not found: the code holds no answer, and steps are better readable at even latents
    assert result.answer("final_detection") == "not testable: floor"
    assert result.answer("probe_kind") == "alternates, opposite phase"
    assert f"({len(alternating.problems)} prompts in" in summary(result) and "supported" in summary(result)


def test_a_simulated_model_without_alternation_is_not() -> None:
    result = analyse(planted_model(False), QUICK)
    assert result.verdict() == "contradicted", summary(result)
    assert not {"supported", "opposite phase"} & set(result.tests["verdict"]), summary(result)


def test_a_model_that_cannot_do_the_task_says_nothing(alternating: Observations) -> None:
    assert alternating.correct_after is not None
    rare = alternating.correct_after & (np.arange(len(alternating.problems)) % 10 == 0)[:, None]
    weak = analyse(replace(alternating, correct_after=rare, correct_ablated={}), QUICK)
    assert weak.verdict() == "not testable" and "of the prompts right" in weak.row()["reason"]


def test_ceilings_are_those_that_a_measure_can_reach(alternating: Observations) -> None:
    """A lens that always shows the answer is at its ceiling: 1 − chance, not 1; so is a probe at what is reachable."""
    answers = np.array([alternating.forms[problem.answer][0] for problem in alternating.problems])
    tokens = alternating.readings.tokens.copy()
    tokens[..., 0] = answers[:, None, None]
    full = {name: replace(one, correct=np.ones_like(one.correct)) for name, one in alternating.readable.items()}
    found = replace(alternating, readings=Readings(tokens, alternating.readings.entropy), readable=full)
    result = analyse(found, QUICK)
    assert result.answer("final_detection") == "not testable: ceiling"
    assert result.answer("probe_intermediate") == "not testable: ceiling"
    top = {profile.name: profile.bounds for profile in profiles_of(found)}["final_detection"]
    assert top is not None and 0.5 < top[1] < 1.0


def test_few_measures_are_not_pooled(alternating: Observations) -> None:
    bare = replace(alternating, correct_after=None, correct_ablated={}, attention=None, readable={})
    result = analyse(bare, QUICK)  # detection of intermediates, entropy and components are left
    assert result.verdict() == "not testable" and f"{LEAST_MEASURES} are needed" in result.row()["reason"]
    assert result.verdict("entropy") == "supported"


def test_sizes_come_from_wordings_where_these_differ_by_more(alternating: Observations) -> None:
    problems = alternating.problems
    scenes = sorted({problem.template for problem in problems})
    effect = np.array([0.3 * scenes.index(problem.template) / len(scenes) for problem in problems])
    values = EVEN[None] * effect[:, None] + 0.01 * np.random.default_rng(0).normal(size=(len(problems), 6))
    moved = size_of(Profile("ablation_slot", values, 1, 0.05), alternating)
    assert moved.size == moved.spread > 0.05 and "wordings" in moved.words
    steady = size_of(Profile("ablation_slot", values * 0.01, 1, 0.05), alternating)
    assert steady.size == 0.05 > steady.spread and steady.words == "one answer in twenty"
    single = replace(alternating, problems=tuple(replace(p, template="one") for p in problems))
    assert np.isnan(size_of(Profile("ablation_slot", values, 1, 0.05), single).spread)
    lent = size_of(Profile("ablation_slot", values, 1, 0.05), single, borrowed=moved)
    assert lent.size == moved.size and "templates" in lent.words


def test_edits_are_mapped_to_latents_once() -> None:
    assert carrying("state") == carrying("slot") == (2, 4) and carrying("embedding") == (3, 5)
    predicted = {measure.name: measure.predicted for measure in MEASURES}
    for carrier in ("slot", "embedding"):
        assert predicted[f"ablation_{carrier}"] == parity(carrier)
        assert {k % 2 == 0 for k in carrying(carrier)} == {parity(carrier) == 1}
    assert all(measure.source and measure.reason for measure in MEASURES)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("supported", "supported"), "supported"),
        (("contradicted", "contradicted"), "contradicted"),
        (("opposite phase", "not testable"), "opposite phase"),
        (("supported", "contradicted"), "undecided"),
        (("contradicted", "undecided"), "undecided"),
        (("not testable", "not testable"), "not testable"),
    ],
)
def test_tasks_must_agree(verdicts: tuple[str, str], expected: str) -> None:
    results = [
        Result(task, pd.DataFrame([{"measure": POOLED.name, "verdict": verdict, "reason": "why"}]), pd.DataFrame(), {},
               1.0, QUICK)
        for task, verdict in zip(("templates", "arithmetic"), verdicts, strict=True)
    ]  # fmt: skip
    verdict, reason = overall(results)
    assert verdict == expected and "templates" in reason


def test_claims_of_the_simulated_model(alternating: Observations) -> None:
    result = analyse(alternating, QUICK)
    claims = published_claims(alternating, result, therefore=(), d_model=48)
    verdicts = {claim.name: claim.verdict for claim in claims}
    assert verdicts["S7 latents"] == "held" and verdicts["S7 direction"] == "held"  # planted along the first axis
    # accuracy grows to the end, but by two points only: the family's interval reaches across 0
    assert verdicts["C1 peak"] == "undecided" and claims["C1 peak"].estimate < 0
    # readable at 2, 4 and 6 alike: the lead of one is about 0
    assert verdicts["C2 step1"] == "undecided" and abs(claims["C2 step1"].estimate) < 0.1
    assert verdicts["C2 final"] == "held"
    assert verdicts["S3 odd"] == verdicts["S2"] == verdicts["S7 keys"] == "not testable"
    assert claims["C1 peak"].family == claims["C2 final"].family > 1 and "together" in claims["C1 peak"].corrected
    across = published_claims(planted_model(True, along=False), result, d_model=48, suffix=" (again)")
    assert across["S7 direction (again)"].verdict == "not held"


def test_no_pattern_in_the_cache_is_an_absence_of_a_stated_size(alternating: Observations) -> None:
    result = analyse(alternating, QUICK)
    rng = np.random.default_rng(0)
    flat = 0.1 * rng.normal(size=(120, 6, 2))
    wide = EVEN[None, :, None] * np.array([1.5, 0.0]) + flat
    noisy = 40 * rng.normal(size=(120, 6, 2))
    for keys, verdict in ((flat, "held"), (wide, "not held"), (noisy, "undecided")):
        seen = replace(alternating, reference=replace(alternating.reference, keys=keys))
        claim = published_claims(seen, result, d_model=48)["S7 keys"]
        assert claim.verdict == verdict and claim.size == result.row("components")["smallest"]


def test_figures_have_every_measure_and_nothing_outside(alternating: Observations) -> None:
    result = analyse(alternating, QUICK, task="templates")
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


# --- Hand-weighted models through the whole study ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latents", "verdict", "answer"),
    [
        ((2, 4, 6), "supported", "supported"),
        ((4, 5, 6), "contradicted", "another split explains more"),
    ],
)
def test_a_planted_model_gets_the_verdict_that_it_deserves(
    latents: tuple[int, int, int], verdict: str, answer: str, tmp_path: Path
) -> None:
    """A model whose answer hangs on the slots of three latents: even ones, or the last three."""
    options = AlternationOptions(task="planted", resamples=200, max_new_tokens=2, out=tmp_path / "run")
    found = run(options, storing_model(latents), storing_split())
    verdicts, tests = found.tables["verdicts"].set_index("task"), found.tables["tests"].set_index("measure")
    assert verdicts.loc["overall", "verdict"] == verdict and verdicts.loc["planted", "answer"] == answer, found.text
    assert tests.loc["ablation_slot", "best_split"] == "".join(map(str, latents))
    assert (
        tests.loc["ablation_embedding", "answer"] == "not testable: floor"
    )  # what is fed to its latents is a constant
    levels = found.tables["latents"]
    slot = levels[levels["measure"] == "ablation_slot"].set_index("latent")["mean"]
    assert all((slot[k] > 0.5) == (k in latents) for k in range(1, 7))


# --- The command ------------------------------------------------------------------------------------------------------


def test_both_tasks_are_asked_by_default(codi_model: CodiModel) -> None:
    options = AlternationOptions(limit=6, derivation=4)
    split = options.load_split(0, "", known_steps=1)
    assert isinstance(split, JoinedSplit) and [asked.task for asked in split.tasks] == ["templates", "arithmetic"]
    first, second = (split.evaluation[slice(*asked.evaluation)] for asked in split.tasks)
    assert len(first) == len(second) == 6 and {len(problem.steps) for problem in second} == {5}
    assert {len(problem.intermediates) for problem in first} == {3}
    fewer = AlternationOptions(limit=6, derivation=4, min_steps=2, max_steps=3).load_split(0)
    assert {len(problem.steps) for problem in fewer.evaluation[6:]} <= {2, 3}
    one = AlternationOptions(task="templates", limit=6, derivation=4).load_split(0)
    assert isinstance(one, JoinedSplit) and [asked.task for asked in one.tasks] == ["templates"]
    with pytest.raises(ValueError, match="attention='eager'"):
        make_plan(options, codi_model, split)
    options.check_inputs()
    with pytest.raises(ValueError, match="unknown task 'all'"):
        AlternationOptions(task="all").check_inputs()
    with pytest.raises(ValueError, match="no folder of lenses"):
        AlternationOptions(lens=Path("nowhere")).check_inputs()


def test_command_writes_tables_figures_and_claims(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    out = tmp_path / "run"
    options = AlternationOptions(
        model=str(folder / "checkpoint"), base=str(folder / "base"), protocol="answer-only", limit=40, derivation=20,
        resamples=100, max_new_tokens=2, device="cpu", out=out,
    )  # fmt: skip
    main(options)
    tests = pd.read_csv(out / "tests.csv")
    assert tests["measure"].tolist() == 2 * [*[measure.name for measure in MEASURES], POOLED.name]
    assert tests["task"].unique().tolist() == ["templates", "arithmetic"]
    assert set(tests["verdict"]) <= {"supported", "opposite phase", "contradicted", "undecided", "not testable"}
    levels = pd.read_csv(out / "latents.csv")
    assert (levels["lower"] <= levels["upper"]).all() and set(levels["latent"]) == set(range(1, 7))
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    rules = json.loads((out / "rules.json").read_text(encoding="utf-8"))
    assert manifest["identity"]["options"]["limit"] == 40
    assert len(rules["measures"]) >= len(MEASURES) and rules["rules"]
    files = ("figures/alternation.png", "figures/alternation.pdf", "figures/states.png", "claims.csv", "summary.md")
    for name in (*files, "figures/alternation-2.png", "verdicts.csv"):
        assert (out / name).stat().st_size > 0
    assert "Compute/store alternation:" in capsys.readouterr().out
    main(options)  # goes on: nothing is computed again, the same verdict
    assert pd.read_csv(out / "tests.csv").equals(tests)


# --- What a model would have to do (docs/training.md) -----------------------------------------------------------------


def pooled_answer(levels: dict[str, Sequence[float]], spread: float = 0.3) -> str:
    """What the rule says of a model with these values at latents 1..6, measures in units of their spread."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(100), 3)
    signs = {measure.name: measure.predicted for measure in MEASURES}
    profiles = [
        Profile(name, np.array(values) + spread * rng.standard_normal((300, 6)), signs[name], 0.05)
        for name, values in levels.items()
    ]
    tests = alternation(profiles, clusters, Settings(resamples=300), least_measures=3)
    return str(tests["answer"].iloc[-1])


def test_storing_is_supported_and_repeating_is_not() -> None:
    """A model that shows a step's result at even latents and nothing at odd ones is supported, although slots and the
    attention of the next latent are against it; one whose even latents repeat what odd ones have found is not."""
    storing = {
        "intermediate_detection": (0, 0.5, 0, 0.5, 0, 0), "final_detection": (0, 0, 0, 0, 0, 1),
        "entropy": (1, 0, 1, 0, 1, 0), "ablation_embedding": (0.3, 0, 0.8, 0, 0.8, 0),
        "ablation_slot": (0.1, 0.3, 0.6, 0.3, 0.6, 0.5), "attention_from_next": (1, 0.3, 1, 0.3, 1, 0.3),
        "probe_intermediate": (0.1, 0.5, 0.1, 0.6, 0.2, 0.5),
    }  # fmt: skip
    repeating = {
        "intermediate_detection": (0.5, 0.5, 0.5, 0.5, 0, 0), "final_detection": (0, 0, 0, 0, 1, 1),
        "entropy": (0, 0, 0, 0, 0, 0), "ablation_embedding": (0.1, 0.4, 0.3, 0.4, 0.3, 0.1),
        "ablation_slot": (0.1, 0.4, 0.2, 0.4, 0.2, 0.5), "attention_from_next": (0.5, 1, 0.5, 1, 0.5, 1),
        "probe_intermediate": (0.5, 0.5, 0.55, 0.55, 0.5, 0.5),
    }  # fmt: skip
    assert pooled_answer(storing) == "supported"
    assert pooled_answer(repeating) in ("another split explains more", "undecided at this power")
    turned = {name: (*values[1:], values[0]) for name, values in storing.items()}
    assert pooled_answer(turned) == "alternates, opposite phase"
