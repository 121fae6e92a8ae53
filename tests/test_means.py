"""steering.means: streaming equals whole batch, frames of keys, split halves, draws, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codi.rope import rotate
from steering.means import ControlDraws, DrawsAccumulator, LatentMeans, LatentMeansAccumulator, content_keys

NAMES = ("embeddings", "hidden_states", "states", "keys_raw", "values")


@pytest.fixture(scope="module")
def texts(questions):
    return [*questions, "5*5", "Ann has 7 apples, Bob has 9.", "1+1=?"]


@pytest.fixture(scope="module")
def run(codi_model, texts):
    return codi_model.rollout(codi_model.encode(texts), 4)


def streamed(model, run, sizes, halves=None):
    accumulator, start = LatentMeansAccumulator(model), 0
    for size in sizes:
        rows = list(range(start, start + size))
        accumulator.update(run.select(rows), None if halves is None else [halves[row] for row in rows])
        start += size
    return accumulator.finish({"note": "test"})


def test_streaming_equals_whole_batch(codi_model, run):
    means = streamed(codi_model, run, (2, 1, 4))
    expected = {
        "embeddings": run.embeddings, "hidden_states": run.hidden_states, "states": run.states, "keys_raw": run.keys,
        "values": run.values, "keys_content": content_keys(run, codi_model),
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(means.mean(name), value.double().mean(0), rtol=0, atol=1e-12)
    assert means.count == 7 and means.counts == (4, 3)
    # the control: one prompt less is another mean
    assert (streamed(codi_model, run, (2, 1, 3)).embeddings - means.embeddings).abs().max() > 1e-3


def test_indices(codi_model, run):
    """Row k-1 of projected_states is what latent k was projected from; states has h_0..h_n."""
    means = streamed(codi_model, run.select([2]), (1,))
    projected = codi_model.project(means.projected_states.float())
    torch.testing.assert_close(projected, means.embeddings.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(means.states[1:], means.hidden_states[:, -1])
    assert means.n_latents == 4 and means.states.shape[0] == 5


def test_content_keys_rotated_back_are_the_cached_ones(codi_model, run):
    content = content_keys(run, codi_model)
    positions = run.prompt_lengths[:, None] + torch.arange(4)
    back = rotate(content, positions[:, :, None, None], codi_model)
    torch.testing.assert_close(back.float(), run.keys, atol=1e-5, rtol=0)
    assert (content.float() - run.keys).abs().max() > 0.1  # rotation does something


def test_content_keys_do_not_depend_on_padding(codi_model, texts, run):
    for row in (0, 3):
        alone = codi_model.rollout(codi_model.encode([texts[row]]), 4)
        torch.testing.assert_close(
            content_keys(alone, codi_model)[0], content_keys(run, codi_model)[row], atol=1e-4, rtol=0
        )


def test_absolute_positions_are_left_alone(tiny_model, texts):
    model = tiny_model("gpt2", "original")
    run = model.rollout(model.encode(texts), 2)
    assert torch.equal(content_keys(run, model), run.keys.double())


def test_split_halves(codi_model, run):
    halves = [0, 1, 1, 0, 0, 1, 0]
    means = streamed(codi_model, run, (3, 4), halves)
    first, second = run.select([0, 3, 4, 6]), run.select([1, 2, 5])
    a, b = first.values.double().mean(0)[2, 1], second.values.double().mean(0)[2, 1]
    expected = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    assert means.split_half_cosines()["values"][2, 1] == pytest.approx(float(expected), abs=1e-9)
    assert means.norms()["values"][2, 1] == pytest.approx(float(run.values.double().mean(0)[2, 1].norm()), rel=1e-9)
    # the same prompts in both halves agree fully, also once centred
    same = LatentMeansAccumulator(codi_model)
    same.update(run, [0] * 7)
    same.update(run, [1] * 7)
    for centred in (False, True):
        for cosines in same.finish().split_half_cosines(centred).values():
            torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_summary_has_a_record_per_latent_and_layer(codi_model, run):
    records = streamed(codi_model, run, (7,)).summary()
    layers = codi_model.n_layers
    assert len(records) == 4 * (1 + (layers + 1) + 3 * layers)
    assert {record["layer"] for record in records if record["quantity"] == "values"} == set(range(1, layers + 1))
    assert {record["latent"] for record in records} == {1, 2, 3, 4}


def test_files(codi_model, run, tmp_path):
    means = streamed(codi_model, run, (7,))
    means.save(tmp_path / "means.safetensors")
    again = LatentMeans.load(tmp_path / "means.safetensors")
    assert again.counts == means.counts and again.metadata == {"note": "test"}
    for name in means.halves:
        assert torch.equal(again.halves[name], means.halves[name])
    content = (tmp_path / "means.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="short.safetensors"):
        LatentMeans.load(tmp_path / "short.safetensors")


def test_mistakes(codi_model, run):
    accumulator = LatentMeansAccumulator(codi_model)
    with pytest.raises(ValueError, match="at least one prompt"):
        accumulator.finish()
    with pytest.raises(ValueError, match="halves must be 0 or 1"):
        accumulator.update(run, [0, 1])
    accumulator.update(run)
    with pytest.raises(ValueError, match="shape"):
        accumulator.update(run.truncate(2))
    with pytest.raises(ValueError, match="keys must be one of content, raw, got 'cooked'"):
        accumulator.finish().keys("cooked")
    with pytest.raises(ValueError, match="kept keys"):
        accumulator.update(
            codi_model.rollout(codi_model.encode(["1"]), 4, keep=("embeddings", "hidden_states", "values"))
        )


def draws_of(model, run, sizes, n_draws, seed=3, keys="content") -> ControlDraws:
    accumulator, start = DrawsAccumulator(model, n_draws, seed, keys), 0
    for size in sizes:
        accumulator.update(run.select(list(range(start, start + size))))
        start += size
    return accumulator.finish()


def test_draws_do_not_depend_on_batches_but_on_the_seed(codi_model, run):
    one, other = draws_of(codi_model, run, (7,), 3), draws_of(codi_model, run, (1, 4, 2), 3)
    for kind in ("covariance", "shuffled"):
        for name, value in getattr(one, kind).items():
            torch.testing.assert_close(getattr(other, kind)[name], value, atol=1e-6, rtol=0)
    reseeded = draws_of(codi_model, run, (7,), 3, seed=4)
    assert (reseeded.covariance["values"] - one.covariance["values"]).abs().max() > 1e-3


def test_covariance_draws_have_the_covariance_of_the_latents(codi_model, run):
    draws = draws_of(codi_model, run, (7,), 20000).covariance["embeddings"].double()
    centred = run.embeddings.double() - run.embeddings.double().mean(0)
    flat = centred.flatten(0, 1)
    expected = flat.T @ flat / len(flat)
    found = draws.T @ draws / len(draws)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05
    isotropic = torch.eye(len(expected), dtype=torch.float64) * expected.trace() / len(expected)
    assert (isotropic - expected).norm() / expected.norm() > 0.3  # what an unmatched Gaussian would have


def test_shuffled_draws_permute_labels_within_prompts(codi_model, run):
    draws = draws_of(codi_model, run, (7,), 200).shuffled["values"].double()
    # whatever the permutations, the sum over labels is the sum over latents
    expected = run.values.double().mean(0).sum(0)
    for draw in draws[:5]:
        torch.testing.assert_close(draw.sum(0), expected, atol=1e-4, rtol=0)
    # every label gets every latent equally often: the mean over draws has no labels left
    true = run.values.double().mean(0)
    left = (draws.mean(0) - true.mean(0)).norm() / (true - true.mean(0)).norm()
    assert left < 0.15
    assert ((draws[0] - true.mean(0)).norm() / (true - true.mean(0)).norm()) > 0.15


def test_one_prompt_shuffled_is_a_permutation_of_its_latents(codi_model, run):
    draw = draws_of(codi_model, run.select([1]), (1,), 4).shuffled["embeddings"][2]
    rows = {tuple(np.round(row.numpy(), 4)) for row in draw}
    assert rows == {tuple(np.round(row.numpy(), 4)) for row in run.embeddings[1]}


def test_draw_files(codi_model, run, tmp_path):
    draws = draws_of(codi_model, run, (7,), 2, keys="raw")
    draws.save(tmp_path / "draws.safetensors")
    again = ControlDraws.load(tmp_path / "draws.safetensors")
    assert again.keys_frame == "raw" and again.n_draws == 2
    assert torch.equal(again.shuffled["keys"], draws.shuffled["keys"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DrawsAccumulator(codi_model, 0)
