"""What the studies share: forced answers, divergence, row-wise edits, judged rows, parts of a run, prompts."""

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
from experiments.study.answers import answer_table
from experiments.study.folder import open_run
from experiments.study.options import StudyOptions
from experiments.study.parts import Part, Workbench
from experiments.study.rows import answer_rows
from experiments.study.run import fill, read_trials, study_identity
from experiments.study.thoughts import think
from steering.replacements import ReplaceRows, replace_embeddings


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


made: list[int] = []


def compute(bench: Workbench, *, seed: int) -> pd.DataFrame:
    made.append(seed)
    return pd.DataFrame({"a": [1.5, 2.5]})


def test_damaged_parts_are_computed_again(tmp_path: Path) -> None:
    options, model, split = StudyOptions(out=tmp_path / "run", task="planted"), planted_model(), planted_split()
    parts = [Part("x", compute)]
    made.clear()
    for damage in (False, False, True):
        identity = study_identity(options, model, split)
        with open_run(options.out, identity, model=options.model, about="", say=lambda line: None) as folder:
            if damage:
                folder.part_path("x").write_bytes(b"not parquet")
            fill(folder, parts, Workbench(model, split))
            assert read_trials(folder, parts)["x"]["a"].tolist() == [1.5, 2.5]
    assert len(made) == 2


def test_legacy_prompts_are_the_published_choice() -> None:
    split = StudyOptions(legacy=True, limit=None).load_split(0, known_steps=3)
    assert len(split.evaluation) == 1000 and len({p.cluster for p in split.evaluation}) == 50
    assert split.evaluation == split.derivation
    with pytest.raises(ValueError, match="known intermediate values"):
        StudyOptions(task="arithmetic", limit=20, derivation=20).load_split(0, known_steps=99)
