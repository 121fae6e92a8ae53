"""Traced trials of `codi circuit`: who writes each word of the chain, and from which part of the text.

One pass over an item's text serves all its words: what stands after the words' prefixes is read from it. A head's
contribution is what it adds to the logit of the word less the mean over the vocabulary, at the item's own scale of the
final norm (`circuits.writers`), split by the tokens that the head's values come from (`circuits.flow`):

    demonstrations   everything before the question
    question         from its "### Input:" to "### Response:"
    chain            what was written before the word
    rest             the first token of all, where attention rests that has nothing to do

Movers: at the object of a statement of the question, attention to its subject, less attention as far back from the
token after it; a head that only looks back by a number of tokens has 0.

Knows nothing about what is concluded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from circuits.flow import flow_tree, mention_check, tree_record
from circuits.heads import Reading
from circuits.writers import FrozenNorm, alone, answer_direction
from experiments.circuit.items import subtasks
from experiments.circuit.trials import heads_of, right_subtasks
from experiments.study.folder import TEXT
from experiments.study.parts import Workbench
from experiments.tasks.alignment import Encoded, encode
from experiments.tasks.ontology_corruption import Where
from experiments.tasks.ontology_text import OntologyItem
from lm.text import left_padded

__all__ = ["MENTIONS", "MOVERS", "PARTS", "SOURCES", "TREE", "WRITERS", "mentions", "movers", "parts_of_text",
           "sources", "tree", "writers", "writers_of"]  # fmt: skip

PARTS = ("demonstrations", "question", "chain", "rest")
ROOTS = 3
"""Writers that the tree begins at."""
_SUBTASK: dict[str, pa.DataType] = {"item": pa.int32(), "subtask": pa.int16(), "kind": TEXT}
_HEAD: dict[str, pa.DataType] = {"block": pa.int16(), "head": pa.int16()}
WRITERS = pa.schema(
    {**_SUBTASK, **_HEAD, "contribution": pa.float64(), "alone": pa.float64(), "total": pa.float64()}.items()
)
"""One row per item, subtask that is predicted rightly, and head: what it adds to the logit of the word (less the mean
over the vocabulary), the word's probability by the head alone, and the whole logit."""
SOURCES = pa.schema({**_SUBTASK, **_HEAD, "part": TEXT, "attention": pa.float64(), "written": pa.float64()}.items())
"""The same by part of the text: attention after the subtask's prefix, and contribution."""
MOVERS = pa.schema({"item": pa.int32(), **_HEAD, "attention": pa.float64(), "control": pa.float64()}.items())
"""One row per item and head: attention from objects to subjects of statements, and as far back from the next token."""
MENTIONS = pa.schema({**_SUBTASK, "corruption": TEXT, "probability": pa.float64(), "kl": pa.float64()}.items())
"""One row per item, induction subtask and corruption ("none", "question", "chain", "both")."""
TREE = pa.schema({"item": pa.int32(), "subtask": pa.int16(), "record": pa.string()}.items())
"""One row: the flow tree of one word as JSON (networkx's node-link form)."""


@dataclass(frozen=True)
class _Traced:
    """Tables of one item."""

    writers: pd.DataFrame
    sources: pd.DataFrame
    movers: pd.DataFrame


def parts_of_text(item: OntologyItem, text: Encoded) -> Tensor:
    """(token, part) bool: which of `PARTS` each token belongs to."""
    question = item.text.rfind("### Input:", 0, item.prompt_end)
    found = torch.zeros(len(text), len(PARTS), dtype=torch.bool)
    for i, (start, end) in enumerate(text.spans):
        middle = (start + end) / 2
        part = "demonstrations" if middle < question else "question" if middle < item.prompt_end else "chain"
        found[i, PARTS.index("rest" if i == 0 else part)] = True
    return found


