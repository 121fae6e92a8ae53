"""circuits.knockout: TransformerLens's numbers, means from the end, rules by hand, and the circuit of a known model."""

from __future__ import annotations

import json

import pytest
import torch
from induction_model import COPY, INDUCE, make_induction_model, make_induction_probes, make_texts
from safetensors.torch import load_file

from circuits.heads import Heads, head_sets
from circuits.knockout import (
    agreement,
    completeness,
    faithfulness,
    greedy,
    kept_curve,
    knocked_out,
    outliers,
    random_sets,
    ranking,
    reference_means,
    top,
)
from circuits.patching import patch
from lm.errors import UserError
from lm.load import load_lm
from lm.text import left_padded

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_golden_cases(golden_root, kind):
    folder = golden_root / "circuit" / kind
    texts = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    model = load_lm(str(folder / "model"), form="plain", device="cpu")
    heads = Heads(model)
    clean, corrupted = model.encode(texts["clean"]), model.encode(texts["corrupted"])
    means = reference_means(heads, corrupted, batch_size=3)
    keep = tensors["keep"].bool()
    assert 0 < int(keep.sum()) < keep.numel()
    scale = float(tensors["logits.clean"].abs().max())
    for batch_size in (1, 8):
        found = knocked_out(heads, clean, keep, means, batch_size=batch_size)
        torch.testing.assert_close(found, tensors["logits.knocked_out"], atol=1e-4 * scale, rtol=0)
    assert not torch.allclose(found, tensors["logits.clean"], atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_means_are_aligned_from_the_end(language_model, kind):
    """Texts of different lengths: the last tokens are averaged with each other; far columns take the mean of all."""
    model = language_model(kind)
    heads = Heads(model)
    batch = model.encode(TEXTS)
    z = heads.run(batch, z=True).z
    assert z is not None
    real = batch.attention_mask
    means = reference_means(heads, batch, batch_size=1, least=2)
    torch.testing.assert_close(means.z[-1], z[:, -1].double().mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(means.z[-3], z[[0, 1, 3], -3].double().mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(means.anywhere, z[real].double().mean(0), atol=1e-5, rtol=1e-4)
    assert means.counts.tolist() == real.sum(0).tolist()
    columns = means.columns(len(means.counts) + 2)
    few = int((means.counts < 2).sum())
    assert few and torch.equal(columns[: few + 2], means.anywhere.expand(few + 2, *means.anywhere.shape))
    assert torch.equal(columns[few + 2 :], means.z[few:]) and not torch.equal(means.z[few - 1], means.anywhere)
    assert torch.equal(means.columns(2), means.z[-2:])
    with pytest.raises(UserError, match=r"least must be in 1\.\.4 \(the number of reference texts\), got 5"):
        reference_means(heads, batch, least=5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_knocking_nothing_out_agrees_and_everything_forgets(language_model, kind):
    model = language_model(kind)
    heads = Heads(model)
    batch = model.encode(TEXTS)
    means = reference_means(heads, batch)
    whole = heads.run(batch).logits
    every = torch.ones(heads.n_blocks, heads.n_heads, dtype=torch.bool)
    kept = knocked_out(heads, batch, every, means, batch_size=3)
    assert bool(agreement(kept, whole).all())
    torch.testing.assert_close(kept, whole, atol=1e-5, rtol=1e-4)
    # With nothing kept only the last token and the text's position tell texts apart.
    same_end = model.encode(["aaab", "cdeb"])
    silent = knocked_out(heads, same_end, ~every, means)
    torch.testing.assert_close(silent[0], silent[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(heads.run(same_end).logits[0], heads.run(same_end).logits[1], atol=1e-2)
    at = torch.tensor([[3, 4], [4, 2]])
    chosen = knocked_out(heads, same_end, every, means, at=at)
    whole_at = heads.run(same_end, at=at).logits
    torch.testing.assert_close(chosen, whole_at, atol=1e-5, rtol=1e-4)


def test_rules_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.1], [0.9, 0.0, 0.5]])
    assert ranking(scores) == [(2, 0), (1, 1), (2, 2), (1, 0), (1, 2), (2, 1)]
    assert top(scores, 2).nonzero().tolist() == [[0, 1], [1, 0]]
    with pytest.raises(UserError, match=r"in 0\.\.6, got 7"):
        top(scores, 7)
    sets = random_sets(top(scores, 3), 200, torch.Generator().manual_seed(0))
    assert sets.shape == (200, 2, 3) and (sets.sum((1, 2)) == 3).all()
    assert (sets.float().mean(0) - 0.5).abs().max() < 0.15
    chosen = torch.tensor([[True, False, False], [True, True, False]])
    layered = random_sets(chosen, 50, torch.Generator().manual_seed(0), same_blocks=True)
    assert (layered.sum(2) == torch.tensor([1, 2])).all() and len({tuple(s.flatten().tolist()) for s in layered}) > 3


def test_outliers_by_hand_and_when_they_say_little():
    bulk = torch.linspace(0, 1, 296)
    far = torch.tensor([2.0, 2.1, 2.2, 5.0])
    scores = torch.cat((bulk, far))[torch.randperm(300, generator=torch.Generator().manual_seed(1))].view(30, 10)
    found = outliers(scores)
    quarters = torch.quantile(scores.flatten().double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert found.width == pytest.approx(2 * float(quarters[1] - quarters[0]) / 300 ** (1 / 3))
    assert found.note == "" and sorted(scores[found.chosen].tolist()) == pytest.approx(far.tolist())
    assert 1 < found.threshold <= 2
    none = outliers(torch.linspace(0, 1, 300).view(30, 10))
    assert not none.chosen.any() and none.note == "no score stands apart"
    alike = outliers(torch.cat((torch.zeros(290), torch.ones(10))).view(30, 10))
    assert not alike.chosen.any() and "IQR is 0" in alike.note
    few = outliers(torch.cat((torch.linspace(0, 1, 11), torch.tensor([9.0]))).view(3, 4))
    assert few.chosen.sum() == 1 and few.note.startswith("12 heads, fewer than 256")


def test_greedy_finds_the_order_of_loss():
    """The score adds up what the heads are worth: they go in ascending order of worth."""
    worth = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    asked: list[int] = []
    gone = greedy(lambda keep: worth[keep].sum()[None], torch.ones(2, 2), 1, advance=asked.append)
    assert gone == [(1, 1), (2, 1), (1, 0)] and sum(asked) == 4 + 3 + 2
    assert greedy(lambda keep: worth[keep].sum()[None], torch.ones(2, 2), 1, at_once=2) == gone
    with pytest.raises(UserError, match=r"until must be in 0\.\.4"):
        greedy(lambda keep: keep, torch.ones(2, 2), 5)


def test_the_circuit_of_a_known_model():
    """Both heads are found; alone they do everything, without either nothing is left; random pairs do nothing."""
    heads = Heads(make_induction_model())
    probes = make_induction_probes(12)
    batch = left_padded([probe.clean for probe in probes], 0)
    target = torch.tensor([probe.target for probe in probes])
    reference = left_padded([ids[:-1] for ids, _, _ in make_texts(64, seed=9, length=13)], 0)
    means = reference_means(heads, reference)
    effect = patch(heads, probes).effect()
    assert set(ranking(effect)[:2]) == {COPY, INDUCE}
    assert float(effect[COPY[0] - 1, COPY[1]]) > 0.9 and float(effect[INDUCE[0] - 1, INDUCE[1]]) > 0.9
    rest = ~head_sets(heads, [COPY, INDUCE])
    assert float(effect[rest].abs().max()) < 0.1

    def accuracy(keep: torch.Tensor) -> torch.Tensor:
        return (knocked_out(heads, batch, keep, means).argmax(-1) == target).double()

    whole = torch.ones_like(rest)
    assert accuracy(whole).mean() == 1
    circuit = head_sets(heads, [COPY, INDUCE])
    assert accuracy(circuit).mean() == 1
    assert faithfulness(accuracy, circuit) == 1 and completeness(accuracy, circuit) == 1
    for one in (COPY, INDUCE):
        assert accuracy(head_sets(heads, [one])).mean() < 0.5
    for other in random_sets(circuit, 20, torch.Generator().manual_seed(0)):
        if not torch.equal(other, circuit):
            assert accuracy(other).mean() < 0.5
    curve = kept_curve(accuracy, ranking(effect), [0, 1, 2, 8], (2, 4)).mean(1)
    assert curve[0] < 0.5 and curve[1] < 0.5 and curve[2:].tolist() == [1, 1]

    def probability(keep: torch.Tensor) -> torch.Tensor:
        return knocked_out(heads, batch, keep, means).log_softmax(-1)[torch.arange(len(target)), target]

    gone = greedy(probability, whole, 2)
    assert set(gone).isdisjoint({COPY, INDUCE}) and len(gone) == 6
    with pytest.raises(UserError, match=r"must be \(2, 4\)"):
        knocked_out(heads, batch, whole.T, means)
    with pytest.raises(UserError, match=r"counts must be in 0\.\.8, got 9"):
        kept_curve(accuracy, ranking(effect), [9], (2, 4))
