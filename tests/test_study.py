"""What the studies share: paired tables keep their level and find a planted effect; forced answers; row-wise edits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted import planted_model, planted_problems, planted_split

from codi import CodiModel
from codi.decode import decode_answers
from codi.forced import divergence, forced
from experiments.study.shared import (
    StudyOptions,
    answer_rows,
    answer_table,
    compare,
    levels,
    load_prompts,
    open_study,
    think,
)
from experiments.sweep.cells import Settings
from steering.replacements import ReplaceRows, replace_embeddings

QUICK = Settings(resamples=200, permutations=200)


def paired(rng: np.random.Generator, effect: float, clusters: int = 30, size: int = 4) -> pd.DataFrame:
    """Trials of "edited" and "none": whole clusters tend to flip together, up or down alike but for `effect`."""
    rows = []
    for cluster in range(clusters):
        up = rng.random() < 0.5 + effect / 2
        for prompt in range(size):
            before = rng.random() < 0.5
            after = up if rng.random() < 0.4 else before
            for name, right in (("none", before), ("edited", after)):
                rows.append({"condition": name, "cluster": f"c{cluster}", "prompt_id": f"{cluster}-{prompt}",
                             "correct": right})  # fmt: skip
    return pd.DataFrame(rows)


def test_compare_holds_its_level_and_finds_an_effect() -> None:
    rng = np.random.default_rng(0)
    p = [compare(paired(rng, 0.0), [("edited", "none")], settings=QUICK)["p"][0] for _ in range(200)]
    assert np.mean(np.array(p) < 0.05) < 0.09
    row = compare(paired(rng, 0.9), [("edited", "none")], settings=QUICK).iloc[0]
    assert row["p"] < 0.01 and row["lower"] > 0 and row["gained"] > row["lost"]


def test_compare_by_hand() -> None:
    """Four prompts in four clusters, three gained, none lost: exact p = 2/8."""
    rows = []
    for i, (before, after) in enumerate(((0, 1), (0, 1), (0, 1), (1, 1))):
        for name, right in (("none", before), ("edited", after)):
            rows.append({"condition": name, "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": right})
    row = compare(pd.DataFrame(rows).astype({"correct": bool}), [("edited", "none")], settings=QUICK).iloc[0]
    assert (row["difference"], row["gained"], row["lost"]) == (0.75, 3, 0)
    assert row["p"] == row["mcnemar_p"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no condition 'other'"):
        compare(pd.DataFrame(rows), [("other", "none")])


def test_draws_are_averaged_before_they_are_compared() -> None:
    """Ten copies of one prompt's draw are not ten prompts."""
    rows = [{"condition": "none", "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": True} for i in range(3)]
    rows += [{"condition": "edited", "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": d % 2 == 0}
             for i in range(3) for d in range(10)]  # fmt: skip
    row = compare(pd.DataFrame(rows), [("edited", "none")], settings=QUICK).iloc[0]
    assert row["n"] == 3 and row["difference"] == -0.5 and np.isnan(row["mcnemar_p"]) and row["p"] > 0.2
    assert levels(pd.DataFrame(rows), settings=QUICK).set_index("condition").loc["edited", "mean"] == 0.5


def test_forced_answers_are_the_greedy_ones(codi_model: CodiModel, questions: list[str]) -> None:
    run = codi_model.rollout(codi_model.encode(questions), 6)
    answers = decode_answers(codi_model, run, 5, keep_first_logits=True)
    logp, there, hidden, _ = forced(codi_model, run, answers.tokens, hidden_states=True)
    assert answers.first_logits is not None and hidden is not None
    torch.testing.assert_close(logp[:, 0], answers.first_logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
    for row, tokens in enumerate(answers.tokens):
        assert logp[row, : len(tokens)].argmax(-1).tolist() == tokens and there[row].sum() == len(tokens) + 1
    torch.testing.assert_close(codi_model.logits(hidden[:, -1]).log_softmax(-1), logp[:, 0], rtol=1e-4, atol=1e-4)
    assert divergence(logp, logp, there).abs().max() == 0
    other, _, _, _ = forced(codi_model, run.truncate(3), answers.tokens)
    assert (divergence(logp, other, there) > 0).all()


def test_divergence_by_hand() -> None:
    before = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    after = torch.tensor([[[0.25, 0.75], [0.1, 0.9]]]).log()
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    found = divergence(before, after, torch.tensor([[True, False]]))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_row_wise_edits_agree_with_the_branch_engine() -> None:
    """z_2 and z_4 of every prompt become those of another prompt, through both ways of decoding."""
    model, problems = planted_model(), planted_problems(1)[:12]
    thoughts = think(model, problems)
    z = thoughts.run.embeddings
    assert z is not None
    donor = torch.arange(12).flip(0)
    active = torch.tensor([True] * 6 + [False] * 6)
    places = {("embedding", k, 0): (active, z[donor, k - 1]) for k in (2, 4)}
    one = answer_rows(
        model, thoughts.prefill, range(12),
        lambda rows: [ReplaceRows({p: (a[rows], v[rows]) for p, (a, v) in places.items()})], batch_size=5,
    )  # fmt: skip
    latent = torch.tensor([[2, 4]]).expand(12, 2)
    direction = torch.where(active[:, None], donor[:, None] * 6 + latent - 1, torch.full((12, 2), -1))
    two = replace_embeddings(model, thoughts.run, z.flatten(0, 1), torch.arange(12), latent, direction)
    assert one == two.texts
    assert one == [
        str(problems[int(d)].answer if a else p.answer) for p, d, a in zip(problems, donor, active, strict=True)
    ]


def test_answer_table_counts_unparsed_as_wrong() -> None:
    table = answer_table(planted_problems(1)[:3], [0, 1, 2], ["2", "none", "9"], condition="none")
    assert table["correct"].tolist() == [True, False, False]
    assert table["parsed"].tolist() == [True, False, True] and np.isnan(table["prediction"][1])


def test_damaged_parts_are_computed_again(tmp_path: Path) -> None:
    config, model, split = StudyOptions(out=tmp_path / "run", task="planted"), planted_model(), planted_split()
    made: list[int] = []

    def compute() -> pd.DataFrame:
        made.append(1)
        return pd.DataFrame({"a": [1.5, 2.5]})

    for damage in (False, False, True):
        with open_study("test", config, model, split) as study:
            if damage:
                study.folder.part_path("x").write_bytes(b"not parquet")
            assert study.part("x", compute)["a"].tolist() == [1.5, 2.5]
    assert len(made) == 2


def test_legacy_prompts_are_the_published_choice() -> None:
    split = load_prompts(StudyOptions(legacy=True, limit=None), known_steps=3)
    assert len(split.evaluation) == 1000 and len({p.cluster for p in split.evaluation}) == 50
    assert split.evaluation == split.derivation
    with pytest.raises(ValueError, match="known intermediate values"):
        load_prompts(StudyOptions(task="arithmetic", limit=20, derivation=20), known_steps=99)
