"""Measures of single latents against hand-made tokens, an independent attention, and the model's own answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codi import CodiModel
from experiments.alternation.measures import (
    DEPTH,
    DIRECTION_RESAMPLES,
    Observations,
    Readings,
    Reference,
    chance_corrected,
    components,
    detection,
    principal_plane,
    readability,
)
from experiments.alternation.observe import derivation_latents, mean_slot, number_tokens, read
from experiments.alternation.options import AlternationOptions
from experiments.alternation.run import make_plan, parts
from experiments.study.folder import RunFolder
from experiments.study.parts import Workbench
from experiments.study.prompts import Asked
from experiments.study.run import fill, read_trials
from experiments.tasks import Problem, is_correct, load_task
from experiments.tasks.split import Split
from steering.replacements import MeanAblation


def test_hit_and_chance_by_hand() -> None:
    # three prompts of three clusters; values 7, 8, 9 shown by tokens 70, 80, 90
    tokens = np.array([[[70, 80, 1]], [[1, 80, 70]], [[70, 1, 2]]])
    forms = {7: (70,), 8: (80, 81), 9: (90,)}
    hit, chance = chance_corrected(tokens, [7, 8, 9], forms, np.array(["a", "b", "c"]), k=2)
    assert hit.tolist() == [[1.0], [1.0], [0.0]]
    # of the other prompts' values: 8 but not 9; neither 7 (rank 3) nor 9; 7 but not 8
    assert chance.tolist() == [[0.5], [0.0], [0.5]]
    same, _ = chance_corrected(tokens, [7, None, 9], forms, np.array(["a", "a", "c"]), k=3)
    assert np.isnan(same[1]).all() and same[0] == 1.0
    with pytest.raises(ValueError, match="k must be in 1..3, got 4"):
        chance_corrected(tokens, [7, 8, 9], forms, np.array(["a", "b", "c"]), k=4)


def test_a_lens_that_ignores_the_prompt_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([1, 2, 3], p=[0.8, 0.1, 0.1], size=600).tolist()
    clusters = np.arange(600).astype(str)
    tokens = np.tile(np.array([[[1, 2]]]), (600, 1, 1))  # always the frequent one first
    hit, chance = chance_corrected(tokens, values, {v: (v,) for v in (1, 2, 3)}, clusters, k=1)
    assert hit.mean() > 0.7 and abs((hit - chance).mean()) < 1e-9


def made(problems: list[Problem], tokens: list[list[int]]) -> Observations:
    forms = {value: (int(value),) for problem in problems for value in problem.intermediates}
    array = np.array(tokens)[:, None, None]
    readings = Readings(array, np.zeros(array.shape[:3]))
    reference = Reference(np.array(["x"]), np.zeros((1, 0, 2)))
    return Observations(tuple(problems), readings, forms, np.zeros((len(problems), 0, 2)), reference)


def test_values_of_the_question_and_ambiguous_values_are_left_out() -> None:
    def problem(numbers: tuple[int, ...], steps: tuple[int, ...]) -> Problem:
        return Problem("p", "?", steps[-1], tuple("=" for _ in steps), f"{numbers}", "", "", numbers, steps)

    problems = [
        problem((1, 2, 4), (3, 12, 15)),  # all clear
        problem((5, 2, 4), (7, 7, 14)),  # step 1 = step 2
        problem((6, 3, 1), (3, 30, 33)),  # step 1 stands in the question
    ]
    hits = made(problems, [[3, 12, 0, 0], [7, 14, 0, 0], [3, 30, 0, 0]])
    first, second, final = (detection(hits, which, 2)[0][:, 0] for which in (1, 2, "final"))
    np.testing.assert_array_equal(first, [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(second, [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(final, [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(detection(hits, "intermediate", 2)[0][:, 0], [1.0, np.nan, 1.0])


def test_entropy_and_top_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
    tokens, entropy = read(logits, depth=2)
    assert tokens[0, 0] == 0 and tokens.shape == (2, 2)
    np.testing.assert_allclose(entropy, [1.5 * np.log(2), np.log(3)], rtol=1e-6)
    assert read(torch.tensor([[0.0, float("-inf")]]))[1][0] == 0.0


def test_number_tokens_are_first_tokens_with_and_without_space(codi_model: CodiModel) -> None:
    first = codi_model.tokenizer("12", add_special_tokens=False)["input_ids"][0]
    # one token per byte: a space of its own is skipped, and 12 is shown by its first digit
    assert number_tokens(codi_model, 12) == (first,) == number_tokens(codi_model, 1)


def test_plane_is_orthonormal_and_in_units_of_its_spread() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(50, 6, 5)) * np.array([5.0, 3.0, 0.1, 0.1, 0.1]) + 7.0
    plane = principal_plane(latents)
    np.testing.assert_allclose(plane[1] @ plane[1].T, np.eye(2), atol=1e-9)
    placed = components(latents, plane)
    assert abs(plane[1][0, 0]) > 0.99 and abs(plane[1][1, 1]) > 0.99
    assert (placed**2).sum(-1).mean() == pytest.approx(2.0, rel=0.02) and abs(placed.mean((0, 1))).max() < 1e-9


def test_readability_finds_the_latent_that_holds_the_step() -> None:
    problems = load_task("templates", "test", 300, 0)
    rng = np.random.default_rng(0)
    codes = {value: rng.normal(size=24) for value in {p.intermediates[0] for p in problems}}
    states = 0.2 * rng.normal(size=(300, 2, 24))
    states[:, 1] += np.stack([codes[p.intermediates[0]] for p in problems])
    gains = readability(states, problems)
    assert set(gains) == {"step1", "step2", "answer"}
    assert gains["step1"].gain[:, 1].mean() > 0.5 and abs(gains["step1"].gain[:, 0].mean()) < 0.15
    assert 0.8 < gains["step1"].reachable <= 1.0


def observe(
    model: CodiModel, others: list[Problem], problems: list[Problem], folder: Path, **options: Any
) -> Observations:
    """All parts of the study, written to a run folder and read from it."""
    split = Split(tuple(others), tuple(problems))
    plan = make_plan(AlternationOptions(**options), model, split)
    run = RunFolder(folder)
    with run.open({"study": "alternation"}, {}):
        fill(run, parts(plan), Workbench(model, split))
    return Observations.of(read_trials(run, parts(plan)))


@pytest.fixture(scope="module")
def observed(
    tiny_model: Callable[..., CodiModel], tmp_path_factory: pytest.TempPathFactory
) -> tuple[CodiModel, list[Problem], Observations]:
    model = tiny_model(attention="eager")
    problems = load_task("templates", "test", 5, 0)
    others = load_task("templates", "derivation", 4, 0)
    folder = tmp_path_factory.mktemp("observed")
    return model, problems, observe(model, others, problems, folder, max_new_tokens=2, batch_size=3)


def test_observations_agree_with_the_model(observed: tuple[CodiModel, list[Problem], Observations]) -> None:
    model, problems, found = observed
    n = model.n_latents
    assert found.places.shape == (5, n, 2) and found.readings.tokens.shape == (5, n + 1, 1, DEPTH)
    assert [(p.prompt_id, p.answer, p.numbers, p.intermediates) for p in found.problems] == [
        (p.prompt_id, p.answer, p.numbers, p.intermediates) for p in problems
    ]
    for count in (0, 3, n):
        texts = model.answer([p.question for p in problems], n_latents=count, max_new_tokens=2)
        assert found.correct_after is not None
        expected = [is_correct(text, p.answer) for text, p in zip(texts, problems, strict=True)]
        assert found.correct_after[:, count].tolist() == expected
    batch = model.encode([p.question for p in problems])
    run = model.rollout(batch, n)
    top = model.logits(run.states).argmax(-1)
    np.testing.assert_array_equal(found.readings.tokens[:, :, 0, 0], top.numpy())
    assert found.reference.keys is not None and found.reference.places.shape == (4, n, 2)
    others = load_task("templates", "derivation", 4, 0)
    before = model.rollout(model.encode([p.question for p in others]), n).states[:, 1:].numpy()
    plane = principal_plane(before)
    np.testing.assert_allclose(found.reference.places, components(before, plane), atol=1e-3)
    np.testing.assert_allclose(found.places, components(run.states[:, 1:].numpy(), plane), atol=1e-3)
    assert found.reference.cosines is not None and len(found.reference.cosines) == 1 + DIRECTION_RESAMPLES


def test_attention_sums_to_one_and_agrees_with_the_weights(
    observed: tuple[CodiModel, list[Problem], Observations],
) -> None:
    model, problems, found = observed
    assert found.attention is not None
    n = model.n_latents
    # latent k attends to prompt and latents 1..k: all of its mass is in the table
    np.testing.assert_allclose(found.attention[:, :n].sum(-1), 1.0, atol=1e-5)
    assert (found.attention[:, n].sum(-1) < 1.0).all()  # the end of thought also looks at itself
    for query in range(n):
        np.testing.assert_allclose(found.attention[:, query, 3 + query :], 0.0, atol=1e-7)
    # one prompt, one forward pass over everything, no cache
    batch = model.encode([problems[0].question])
    run = model.rollout(batch, n)
    assert run.embeddings is not None
    end = model.embed(torch.tensor([model.protocol.after_latents[:1]]))
    everything = torch.cat((model.embed(batch.input_ids), run.embeddings, end), dim=1)
    with torch.no_grad():
        output = model.decoder(inputs_embeds=everything, output_attentions=True)
    weights = torch.stack(output.attentions).mean((0, 2))[0]  # (query, key)
    width = batch.input_ids.shape[1]
    np.testing.assert_allclose(found.attention[0, :, 2:], weights[width:, width : width + n].numpy(), atol=1e-5)
    digits = [model.tokenizer.decode([token]).strip().isdigit() for token in batch.input_ids[0].tolist()]
    on_numbers = weights[width:, :width][:, torch.tensor(digits)].sum(-1)
    np.testing.assert_allclose(found.attention[0, :, 0], on_numbers.numpy(), atol=1e-5)


def test_ablating_by_its_own_embedding_changes_nothing_and_by_another_does(codi_model: CodiModel) -> None:
    batch = codi_model.encode([load_task("templates", "test", 1, 3)[0].question])
    run = codi_model.rollout(batch, 6)
    assert run.embeddings is not None
    for latent in (1, 4, 6):
        own = codi_model.rollout(run.truncate(latent - 1), 6, [MeanAblation(latent, run.embeddings[0, latent - 1])])
        torch.testing.assert_close(own.states, run.states, rtol=1e-5, atol=1e-5)
        other = codi_model.rollout(run.truncate(latent - 1), 6, [MeanAblation(latent, run.embeddings.mean((0, 1)))])
        torch.testing.assert_close(other.states[:, :latent], run.states[:, :latent])  # earlier latents stay
        assert (other.states[:, latent:] - run.states[:, latent:]).abs().amax(-1).min() > 1e-3


def test_a_mean_slot_is_what_all_later_positions_see(
    observed: tuple[CodiModel, list[Problem], Observations],
) -> None:
    """The mean over one prompt is its own slot: nothing changes. That of another prompt changes what comes later."""
    model, problems, found = observed
    n = model.n_latents
    assert set(found.correct_ablated) == {"embedding", "slot"}
    assert all(right.shape == (5, n) for right in found.correct_ablated.values())
    batch = model.encode([problem.question for problem in problems[:1]])
    run = model.rollout(batch, n)
    for latent, other in ((2, False), (4, True)):
        source = problems[1] if other else problems[0]
        bench = Workbench(model, Split((source,), ()))
        slots = derivation_latents(bench, Asked("t", (0, 1), (0, 0)), 4).slots
        edit = mean_slot(model, run, latent, slots)
        edited = model.rollout(run.truncate(latent - 1), n, [edit])
        assert edited.keys is not None and run.keys is not None and edited.values is not None
        if other:
            torch.testing.assert_close(edited.states[:, : latent + 1], run.states[:, : latent + 1])  # h_k is as before
            assert (edited.states[:, latent + 1 :] - run.states[:, latent + 1 :]).abs().amax(-1).min() > 1e-4
            torch.testing.assert_close(edited.values[:, latent - 1], slots[1][None, latent - 1].float())
        else:
            torch.testing.assert_close(edited.states, run.states, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(edited.keys, run.keys, rtol=1e-5, atol=1e-5)


def test_a_second_lens_is_read_below_the_last_layer(
    observed: tuple[CodiModel, list[Problem], Observations], tmp_path: Path
) -> None:
    from lenses.latent_lens import LatentLens

    model, problems, _ = observed
    lens = LatentLens.plain(model)
    found = observe(model, problems, problems, tmp_path, lens=tmp_path, lens_name="plain", max_new_tokens=1)
    assert found.tuned is not None and found.tuned.tokens.shape == (5, 7, model.n_layers, DEPTH)
    run = model.rollout(model.encode([problem.question for problem in problems]))
    assert run.hidden_states is not None
    expected = lens.logits(run.hidden_states[:, 3, 2], 2, 4).argmax(-1)
    np.testing.assert_array_equal(found.tuned.tokens[:, 4, 2, 0], expected.numpy())
    hit, chance = detection(found, "final", 5, tuned=True)
    assert hit.shape == chance.shape == (5, 7)


def test_observing_needs_attention_weights_and_prompts(codi_model: CodiModel, tmp_path: Path) -> None:
    problems = load_task("templates", "test", 2, 0)
    with pytest.raises(ValueError, match="attention='eager'"):
        observe(codi_model, problems, problems, tmp_path)
    with pytest.raises(ValueError, match="prompts of both kinds"):
        observe(codi_model, [], problems, tmp_path)
