"""steering.contrasts and pair_statistics: the four methods are what the published library computes, planted directions
come back, and neither batches, padding nor streaming change a vector."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lm.errors import UserError
from lm.load import load_lm
from lm.residual import read_residual
from lm.text import left_padded
from steering import (
    ControlVector,
    PairStatistics,
    VectorOrigin,
    Written,
    fit_contrasts,
    fit_runs,
    pair_statistics,
    pooled,
)
from steering.contrasts import origin_of

METHODS = ("reading", "contrastive", "pca-contrast", "pca-reading")
ORIGIN = VectorOrigin(model_name="toy", n_layers=2)
RIGHT = ["3+4=7", "Tom has 12 pens, so 12", "no", "1 2 3 4 5 6 7 8 9", "five", "Anna is fast. True"]
WRONG = ["3+4=8", "qwertzuiop", "yes and no", "9 8 7", "a long sentence about nothing", "Anna is fast. False"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(positive, negative, step=None, **options):
    """Statistics of given states, added `step` pairs at a time."""
    found = PairStatistics(ORIGIN, range(1, positive.shape[1] + 1), **options)
    for rows in torch.arange(len(positive)).split(step or len(positive)):
        found.update(positive[rows], None if negative is None else negative[rows], rows.tolist())
    return found


def assert_same(a: ControlVector, b: ControlVector, close=1e-5):
    assert a.layers == b.layers
    for layer in a.layers:
        torch.testing.assert_close(a[layer], b[layer], atol=close * float(b[layer].abs().max()), rtol=0)


# --- Golden cases -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def published(request, golden_root):
    """(model, expected.json, tensors) of a golden case."""
    folder = golden_root / "control" / request.param
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return load_lm(str(folder / "model")), expected, load_file(folder / "expected.safetensors")


def compare_with_published(pairs, tensors, n_layers, close=1e-4):
    """Every method at every block; the last block's was published after the final norm, and must differ here."""
    for method in METHODS:
        vector = pairs.vector(method)
        assert vector.layers == tuple(range(1, n_layers + 1))
        for block in range(n_layers):
            wanted, found = tensors[f"{method.replace('-', '_')}.{block}"], vector[block + 1]
            if method.startswith("pca") and float(wanted @ found) < 0:
                wanted = -wanted  # the published sign is arbitrary
            error = float((found - wanted).abs().max() / wanted.abs().max())
            assert error <= close if block < n_layers - 1 else error > 0.1, (method, block, error)


def test_golden_vectors(published):
    model, expected, tensors = published
    pairs = fit_contrasts(model, expected["positive"], expected["negative"], batch_size=7)
    assert pairs.n == expected["n"]
    compare_with_published(pairs, tensors, model.n_layers)


def test_golden_vectors_from_padded_batches(published):
    """The same texts left padded, in one batch with longer ones; control: one token before the last gives others."""
    model, expected, tensors = published
    long = [expected["positive"][0] + " " + expected["positive"][1]]
    states = []
    for side in ("positive", "negative"):
        batch = model.encode([*long, *expected[side], *long])
        assert not batch.attention_mask[1:-1].all(dim=1).any(), "every text must be padded"
        states.append(read_residual(model, batch, "all", layers=range(1, model.n_layers + 1))[1:-1])
    n = range(expected["n"])
    pairs, early = (PairStatistics(origin_of(model), range(1, model.n_layers + 1)) for _ in range(2))
    pairs.update(states[0][:, -1], states[1][:, -1], n)
    compare_with_published(pairs, tensors, model.n_layers)
    early.update(states[0][:, -2], states[1][:, -2], n)
    with pytest.raises(AssertionError):
        compare_with_published(early, tensors, model.n_layers)


