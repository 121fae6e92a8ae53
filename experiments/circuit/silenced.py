"""Knock-out trials of `codi circuit`: what a circuit still does on other ontologies when all other heads are silenced.

Heads are ranked on the run's own items by three scores, each a mean of E:

    reasoning   over the three corruptions of the premises of a 1-hop item, at the step of inference
    copy        over the subtasks that copy a word of the question
    decision    over the subtasks that choose what to go on with

Blocks that were not patched (--step) score 0. The best heads are kept, all others say what they say on average over
false ontologies; random sets of as many heads are the control. Judged on held-out items of the same words and on items
of unseen words, every word of the chain in one pass over the text. Also the check of the writers: the same with only
them silenced, against random heads of the same blocks.

Knows nothing about what is concluded. Source: Dutta et al. 2024, arXiv 2402.18312.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from circuits.knockout import ReferenceMeans, knocked_out, outliers, random_sets, reference_means, top
from circuits.patching import Positions
from experiments.circuit.traced import writers_of
from experiments.circuit.trials import effect_rows, heads_of, hop_rows
from experiments.study.folder import TEXT
from experiments.study.parts import Workbench
from experiments.tasks.alignment import encode
from experiments.tasks.ontology_corruption import Where
from experiments.tasks.ontology_text import OntologyItem
from lm.text import EncodedBatch, left_padded

__all__ = ["ABLATED", "KEPT", "KEPT_SHARES", "PUBLISHED_SHARE", "Ranking", "ablated", "kept", "scores"]

PUBLISHED_SHARE = 458 / 1024
"""Of heads kept in the published circuit."""
KEPT_SHARES = (0.1, 0.25, PUBLISHED_SHARE, 0.6, 0.75, 0.9)
TEXTS_AT_ONCE = 2
_SUBTASK: dict[str, pa.DataType] = {"item": pa.int32(), "subtask": pa.int16(), "kind": TEXT}
KEPT = pa.schema(
    {
        "set": TEXT, **_SUBTASK, "circuit": TEXT, "complement": pa.bool_(), "kept": pa.int32(), "draw": pa.int16(),
        "agrees": pa.bool_(), "right": pa.bool_(), "probability": pa.float64(),
    }.items()
)  # fmt: skip
"""One row per set ("held-out", "unseen"), item, subtask and circuit ("whole", "none", a ranking, "outliers", "random");
complement: everything but the circuit is kept; kept: heads of the circuit; agrees: with the whole model; draw: −1 where
nothing is random."""
ABLATED = pa.schema(
    {**_SUBTASK, "silenced": TEXT, "heads": pa.int32(), "draw": pa.int16(), "right": pa.bool_(),
     "probability": pa.float64()}.items()
)  # fmt: skip
"""One row per held-out item, subtask and what was silenced ("none", "writers", "random")."""


@dataclass(frozen=True)
class Ranking:
    """How heads were patched for the scores: arguments of `effect_rows` and `hop_rows`, plain values.

    Attributes:
        groups: the items, as they were patched together.
        where, positions, blocks, tokens_at_once: see the trials of effects.
    """

    groups: tuple[tuple[int, ...], ...]
    where: Where
    positions: Positions
    blocks: tuple[int, ...]
    tokens_at_once: int


def scores(bench: Workbench, ranking: Ranking) -> dict[str, Tensor]:
    """(block, head) scores by name; those for which no item is right are not there."""
    how = (ranking.positions, ranking.blocks, ranking.tokens_at_once)
    rows = [bench.once(effect_rows, group, ranking.where, *how) for group in ranking.groups]
    effects = pd.concat([one for one in rows if len(one)] or rows[:1], ignore_index=True)
    heads = bench.once(heads_of)
    shape = (heads.n_blocks, heads.n_heads)
    found = {
        "reasoning": _mean_effect(bench.once(hop_rows, *how), "part", shape),
        "copy": _mean_effect(effects[effects["kind"] == "copy"], "subtask", shape),
        "decision": _mean_effect(effects[effects["kind"] == "decision"], "subtask", shape),
    }
    return {name: score for name, score in found.items() if score is not None}


def _mean_effect(trials: pd.DataFrame, by: str, shape: tuple[int, int]) -> Tensor | None:
    """Mean over the values of `by` of E (ratio of sums over items); None without trials."""
    if trials.empty:
        return None
    sums = trials.groupby([by, "block", "head"], observed=True)[["kl", "kl_corrupted"]].sum()
    effect = (1 - sums["kl"] / sums["kl_corrupted"]).groupby(level=["block", "head"]).mean()
    score = torch.zeros(shape, dtype=torch.float64)
    for key, value in effect.items():
        block, head = key  # type: ignore[misc]
        score[int(block) - 1, int(head)] = float(value)
    return score


# --- Texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """Items as tokens, up to the last word: columns after which words are predicted, and these words."""

    batch: EncodedBatch
    at: Tensor
    targets: Tensor
    numbers: tuple[int, ...]
    kinds: tuple[str, ...]


def _texts(bench: Workbench, name: str) -> _Texts:
    """The items of one set ("held_out", "unseen"); through `bench.once`."""
    items: Sequence[OntologyItem] = getattr(bench.prompts, name)
    encoded = [encode(bench.model.tokenizer, item.text, special_tokens=True) for item in items]
    places = [[one.predicted(cut.span) for cut in item.cuts] for one, item in zip(encoded, items, strict=True)]
    rows = [one.ids[: spots[-1][0] + 1] for one, spots in zip(encoded, places, strict=True)]
    batch = left_padded(rows, bench.model.pad_id)
    width = batch.input_ids.shape[1]
    at = [[width - len(row) + before for before, _ in spots] for row, spots in zip(rows, places, strict=True)]
    cuts = items[0].cuts
    return _Texts(
        batch, torch.tensor(at), torch.tensor([[target for _, target in spots] for spots in places]),
        tuple(cut.number for cut in cuts), tuple(cut.kind for cut in cuts),
    )  # fmt: skip


def _means(bench: Workbench) -> ReferenceMeans:
    """What heads say on average over the false ontologies; through `bench.once`."""
    model = bench.model
    rows = []
    for item in bench.prompts.reference:
        text = encode(model.tokenizer, item.text, special_tokens=True)
        rows.append(text.ids[: text.predicted(item.cuts[-1].span)[0] + 1])
    return reference_means(bench.once(heads_of), left_padded(rows, model.pad_id), TEXTS_AT_ONCE)


def _said(bench: Workbench, name: str, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(item, subtask) most probable token, whether it is right, probability of the right one, of a circuit."""
    texts = bench.once(_texts, name)
    means = bench.once(_means)
    logits = knocked_out(bench.once(heads_of), texts.batch, keep, means, texts.at, TEXTS_AT_ONCE)
    best = logits.argmax(-1)
    probability = logits.double().log_softmax(-1).gather(-1, texts.targets[..., None])[..., 0].exp()
    return best, best == texts.targets, probability


