"""Knock-out: heads replaced by what they say on average, and what a circuit still does when all others are.

A silenced head says its mean over a reference set of texts, position by position, counted from the end (texts of one
form end alike). A *circuit* is the set of heads that is kept. What it is worth: *agreement* (the same next token as the
whole model), gold accuracy, and, of any score F,

    faithfulness   (F(circuit) − F(nothing kept)) / (F(whole model) − F(nothing kept))   1: it does what the model does
    completeness   1 − the same of everything but the circuit                            1: nothing else does it

Which heads: those whose score stands apart from the others' (`outliers`), the best k (`ranking`), or one after the
other by what it does to the score (`greedy`). Controls: `random_sets` of the same size.

Knows nothing about tasks: scores come as functions or tensors. Source: Dutta et al. 2024, arXiv 2402.18312 (means over
another set of texts, the three rules, agreement); Wang et al. 2022, arXiv 2211.00593, and Marks et al. 2024, arXiv
2403.19647 (faithfulness and completeness).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.heads import Heads
from lm.errors import UserError
from lm.text import EncodedBatch

__all__ = [
    "Outliers",
    "ReferenceMeans",
    "Score",
    "agreement",
    "completeness",
    "faithfulness",
    "greedy",
    "kept_curve",
    "knocked_out",
    "outliers",
    "random_sets",
    "ranking",
    "reference_means",
    "top",
]

Score = Callable[[Tensor], Tensor]
"""Heads that are kept (block, head) bool -> score of every item (item,)."""

ENOUGH_HEADS = 256
"""Below so many scores the bins of the rule of Freedman and Diaconis are too wide to leave gaps."""


# --- Silencing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceMeans:
    """What heads say on average.

    Attributes:
        z: (column, block, head, d_head) float64 on the CPU; the last column is the last token of every text.
        anywhere: (block, head, d_head) mean over all tokens of all texts.
        counts: (column,) texts that have a token there.
        least: columns with fewer texts than this take the mean over all tokens.
    """

    z: Tensor
    anywhere: Tensor
    counts: Tensor
    least: int

    def columns(self, width: int) -> Tensor:
        """(width, block, head, d_head) means for the last `width` columns, `anywhere` where too few texts reach."""
        found = self.anywhere.expand(width, *self.anywhere.shape).clone()
        usable = min(width, int((self.counts >= self.least).sum()))
        if usable:
            found[-usable:] = self.z[-usable:]
        return found


def reference_means(heads: Heads, batch: EncodedBatch, batch_size: int = 8, least: int = 1) -> ReferenceMeans:
    """Means of every head over reference texts, per position from the end.

    Args:
        heads: of the model.
        batch: the texts.
        batch_size: texts at once; does not change the means.
        least: texts that a position needs for a mean of its own.

    Raises:
        ValueError: `least` above the number of texts, or below 1.
    """
    if not 1 <= least <= len(batch):
        raise UserError(f"least must be in 1..{len(batch)} (the number of reference texts), got {least}")
    width = int(batch.lengths.max())
    total = torch.zeros(width, heads.n_blocks, heads.n_heads, heads.d_head, dtype=torch.float64)
    counts = torch.zeros(width, dtype=torch.long)
    for _, part in batch.parts(batch_size):
        z = heads.run(part, z=True).z
        assert z is not None
        real = part.attention_mask.bool()
        n = real.shape[1]
        total[-n:] += torch.where(real[..., None, None, None], z.double(), 0.0).sum(0).cpu()
        counts[-n:] += real.sum(0).cpu()
    mean = total / counts.clamp(min=1)[:, None, None, None]
    return ReferenceMeans(mean, total.sum(0) / counts.sum(), counts, least)


def knocked_out(
    heads: Heads,
    batch: EncodedBatch,
    keep: Tensor,
    means: ReferenceMeans,
    at: Tensor | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Logits of texts with every head silenced that is not kept.

    Args:
        heads: of the model.
        batch: the texts.
        keep: (block, head) bool.
        means: what silenced heads say.
        at: (text, chosen) columns of `batch` after which logits are wanted; None: the last.
        batch_size: texts at once; changes nothing.

    Returns:
        (text, vocab) or (text, chosen, vocab) on the CPU.

    Raises:
        ValueError: a set of another shape.
    """
    if keep.shape != (heads.n_blocks, heads.n_heads):
        raise UserError(f"a set of heads must be {(heads.n_blocks, heads.n_heads)}, got {tuple(keep.shape)}")
    device, dtype = heads.model.device, heads.model.dtype
    width = batch.input_ids.shape[1]
    kept = keep.to(device)
    instead = means.columns(width).to(device, dtype)
    found: list[Tensor] = [torch.empty(0)] * len(batch)
    for rows, part in batch.parts(batch_size):
        n = part.input_ids.shape[1]

        def change(block: int, z: Tensor, n: int = n) -> Tensor:
            if bool(kept[block - 1].all()):
                return z
            return torch.where(kept[block - 1][:, None], z, instead[width - n :, block - 1])

        chosen = None if at is None else at[rows.to(at.device)] - (width - n)
        for row, logits in zip(rows.tolist(), heads.run(part, change, at=chosen).logits.cpu(), strict=True):
            found[row] = logits
    return torch.stack(found)


