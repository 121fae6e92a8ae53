"""Trials of `codi circuit-latents`: who writes the answer at the end of a latent thought, and from where.

After the latents and the end-of-thought tokens (and, where answers are sentences, after the words before the number)
the first token of the answer's number is predicted. What each head adds to its logit, less the mean over the
vocabulary, is split by what the head's values come from:

    question   the tokens of the prompt
    latent k   what latent k left in the cache
    rest       the first token of all, where attention rests that has nothing to do, and the tokens after the latents

the same measure as for written chains (traced.py). Only prompts that the model answers rightly count. Knows nothing
about what is concluded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from circuits.heads import Change, Heads
from circuits.knockout import random_sets
from circuits.writers import FrozenNorm, alone, answer_direction
from codi import LatentRollout
from codi.decode import decode_answers
from experiments.study.answers import judged, reading_of
from experiments.study.folder import TEXT
from experiments.study.parts import Workbench
from lm.cache import cache_length, clone_cache, read_slots
from lm.forward import feed, tapped

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["LATENT_ABLATED", "LATENT_SOURCES", "LATENT_WRITERS", "latent_ablated", "latent_sources", "latent_writers",
           "writing_heads"]  # fmt: skip

_ITEM: dict[str, pa.DataType] = {"item": pa.int32(), "cluster": pa.string()}
_HEAD: dict[str, pa.DataType] = {"block": pa.int16(), "head": pa.int16()}
LATENT_WRITERS = pa.schema(
    {**_ITEM, **_HEAD, "contribution": pa.float64(), "alone": pa.float64(), "total": pa.float64()}.items()
)
"""One row per prompt that is answered rightly, and head: see `WRITERS` of traced.py."""
LATENT_SOURCES = pa.schema(
    {**_ITEM, **_HEAD, "source": TEXT, "latent": pa.int16(), "attention": pa.float64(),
     "written": pa.float64()}.items()
)  # fmt: skip
"""The same by source ("question", "latent" with its number, "rest")."""
LATENT_ABLATED = pa.schema(
    {**_ITEM, "silenced": TEXT, "heads": pa.int32(), "draw": pa.int16(), "right": pa.bool_(),
     "probability": pa.float64()}.items()
)  # fmt: skip
"""One row per prompt and what was silenced after the latents ("none", "writers", "random", "all")."""


@dataclass(frozen=True)
class _Thought:
    """Prompts that are fed alike: a finished rollout, the tokens after it, and the token to be predicted.

    Attributes:
        items: (row,) places among the evaluation prompts.
        run: with its cache.
        fed: tokens after the latents.
        target: (row,).
    """

    items: list[int]
    run: LatentRollout
    fed: tuple[int, ...]
    target: Tensor


def _heads(bench: Workbench) -> Heads:
    return Heads(bench.model)


def _norm(bench: Workbench) -> FrozenNorm:
    return FrozenNorm(bench.model)


def _thoughts(bench: Workbench, batch_size: int) -> list[_Thought]:
    """The prompts that are answered rightly, in groups; through `bench.once`."""
    model: CodiModel = bench.model
    problems = bench.prompts.evaluation
    found = []
    for start in range(0, len(problems), batch_size):
        part = problems[start : start + batch_size]
        run = model.rollout(model.encode([p.question for p in part]), model.n_latents, keep=("cache",))
        said = decode_answers(model, run)
        right = judged(said.texts, [float(p.answer) for p in part], reading_of(part))["correct"]
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for row in np.flatnonzero(right).tolist():
            before = _before_the_number(model, said.tokens[row])
            if before < len(said.tokens[row]):
                key = tuple(said.tokens[row][:before])
                groups.setdefault(key, []).append((row, said.tokens[row][before]))
        for before_it, members in groups.items():
            rows = [row for row, _ in members]
            fed = (*model.protocol.after_latents, *before_it)
            target = torch.tensor([token for _, token in members])
            found.append(_Thought([start + row for row in rows], run.select(rows), fed, target))
    return found


def _before_the_number(model: CodiModel, tokens: Sequence[int]) -> int:
    """Tokens before the first one that holds a digit."""
    for i, token in enumerate(tokens):
        if any(c.isdigit() for c in model.tokenizer.decode([token])):
            return i
    return len(tokens)


@dataclass(frozen=True)
class _Read:
    """What a pass over the tokens after the latents shows, at the last of them.

    Attributes:
        logits: (row, vocab). stream: (row, d_model) before the final norm. weights: (row, block, head, key).
        values: (row, key, block, kv_head, d_head). z: (row, block, head, d_head).
    """

    logits: Tensor
    stream: Tensor
    weights: Tensor
    values: Tensor
    z: Tensor


@torch.no_grad()
def _read(heads: Heads, thought: _Thought, change: Change | None = None) -> _Read:
    """One pass after the latents; what `change` replaces is read as replaced."""
    model, run = heads.model, thought.run
    assert run.past_key_values is not None
    size, device = len(run), run.states.device
    fed = torch.tensor(thought.fed, device=device).expand(size, -1)
    mask = torch.cat((run.attention_mask, torch.ones_like(fed, dtype=torch.bool)), dim=1)
    positions = (run.first_position + run.n_latents)[:, None] + torch.arange(fed.shape[1], device=device)
    cache = clone_cache(run.past_key_values)
    z: list[Tensor] = []
    streams: list[Tensor] = []
    with (
        heads.tapped(change, lambda block, x: z.append(x[:, -1])),
        tapped(model.blocks, see=lambda layer, x: streams.append(x[:, -1])),
    ):
        step = feed(model, model.embed(fed), cache, mask, positions, attentions=True)
    assert step.attentions is not None
    values = read_slots(cache, 0, cache_length(cache))[1]
    return _Read(
        model.logits(step.last[:, -1]), streams[-1], step.attentions[:, -1], values, torch.stack(z, dim=1)
    )  # fmt: skip


def _members(thought: _Thought, n_latents: int) -> Tensor:
    """(row, key, source) which source every key belongs to: question, latents 1..n, rest."""
    mask = thought.run.attention_mask
    size, past = mask.shape
    width = thought.run.prompt_width
    found = torch.zeros(size, past + len(thought.fed), n_latents + 2, dtype=torch.float64, device=mask.device)
    found[:, :width, 0] = mask[:, :width].double()
    for latent in range(1, n_latents + 1):
        found[:, width + latent - 1, latent] = 1
    found[:, past:, -1] = 1
    first = mask.int().argmax(1)
    rows = torch.arange(size, device=mask.device)
    found[rows, first, 0] = 0
    found[rows, first, -1] = 1
    return found


def _written(bench: Workbench, batch_size: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of `LATENT_WRITERS` and of `LATENT_SOURCES`; through `bench.once`."""
    heads, norm, model = bench.once(_heads), bench.once(_norm), bench.model
    tables: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for thought in bench.once(_thoughts, batch_size):
        read = _read(heads, thought)
        goal = thought.target.to(model.device)
        direction, constant = answer_direction(model, goal, None)
        scale = norm.scale(read.stream)
        total = ((norm.part(read.stream, scale) + norm.bias) * direction).sum(-1) + constant
        members = _members(thought, model.n_latents)
        per_group = heads.n_heads // len(heads.groups)
        attention, written, said = [], [], []
        for block in range(1, heads.n_blocks + 1):
            weights = read.weights[:, block - 1].double()
            values = read.values[:, :, block - 1].double().repeat_interleave(per_group, 2)
            z = torch.einsum("ihc,icp,ichk->iphk", weights, members, values)
            out = heads.written(block, z)
            attention.append(torch.einsum("ihc,icp->ihp", weights, members))
            written.append(torch.einsum("iphd,id->ihp", norm.part(out, scale[:, None, None]), direction))
            said.append(alone(model, out.sum(1).to(model.dtype), goal[:, None].expand(-1, heads.n_heads)))
        _add(
            tables,
            bench,
            thought.items,
            torch.stack(attention, 1),
            torch.stack(written, 1),
            torch.stack(said, 1),
            total,
        )
    joined = [pd.concat(rows, ignore_index=True) if rows else schema.empty_table().to_pandas()
              for rows, schema in zip(tables, (LATENT_WRITERS, LATENT_SOURCES), strict=True)]  # fmt: skip
    return joined[0], joined[1]