# --- Rows -------------------------------------------------------------------------------------------------------------


def _sizes(n: int) -> list[int]:
    """Numbers of heads that are kept."""
    return sorted({max(1, min(n - 1, round(share * n))) for share in KEPT_SHARES})


def _generator(seed: int, size: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 * seed + size)


def _circuits(bench: Workbench, ranking: Ranking, draws: int, seed: int, whole_curve: bool) -> list[tuple[Any, ...]]:
    """(name, complement, heads kept, draw, set of heads that are kept) of every circuit that is tried."""
    heads = bench.once(heads_of)
    known = bench.once(scores, ranking)
    total = heads.n_blocks * heads.n_heads
    sizes = _sizes(total)
    published = max(1, min(total - 1, round(PUBLISHED_SHARE * total)))
    empty = torch.zeros(heads.n_blocks, heads.n_heads, dtype=torch.bool)
    found: list[tuple[Any, ...]] = [("none", False, 0, -1, empty)]
    for name, score in known.items():
        for size in sizes if whole_curve else [published] if name == "reasoning" else []:
            found.append((name, False, size, -1, top(score, size)))
        if name == "reasoning":
            found.append((name, True, published, -1, ~top(score, published)))
            apart = outliers(score).chosen
            if 0 < int(apart.sum()) < total:
                found += [("outliers", False, int(apart.sum()), -1, apart),
                          ("outliers", True, int(apart.sum()), -1, ~apart)]  # fmt: skip
    for size in sizes if whole_curve else [published]:
        like = torch.zeros_like(empty).flatten()
        like[:size] = True
        drawn = random_sets(like.view(empty.shape), draws, _generator(seed, size))
        found += [("random", False, size, draw, keep) for draw, keep in enumerate(drawn)]
    return found


