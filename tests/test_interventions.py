"""steering.interventions: both forms of an edit agree, coefficient 0 is no edit, coefficients reach the right part."""

from __future__ import annotations

import pytest
import torch

from codi.branches import decode_branches
from codi.decode import decode_answers
from lm.terms import SPACES
from steering.directions import Direction, difference, generator, patch_norm, random_direction
from steering.interventions import AddDirection, Edit, ReplaceLatent, branches, coefficients_of, edit_table
from steering.means import LatentMeansAccumulator

N = 4


@pytest.fixture(scope="module")
def batch(codi_model, questions):
    return codi_model.encode(questions)


@pytest.fixture(scope="module")
def run(codi_model, batch):
    return codi_model.rollout(batch, N)


@pytest.fixture(scope="module")
def means(codi_model, run):
    accumulator = LatentMeansAccumulator(codi_model)
    accumulator.update(run)
    return accumulator.finish()


def logits(model, run):
    return decode_answers(model, run, 1, keep_first_logits=True).first_logits


@pytest.mark.parametrize("keys", ["content", "raw"])
@pytest.mark.parametrize("timing", ["early-exit", "continue"])
@pytest.mark.parametrize("space", SPACES)
def test_branches_equal_interventions(codi_model, batch, run, means, space, timing, keys):
    """Padded prompts of different length; one edit at a time through the rollout, all at once through branches."""
    direction = difference(means, 1, 3, space, **({"keys": keys} if space == "kv" else {}))
    control = random_direction(direction, generator(0))
    edits = [
        Edit(k, row, c, part) for k in (1, 3) for row in (0, 1) for c in (-1.5, 0.5)
        for part in (("keys", "values", "both") if space == "kv" else ("both",))
    ]  # fmt: skip
    rows = branches(edits, run, space)
    answers = decode_branches(
        codi_model, run, edit_table([direction, control]), rows, timing=timing, max_new_tokens=1, keep_first_logits=True
    )
    found = answers.first_logits.reshape(len(run), len(edits), -1)
    plain = logits(codi_model, run)
    for place, edit in enumerate(edits):
        change = AddDirection(
            (direction, control)[edit.direction],
            edit.latent,
            edit.coefficient,
            part=edit.part,
        )
        steered = codi_model.rollout(batch, edit.latent if timing == "early-exit" else N, [change])
        expected = logits(codi_model, steered)
        torch.testing.assert_close(found[:, place], expected, atol=5e-4, rtol=0)
        assert (expected - plain).abs().max() > 1e-2  # the edit does something


@pytest.mark.parametrize("space", SPACES)
def test_coefficient_zero_is_bit_identical_to_no_edit(codi_model, batch, run, means, space):
    direction = difference(means, 2, 1, space)
    change = AddDirection(direction, 2, 0.0)
    again = codi_model.rollout(batch, N, [change])
    for name in ("states", "embeddings", "keys", "values"):
        assert torch.equal(getattr(again, name), getattr(run, name))
    rows = branches([Edit(2, 0, 0.0), Edit(2)], run, space)
    answers = decode_branches(codi_model, run, edit_table([direction]), rows, max_new_tokens=1, keep_first_logits=True)
    both = answers.first_logits.reshape(len(run), 2, -1)
    assert torch.equal(both[:, 0], both[:, 1]) and answers.applied_norm.abs().max() == 0
    steered = codi_model.rollout(batch, N, [AddDirection(direction, 2, 1.0)])
    assert not torch.equal(steered.states[:, 3], run.states[:, 3])


def test_earlier_latents_and_the_edited_one(codi_model, batch, run, means):
    """A slot edit shows from the next latent on; an embedding edit at the latent itself; nothing before changes."""
    kv = codi_model.rollout(batch, N, [AddDirection(difference(means, 1, 4, "kv"), 2, 1.0)])
    assert torch.equal(kv.states[:, :3], run.states[:, :3]) and not torch.equal(kv.states[:, 3], run.states[:, 3])
    z = codi_model.rollout(batch, N, [AddDirection(difference(means, 1, 4, "embedding"), 2, 1.0)])
    assert torch.equal(z.states[:, :2], run.states[:, :2]) and not torch.equal(z.states[:, 2], run.states[:, 2])


def test_the_slot_gets_what_the_formula_says(codi_model, batch, run, means):
    """Content keys: K + c · rotate(ΔK, own position of the slot); values: V + c · scale · ΔV."""
    from codi.rope import rotate

    direction = difference(means, 4, 1, "kv")
    change = AddDirection(direction, 2, -2.0, key_scale=0.5, value_scale=3.0)
    steered = codi_model.rollout(batch, 2, [change])
    positions = (run.prompt_lengths + 1)[:, None, None]
    turned = rotate(direction.keys.expand(len(run), -1, -1, -1), positions, codi_model)
    torch.testing.assert_close(steered.keys[:, 1].double(), run.keys[:, 1] - 1.0 * turned, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        steered.values[:, 1].double(), run.values[:, 1] - 6.0 * direction.values, atol=1e-5, rtol=0
    )