def _add(
    tables: tuple[list[pd.DataFrame], list[pd.DataFrame]], bench: Workbench, items: list[int], attention: Tensor,
    written: Tensor, said: Tensor, total: Tensor,
) -> None:  # fmt: skip
    """Rows of (item, block, head[, source]) numbers."""
    problems = bench.prompts.evaluation
    names = [problems[i].cluster or problems[i].prompt_id for i in items]

    def columns(shape: tuple[int, ...]) -> dict[str, Any]:
        item, block, head = (axis.ravel() for axis in np.indices(shape)[:3])
        return {
            "item": np.array(items)[item], "cluster": np.array(names, dtype=object)[item], "block": block + 1,
            "head": head,
        }  # fmt: skip

    whole = columns(tuple(said.shape))
    each = total.cpu().numpy()[np.indices(tuple(said.shape))[0].ravel()]
    tables[0].append(
        pd.DataFrame(
            {
                **whole, "contribution": written.sum(-1).flatten().cpu().numpy(),
                "alone": said.double().flatten().cpu().numpy(), "total": each,
            }
        )
    )  # fmt: skip
    source = np.indices(tuple(written.shape))[3].ravel()
    last = written.shape[-1] - 1
    tables[1].append(
        pd.DataFrame(
            {
                **columns(tuple(written.shape)),
                "source": np.where(source == 0, "question", np.where(source == last, "rest", "latent")),
                "latent": np.where(source == last, 0, source),
                "attention": attention.flatten().cpu().numpy(),
                "written": written.flatten().cpu().numpy(),
            }
        )
    )


