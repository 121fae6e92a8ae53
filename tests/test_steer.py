"""Your own question in three lines: steer() gives the branch engine's answers, leaves no trace, and refuses what has no
meaning; directions are made from prompts, saved, and refused for another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codi import Intervention, UserError, load_codi
from codi.branches import decode_branches
from experiments.tasks import load_task
from lm.terms import SPACES, TIMINGS
from steering import (
    AddDirection,
    Edit,
    MeanAblation,
    ReplaceLatent,
    ReplaceRows,
    branches,
    difference,
    direction_from,
    edit_table,
    load_direction,
    save_direction,
    steer,
)
from steering.directions import generator, random_direction
from steering.means import LatentMeansAccumulator

ROOT = Path(__file__).resolve().parent.parent
N_QUESTIONS = 60


@pytest.fixture(scope="module")
def model():
    """The model in the box: a real one, so that answers are readable and close calls are few."""
    return load_codi(ROOT / "checkpoints" / "tiny")


@pytest.fixture(scope="module")
def asked():
    """Questions of 3 to 5 steps: of unequal length, and where latents matter."""
    return [problem.question for problem in load_task("arithmetic", "test", N_QUESTIONS, seed=3, min_steps=3)]


@pytest.fixture(scope="module")
def prompts():
    return [problem.question for problem in load_task("arithmetic", "train", 40, seed=4)]


def engine(model, asked, direction, latent, coefficient, timing):
    run = model.rollout(model.encode(asked), model.n_latents, keep=("embeddings", "cache"))
    rows = branches([Edit(latent, 0, coefficient)], run, direction.space)
    return decode_branches(model, run, edit_table([direction]), rows, timing=timing).texts


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("space", SPACES)
def test_steered_answers_are_those_of_the_branch_engine(model, asked, prompts, space, timing):
    direction = direction_from(model, prompts, source=6, target=2, space=space)
    plain = model.answer(asked)
    coefficient = 8.0 if space == "hidden" else 2.0  # the projection's LayerNorm swallows most of it
    with steer(model, direction, latent=5, coefficient=coefficient, timing=timing):
        steered = model.answer(asked)
    assert steered == engine(model, asked, direction, 5, coefficient, timing)
    least = 1 if (space, timing) == ("hidden", "cached") else 4
    assert sum(a != b for a, b in zip(steered, plain, strict=True)) >= least, "control: the edit does something"
    assert model.answer(asked) == plain


@pytest.mark.parametrize("timing", TIMINGS)
def test_any_batch_and_any_order_gives_the_same(model, asked, prompts, timing):
    """Padded or alone, shuffled or reversed: the rotation is that of each row's own slot."""
    direction = direction_from(model, prompts, source=5, target=2)
    assert len({len(ids) for ids in model.tokenizer(asked)["input_ids"]}) > 5, "they must differ in length"
    with steer(model, direction, latent=4, coefficient=2, timing=timing):
        together = model.answer(asked)
        assert model.answer(asked[::-1]) == together[::-1]
        assert model.answer(asked, batch_size=7) == together
        order = generator(1).permutation(len(asked)).tolist()
        assert model.answer([asked[i] for i in order]) == [together[i] for i in order]
        for i in range(0, len(asked), 6):
            assert model.answer([asked[i]]) == [together[i]]


def test_an_edit_made_once_serves_any_questions(model, asked, prompts):
    """The complaint: an edit of content keys kept the rotations of the prompts it was made for."""
    edit = AddDirection(direction_from(model, prompts, source=5, target=2), 4, 2.0)
    together = model.answer(asked, interventions=[edit])
    assert model.answer(asked[::-1], interventions=[edit]) == together[::-1]
    assert [model.answer([question], interventions=[edit])[0] for question in asked] == together


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("mask", ["carried", "published"])
def test_other_bases_and_the_published_mask(tiny_model, questions, kind, mask):
    model = tiny_model(kind, mask=mask)
    direction = direction_from(model, questions, source=1, target=3)
    for timing in TIMINGS:
        with steer(model, direction, latent=2, coefficient=4, timing=timing):
            found = model.answer(questions)
        assert found == engine(model, questions, direction, 2, 4, timing)