def test_golden_vectors_from_sums(published):
    """What is kept when there are too many pairs: sums only."""
    model, expected, tensors = published
    layers = range(1, model.n_layers + 1)
    pairs = PairStatistics(origin_of(model), layers, keep=3)
    for start in range(0, expected["n"], 5):
        rows = range(start, min(start + 5, expected["n"]))
        sides = [model.encode([expected[side][i] for i in rows]) for side in ("positive", "negative")]
        pairs.update(*(read_residual(model, side, layers=layers) for side in sides), rows)
    compare_with_published(pairs, tensors, model.n_layers)


# --- What the methods are ---------------------------------------------------------------------------------------------


def planted(n=40, width=24, seed=0):
    """States (pair, 2 layers, width) whose positives lie further along a direction of their layer, by varying amounts;
    the directions."""
    directions = torch.nn.functional.normalize(gaussian(2, width, seed=seed + 1), dim=-1)
    amounts = 3 + 3 * gaussian(n, seed=seed + 2).abs()
    negative = 0.1 * gaussian(n, 2, width, seed=seed + 3)
    positive = 0.1 * gaussian(n, 2, width, seed=seed + 4) + amounts[:, None, None] * directions
    return positive, negative, directions


@pytest.mark.parametrize("keep", [None, 5], ids=["rows", "sums"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_comes_back(method, centred, keep):
    positive, negative, directions = planted()
    pairs = statistics(positive, negative, step=7, draws=4, keep=keep)
    vector = pairs.vector(method, centred=centred)
    for layer in (1, 2):
        found = torch.nn.functional.normalize(vector[layer].double(), dim=0)
        assert float(found @ directions[layer - 1]) > 0.98
        assert abs(float(found @ directions[2 - layer])) < 0.6, "control: the other layer's direction"
        if method.startswith("pca"):
            assert vector.origin.explained[layer] > 0.8
    assert vector.origin.method == method and vector.origin.n == 40
    for draw in range(4):
        shuffled = pairs.shuffled(draw, vector)
        assert shuffled.norms() == pytest.approx(vector.norms(), rel=1e-5)
    nothing = statistics(negative, 0.1 * gaussian(40, 2, 24, seed=9)).vector("pca-contrast", centred=centred)
    assert max(nothing.origin.explained.values()) < 0.5, "control: no direction explains noise"


def test_methods_by_hand():
    positive, negative = gaussian(9, 2, 5, seed=1) + 1, gaussian(9, 2, 5, seed=2)
    pairs, d = statistics(positive, negative), positive - negative
    torch.testing.assert_close(pairs.vector("reading").tensor().double(), positive.mean(0))
    torch.testing.assert_close(pairs.vector("contrastive").tensor().double(), d.mean(0))
    for method, x in (("pca-contrast", d), ("pca-reading", positive)):
        for centred in (True, False):
            vector = pairs.vector(method, centred=centred)
            unit = pairs.vector(method, centred=centred, scale="unit")
            for i in range(2):
                rows = x[:, i] - x[:, i].mean(0) if centred else x[:, i]
                _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
                assert abs(float(unit[i + 1].double() @ right[0])) == pytest.approx(1)
                assert vector.origin.explained[i + 1] == pytest.approx(float(sizes[0] ** 2 / (sizes**2).sum()))
                assert vector.norms()[i + 1] == pytest.approx(float(x[:, i].mean(0).norm()), rel=1e-5)
                assert vector.cosine(unit)[i + 1] == pytest.approx(1)
            assert (vector.origin.centred, vector.origin.scale) == (centred, "mean")


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_the_sign_is_that_of_most_pairs(centred, flip):
    """Three pairs a little one way, two far the other way: the mean says one sign, the majority the other."""
    along = torch.tensor([1.0, 1.1, 0.9, -20.0, -25.0], dtype=torch.float64) * flip
    d = torch.zeros(5, 1, 4, dtype=torch.float64)
    d[:, 0, 2] = along
    zero = torch.zeros_like(d)
    vector = statistics(d, zero).vector("pca-contrast", centred=centred, scale="unit")
    assert vector[1].tolist() == pytest.approx([0, 0, flip, 0])
    assert float(statistics(d, zero).vector("contrastive")[1][2]) * flip < 0, "control: the mean points elsewhere"
    reading = statistics(d, None).vector("pca-reading", centred=centred, scale="unit")
    assert reading[1].tolist() == pytest.approx([0, 0, flip, 0]), "without negatives most texts decide"


def test_in_a_tie_the_mean_decides():
    d = torch.zeros(2, 1, 3, dtype=torch.float64)
    d[:, 0, 0] = torch.tensor([1.0, -5.0])
    for flip in (1.0, -1.0):
        vector = statistics(flip * d, torch.zeros_like(d)).vector("pca-contrast", scale="unit")
        assert vector[1].tolist() == pytest.approx([-flip, 0, 0])


def test_turning_the_pairs_around_turns_the_contrast_around():
    positive, negative, _ = planted()
    there, back = statistics(positive, negative), statistics(negative, positive)
    for method in ("contrastive", "pca-contrast"):
        assert_same(there.vector(method), -back.vector(method))


# --- Streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_streaming_is_the_whole_batch(method):
    """In pieces, and by sums instead of rows, with a large common offset as real states have it."""
    positive, negative, _ = planted(n=60)
    positive, negative = positive + 100, negative + 100
    whole = statistics(positive, negative).vector(method)
    for step, keep in ((1, None), (7, None), (7, 0), (60, 10), (1, 59)):
        vector = statistics(positive, negative, step=step, keep=keep).vector(method)
        assert_same(vector, whole)
        assert vector.origin.explained == pytest.approx(whole.origin.explained)
    assert not torch.allclose(statistics(positive[:30], negative[:30]).vector(method).tensor(), whole.tensor())


def test_memory_does_not_grow(monkeypatch):
    monkeypatch.setattr(pair_statistics, "VOTERS", 8)
    positive, negative, directions = planted(n=200, width=6)
    pairs = statistics(positive, negative, step=11, keep=6)
    for moments in (pairs._positive, pairs._difference):
        assert moments.count == 200 and moments.kept.shape == (8, 2, 6) and len(moments._keys) == 8
    assert min(float(pairs.vector("pca-contrast")[1].double() @ directions[0]), 1) > 0.9
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    other = PairStatistics(ORIGIN, (1, 2), keep=6)
    for rows in order.split(13):
        other.update(positive[rows], negative[rows], rows.tolist())
    kept = [sorted(moments.kept[:, 0, 0].tolist()) for moments in (pairs._difference, other._difference)]
    assert kept[0] == pytest.approx(kept[1]), "the sample does not depend on the order or on batches"


@pytest.mark.parametrize("n", [100, 101])
def test_shuffled_pairs(n):
    """Half of the pairs the other way round: nothing of a strong contrast is left; the same draws from any batches."""
    direction = torch.nn.functional.normalize(gaussian(1, 2, 64, seed=5), dim=-1)
    negative = 0.1 * gaussian(n, 2, 64, seed=6)
    positive = 0.1 * gaussian(n, 2, 64, seed=7) + 30 * direction
    pairs = statistics(positive, negative, draws=6, seed=3)
    contrast = pairs.vector("contrastive")
    draws = [pairs.shuffled(draw, contrast) for draw in range(6)]
    coins = torch.where(torch.arange(n) % 7 < 4, 1.0, -1.0).double()
    tossed = (coins[:, None, None] * (positive - negative)).mean(0)
    assert abs(float(torch.nn.functional.normalize(tossed[0], dim=0) @ direction[0, 0])) > 0.9, (
        "control: not in balance"
    )
    for draw in draws:
        assert draw.norms() == pytest.approx(contrast.norms(), rel=1e-5) and draw.origin.method == "shuffled"
        assert max(map(abs, draw.cosine(contrast).values())) < 0.4
    assert max(abs(draws[0].cosine(draw)[1]) for draw in draws[1:]) < 0.5
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    again = PairStatistics(ORIGIN, (1, 2), draws=6, seed=3)
    for rows in order.split(9):
        again.update(positive[rows], negative[rows], rows.tolist())
    assert_same(again.shuffled(2, contrast), draws[2])
    other = statistics(positive, negative, draws=6, seed=4)
    assert abs(other.shuffled(2, contrast).cosine(draws[2])[1]) < 0.5
    assert pairs.shuffled(1, contrast.only([2])).layers == (2,)
    with pytest.raises(UserError, match="6 shuffled vectors were collected, numbered from 0, got 6"):
        pairs.shuffled(6, contrast)


# --- From texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_batches_do_not_change_vectors(language_model, kind):
    model = language_model(kind)
    seen = []
    whole = fit_contrasts(model, RIGHT, WRONG, draws=2, seen=seen.append)
    single = fit_contrasts(model, RIGHT, WRONG, batch_size=1, draws=2)
    some = fit_contrasts(model, RIGHT, WRONG, batch_size=4, layers=[2], draws=2)
    assert sum(seen) == len(RIGHT)
    for method in METHODS:
        vector = whole.vector(method)
        assert_same(single.vector(method), vector, close=1e-4)
        assert_same(some.vector(method), vector.only([2]), close=1e-4)
    assert_same(single.shuffled(1, vector), whole.shuffled(1, vector), close=1e-4)
    swapped = fit_contrasts(model, RIGHT, [WRONG[1], WRONG[0], *WRONG[2:]])
    assert_same(swapped.vector("contrastive"), whole.vector("contrastive"))
    assert not torch.allclose(swapped.vector("pca-contrast").tensor(), whole.vector("pca-contrast").tensor(), atol=1e-3)


def test_what_a_vector_says_about_itself(language_model):
    model = language_model()
    vector = fit_contrasts(model, RIGHT, WRONG).vector("pca-contrast", centred=False, scale="unit")
    a = vector.origin
    assert (a.model_name, a.model_type, a.n_layers, a.method) == ("llama", "llama", 3, "pca-contrast")
    assert (a.tokens, a.n, a.centred, a.scale, set(a.explained)) == ("last", 6, False, "unit", {1, 2, 3})
    assert a.made_by.startswith("codi-steering ")
    digests = [
        fit_contrasts(model, right, wrong).vector("reading").origin.data_digest
        for right, wrong in ((RIGHT, WRONG), (WRONG, RIGHT), (RIGHT, None), (RIGHT[:-1], WRONG[:-1]))
    ]
    assert digests[0] == a.data_digest and len(set(digests)) == 4


def written(model, prompts, answers):
    """Answers as token ids, one byte one token."""
    texts = zip(prompts, answers, strict=True)
    return [Written(model.encode([p]).input_ids[0].tolist(), list(a.encode())) for p, a in texts]


@pytest.mark.parametrize("tokens", ["generated", "all", "last-prompt"])
def test_runs_by_hand(language_model, tokens):
    """Mean over a question's tokens first, then over questions; control: the mean over all tokens is another one."""
    model = language_model()
    slow = written(model, RIGHT, ["first this and then that, so 7", "a", "bb bb", "c", "dd", "e"])
    fast = written(model, WRONG, ["7", "x", "y", "zz", "no", "a long one here"])
    pairs = fit_runs(model, slow, fast, tokens, batch_size=4)
    vector = pairs.vector("contrastive")
    assert vector.origin.tokens == tokens and vector.origin.n == 6
    each, everything = [], [[], []]
    for both in zip(slow, fast, strict=True):
        sides = []
        for side, run in enumerate(both):
            batch = left_padded([[*run.prompt, *run.written]], 0)
            states = read_residual(model, batch, "all", layers=(1, 2, 3))[0].double()
            first = len(run.prompt)
            chosen = {"generated": states[first:], "all": states, "last-prompt": states[first - 1 : first]}[tokens]
            sides.append(chosen.mean(0))
            everything[side] += list(chosen)
        each.append(sides[0] - sides[1])
    wanted = torch.stack(each).mean(0)
    torch.testing.assert_close(vector.tensor().double(), wanted, atol=1e-4, rtol=1e-4)
    over_tokens = torch.stack(everything[0]).mean(0) - torch.stack(everything[1]).mean(0)
    assert torch.allclose(over_tokens, wanted, atol=1e-3) == (tokens == "last-prompt")
    # the other methods are to be had too
    assert pairs.vector("pca-contrast").origin.tokens == tokens


def test_the_prompts_last_token_needs_no_answer(language_model):
    model = language_model()
    runs = [written(model, side, [""] * len(side)) for side in (RIGHT, WRONG)]
    assert_same(
        fit_runs(model, *runs, "last-prompt").vector("contrastive"),
        fit_contrasts(model, RIGHT, WRONG).vector("contrastive"),
        close=1e-4,
    )
    with pytest.raises(UserError, match="answer 1 has no written token: tokens='generated' cannot be read"):
        fit_runs(model, *runs)


def test_pooled_is_the_vector_of_all():
    positive, negative, _ = planted(n=30)
    whole = statistics(positive, negative)
    parts = [statistics(positive[rows], negative[rows]) for rows in (slice(0, 4), slice(4, 13), slice(13, 30))]
    for method in ("reading", "contrastive"):
        vectors = [part.vector(method) for part in parts]
        found = pooled(vectors)
        assert_same(found, whole.vector(method))
        assert found.origin.n == 30 and found.origin.method == method
        assert_same(pooled(vectors[:2]), statistics(positive[:13], negative[:13]).vector(method))
    with pytest.raises(UserError, match="only means over pairs can be pooled, got 'pca-contrast'"):
        pooled([part.vector("pca-contrast") for part in parts])
    with pytest.raises(UserError, match="one method, one choice of tokens"):
        pooled([parts[0].vector("reading"), parts[1].vector("contrastive")])
    with pytest.raises(UserError, match="at least one vector"):
        pooled([])


def test_refusals(language_model):
    model = language_model()
    same = torch.ones(3, 2, 4)
    for call, message in (
        (lambda: fit_contrasts(model, RIGHT, WRONG[:2]), "must be as many, got 6 and 2"),
        (lambda: fit_contrasts(model, [], []), "at least one text"),
        (lambda: fit_contrasts(model, RIGHT, WRONG, layers=[0]), r"must be in 1\.\.3, got 0"),
        (lambda: fit_contrasts(model, RIGHT, WRONG, batch_size=0), "batch_size must be 1 or more"),
        (lambda: fit_contrasts(model, RIGHT).vector("contrastive"), "contrastive needs negative texts, none"),
        (lambda: fit_contrasts(model, RIGHT, WRONG).vector("mean"), "method must be one of reading, contrastive"),
        (lambda: fit_contrasts(model, RIGHT, WRONG).vector("pca-contrast", scale="half"), "scale must be one of mean"),
        (lambda: fit_contrasts(model, RIGHT[:1], WRONG[:1]).vector("pca-contrast"), "two or more pairs that differ"),
        (lambda: statistics(same, same).vector("pca-contrast", centred=False), "two or more pairs that differ"),
        (lambda: fit_runs(model, [], []), "one answer per question, got 0 and 0"),
        (lambda: fit_runs(model, [Written([1], [2])], [Written([1], [2])], "some"), "tokens must be one of generated"),
        (lambda: PairStatistics(ORIGIN, (1,)).vector("reading"), "at least one pair, none was added"),
        (lambda: PairStatistics(ORIGIN, (1,), draws=-1), "draws must be 0 or more, got -1"),
        (lambda: PairStatistics(ORIGIN, (1,)).update(same, same, range(3)), r"must be \(3, 1, d_model\)"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    pairs = statistics(same, None)
    with pytest.raises(UserError, match="either every pair has a negative text or none"):
        pairs.update(same, same, range(3))
