"""steering.directions: differences, their signs and subsets, controls matched in norm, seeds."""

from __future__ import annotations

import pytest
import torch

from lm.terms import SPACES
from steering.directions import (
    Direction,
    covariance_matched,
    difference,
    generator,
    legacy_difference,
    match_norms,
    patch_coordinate,
    patch_norm,
    patch_scalar,
    random_direction,
    shuffled_difference,
    typical,
)
from steering.means import DrawsAccumulator, LatentMeansAccumulator

N = 4


@pytest.fixture(scope="module")
def run(codi_model, questions):
    return codi_model.rollout(codi_model.encode([*questions, "8-5", "2*3*4"]), N)


@pytest.fixture(scope="module")
def means(codi_model, run):
    accumulator = LatentMeansAccumulator(codi_model)
    accumulator.update(run)
    return accumulator.finish()


@pytest.fixture(scope="module")
def draws(codi_model, run):
    accumulator = DrawsAccumulator(codi_model, 5, seed=1)
    accumulator.update(run)
    return accumulator.finish()


def equal(one: Direction, other: Direction) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


@pytest.mark.parametrize("space", SPACES)
def test_a_minus_b_is_minus_b_minus_a(means, space):
    for a in range(1, N + 1):
        for b in range(1, N + 1):
            if a != b:
                assert equal(difference(means, a, b, space), -difference(means, b, a, space))
    assert not equal(difference(means, 1, 2, space), difference(means, 2, 1, space))


@pytest.mark.parametrize("space", SPACES)
def test_differences_add_up(means, space):
    left = difference(means, 1, 3, space)
    parts = [difference(means, 1, 2, space), difference(means, 2, 3, space)]
    for block, a, b in zip(left.blocks(), parts[0].blocks(), parts[1].blocks(), strict=True):
        torch.testing.assert_close(block, a + b)


def test_direction_moves_mean_b_to_mean_a(means, run):
    """In every space: mean at latent b of what is edited there, plus A−B, is the mean at latent a."""
    a, b = 4, 2
    edited = {"embedding": run.embeddings, "hidden": run.states[:, :-1], "kv": run.values}
    for space, quantity in edited.items():
        direction = difference(means, a, b, space)
        block = direction.values if space == "kv" else direction.vector
        mean = quantity.double().mean(0)
        torch.testing.assert_close(mean[b - 1] + block, mean[a - 1], atol=1e-9, rtol=0)


def test_subsets_are_zero_elsewhere(means):
    whole, part = difference(means, 1, 2, "kv"), difference(means, 1, 2, "kv", layers=[1, 3], kv_heads=[2])
    for full, some in ((whole.keys, part.keys), (whole.values, part.values)):
        assert torch.equal(some[[0, 2], 1], full[[0, 2], 1])
        assert some[1].abs().max() == 0 and some[:, 0].abs().max() == 0
        assert some.abs().max() > 0


def test_frames_differ_in_keys_only(means):
    content, raw = difference(means, 1, 2, "kv"), difference(means, 1, 2, "kv", keys="raw")
    assert (content.keys_frame, raw.keys_frame) == ("content", "raw")
    assert torch.equal(content.values, raw.values) and not torch.equal(content.keys, raw.keys)


def test_legacy(means):
    assert equal(legacy_difference(means, 1, 3, "kv"), difference(means, 3, 1, "kv", keys="raw"))
    states = means.hidden_states[:, -1]
    assert torch.equal(legacy_difference(means, 1, 3, "embedding").vector, states[2] - states[0])
    with pytest.raises(ValueError, match="got hidden"):
        legacy_difference(means, 1, 3, "hidden")


@pytest.mark.parametrize(
    "a, b, message",
    [
        (0, 1, "latent must be in 1..4, got 0"),
        (1, 5, "latent must be in 1..4, got 5"),
        (2, 2, "must differ, got 2 twice"),
    ],
)
def test_latents_out_of_range(means, a, b, message):
    for function in (difference, legacy_difference):
        with pytest.raises(ValueError, match=message):
            function(means, a, b, "embedding")


def test_other_mistakes(means):
    with pytest.raises(ValueError, match="layer must be in 1..3, got 4"):
        difference(means, 1, 2, "kv", layers=[4])
    with pytest.raises(ValueError, match="kv-head must be in 1..2, got 0"):
        difference(means, 1, 2, "kv", kv_heads=[0])
    with pytest.raises(ValueError, match="kv space only"):
        difference(means, 1, 2, "embedding", layers=[1])
    with pytest.raises(ValueError, match="space must be one of kv, embedding, hidden"):
        difference(means, 1, 2, "logits")
    with pytest.raises(ValueError, match="needs keys and values"):
        Direction("kv", vector=torch.zeros(3))