def test_no_trace_also_after_an_error(model, asked, prompts):
    direction = direction_from(model, prompts, source=5, target=2)
    plain = model.answer(asked[:5])
    weights = {name: value.clone() for name, value in model.base.state_dict().items()}
    with pytest.raises(RuntimeError, match="mine"), steer(model, direction, 4, 2, "cached"):
        model.answer(asked[:5])
        raise RuntimeError("mine")
    with pytest.raises(UserError, match="never act"), steer(model, direction, 4, 2, "cached"):
        model.answer(asked[:5], mode="direct")
    assert model.interventions == () and model.answer(asked[:5]) == plain
    assert all(torch.equal(value, weights[name]) for name, value in model.base.state_dict().items())


def test_rollouts_inside(model, asked, prompts):
    """timing "continue" steers rollouts too; the others have no meaning for them and say so."""
    direction = direction_from(model, prompts, source=5, target=2)
    batch = model.encode(asked[:4])
    expected = model.rollout(batch, 6, [AddDirection(direction, 4, 2.0)]).states
    with steer(model, direction, 4, 2):
        assert torch.equal(model.rollout(batch).states, expected)
    with steer(model, direction, 4, 2, "cached"), pytest.raises(UserError, match="only answers see"):
        model.rollout(batch)


def test_blocks_inside_each_other(model, asked, prompts):
    """Two slots of one cache add up, as in the engine; what has no meaning together is refused."""
    kv = direction_from(model, prompts, source=5, target=2)
    z = direction_from(model, prompts, source=5, target=2, space="embedding")
    run = model.rollout(model.encode(asked), 6, keep=("cache",))
    rows = branches([Edit(3, 0, 1.0)], run, "kv")
    two = torch.tensor([[3, 4]]).expand(len(asked), 2)
    pair = replace(
        rows, latent=two, direction=torch.zeros(len(asked), 2), key_coefficient=torch.ones(len(asked), 2),
        value_coefficient=torch.ones(len(asked), 2), replace=None,
    )  # fmt: skip
    expected = decode_branches(model, run, edit_table([kv]), pair, timing="cached").texts
    with steer(model, kv, 3, timing="cached"), steer(model, kv, 4, timing="cached"):
        assert model.answer(asked) == expected
    for first, second in (
        ((kv, 3, 1.0, "cached"), (kv, 4, 1.0, "continue")),
        ((kv, 3, 1.0, "early-exit"), (kv, 4, 1.0, "early-exit")),
        ((z, 3, 1.0, "cached"), (z, 4, 1.0, "cached")),
    ):
        with pytest.raises(UserError, match="steer inside steer"), steer(model, *first), steer(model, *second):
            raise AssertionError("not reached")
        assert model.interventions == ()


class LatentsOnly(Intervention):
    def edit_embedding(self, k, z):
        return z + 1


def test_edits_that_can_never_act_are_refused(model, asked, prompts):
    direction = direction_from(model, prompts, source=5, target=2)
    vector = direction_from(model, prompts, source=5, target=2, space="embedding")
    batch = model.encode(asked[:2])
    for edit in (AddDirection(direction, 9), ReplaceLatent(vector, 9), MeanAblation(9, vector.vector)):
        with pytest.raises(UserError, match="edits latent 9, but a latent answer has latents 1..6"):
            model.answer(asked[:2], interventions=[edit])
        with pytest.raises(UserError, match="edits latent 9, but this run computes latents 1..6"):
            model.rollout(batch, 6, [edit])
    for mode in ("direct", "verbal"):
        for edit in (AddDirection(direction, 4), LatentsOnly()):
            with pytest.raises(UserError, match=f"a {mode} answer has no latents here: it would never act"):
                model.answer(asked[:2], mode=mode, interventions=[edit])
    with pytest.raises(UserError, match="has latents 1..3 here"):
        model.answer(asked[:2], n_latents=3, interventions=[AddDirection(direction, 4)])
    done = model.rollout(batch, 4)
    with pytest.raises(UserError, match="this run computes latents 5..6"):
        model.rollout(done, 6, [AddDirection(direction, 4)])
    rows = ReplaceRows({("embedding", 1, 0): (torch.ones(2, dtype=torch.bool), torch.zeros(2, model.d_model))})
    with pytest.raises(UserError, match="ReplaceRows holds values row by row"):
        model.answer(asked[:2], interventions=[rows])
    model.rollout(batch, 6, [rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 9}, "latent must be in 1..6, got 9"),
        ({"latent": 0}, "latent must be in 1..6, got 0"),
        ({"latent": 4, "timing": "late"}, "timing must be one of early-exit, continue, cached, got 'late'"),
        ({"latent": 4, "coefficient": float("nan")}, "coefficient must be a finite number, got nan"),
    ],
)
def test_mistakes(model, prompts, options, message):
    direction = direction_from(model, prompts[:2], source=5, target=2)
    with pytest.raises(UserError, match=message), steer(model, direction, **options):
        raise AssertionError("not reached")


