"""Lens training: below the plain lens on held-out prompts, alone = together, interrupted = in one go, streaming."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from codi import CodiModel
from lenses import TEXT, LatentLens, LensTraining, TrainingOptions, divergence_to_output, latent_states, unembed
from lenses.training import collect_states


def question(i: int) -> str:
    return f"{i % 97}+{i % 13}*{i % 7}=?"


def stream(step: int) -> list[str]:
    return [question(8 * step + i) for i in range(8)]


HELD_OUT = [[question(10_000 + 17 * i) for i in range(24)]]
FAST = TrainingOptions(steps=30, evaluate_every=10, lr=5e-3)


def weights(training: LensTraining, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.lenses[name].layer_translators.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_trained_lens_beats_the_plain_one_on_held_out_prompts(codi_model: CodiModel, optimizer: str) -> None:
    options = TrainingOptions(
        optimizer=optimizer, steps=30, evaluate_every=10, lr=5e-3 if optimizer == "adamw" else None
    )
    training = LensTraining(codi_model, {"each1": (1,), "all": (1, 2, 3), "text": (TEXT,)}, options)
    training.fit(stream, HELD_OUT)
    fresh = collect_states(codi_model, [question(20_000 + 31 * i) for i in range(24)], (TEXT, 1, 2, 3))
    plain = LatentLens.plain(codi_model)
    for name, positions in training.positions.items():
        states = fresh.at(positions)
        tuned = divergence_to_output(training.lens(name), states).mean(0)
        base = divergence_to_output(plain, states).mean(0)
        assert (tuned[:-1] < base[:-1]).all(), (name, tuned, base)
        assert tuned[-1] == base[-1] == 0  # the last layer is exact with and without training


def test_divergence_is_computed_by_hand(codi_model: CodiModel, questions: list[str]) -> None:
    run = codi_model.rollout(codi_model.encode(questions), 2)
    states = latent_states(run, [2])
    found = divergence_to_output(
        LatentLens.plain(codi_model), states, budget=codi_model.vocab_size
    )  # one row at a time
    p = codi_model.logits(run.states[0, 2]).double().softmax(-1)
    q = unembed(codi_model)(run.hidden_states[0, 1, 1]).double().softmax(-1)
    assert found[0, 1].item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)


def test_target_is_not_normed_twice(codi_model: CodiModel) -> None:
    """A lens trained to a target that is normed again ends somewhere else: what the published trainer did."""
    training = LensTraining(codi_model, {"1": (1,)}, FAST)
    loss = training.update(stream(0))
    states = collect_states(codi_model, stream(0), (1,))
    expected = divergence_to_output(LatentLens.plain(codi_model), states).mean(0)
    assert [loss[f"1/{layer}"] for layer in range(codi_model.n_layers)] == pytest.approx(
        expected[:-1].tolist(), rel=1e-4
    )
    shared = unembed(codi_model)
    twice = shared(states.hidden[:, -1]).softmax(-1)
    wrong = (twice * (twice.log() - shared(states.hidden[:, 1]).log_softmax(-1))).sum(-1).mean()
    assert abs(float(wrong) - loss["1/1"]) > 0.01


def test_together_is_alone(codi_model: CodiModel) -> None:
    together = LensTraining(codi_model, {"1": (1,), "all": (1, 2), "2": (2,)}, FAST)
    alone = LensTraining(codi_model, {"all": (1, 2)}, FAST)
    for step in range(5):
        together.update(stream(step))
        alone.update(stream(step))
    for a, b in zip(weights(together, "all"), weights(alone, "all"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert not torch.allclose(weights(together, "1")[0], weights(together, "all")[0], atol=1e-3)


def test_cut_into_pieces_is_the_same_step(codi_model: CodiModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LensTraining(codi_model, {"1": (1,), "all": (1, 2)}, FAST)
    whole.update(stream(0))
    monkeypatch.setattr("lenses.training.LOGIT_BUDGET", 5 * codi_model.vocab_size)  # groups of five rows
    pieces = LensTraining(codi_model, {"1": (1,), "all": (1, 2)}, FAST)
    pieces.update(stream(0))
    for name in ("1", "all"):
        for a, b in zip(whole.lenses[name].parameters(), pieces.lenses[name].parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3)


def test_interrupted_training_is_one_training(codi_model: CodiModel, tmp_path: Path) -> None:
    options = TrainingOptions(steps=12, evaluate_every=4, lr=5e-3)
    lenses = {"2": (2,), "text": (TEXT,)}
    straight = LensTraining(codi_model, lenses, options)
    straight.fit(stream, HELD_OUT)

    class Killed(Exception):
        pass

    def until_seven(training: LensTraining) -> None:
        training.save(tmp_path / "state.pt")
        if training.step == 7:
            raise Killed

    first = LensTraining(codi_model, lenses, options)
    with pytest.raises(Killed):
        first.fit(stream, HELD_OUT, until_seven)
    second = LensTraining(codi_model, lenses, options)
    second.load(tmp_path / "state.pt")
    assert second.step == 7
    second.fit(stream, HELD_OUT)
    for name in lenses:
        for a, b in zip(weights(straight, name), weights(second, name), strict=True):
            assert torch.equal(a, b)
    assert straight.history == second.history or all(
        math.isnan(x["loss"]) or x == y for x, y in zip(straight.history, second.history, strict=True)
    )
    with pytest.raises(ValueError, match="other lenses or training options"):
        LensTraining(codi_model, {"2": (2,)}, options).load(tmp_path / "state.pt")


def test_early_stopping_keeps_the_best(codi_model: CodiModel) -> None:
    options = TrainingOptions(steps=200, evaluate_every=1, patience=2, lr=100.0)  # far too high a rate
    training = LensTraining(codi_model, {"1": (1,)}, options)
    training.fit(stream, HELD_OUT)
    assert training.step < 200 and all(item.stopped for item in training.translators)
    states = training.states(HELD_OUT[0], -1)
    final = divergence_to_output(training.lens("1"), states).mean(0)[:-1]
    plain = divergence_to_output(LatentLens.plain(codi_model), states).mean(0)[:-1]
    assert (final <= plain + 1e-6).all()  # never worse than the identity it started from
    assert final.tolist() == pytest.approx([item.divergence for item in training.translators], rel=1e-5)


def test_memory_does_not_grow_with_prompts(codi_model: CodiModel) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    training = LensTraining(codi_model, {"1": (1,), "all": (1, 2)}, FAST)
    for step in range(3):
        training.update(stream(step))
    early = tensors()
    for step in range(3, 15):
        training.update(stream(step))
    assert tensors() <= early + 1000  # keeping the states of one batch would add 3 × 8 × 4 × 32 numbers per step


def test_model_is_left_alone(codi_model: CodiModel) -> None:
    before = {name: value.clone() for name, value in codi_model.base.state_dict().items()}
    training = LensTraining(codi_model, {"1": (1,)}, FAST)
    training.update(stream(0))
    assert all(torch.equal(value, before[name]) for name, value in codi_model.base.state_dict().items())
    assert all(parameter.grad is None for parameter in codi_model.base.parameters())


def test_passages_of_their_own(codi_model: CodiModel) -> None:
    own = LensTraining(codi_model, {"text": (TEXT,)}, FAST)
    other = LensTraining(
        codi_model, {"text": (TEXT,)}, FAST, passages=lambda step: ["Once upon a time.", "The sea is wide."]
    )
    assert len(own.states(stream(0), 0)) == 64  # 8 prompts × 8 tokens
    states = other.states(stream(0), 0)
    assert len(states) == 16 and set(states.position.tolist()) == {TEXT}


def test_rate_and_bad_options(tiny_model: Callable[..., CodiModel]) -> None:
    options = TrainingOptions(steps=100, warmup=0.1)
    assert options.rate(9) == pytest.approx(1e-3) and options.rate(0) == pytest.approx(1e-4)
    assert options.rate(99) < options.rate(50) < options.rate(10)
    assert TrainingOptions(optimizer="sgd", steps=100, warmup=0.1).rate(9) == pytest.approx(0.1)
    for wrong in (
        {"steps": 0},
        {"lr": 0.0},
        {"patience": 0},
        {"clip": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(ValueError, match="must be"):
            TrainingOptions(**wrong)
    with pytest.raises(ValueError, match="at least one lens"):
        LensTraining(tiny_model(), {})
    with pytest.raises(ValueError, match="no positions"):
        LensTraining(tiny_model(), {"1": ()})
    with pytest.raises(ValueError, match="validation questions"):
        LensTraining(tiny_model(), {"1": (1,)}, options).fit(stream, [])