def agreement(logits: Tensor, whole: Tensor) -> Tensor:
    """(…,) bool: the same next token as the whole model, of logits (…, vocab)."""
    return logits.argmax(-1) == whole.argmax(-1)


# --- Which heads ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outliers:
    """Heads whose score stands apart.

    Attributes:
        chosen: (block, head) bool.
        threshold: scores above it were chosen; inf: none.
        width: of the bins; 0: none could be made.
        note: why the rule says little here; "" where it does say something.
    """

    chosen: Tensor
    threshold: float
    width: float
    note: str


def outliers(scores: Tensor) -> Outliers:
    """Heads above the first gap of the histogram of scores, seen from the median upwards.

    Bins are as wide as Freedman and Diaconis say, 2 · IQR / n^(1/3), and begin at the median; the gap is the first
    empty bin. The published text says "outliers of the histogram" and no more: this is our reading of it.

    Degenerate, and said so in the note: an IQR of 0 (no bins: more than half of the scores are alike), no empty bin
    (nothing stands apart), or fewer than 256 heads (bins so wide that a gap is hardly ever empty).

    Args:
        scores: (block, head).
    """
    values = scores.flatten().double()
    n = len(values)
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    low, median, high = quartiles.tolist()
    width = 2 * (high - low) / n ** (1 / 3)
    none = torch.zeros_like(scores, dtype=torch.bool)
    few = f"{n} heads, fewer than {ENOUGH_HEADS}: bins are wide" if n < ENOUGH_HEADS else ""
    if width <= 0:
        return Outliers(none, float("inf"), 0.0, "half of the scores are alike (their IQR is 0): there are no bins")
    upper = values[values >= median].sort().values
    filled = ((upper - median) / width).floor().long().unique()
    gaps = (filled[1:] - filled[:-1] > 1).nonzero().flatten()
    if not len(gaps):
        return Outliers(none, float("inf"), width, "no score stands apart" + (f"; {few}" if few else ""))
    threshold = median + width * (int(filled[gaps[0]]) + 1)
    return Outliers(scores.double() >= threshold, threshold, width, few)