def test_a_direction_of_prompts_is_the_mean_difference(model, prompts):
    accumulator = LatentMeansAccumulator(model)
    accumulator.update(model.rollout(model.encode(prompts)))
    for space in SPACES:
        expected = difference(accumulator.finish(), 5, 2, space)
        found = direction_from(model, prompts, source=5, target=2, space=space, batch_size=7)
        for mine, theirs in zip(found.blocks(), expected.blocks(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="in 1..6, got 7"):
        direction_from(model, prompts, source=7, target=2)
    with pytest.raises(UserError, match="at least one question"):
        direction_from(model, [], source=5, target=2)


@pytest.mark.parametrize("space", SPACES)
def test_saved_and_loaded(model, prompts, tmp_path, space):
    direction = direction_from(model, prompts, source=5, target=2, space=space)
    save_direction(tmp_path / "d.safetensors", direction)
    again = load_direction(tmp_path / "d.safetensors", model)
    assert again.origin == direction.origin and again.space == space and again.keys_frame == "content"
    assert all(torch.equal(a, b) for a, b in zip(again.blocks(), direction.blocks(), strict=True))
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["model_hash"] == model.checkpoint_hash and header["n_prompts"] == "40"
    assert json.loads(header["protocol"])["name"] == "answer-only" and (header["source"], header["target"]) == (
        "5",
        "2",
    )
    assert float(header["norm"]) == direction.norm() and header["space"] == space
    norms = [n for name in ("keys", "values", "vector") for n in json.loads(header.get(f"norm_{name}", "[]"))]
    assert len(norms) == (8 if space == "kv" else 1)
    assert sum(n**2 for n in norms) ** 0.5 == pytest.approx(direction.norm())


def test_refused_for_another_model(model, prompts, tmp_path, codi_model):
    path = tmp_path / "d.safetensors"
    direction = direction_from(model, prompts, source=5, target=2)
    save_direction(path, direction)
    with pytest.raises(UserError, match="made with another model: .*tiny") as error:
        load_direction(path, codi_model)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="another model"), steer(codi_model, direction, 2):
        raise AssertionError("not reached")
    other = load_codi(ROOT / "checkpoints" / "tiny", protocol=replace(model.protocol, before_latents=(1604,)))
    with pytest.raises(UserError, match="another protocol of .*tiny: before_latents differ"):
        load_direction(path, other)
    with pytest.raises(UserError, match="does not say which checkpoint"):
        save_direction(path, random_direction(direction, generator(0)))
    assert (-direction).origin is None, "what was made of a direction is another one"


def test_damaged_files(model, prompts, tmp_path):
    path = tmp_path / "d.safetensors"
    save_direction(path, direction_from(model, prompts, source=5, target=2))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_direction(path, model)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_direction(tmp_path / "nothing", model)
    for change, message in (
        ({"kind": "means"}, "holds no direction"),
        ({"n_prompts": "many"}, "is damaged"),
        ({"space": "hidden"}, "is damaged"),
        ({"norm": "1.0"}, "is damaged: norm"),
    ):
        save_file(tensors, path, {**header, **change})
        with pytest.raises(UserError, match=message) as error:
            load_direction(path, model)
        assert str(path) in str(error.value)
