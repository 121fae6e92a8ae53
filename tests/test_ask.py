"""experiments.lens.ask: one question, its answer, and what is read at each latent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codi import CodiModel, load_codi
from experiments import cli
from experiments.lens.ask import asked
from experiments.lens.options import AskOptions
from lenses.latent_lens import new_lens, save_lens, unembed

QUESTION = "There are 7 birds in the garden. Then 5 more arrive. Each one is joined by 3 more. How many are there now?"


def rows(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


def test_the_last_layer_is_the_models_own_distribution(codi_model: CodiModel) -> None:
    text = asked(AskOptions(question=QUESTION, layers=(codi_model.n_layers,), top=1), codi_model)
    run = codi_model.rollout(codi_model.encode([QUESTION + codi_model.protocol.question_suffix]), codi_model.n_latents)
    assert run.states is not None
    probabilities = codi_model.unembedding(run.states[0]).float().softmax(-1).max(-1).values
    assert len(rows(text)) == codi_model.n_latents + 1
    assert [row.split()[-1] for row in rows(text)] == [f"{float(p):.2f}" for p in probabilities]
    with torch.no_grad():
        (answer,) = codi_model.answer([QUESTION + codi_model.protocol.question_suffix])
    assert f"answer    {' '.join(answer.split()) or '(nothing)'}   after" in text


def test_the_shipped_model_thinks_what_it_writes() -> None:
    model = load_codi(Path(__file__).resolve().parent.parent / "checkpoints" / "tiny")
    text = asked(AskOptions(question=QUESTION, direct=True, chain=True, top=3), model)
    assert "answer    48   after 6 latents" in text and "<<7+5=12>><<12*3=36>>" in text and "without a thought" in text
    assert text.count("latent 3 ") == 2
    assert "layer 3, logit lens" in text and "layer 4, the model's own next token" in text
    assert [row.split()[3] for row in rows(text) if row.startswith("begin")] == ["'12'", "'12'"]
    assert "<<7+5" not in asked(AskOptions(question=QUESTION), model)


def test_a_lens_that_is_given(codi_model: CodiModel, tmp_path: Path) -> None:
    lens = new_lens(codi_model, unembed(codi_model))
    save_lens(lens, tmp_path / "all", "all", (1, 2, 3, 4, 5, 6))
    plain = asked(AskOptions(question="3+4=?", layers=(1,)), codi_model)
    tuned = asked(AskOptions(question="3+4=?", layers=(1,), lens=tmp_path, read="all"), codi_model)
    assert "layer 1, lens all" in tuned and rows(plain) == rows(tuned)  # untrained: the logit lens
    with pytest.raises(ValueError, match="no lens 'odd'; there are: plain, all"):
        asked(AskOptions(question="3+4=?", lens=tmp_path, read="odd"), codi_model)


def test_refusals(codi_model: CodiModel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"question 1 holds half a character \(\\ud83c, a lone surrogate\)"):
        asked(AskOptions(question="5 \ud83c + 7?"), codi_model)  # bytes of a terminal that are no UTF-8 come like this
    with pytest.raises(ValueError, match=r"layers must be in 0\.\.3, got 9"):
        asked(AskOptions(question="1", layers=(9,)), codi_model)
    for arguments, says in (
        ([], "Missing"),
        ([" "], "the question must hold at least one word"),
        (["1", "--layers", "1", "1"], "layers must be different"),
        (["1", "--lens", "nowhere"], "there are no lenses at nowhere"),
        (["1", "--top", "0"], "top must be at least 1"),
        (["1", "--model", "nope"], "no checkpoint 'nope'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["ask", *arguments])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and says in printed.err and printed.err.count("\n") == 1, printed.err
