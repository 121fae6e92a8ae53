"""Where an answer comes from: what its writers attend to, who wrote there, and how many sources write at once.

*Flow tree*. From a head at the last token to the positions that it attends to most; at each of them to the heads of
lower blocks that make up most of the stream which is read there; and so on. A head's share of a stream x is ⟨what it
wrote, x⟩ / ⟨x, x⟩, which adds up to 1 over everything that was written into it. What the stream says at a position is
decoded through the final norm and the unembedding. Attention reads keys as well as values: a share says that the parent
reads what the child wrote, not in which of these ways.

*Sources*. z of a head is the attention-weighted sum of values, so what it writes into the logit of the answer is a sum
over positions, at the item's own scale of the final norm (`circuits.writers`): the share of the demonstrations, the
question and the generated chain, per head. *Parallel pathways*: how many of these sources write at once. The causal
check corrupts one mention of the answer, the other, or both.

Needs a model with eager attention. Knows nothing about what the parts of a text are: columns come from the caller.
Source: Dutta et al. 2024, arXiv 2402.18312, restated; the rule by shares is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from circuits.heads import Heads, Reading
from circuits.patching import measures
from circuits.writers import FrozenNorm, alone, answer_direction
from lm.errors import UserError
from lm.text import EncodedBatch

__all__ = ["MentionCheck", "Sources", "flow_tree", "mention_check", "pathways", "sources", "tree_record"]


# --- The tree ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """One text as it was read, and the rules of the tree."""

    heads: Heads
    ids: list[int]
    read: Reading
    target: int
    positions: int
    children: int
    least_attention: float
    least_share: float
    depth: int


def flow_tree(
    heads: Heads,
    ids: Sequence[int],
    roots: Sequence[tuple[int, int]],
    target: int,
    *,
    depth: int = 3,
    positions: int = 3,
    children: int = 2,
    least_attention: float = 0.1,
    least_share: float = 0.05,
) -> nx.DiGraph:
    """The flow tree of one text as a graph; heads that are reached twice are one node.

    Args:
        heads: of a model with eager attention.
        ids: token ids of the text, without padding.
        roots: writers as (block, head), at the last token.
        target: id of the answer.
        depth: heads in a row at most, 1 or more.
        positions: that a head is followed to, at most.
        children: heads that are followed at a position, at most.
        least_attention, least_share: below which nothing is followed.

    Returns:
        nodes "b.h@position" (kind "head": block, head, position, depth, probability of the target by the head alone)
        and "@position" (kind "token": position, token id), edges from a head to the positions that it attends to
        (kind "attends": attention, decoded token id, probability of the target there) and from a position to the heads
        that wrote there (kind "written": share, of the stream that the parent block reads).

    Raises:
        ValueError: a depth below 1, no roots, a root that the model does not have, or a model without eager attention.
    """
    if depth < 1 or not roots:
        raise UserError(f"a tree needs a depth of 1 or more and a root, got {depth} and {len(roots)} roots")
    device = heads.model.device
    row = torch.tensor([list(ids)], device=device)
    read = heads.run(EncodedBatch(row, torch.ones_like(row, dtype=torch.bool)), z=True, residual=True, patterns=True)
    text = _Text(heads, list(ids), read, target, positions, children, least_attention, least_share, depth)
    graph = nx.DiGraph(target=int(target), length=len(ids), model=heads.model.name)
    for block, head in roots:
        heads.check_block(block)
        if not 0 <= head < heads.n_heads:
            raise UserError(f"head must be in 0..{heads.n_heads - 1}, got {head}")
        _follow(graph, text, block, head, len(ids) - 1, 1)
    return graph


def _follow(graph: nx.DiGraph, text: _Text, block: int, head: int, position: int, depth: int) -> str:
    name = f"{block}.{head}@{position}"
    if name in graph and graph.nodes[name]["depth"] <= depth:
        return name
    assert text.read.z is not None and text.read.residual is not None and text.read.patterns is not None
    model = text.heads.model
    written = text.heads.written(block, text.read.z[0, position, block - 1])[head]
    goal = torch.tensor(text.target, device=written.device)
    graph.add_node(
        name, kind="head", block=block, head=head, position=position, depth=depth,
        probability=float(alone(model, written, goal)),
    )  # fmt: skip
    weights = text.read.patterns[0, block - 1, head, position]
    for place in weights.argsort(descending=True, stable=True)[: text.positions].tolist():
        if float(weights[place]) < text.least_attention:
            break
        stream = text.read.residual[0, place, block - 1]
        with torch.no_grad():
            said = model.logits(model.final_norm(stream)).double().log_softmax(-1)
        at = f"@{place}"
        graph.add_node(at, kind="token", position=place, token=text.ids[place])
        graph.add_edge(
            name, at, kind="attends", attention=float(weights[place]), decoded=int(said.argmax()),
            probability=float(said[text.target].exp()),
        )  # fmt: skip
        if depth < text.depth and block > 1:
            for (below, other), share in _writers_at(text, block, place):
                child = _follow(graph, text, below, other, place, depth + 1)
                graph.add_edge(at, child, kind="written", share=share)
    return name


def _writers_at(text: _Text, block: int, place: int) -> list[tuple[tuple[int, int], float]]:
    """Heads of lower blocks that make up most of the stream which a block reads at a position, with their shares."""
    assert text.read.z is not None and text.read.residual is not None
    stream = text.read.residual[0, place, block - 1].double()
    parts = torch.stack(
        [text.heads.written(below, text.read.z[0, place, below - 1].double()) for below in range(1, block)]
    )
    shares = (parts * stream).sum(-1) / stream.pow(2).sum()
    order = shares.flatten().argsort(descending=True, stable=True)[: text.children].tolist()
    n = shares.shape[1]
    found = [((i // n + 1, i % n), float(shares.flatten()[i])) for i in order]
    return [(head, share) for head, share in found if share >= text.least_share]


def tree_record(graph: nx.DiGraph) -> dict[str, Any]:
    """A tree as plain values for JSON; `networkx.node_link_graph(record, edges="edges")` reads it back."""
    return nx.node_link_data(graph, edges="edges")


# --- Sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """From where heads at the last token write.

    Attributes:
        parts: names; the last one, "rest", is what no part names.
        attention: (item, block, head, part) attention of the last token, adds up to 1 over parts.
        written: (item, block, head, part) contribution to the logit of the answer (less that of the other token, or the
            mean over the vocabulary), adds up to that of the head.
    """

    parts: tuple[str, ...]
    attention: Tensor
    written: Tensor


@torch.no_grad()
def sources(
    heads: Heads,
    batch: EncodedBatch,
    parts: Mapping[str, Tensor],
    target: Tensor,
    other: Tensor | None = None,
    batch_size: int = 8,
) -> Sources:
    """Attention and contribution of every head at the last token by part of the text.

    Args:
        heads: of a model with eager attention.
        batch: the texts.
        parts: name -> (item, column) bool, columns of `batch`; no column in two of them, none of padding.
        target: (item,) token ids.
        other: (item,) token ids whose logit is taken off; None: the mean over the vocabulary is.
        batch_size: texts at once; changes nothing.

    Raises:
        ValueError: parts that overlap or hold padding, or a model without eager attention.
    """
    named = {name: mask.bool() for name, mask in parts.items()}
    taken = torch.zeros_like(batch.attention_mask, dtype=torch.long)
    for name, mask in named.items():
        if mask.shape != batch.attention_mask.shape or bool((mask & ~batch.attention_mask.bool().cpu()).any()):
            raise UserError(f"part {name!r} must have the shape of the batch and hold none of its padding")
        taken = taken + mask.to(taken.device)
    if int(taken.max()) > 1:
        raise UserError("a column is in two parts")
    named["rest"] = (taken == 0).cpu()
    stacked = torch.stack([mask.double() for mask in named.values()], dim=-1)  # (item, column, part)
    model = heads.model
    norm = FrozenNorm(model)
    attention, written = [], []
    per_group = heads.n_heads // len(heads.groups)
    for start in range(0, len(batch), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(batch)))
        part = batch.select(rows.to(batch.input_ids.device)).to(model.device)
        read = heads.run(part, residual=True, patterns=[-1], values=True)
        assert read.patterns is not None and read.residual is not None and read.values is not None
        scale = norm.scale(read.residual[:, -1, -1])
        direction, _ = answer_direction(model, target[rows], None if other is None else other[rows])
        at = stacked[rows].to(model.device)
        for block in range(1, heads.n_blocks + 1):
            weights = read.patterns[:, block - 1, :, 0].double()  # (item, head, column)
            values = read.values[:, :, block - 1].double().repeat_interleave(per_group, 2)  # (item, column, head, d)
            z = torch.einsum("ihc,icp,ichk->iphk", weights, at, values)
            said = norm.part(heads.written(block, z), scale[:, None, None])
            attention.append(torch.einsum("ihc,icp->ihp", weights, at).cpu())
            written.append(torch.einsum("iphd,id->ihp", said, direction).cpu())
    count = -(-len(batch) // batch_size)

    def joined(found: list[Tensor]) -> Tensor:
        blocks = heads.n_blocks
        return torch.cat([torch.stack(found[i * blocks : (i + 1) * blocks], dim=1) for i in range(count)])

    return Sources(tuple(named), joined(attention), joined(written))


def pathways(found: Sources, writers: Tensor, least: float = 0.1) -> Tensor:
    """(item,) number of sources through which the answer is written at once.

    Args:
        found: of all heads; "rest" is no source.
        writers: (block, head) bool, the heads that count.
        least: share of what all parts together write towards the answer (negative contributions left out) that a part
            must have to count, above 0 and at most 1.

    Raises:
        ValueError: `least` outside (0, 1], or no writers.
    """
    if not 0 < least <= 1 or not bool(writers.any()):
        raise UserError(f"least must be in (0, 1] and there must be a writer, got {least} and {int(writers.sum())}")
    by_part = found.written[:, writers.bool()].sum(1).clamp(min=0)  # (item, part)
    share = by_part / by_part.sum(-1, keepdim=True).clamp(min=1e-12)
    return (share[:, :-1] >= least).sum(-1)


# --- The causal check -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MentionCheck:
    """What corrupting mentions of the answer does to its probability.

    Attributes:
        clean: (item,) probability of the target.
        probability, kl: name of the corruption -> (item,) probability of the target, and KL(clean ‖ corrupted).
    """

    clean: Tensor
    probability: dict[str, Tensor]
    kl: dict[str, Tensor]

    def backup(self, first: str, second: str, both: str) -> Tensor:
        """(item,) what only corrupting both mentions takes: the loss by both, less the larger loss by one of them.

        Near the loss by both: each mention alone is enough (parallel pathways). 0: one mention did it all.
        """
        for name in (first, second, both):
            if name not in self.probability:
                raise UserError(f"corruptions are {', '.join(self.probability)}, got {name!r}")
        larger = torch.maximum(self.clean - self.probability[first], self.clean - self.probability[second])
        return self.clean - self.probability[both] - larger


def mention_check(
    heads: Heads, clean: EncodedBatch, corrupted: Mapping[str, EncodedBatch], target: Tensor, batch_size: int = 8
) -> MentionCheck:
    """The probability of the answer when its mentions are corrupted.

    Args:
        heads: of the model.
        clean: the texts.
        corrupted: name ("question", "chain", "both") -> the texts with those mentions exchanged, in the same order.
        target: (item,) token ids.
        batch_size: texts at once; changes nothing.
    """
    for name, batch in corrupted.items():
        if len(batch) != len(clean):
            raise UserError(f"corruption {name!r} has {len(batch)} texts, the clean ones are {len(clean)}")

    def logits(batch: EncodedBatch) -> Tensor:
        found: list[Tensor] = [torch.empty(0)] * len(batch)
        for rows, part in batch.parts(batch_size):
            for row, values in zip(rows.tolist(), heads.run(part).logits.cpu(), strict=True):
                found[row] = values
        return torch.stack(found)

    plain = logits(clean)
    goal = target.cpu()
    found = {name: measures(logits(batch), plain, goal, goal) for name, batch in corrupted.items()}
    return MentionCheck(
        measures(plain, plain, goal, goal)["probability"],
        {name: value["probability"] for name, value in found.items()},
        {name: value["kl"] for name, value in found.items()},
    )