@torch.no_grad()
def _traced(bench: Workbench, number: int, where: Where) -> _Traced:
    """One item; through `bench.once`."""
    item: OntologyItem = bench.prompts.items[number]
    heads, model = bench.once(heads_of), bench.model
    text = encode(model.tokenizer, item.text, special_tokens=True)
    chosen = right_subtasks(bench, number, where)
    cuts = [len(one.probe.clean) - 1 for one in chosen]
    pairs = _statements(item, text)
    queries = sorted({*cuts, *(q for q, _ in pairs), *(q + 1 for q, _ in pairs)})
    last = max(queries)
    batch = left_padded([text.ids[: last + 1]], model.pad_id)
    read = heads.run(batch, z=True, residual=True, patterns=queries, values=True)
    at = {column: i for i, column in enumerate(queries)}
    members = parts_of_text(item, text)[: last + 1].to(model.device, torch.float64)
    writer_rows: list[pd.DataFrame] = []
    source_rows: list[pd.DataFrame] = []
    for one, cut in zip(chosen, cuts, strict=True):
        about = {"item": number, "subtask": one.number, "kind": one.kind}
        found = _written(bench, read, cut, at[cut], members, one.probe.target)
        writer_rows.append(pd.DataFrame({**about, **found[0]}))
        source_rows.append(pd.DataFrame({**about, **found[1]}))
    assert read.patterns is not None
    direct = [read.patterns[0, :, :, at[q], s] for q, s in pairs]
    shifted = [read.patterns[0, :, :, at[q + 1], s + 1] for q, s in pairs]
    block, head = _grid(heads.n_blocks, heads.n_heads)
    mover_rows = pd.DataFrame(
        {
            "item": number, "block": block, "head": head,
            "attention": torch.stack(direct).double().mean(0).flatten().cpu().numpy(),
            "control": torch.stack(shifted).double().mean(0).flatten().cpu().numpy(),
        }
    )  # fmt: skip
    empty = (WRITERS.empty_table().to_pandas(), SOURCES.empty_table().to_pandas())
    joined = [
        pd.concat(rows, ignore_index=True) if rows else nothing
        for rows, nothing in zip((writer_rows, source_rows), empty, strict=True)
    ]
    return _Traced(joined[0], joined[1], mover_rows)


def _grid(n_blocks: int, n_heads: int) -> tuple[Any, Any]:
    """Block numbers and heads, head by head."""
    grid = torch.cartesian_prod(torch.arange(1, n_blocks + 1), torch.arange(n_heads)).numpy()
    return grid[:, 0], grid[:, 1]


def _statements(item: OntologyItem, text: Encoded) -> list[tuple[int, int]]:
    """(last token of the object, last token of the subject) of every statement of the question."""
    ends: dict[tuple[int, str], int] = {
        (m.sentence, m.role): text.last(m.span) for m in item.mentions if m.part == "question" and not m.query
    }
    numbers = sorted({sentence for sentence, _ in ends})
    return [(ends[number, "object"], ends[number, "subject"]) for number in numbers]