# --- Parts of the study -----------------------------------------------------------------------------------------------


def latent_writers(bench: Workbench, *, seed: int, batch_size: int) -> pd.DataFrame:
    """Rows of `LATENT_WRITERS`."""
    return bench.once(_written, batch_size)[0]


def latent_sources(bench: Workbench, *, seed: int, batch_size: int) -> pd.DataFrame:
    """Rows of `LATENT_SOURCES`."""
    return bench.once(_written, batch_size)[1]


def writing_heads(trials: pd.DataFrame, n: int, shape: tuple[int, int]) -> Tensor:
    """(block, head) the n heads that add most to the logits, as a share of them."""
    share = (trials["contribution"] / trials["total"]).groupby([trials["block"], trials["head"]]).mean().nlargest(n)
    found = torch.zeros(shape, dtype=torch.bool)
    for block, head in share.index:
        found[int(block) - 1, int(head)] = True
    return found


def latent_ablated(bench: Workbench, *, seed: int, batch_size: int, n: int, draws: int) -> pd.DataFrame:
    """Rows of `LATENT_ABLATED`: writers are chosen on every other prompt and silenced, where the answer is predicted,
    on the others: they say their mean over the prompts that they were chosen on. Random heads of the same blocks
    beside."""
    heads, problems = bench.once(_heads), bench.prompts.evaluation
    rows = bench.once(_written, batch_size)[0]
    chosen_on = rows[rows["item"] % 2 == 0]
    thoughts = bench.once(_thoughts, batch_size)
    if chosen_on.empty or not any(i % 2 for thought in thoughts for i in thought.items):
        return LATENT_ABLATED.empty_table().to_pandas()
    writers = writing_heads(chosen_on, n, (heads.n_blocks, heads.n_heads))
    seen = [(thought, _read(heads, thought)) for thought in thoughts]
    even = torch.cat([read.z[[i % 2 == 0 for i in thought.items]] for thought, read in seen])
    mean = even.double().mean(0).to(even.dtype)
    sets = [("none", -1, torch.zeros_like(writers)), ("writers", -1, writers)]
    drawn = random_sets(writers, draws, torch.Generator().manual_seed(seed), same_blocks=True)
    sets += [("random", draw, one) for draw, one in enumerate(drawn)]
    sets.append(("all", -1, torch.ones_like(writers)))
    tables = []
    for name, draw, silenced in sets:
        for thought in thoughts:

            def change(block: int, z: Tensor, which: Tensor = silenced) -> Tensor:
                z = z.clone()
                z[:, -1] = torch.where(which[block - 1].to(z.device)[:, None], mean[block - 1], z[:, -1])
                return z

            logits = _read(heads, thought, change).logits.double()
            goal = thought.target.to(logits.device)
            odd = [row for row, item in enumerate(thought.items) if item % 2]
            items = [thought.items[row] for row in odd]
            tables.append(
                pd.DataFrame(
                    {
                        "item": items,
                        "cluster": [problems[i].cluster or problems[i].prompt_id for i in items],
                        "silenced": name, "heads": int(silenced.sum()), "draw": draw,
                        "right": (logits.argmax(-1) == goal)[odd].cpu().numpy(),
                        "probability": logits.log_softmax(-1).gather(1, goal[:, None])[odd, 0].exp().cpu().numpy(),
                    }
                )
            )  # fmt: skip
    return pd.concat(tables, ignore_index=True)