def kept(bench: Workbench, *, seed: int, ranking: Ranking, draws: int, which: str) -> pd.DataFrame:
    """Rows of `KEPT` of one set: "held_out" (all sizes) or "unseen" (the published size only)."""
    texts = bench.once(_texts, which)
    circuits = _circuits(bench, ranking, draws, seed, whole_curve=which == "held_out")
    heads = bench.once(heads_of)
    every = torch.ones(heads.n_blocks, heads.n_heads, dtype=torch.bool)
    tables = []
    with bench.bar(len(circuits) + 1, "circuit", f"circuits, {which.replace('_', '-')} items") as moved:
        whole, right, probability = _said(bench, which, every)
        moved(1)
        about = {"set": which.replace("_", "-")}
        tables.append(_rows(texts, about | _named("whole", False, int(every.sum()), -1), whole == whole, right,
                            probability))  # fmt: skip
        for name, complement, size, draw, keep in circuits:
            best, right, probability = _said(bench, which, keep)
            tables.append(_rows(texts, about | _named(name, complement, size, draw), best == whole, right, probability))
            moved(1)
    return pd.concat(tables, ignore_index=True)


def _named(circuit: str, complement: bool, size: int, draw: int) -> dict[str, Any]:
    return {"circuit": circuit, "complement": complement, "kept": size, "draw": draw}


def _rows(
    texts: _Texts, about: dict[str, Any], agrees: Tensor | None, right: Tensor, probability: Tensor
) -> pd.DataFrame:
    """A row per item and subtask."""
    n, subtasks = right.shape
    table = pd.DataFrame(
        {
            "item": [i for i in range(n) for _ in range(subtasks)],
            "subtask": list(texts.numbers) * n,
            "kind": list(texts.kinds) * n,
            "right": right.flatten().numpy(),
            "probability": probability.flatten().numpy(),
        }
    )
    if agrees is not None:
        table["agrees"] = agrees.flatten().numpy()
    return table.assign(**about)


def ablated(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where, n: int, draws: int) -> pd.DataFrame:
    """Rows of `ABLATED`: the n writers of the traced items silenced on held-out ones, and random heads of the same
    blocks."""
    writers = bench.once(writers_of, items, where, n)
    if writers is None:
        return ABLATED.empty_table().to_pandas()
    texts = bench.once(_texts, "held_out")
    sets = [("none", -1, torch.zeros_like(writers)), ("writers", -1, writers)]
    drawn = random_sets(writers, draws, _generator(seed, 0), same_blocks=True)
    sets += [("random", draw, one) for draw, one in enumerate(drawn)]
    tables = []
    for name, draw, chosen in sets:
        _, right, probability = _said(bench, "held_out", ~chosen)
        about = {"silenced": name, "heads": int(chosen.sum()), "draw": draw}
        tables.append(_rows(texts, about, None, right, probability))
    return pd.concat(tables, ignore_index=True)