@pytest.mark.parametrize("space", SPACES)
def test_controls_have_the_norm_of_each_block(means, draws, space):
    like = difference(means, 1, 3, space, **({"layers": [1, 2]} if space == "kv" else {}))
    controls = [
        random_direction(like, generator(0, "r", 1)),
        covariance_matched(draws, 2, like),
        shuffled_difference(draws, 2, 1, 3, like),
    ]
    for control in controls:
        assert control.keys_frame == like.keys_frame and not equal(control, like)
        for block, target in zip(control.blocks(), like.blocks(), strict=True):
            torch.testing.assert_close(block.norm(dim=-1), target.double().norm(dim=-1))  # per layer × kv-head
        cosine = torch.cosine_similarity(control.blocks()[0].flatten(), like.blocks()[0].flatten(), dim=0)
        assert abs(cosine) < 0.95
    if space == "kv":
        assert controls[0].keys[2].abs().max() == 0  # layers that are not edited stay so


def test_random_directions_are_isotropic_within_a_block(means):
    like = difference(means, 1, 3, "embedding")
    many = torch.stack([random_direction(like, generator(0, "iso", draw)).vector for draw in range(3000)])
    many = many / like.vector.norm()
    d = many.shape[1]
    assert many.mean(0).norm() < 0.06
    second = many.T @ many / len(many) * d
    assert (second - torch.eye(d, dtype=torch.float64)).abs().max() < 0.15


def test_seeds(means):
    like = difference(means, 1, 3, "kv")
    same = [random_direction(like, generator(5, "random", "kv", 1, 3, 0)) for _ in range(2)]
    assert equal(*same)
    others = [
        generator(6, "random", "kv", 1, 3, 0),
        generator(5, "random", "kv", 1, 3, 1),
        generator(5, "random", "kv", 1, 2, 0),
    ]
    for rng in others:
        assert not equal(random_direction(like, rng), same[0])


def test_typical_has_the_mean_norm_of_each_block(means):
    pair = [difference(means, 1, 2, "kv"), difference(means, 1, 3, "kv")]
    stand_in = typical(pair)
    expected = (pair[0].values.norm(dim=-1) + pair[1].values.norm(dim=-1)) / 2
    torch.testing.assert_close(stand_in.values.norm(dim=-1), expected)
    torch.testing.assert_close(random_direction(stand_in, generator(0)).values.norm(dim=-1), expected)


def test_match_norms_refuses_what_cannot_be(means):
    like = difference(means, 1, 2, "embedding")
    with pytest.raises(ValueError, match="zero block"):
        match_norms(Direction("embedding", vector=torch.zeros_like(like.vector)), like)
    with pytest.raises(ValueError, match="kv space to one in embedding space"):
        match_norms(difference(means, 1, 2, "kv"), like)


def test_draws_must_exist_and_share_the_frame(means, draws):
    with pytest.raises(ValueError, match=r"draw must be in 0..4, got 5"):
        covariance_matched(draws, 5, difference(means, 1, 2, "embedding"))
    with pytest.raises(ValueError, match="content keys, the direction of raw keys"):
        shuffled_difference(draws, 0, 1, 2, difference(means, 1, 2, "kv", keys="raw"))


@pytest.mark.parametrize("space", ["embedding", "hidden"])
def test_patches(means, run, space):
    """(i) one mean and spread for all coordinates, (ii) its own for each, (iii) a unit vector."""
    latent, many = 3, 4000
    collected = (run.embeddings if space == "embedding" else run.states[:, :-1])[:, latent - 1].double()
    mean, spread = collected.mean(0), collected.std(0, correction=0)
    scalar = torch.stack([patch_scalar(means, latent, space, generator(0, i)).vector for i in range(many)])
    assert scalar.mean() == pytest.approx(float(mean.mean()), abs=0.02 * float(mean.std()))
    assert scalar.std() == pytest.approx(float(mean.std()), rel=0.02)
    coordinate = torch.stack([patch_coordinate(means, latent, space, generator(0, i)).vector for i in range(many)])
    torch.testing.assert_close(coordinate.mean(0), mean, atol=5 * float(spread.max()) / many**0.5, rtol=0)
    torch.testing.assert_close(coordinate.std(0), spread, rtol=0.08, atol=1e-6)
    assert (scalar.mean(0) - mean).abs().max() > 0.5 * mean.std()  # form (i) forgets the coordinates, (ii) does not
    assert patch_norm(means, latent, space, generator(0)).norm() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="embedding or hidden"):
        patch_norm(means, latent, "kv", generator(0))
