"""codi transfer: an ablated prompt says nothing, planted latents bring its answer back, and a donor's with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted import planted_model, planted_problems, planted_split, repeated

from codi import CodiModel
from experiments.latents.options import TransferOptions
from experiments.latents.transfer import LEVELS, STUDY, conditions, given_back, make_plan, prompt_means, run
from experiments.statistics.effects import Selector, row_of
from experiments.study.claims import ClaimsTable
from experiments.study.result import Result
from steering.replacements import AblatePrompt


def moved(out: Path, carrier: str) -> Result:
    config = TransferOptions(out=out, draws=1, resamples=200, permutations=200, task="planted")
    return run(config, planted_model(carrier), planted_split())  # type: ignore[arg-type]


def mean(result: Result, chosen: Selector, table: str = "levels") -> float:
    return row_of(result.tables[table], chosen)["mean"]


def test_planted_latents_bring_the_answer_back(tmp_path: Path) -> None:
    result = moved(tmp_path / "run", "latents")
    assert mean(result, given_back("intact")) == 1 and mean(result, given_back("ablated")) == 0
    for level in LEVELS:
        assert mean(result, given_back("ablated", "own", level)) == 1
        assert mean(result, given_back("ablated", "same value", level)) == 1
        for state in ("ablated", "intact"):  # the answer follows the latents, whatever the prompt says
            other = given_back(state, "other value", level)
            assert mean(result, other) < 0.3
            assert mean(result, other, "donor_levels") == 1
    assert {claim.verdict for claim in result.claims or () if "own" in claim.name} == {"held"}
    assert Result.read(result.path).markdown() == result.text


def test_nothing_carried_gives_nulls(tmp_path: Path) -> None:
    result = moved(tmp_path / "run", "prompt")
    assert len(result.tables["levels"]) == len(conditions())
    assert all(mean(result, one) == 0 for one in conditions() if one["state"] == "ablated")
    assert all(mean(result, one) == 1 for one in conditions() if one["state"] == "intact")
    # this model reads the numbers in its first block: the published ablation leaves them there
    assert mean(result, given_back("leaky")) == 1
    # 12 clusters without a recovery cannot show that it is below five points; many can
    assert {claim.verdict for claim in result.claims or () if "own" in claim.name} == {"undecided"}
    trials = pd.read_parquet(result.path / "trials" / "part-transfer.parquet")
    assert "not held" in {claim.verdict for claim in claims(repeated(trials, 20)) if "own" in claim.name}


def claims(trials: pd.DataFrame) -> ClaimsTable:
    options = TransferOptions(resamples=500, permutations=100)
    return STUDY.conclude(make_plan(options, planted_model(), planted_split()), {"transfer": trials}).claims


def made_up(shares: dict[str, float], many: int = 300) -> pd.DataFrame:
    """Trials of many clusters; the share of right answers by state, or by kind in an ablated prompt."""
    rng = np.random.default_rng(1)
    rows = []
    for one in conditions():
        share = shares.get(one["kind"] if one["state"] == "ablated" else one["state"], 0.0)
        own = {**one, "draw": -1, "template": "t", "parsed": True, "donor": False, "donor_answer": 1.0}
        right = rng.random(many) < share
        rows += [{**own, "prompt_id": f"p{i}", "cluster": f"c{i}", "correct": bool(right[i])} for i in range(many)]
    return pd.DataFrame(rows)


def test_every_verdict_can_come_out() -> None:
    def verdict(kind: str, **shares: float) -> str:
        return claims(made_up({"intact": 1.0, **{k.replace("_", " "): v for k, v in shares.items()}}))[
            f"C6 ({kind}, slots)"
        ].verdict  # fmt: skip

    assert verdict("own", own=0.9) == "held" and verdict("own", own=0.0) == "not held"
    assert verdict("own", own=0.05) == "undecided"
    assert verdict("other value", other_value=0.0) == "held" and verdict("other value", other_value=0.5) == "not held"
    assert verdict("other value", other_value=0.06) == "undecided"
    assert verdict("own", nothing=1.0, own=1.0) == "not testable"  # the ablation takes nothing
    assert verdict("own", intact=0.1, own=0.1) == "not testable"  # there was nothing to take


def test_what_could_be_seen_is_said_first() -> None:
    options = TransferOptions(resamples=500, permutations=100)
    plan = make_plan(options, planted_model(), planted_split())
    text = STUDY.conclude(plan, {"transfer": made_up({"intact": 1.0, "own": 0.9})}).sections[0].text
    assert "an improvement cannot be seen here" in text and "a loss of" in text and "a gain of" not in text
    text = STUDY.conclude(plan, {"transfer": made_up({"intact": 0.0})}).sections[0].text
    assert "a harm cannot be seen here" in text and "a loss of" not in text and "*" not in text.split("|", 1)[1]


def test_ablated_prompts_of_one_story_are_equal(codi_model: CodiModel) -> None:
    """Two prompts of one story and length have the same states after ablation, not after the leaky one."""
    problems = [p for p in planted_problems(1) if p.template == "t0"][:4]
    problems = [type(p)(**{**p.__dict__, "template": "t0", "operation": "addition"}) for p in problems]
    problems = [type(p)(**{**p.__dict__, "question": f"{i}+{i}=?"}) for i, p in enumerate(problems)]
    batch = codi_model.encode([p.question for p in problems])
    story = ("t0", "addition", int(batch.lengths[0]))
    means = prompt_means(codi_model, problems, {story})
    whole = codi_model.prefill(batch, [AblatePrompt([means[story]] * 4)])
    torch.testing.assert_close(whole.state[0], whole.state[3])
    leaky = codi_model.prefill(batch, [AblatePrompt([means[story]] * 4, embeddings=False)])
    torch.testing.assert_close(leaky.state[0], leaky.state[3])  # the last block's output is a mean too ...
    a, b = (codi_model.rollout(x, 1, keep=("embeddings", "cache")).states[:, 1] for x in (whole, leaky))
    torch.testing.assert_close(a[0], a[3])
    assert not torch.allclose(b[0], b[3])  # ... but the first block's keys and values are not


def test_needs_donors(tmp_path: Path) -> None:
    from experiments.tasks.split import Split

    one = planted_problems(1)[:2]
    with pytest.raises(ValueError, match="derivation"):
        run(TransferOptions(out=tmp_path / "run"), planted_model(), Split(tuple(one), tuple(one)))
