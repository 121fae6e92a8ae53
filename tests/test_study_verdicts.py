"""Claims judged together: each of the four answers can come out, the family is corrected, nothing is judged by no
width."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from experiments.statistics.clusters import Settings
from experiments.statistics.equivalence import judge_absence, judge_presence
from experiments.statistics.families import family_intervals
from experiments.study.claims import Claim, ClaimsTable, effect_claim
from experiments.study.verdicts import Question, judged_together, no_room

SETTINGS = Settings(resamples=1000)
CLUSTERS = np.arange(120)
ROW = {"difference": 0.01, "n": 40, "n_clusters": 20}


def changes(up: int, down: int) -> np.ndarray:
    """Paired changes of 120 answers: so many gained, so many lost."""
    return np.r_[np.ones(up), -np.ones(down), np.zeros(120 - up - down)]


def ask(name: str, values: np.ndarray, **rule: object) -> Question:
    return Question(name, f"claim {name}", "the rule", values, bounds=(-1, 1), **rule)  # type: ignore[arg-type]


def test_every_answer_can_come_out_of_presence_and_absence() -> None:
    claims = ClaimsTable(
        judged_together(
            [
                ask("there", changes(60, 5), above=0.0),
                ask("opposite", changes(5, 60), above=0.0),
                ask("open", changes(12, 10), above=0.0),
                ask("small", changes(1, 1), absent=0.1),
                ask("large", changes(0, 60), absent=0.1, side="below"),
                ask("wide", changes(10, 20), absent=0.1, side="below"),
                ask("no room", changes(0, 0), absent=0.1, side="above", blocked="at its ceiling"),
                ask("nothing", np.empty(0), above=0.0),
            ],
            CLUSTERS,
            SETTINGS,
        )
    )
    verdicts = {claim.name: claim.verdict for claim in claims}
    assert verdicts == {
        "there": "held", "opposite": "not held", "open": "undecided", "small": "held", "large": "not held",
        "wide": "undecided", "no room": "not testable", "nothing": "not testable",
    }  # fmt: skip
    assert claims["no room"].note == "at its ceiling" and claims["nothing"].note == "nothing was measured"
    assert {claim.family for claim in claims} == {6, 1} and claims["no room"].family == 1
    text = claims.markdown()
    assert "**undecided at this power**" in text
    assert "- Intervals of there, opposite, open, small, large, wide: 6 claims, max-t, together at 95 %." in text
    again = ClaimsTable.from_records(json.loads(json.dumps(claims.records(), allow_nan=False)))
    assert again.markdown() == text


def test_an_absence_without_any_change_is_judged_by_exact_bounds() -> None:
    """All 120 answers stay: the share that changes is below 1 - 0.025 ** (1 / 120) = 3.0 %, no better."""
    (one,) = judged_together([ask("C4", changes(0, 0), absent=0.05, side="below")], CLUSTERS, SETTINGS)
    assert one.lower == pytest.approx(-(1 - 0.025 ** (1 / 120))) and one.verdict == "held" and one.family == 1
    (fewer,) = judged_together([ask("C4", changes(0, 0), absent=0.02, side="below")], CLUSTERS, SETTINGS)
    assert fewer.verdict == "undecided" and fewer.visible == pytest.approx(0.0303, abs=1e-4)
    few = judged_together([ask("C4", np.zeros(13), absent=0.05, side="below")], np.arange(13), SETTINGS)
    assert few[0].verdict == "undecided"  # 13 clusters cannot show 5 points
    nats = Question("KL", "nothing moves", "KL", np.zeros(50), absent=0.01, bounds=(0, math.inf))
    assert judged_together([nats], np.arange(50), SETTINGS)[0].verdict == "undecided"


def test_the_family_widens_intervals_and_one_claim_alone_has_its_own() -> None:
    values = np.stack([changes(20 + k, 10) for k in range(10)], axis=1)
    rng = np.random.default_rng(0)
    values = np.stack([rng.permutation(column) for column in values.T], axis=1)
    together = family_intervals(values, CLUSTERS, [(-1, 1)] * 10, SETTINGS)
    alone = family_intervals(values[:, :1], CLUSTERS, [(-1, 1)], SETTINGS)
    assert together["estimate"][0] == alone["estimate"][0] == pytest.approx(10 / 120)
    assert together["lower"][0] < alone["lower"][0] and together["upper"][0] > alone["upper"][0]
    exact = family_intervals(np.c_[values, np.zeros(120)], CLUSTERS, [(-1, 1)] * 11, SETTINGS)
    assert exact["upper"][10] == pytest.approx(1 - (0.05 / 11 / 2) ** (1 / 120))
    holes = np.where(np.arange(120)[:, None] < 60, values, np.nan)
    assert family_intervals(holes, CLUSTERS, [(-1, 1)] * 10, SETTINGS)["n_clusters"].tolist() == [60] * 10
    with pytest.raises(ValueError, match=r"values must be \(120 prompts, 2 claims\)"):
        family_intervals(values, CLUSTERS, [(-1, 1)] * 2, SETTINGS)


def test_intervals_of_a_family_cover_together() -> None:
    """Twelve shares in 60 clusters, some near the end of the scale: all within their intervals in about 95 % of runs,
    which single intervals are not."""
    rng = np.random.default_rng(3)
    truth = np.r_[np.full(6, 0.5), np.full(4, 0.9), np.full(2, 1.0)]
    together = single = 0
    runs = 150
    for _ in range(runs):
        values = (rng.random((60, 12)) < truth).astype(float)
        settings = Settings(resamples=400, seed=int(rng.integers(1 << 30)))
        table = family_intervals(values, np.arange(60), [(0, 1)] * 12, settings)
        together += bool(((table["lower"] <= truth) & (truth <= table["upper"])).all())
        alone = [family_intervals(values[:, [k]], np.arange(60), [(0, 1)], settings).iloc[0] for k in range(10)]
        single += all(row["lower"] <= truth[k] <= row["upper"] for k, row in enumerate(alone))
    assert together / runs >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / runs)
    assert single / runs < 0.8  # the control


def test_no_room_at_an_end_of_the_scale() -> None:
    assert no_room(1.0, "above", 0.02) == (
        "the reference is at its ceiling (100.0 %): a change of 2 points has no room"
    )
    assert "floor (0.0 %)" in no_room(0.0, "below", 0.02)
    assert no_room(1.0, "below", 0.02) == no_room(0.5, "above", 0.02) == no_room(0.98, "above", 0.02) == ""


def test_effect_claim_takes_a_judgement() -> None:
    held = effect_claim("S1", "s", "r", judge_presence(0.95, 0.999, above=0.9, mark="ceiling"), ROW | {"mean": 0.98},
                        of="mean")  # fmt: skip
    assert (held.lower, held.upper, held.size, held.answer) == (0.95, 0.999, 0.9, "held (rests on a ceiling)")
    undecided = effect_claim("S2", "s", "r", judge_absence(-0.1, 0.2, 0.05, family=3), ROW, corrected="Bonferroni")
    assert undecided.answer == "undecided at this power" and undecided.visible == pytest.approx(0.19)
    lost = effect_claim("S3", "s", "r", judge_absence(-0.1, 0.2, 0.05, mark="floor"), ROW, "and so on")
    assert lost.answer == "not testable" and lost.note == "at its floor: no effect could show; and so on"
    with pytest.raises(ValueError, match="how it is corrected"):
        effect_claim("S4", "s", "r", judge_absence(-0.1, 0.2, 0.05, family=3), ROW)
    with pytest.raises(ValueError, match="needs the number"):
        Claim("S5", "s", "r", "undecided")
    with pytest.raises(ValueError, match="above or below, or else absent"):
        Question("S6", "s", "r", np.zeros(3))