def _written(
    bench: Workbench, read: Reading, cut: int, query: int, members: Tensor, target: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of `WRITERS` and of `SOURCES` of one word."""
    heads, model, norm = bench.once(heads_of), bench.model, bench.once(_norm)
    assert read.residual is not None and read.values is not None and read.patterns is not None
    goal = torch.tensor([target], device=model.device)
    direction, constant = answer_direction(model, goal, None)
    x = read.residual[0, cut, -1]
    scale = norm.scale(x[None])[0]
    total = float((norm.part(x, scale) * direction[0]).sum() + (norm.bias * direction[0]).sum() + constant[0])
    per_group = heads.n_heads // len(heads.groups)
    attention, written, said = [], [], []
    for block in range(1, heads.n_blocks + 1):
        weights = read.patterns[0, block - 1, :, query].double()  # (head, column)
        values = read.values[0, :, block - 1].double().repeat_interleave(per_group, 1)  # (column, head, d_head)
        z = torch.einsum("hc,cp,chk->phk", weights, members, values)
        out = heads.written(block, z)  # (part, head, d_model)
        attention.append(weights @ members)
        written.append((norm.part(out, scale) * direction[0]).sum(-1).T)
        said.append(alone(model, out.sum(0).to(model.dtype), goal.expand(heads.n_heads)))
    by_part = torch.stack(written).cpu()  # (block, head, part)
    block, head = _grid(heads.n_blocks, heads.n_heads)
    n = len(PARTS)
    return (
        {
            "block": block, "head": head, "contribution": by_part.sum(-1).flatten().numpy(),
            "alone": torch.stack(said).double().flatten().cpu().numpy(), "total": total,
        },
        {
            "block": block.repeat(n), "head": head.repeat(n), "part": list(PARTS) * len(block),
            "attention": torch.stack(attention).flatten().cpu().numpy(), "written": by_part.flatten().numpy(),
        },
    )  # fmt: skip


def _norm(bench: Workbench) -> FrozenNorm:
    return FrozenNorm(bench.model)


# --- Parts of the study -----------------------------------------------------------------------------------------------


def writers(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where) -> pd.DataFrame:
    """Rows of `WRITERS` of some items."""
    return pd.concat([bench.once(_traced, item, where).writers for item in items], ignore_index=True)


def sources(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where) -> pd.DataFrame:
    """Rows of `SOURCES` of some items."""
    return pd.concat([bench.once(_traced, item, where).sources for item in items], ignore_index=True)


def movers(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where) -> pd.DataFrame:
    """Rows of `MOVERS` of some items."""
    return pd.concat([bench.once(_traced, item, where).movers for item in items], ignore_index=True)


def writers_of(bench: Workbench, items: tuple[int, ...], where: Where, n: int) -> Tensor | None:
    """(block, head) the n heads that add most to the logits of the items' words, as a share of them; None where no
    word is predicted."""
    rows = pd.concat([bench.once(_traced, item, where).writers for item in items], ignore_index=True)
    if rows.empty:
        return None
    share = (rows["contribution"] / rows["total"]).groupby([rows["block"], rows["head"]]).mean().nlargest(n)
    heads = bench.once(heads_of)
    found = torch.zeros(heads.n_blocks, heads.n_heads, dtype=torch.bool)
    for block, head in share.index:
        found[int(block) - 1, int(head)] = True
    return found


def mentions(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where) -> pd.DataFrame:
    """Rows of `MENTIONS`: induction subtasks of some items whose word stands in the question and in the chain."""
    ontologies, model = bench.prompts, bench.model
    places: tuple[Where, ...] = ("question", "chain", "both")
    chosen, texts, corrupted = [], [], {place: [] for place in places}  # type: ignore[var-annotated]
    for item in items:
        right = {one.number for one in right_subtasks(bench, item, where) if one.kind == "induction"}
        found = {
            place: {one.number: one for one in subtasks(ontologies.items[item], ontologies.lexicon, model.tokenizer,
                                                        place)}
            for place in places
        }  # fmt: skip
        for number in sorted(right & set.intersection(*map(set, found.values()))):
            chosen.append((item, number, found["both"][number].probe.target))
            texts.append(found["both"][number].probe.clean)
            for place in places:
                corrupted[place].append(found[place][number].probe.corrupted)
    if not chosen:
        return MENTIONS.empty_table().to_pandas()
    check = mention_check(
        bench.once(heads_of), left_padded(texts, model.pad_id),
        {place: left_padded(rows, model.pad_id) for place, rows in corrupted.items()},
        torch.tensor([target for _, _, target in chosen]), batch_size=2,
    )  # fmt: skip
    about = {"item": [i for i, _, _ in chosen], "subtask": [k for _, k, _ in chosen], "kind": "induction"}
    tables = [pd.DataFrame({**about, "corruption": "none", "probability": check.clean.numpy(), "kl": 0.0})]
    for place in places:
        values = {"probability": check.probability[place].numpy(), "kl": check.kl[place].numpy()}
        tables.append(pd.DataFrame({**about, "corruption": place, **values}))
    return pd.concat(tables, ignore_index=True)


def tree(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where, subtask: int) -> pd.DataFrame:
    """The row of `TREE`: the first item whose word at this subtask is predicted, from its loudest writers."""
    model = bench.model
    for item in items:
        for one in right_subtasks(bench, item, where):
            if one.number != subtask:
                continue
            rows = bench.once(_traced, item, where).writers
            roots = rows[rows["subtask"] == subtask].nlargest(ROOTS, "contribution")
            graph = flow_tree(
                bench.once(heads_of), one.probe.clean, [(int(b), int(h)) for b, h in zip(roots["block"], roots["head"],
                                                                                      strict=True)],
                one.probe.target,
            )  # fmt: skip
            graph.graph["target_text"] = model.tokenizer.decode([one.probe.target])
            for _, node in graph.nodes(data=True):
                if node["kind"] == "token":
                    node["text"] = model.tokenizer.decode([node["token"]])
            for _, _, edge in graph.edges(data=True):
                if edge["kind"] == "attends":
                    edge["decoded_text"] = model.tokenizer.decode([edge["decoded"]])
            record = json.dumps(tree_record(graph))
            return pd.DataFrame({"item": [item], "subtask": [subtask], "record": [record]})
    return TREE.empty_table().to_pandas()
