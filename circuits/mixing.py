"""Token mixing: do the residual streams of two words tell how the words are related?

A probe gets the streams of the two words side by side and says their relation, layer by layer. A linear probe can only
add up what each word says for itself; a small network can combine them. Test pairs are made of words that no training
pair has, so that a probe cannot have learnt words; the same probes on shuffled labels say what is found where there is
nothing.

Knows nothing about texts: positions and labels come from the caller. Probes are scikit-learn's. Source: Dutta et al.
2024, arXiv 2402.18312 (linear probe fails, a small network does not; disjoint vocabulary).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lm.errors import UserError
from lm.model import LanguageModel
from lm.residual import read_residual
from lm.text import EncodedBatch

__all__ = ["MixingScore", "Pairs", "ProbeKind", "mixing_scores", "pair_states"]

ProbeKind = Literal["linear", "mlp"]
Labels = Literal["true", "shuffled"]
HIDDEN = 64
"""Width of the small network."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of words with their streams.

    Attributes:
        states: (pair, layer, 2 · d_model), first word's stream and second word's.
        relation: of each pair.
        words: every word that occurs.
    """

    states: Tensor
    relation: tuple[str, ...]
    words: frozenset[str]

    def __post_init__(self) -> None:
        if len(self.states) != len(self.relation) or self.states.dim() != 3:
            raise UserError(
                f"states must be (pair, layer, width) with a relation each, got {tuple(self.states.shape)} and "
                f"{len(self.relation)} relations"
            )


@dataclass(frozen=True)
class MixingScore:
    """How well one probe does at one layer on pairs that it has not seen.

    Attributes:
        layer: index on the layer axis of the states.
        probe: "linear" or "mlp".
        labels: it was trained on: "true" or "shuffled".
        f1: macro average over relations, 0..1.
        accuracy: 0..1.
        chance: 1 / number of relations.
        correct: (pair,) bool, for intervals over pairs or texts.
    """

    layer: int
    probe: ProbeKind
    labels: Labels
    f1: float
    accuracy: float
    chance: float
    correct: np.ndarray


def pair_states(
    model: LanguageModel,
    batch: EncodedBatch,
    text: Sequence[int],
    first: Sequence[int],
    second: Sequence[int],
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Streams of pairs of words.

    Args:
        model: the model.
        batch: the texts.
        text, first, second: of each pair: its row of the batch, and the columns of its words.
        layers: of 0..n_layers; None: all.
        batch_size: texts at once; changes nothing.

    Returns:
        (pair, layer, 2 · d_model) on the CPU.

    Raises:
        ValueError: a column that is padding.
    """
    at = torch.tensor(text), torch.tensor(first), torch.tensor(second)
    for columns in at[1:]:
        if not bool(batch.attention_mask.cpu()[at[0], columns].bool().all()):
            raise UserError("a word must stand at a token of its text, got a column of padding")
    found: dict[int, Tensor] = {}
    for start in range(0, len(batch), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(batch)))
        states = read_residual(model, batch.select(rows.to(batch.input_ids.device)), "all", layers=layers).cpu()
        for pair in ((at[0] >= start) & (at[0] < start + batch_size)).nonzero().flatten().tolist():
            row = int(at[0][pair]) - start
            found[pair] = torch.cat((states[row, at[1][pair]], states[row, at[2][pair]]), dim=-1)
    return torch.stack([found[pair] for pair in range(len(text))])


def mixing_scores(
    train: Pairs,
    test: Pairs,
    probes: Collection[ProbeKind] = ("linear", "mlp"),
    seed: int = 0,
    shuffles: int = 1,
    advance: Callable[[int], object] | None = None,
) -> list[MixingScore]:
    """Scores of every probe at every layer, on the true and on shuffled labels.

    Args:
        train, test: pairs whose words are disjoint.
        probes: "linear" (logistic regression), "mlp" (one hidden layer of 64).
        seed: of the network's start and of the shuffles.
        shuffles: probes on shuffled labels for each true one.
        advance: called with 1 after every probe.

    Raises:
        ValueError: words in both sets, different layers, a relation that the training pairs lack, or an unknown probe.
    """
    shared = train.words & test.words
    if shared:
        raise UserError(f"training and test pairs share {len(shared)} words, such as {sorted(shared)[0]!r}")
    if train.states.shape[1:] != test.states.shape[1:]:
        raise UserError(
            f"training and test states must have the same layers and width, got {tuple(train.states.shape[1:])} and "
            f"{tuple(test.states.shape[1:])}"
        )
    relations = sorted(set(train.relation))
    missing = sorted(set(test.relation) - set(relations))
    if missing or len(relations) < 2:
        raise UserError(f"training pairs have the relations {relations}, the test pairs also {missing}")
    for probe in probes:
        if probe not in get_args(ProbeKind):
            raise UserError(f"probes must be of {', '.join(get_args(ProbeKind))}, got {probe!r}")
    rng = np.random.default_rng(seed)
    x, y = train.states.float().cpu().numpy(), np.array(train.relation)
    test_x, test_y = test.states.float().cpu().numpy(), np.array(test.relation)
    found = []
    for layer in range(x.shape[1]):
        for probe in probes:
            for turn in range(1 + shuffles):
                labels: Labels = "shuffled" if turn else "true"
                given = rng.permutation(y) if turn else y
                said = _fitted(probe, x[:, layer], given, seed + turn).predict(test_x[:, layer])
                found.append(_score(layer, probe, labels, said, test_y, len(relations)))
                if advance is not None:
                    advance(1)
    return found


def _fitted(probe: ProbeKind, x: np.ndarray, y: np.ndarray, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if probe == "linear":
        classifier: Any = LogisticRegression(C=0.1, max_iter=500)
    else:
        classifier = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=300, early_stopping=True, random_state=seed)
    with warnings.catch_warnings():  # a probe that stops early is still a probe; its score says what it is worth
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), classifier).fit(x, y)


def _score(
    layer: int, probe: ProbeKind, labels: Labels, said: np.ndarray, right: np.ndarray, relations: int
) -> MixingScore:
    from sklearn.metrics import f1_score

    correct = said == right
    f1 = float(f1_score(right, said, average="macro"))
    return MixingScore(layer, probe, labels, f1, float(correct.mean()), 1 / relations, correct)