def ranking(scores: Tensor) -> list[tuple[int, int]]:
    """Heads as (block, head), the highest score first; equal ones in order of the model."""
    n_heads = scores.shape[1]
    order = scores.flatten().double().sort(descending=True, stable=True).indices.tolist()
    return [(i // n_heads + 1, i % n_heads) for i in order]


def top(scores: Tensor, k: int) -> Tensor:
    """The k heads with the highest scores, (block, head) bool."""
    if not 0 <= k <= scores.numel():
        raise UserError(f"the number of heads must be in 0..{scores.numel()}, got {k}")
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for block, head in ranking(scores)[:k]:
        chosen[block - 1, head] = True
    return chosen


def random_sets(chosen: Tensor, n: int, generator: torch.Generator, same_blocks: bool = False) -> Tensor:
    """n random sets of as many heads, (set, block, head) bool.

    Args:
        chosen: (block, head) bool.
        n: number of sets.
        generator: decides everything.
        same_blocks: as many heads of every block as `chosen` has there.
    """

    def draw(like: Tensor) -> Tensor:
        order = torch.randperm(like.numel(), generator=generator)
        return like.flatten()[order].view(like.shape)

    chosen = chosen.bool().cpu()
    return torch.stack([torch.stack([draw(row) for row in chosen]) if same_blocks else draw(chosen) for _ in range(n)])


def kept_curve(score: Score, order: Sequence[tuple[int, int]], counts: Sequence[int], shape: tuple[int, int]) -> Tensor:
    """Scores (count, item) when only the first `count` heads of an order are kept.

    Args:
        score: see `Score`.
        order: heads, the most important first.
        counts: how many to keep, each 0..len(order).
        shape: (blocks, heads).
    """
    found = []
    for count in counts:
        if not 0 <= count <= len(order):
            raise UserError(f"counts must be in 0..{len(order)}, got {count}")
        keep = torch.zeros(shape, dtype=torch.bool)
        for block, head in order[:count]:
            keep[block - 1, head] = True
        found.append(score(keep))
    return torch.stack(found)


def greedy(
    score: Score,
    start: Tensor,
    until: int,
    at_once: int = 1,
    advance: Callable[[int], object] | None = None,
) -> list[tuple[int, int]]:
    """Heads in the order in which they can be spared: each round silences those whose loss lowers the score least.

    A round tries every head that is left, so this takes (heads left)² / 2 / at_once scores in all.

    Args:
        score: see `Score`; the mean over items counts.
        start: (block, head) bool, the heads to begin with.
        until: heads to be left.
        at_once: silenced in one round; more than 1 is faster and no longer strictly greedy.
        advance: called with 1 after every score.

    Returns:
        the silenced heads as (block, head), the first one first.
    """
    keep = start.bool().clone()
    if not 0 <= until <= int(keep.sum()) or at_once < 1:
        raise UserError(f"until must be in 0..{int(keep.sum())} and at_once 1 or more, got {until} and {at_once}")
    gone: list[tuple[int, int]] = []
    while (left := int(keep.sum())) > until:
        candidates = [(int(b) + 1, int(h)) for b, h in keep.nonzero()]
        values = []
        for block, head in candidates:
            keep[block - 1, head] = False
            values.append(float(score(keep).double().mean()))
            keep[block - 1, head] = True
            if advance is not None:
                advance(1)
        order = sorted(range(len(candidates)), key=lambda i: -values[i])
        for i in order[: min(at_once, left - until)]:
            block, head = candidates[i]
            keep[block - 1, head] = False
            gone.append((block, head))
    return gone


# --- What a circuit is worth ------------------------------------------------------------------------------------------


def faithfulness(score: Score, circuit: Tensor) -> float:
    """(F(circuit) − F(∅)) / (F(whole) − F(∅)) of mean scores; nan where the heads change nothing."""
    return _share(score, circuit.bool())


def completeness(score: Score, circuit: Tensor) -> float:
    """1 − (F(all but the circuit) − F(∅)) / (F(whole) − F(∅)) of mean scores; nan where the heads change nothing."""
    return 1 - _share(score, ~circuit.bool())


def _share(score: Score, keep: Tensor) -> float:
    nothing, whole = (float(score(torch.full_like(keep, value)).double().mean()) for value in (False, True))
    if whole == nothing:
        return float("nan")
    return (float(score(keep).double().mean()) - nothing) / (whole - nothing)
