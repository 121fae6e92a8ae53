"""circuits.mixing: planted relations are found by the probe that can find them, on words it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.mixing import Pairs, mixing_scores, pair_states
from lm.errors import UserError
from lm.residual import read_residual

RELATIONS = ("edge", "negated", "unrelated")


def planted(n: int, seed: int, words: str) -> Pairs:
    """Layer 0: nothing. Layer 1: the relation is written into the first word. Layer 2: into the product of signs of
    the two words (no word alone tells anything)."""
    rng = np.random.default_rng(seed)
    d = 6
    relation = rng.integers(0, 2, n)
    states = rng.normal(size=(n, 3, 2 * d))
    states[:, 1, 0] += 4 * relation
    sign = rng.choice([-1, 1], n)
    states[:, 2, 0] = 2 * sign + 0.3 * rng.normal(size=n)
    states[:, 2, d] = 2 * sign * np.where(relation, 1, -1) + 0.3 * rng.normal(size=n)
    names = tuple(RELATIONS[i] for i in relation)
    return Pairs(torch.tensor(states), names, frozenset({f"{words}{i}" for i in range(n)}))


def test_planted_relations():
    done: list[int] = []
    found = mixing_scores(planted(600, 0, "a"), planted(300, 1, "b"), advance=done.append)
    assert len(found) == sum(done) == 3 * 2 * 2
    score = {(s.layer, s.probe, s.labels): s for s in found}
    for probe in ("linear", "mlp"):
        assert score[0, probe, "true"].f1 < 0.6
        assert score[1, probe, "true"].f1 > 0.9
        for layer in range(3):
            assert score[layer, probe, "shuffled"].f1 < 0.65
    assert score[2, "linear", "true"].f1 < 0.6 < 0.9 < score[2, "mlp", "true"].f1
    some = score[1, "linear", "true"]
    assert some.chance == 0.5 and some.correct.shape == (300,) and some.accuracy == some.correct.mean()


def test_the_same_seed_gives_the_same_scores():
    train, test = planted(120, 0, "a"), planted(60, 1, "b")
    first, again, other = (mixing_scores(train, test, seed=seed) for seed in (0, 0, 1))
    assert [s.f1 for s in first] == [s.f1 for s in again] != [s.f1 for s in other]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_of_pairs(language_model, kind):
    model = language_model(kind)
    batch = model.encode(["3+4=?", "Once upon a time"])
    width = batch.input_ids.shape[1]
    text, first, second = [1, 0, 1], [width - 2, width - 1, 3], [width - 1, width - 3, width - 2]
    everything = read_residual(model, batch, "all")
    for batch_size in (1, 8):
        found = pair_states(model, batch, text, first, second, batch_size=batch_size)
        assert found.shape == (3, model.n_layers + 1, 2 * model.d_model)
        for pair in range(3):
            expected = torch.cat((everything[text[pair], first[pair]], everything[text[pair], second[pair]]), -1)
            torch.testing.assert_close(found[pair], expected, atol=1e-5, rtol=1e-4)
    some = pair_states(model, batch, text, first, second, layers=[1])
    torch.testing.assert_close(some[:, 0], found[:, 1], atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="got a column of padding"):
        pair_states(model, batch, [0], [0], [width - 1])


def test_refusals():
    train, test = planted(40, 0, "a"), planted(40, 1, "b")
    with pytest.raises(UserError, match="share 40 words, such as 'a0'"):
        mixing_scores(train, planted(40, 1, "a"))
    with pytest.raises(UserError, match="same layers and width"):
        mixing_scores(train, Pairs(test.states[:, :2], test.relation, test.words))
    with pytest.raises(UserError, match=r"the test pairs also \['x'\]"):
        mixing_scores(train, Pairs(test.states, ("x",) * 40, test.words))
    with pytest.raises(UserError, match="probes must be of linear, mlp, got 'tree'"):
        mixing_scores(train, test, probes=["tree"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="with a relation each"):
        Pairs(test.states, test.relation[:3], test.words)