def test_coefficients_of_parts():
    assert coefficients_of(2.0) == (2.0, 2.0)
    assert coefficients_of(2.0, "keys") == (2.0, 0.0)
    assert coefficients_of(2.0, "values", 0.5, 0.25) == (0.0, 0.5)
    with pytest.raises(ValueError, match="part must be one of keys, values, both, got 'heads'"):
        coefficients_of(1.0, "heads")


def test_sign_flip_is_the_mirror(codi_model, run, means):
    """(A, B, c) and (B, A, −c) give the same logits, bit for bit; (A, B, −c) does not."""
    table = edit_table([difference(means, 1, 3, "kv"), difference(means, 3, 1, "kv")])
    rows = branches([Edit(2, 0, 1.5), Edit(2, 1, -1.5), Edit(2, 0, -1.5)], run, "kv")
    found = decode_branches(codi_model, run, table, rows, max_new_tokens=1, keep_first_logits=True).first_logits
    one, mirror, flipped = found.reshape(len(run), 3, -1).unbind(1)
    torch.testing.assert_close(one, mirror, atol=1e-5, rtol=0)
    assert (one - flipped).abs().max() > 1e-2


@pytest.mark.parametrize("space", ["embedding", "hidden"])
def test_replacing_with_the_prompts_own_norm(codi_model, batch, run, means, space):
    vector = patch_norm(means, 2, space, generator(1))
    rows = branches([Edit(2, 0, 1.0, replace=True, own_norm=True)], run, space)
    own = run.embeddings[:, 1] if space == "embedding" else run.states[:, 1]
    torch.testing.assert_close(rows.value_coefficient.float(), own.norm(dim=-1))
    found = decode_branches(
        codi_model, run, edit_table([vector]), rows, timing="continue", max_new_tokens=1, keep_first_logits=True
    )
    replaced = codi_model.rollout(batch, N, [ReplaceLatent(vector, 2, own_norm=True)])
    torch.testing.assert_close(found.first_logits, logits(codi_model, replaced), atol=5e-4, rtol=0)
    # what was there leaves no trace: another prompt prefix state, same vector fed
    if space == "embedding":
        torch.testing.assert_close(
            replaced.embeddings[:, 1] / replaced.embeddings[:, 1].norm(dim=-1, keepdim=True),
            vector.vector.float().expand(len(run), -1), atol=1e-5, rtol=0,
        )  # fmt: skip


def test_applied_norm_is_what_was_asked_in_float32_and_what_was_left_in_bfloat16(
    tiny_model, questions, means, run, codi_model
):
    direction = difference(means, 1, 3, "embedding")
    rows = branches([Edit(2, 0, 0.5)], run, "embedding")
    exact = decode_branches(codi_model, run, edit_table([direction]), rows, max_new_tokens=1).applied_norm
    torch.testing.assert_close(exact, torch.full_like(exact, 0.5 * direction.norm()), rtol=1e-5, atol=0)
    coarse = tiny_model(dtype="bfloat16")
    rough = coarse.rollout(coarse.encode(questions), N)
    left = decode_branches(
        coarse, rough, edit_table([direction]), branches([Edit(2, 0, 0.5)], rough, "embedding"), max_new_tokens=1
    )
    assert (left.applied_norm - 0.5 * direction.norm()).abs().max() > 1e-5
    torch.testing.assert_close(left.applied_norm, exact, rtol=0.05, atol=0)


def test_an_edit_that_changes_nothing_is_an_error(codi_model, run, means):
    nothing = Direction("embedding", vector=torch.zeros(codi_model.d_model, dtype=torch.float64))
    with pytest.raises(ValueError, match="changed nothing"):
        decode_branches(
            codi_model, run, edit_table([nothing]), branches([Edit(1, 0, 1.0)], run, "embedding"), max_new_tokens=1
        )


def test_mistakes(means):
    with pytest.raises(TypeError, match="prompts"):  # rotated in the run, whatever the prompts
        AddDirection(difference(means, 1, 2, "kv"), 1, prompts=None)
    with pytest.raises(ValueError, match="latent must be 1 or more, got 0"):
        AddDirection(difference(means, 1, 2, "embedding"), 0)
    with pytest.raises(ValueError, match="got kv"):
        ReplaceLatent(difference(means, 1, 2, "kv"), 1)
    with pytest.raises(ValueError, match="one space"):
        edit_table([difference(means, 1, 2, "kv"), difference(means, 1, 2, "hidden")])
