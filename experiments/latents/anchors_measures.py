"""What `codi anchors` measures: answers after a latent was resampled or an edge was cut, and who attends to whom.

The functions that make its trial tables, with their columns; anchors.py says what is concluded from them. Knows nothing
about tables of effects, claims or figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import Intervention, Prefill
from codi.decode import decode_answers
from codi.forced import divergence, forced
from experiments.latents.donors import Noise, by_key, key_of, latents_of, other_keys, put_in
from experiments.statistics.effects import Selector
from experiments.statistics.paired import benjamini_hochberg
from experiments.statistics.sizes import smallest_size
from experiments.study.answers import answer_table, trial_schema
from experiments.study.parts import Workbench
from experiments.study.thoughts import Thoughts, evaluation_thoughts
from experiments.tasks import Problem
from steering.directions import generator
from steering.replacements import HideSlots

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = [
    "EDGE", "HIDDEN", "KINDS", "RESAMPLED", "RESAMPLED_BY", "edge", "heads", "heads_schema", "hidden_latent",
    "receiver_heads", "receivers", "resampled_at", "resampling", "suppression",
]  # fmt: skip

KINDS = (
    ("vector", "unmatched"),
    ("vector", "matched"),
    ("vector", "noise"),
    ("slot", "unmatched"),
    ("slot", "matched"),
)
"""(level, kind) of what is put in place of a latent."""

RESAMPLED = trial_schema(
    level=pa.string(), kind=pa.string(), latent=pa.int16(), draw=pa.int32(), kl=pa.float64(), flip=pa.bool_()
)
"""Kind "none" is the unedited run; kl in nats, flip: another answer than unedited."""
RESAMPLED_BY = ("level", "kind", "latent")

HIDDEN = trial_schema(
    hidden=pa.string(),
    source=pa.int16(),
    reader=pa.string(),
    target=pa.int16(),
    draw=pa.int32(),
    kl=pa.float64(),
    flip=pa.bool_(),
    change=pa.float64(),
)
"""What is hidden ("latent" source, prompt, question, position, none) from whom ("latent" target, answer, all). change
is that of the reader's own state; null if the reader is no latent."""
EDGE = ("hidden", "source", "reader", "target")

KEPT = ("embeddings", "cache")
_COLUMN = {"none": -1, "prompt": -2, "question": -3, "position": -4}
"""How `HideSlots` and the choice of a random position are asked for what is no latent."""


def resampled_at(level: str, kind: str, latent: int) -> Selector:
    """One latent resampled."""
    return {"level": level, "kind": kind, "latent": latent}


def edge(hidden: str, reader: str | int) -> Selector:
    """Something other than a latent, hidden from a latent (its number), the answer, or all."""
    return {"hidden": hidden, "source": 0, **_reader(reader)}


def hidden_latent(source: int, reader: str | int) -> Selector:
    """A latent's slot, hidden from a later latent (its number), the answer, or all."""
    return {"hidden": "latent", "source": source, **_reader(reader)}


def _reader(reader: str | int) -> Selector:
    return {"reader": "latent", "target": reader} if isinstance(reader, int) else {"reader": reader, "target": 0}


@torch.no_grad()
def _measured(
    model: CodiModel,
    thoughts: Thoughts,
    prompt: Tensor,
    edits: Callable[[Tensor, Prefill], Sequence[Intervention]],
    max_new_tokens: int | None,
    batch_size: int,
) -> tuple[list[str], dict[str, np.ndarray], np.ndarray]:
    """Answers; kl and flip (row,) against the unedited run; and the relative change of h_1..h_n (row, latent).

    Args:
        model: the model.
        thoughts: the prompts and their unedited run.
        prompt: (row,) which prompt a row continues.
        edits: interventions for a batch of rows and their prompts.
        max_new_tokens, batch_size: of the decoding.
    """
    plain = decode_answers(model, thoughts.run, max_new_tokens)
    states = thoughts.run.states[:, 1:].float()
    spread = (states - states.mean(0)).norm(dim=-1).square().mean(0).sqrt().clamp_min(1e-6)  # (latent,)
    texts, kl, change = [], [], []
    for start in range(0, len(prompt), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(prompt)))
        here = prompt[rows]
        prefill = thoughts.prefill.select(here)
        interventions = list(edits(rows, prefill))
        edited = model.rollout(prefill, model.n_latents, interventions, keep=("cache",))
        texts += decode_answers(model, edited, max_new_tokens, interventions=interventions).texts
        tokens = [plain.tokens[int(i)] for i in here]
        before, there, _, _ = forced(model, thoughts.run.select(here), tokens)
        after, _, _, _ = forced(model, edited, tokens, interventions)
        kl.append(divergence(before, after, there).cpu().numpy())
        moved = (edited.states[:, 1:].float() - states[here.to(states.device)]).norm(dim=-1) / spread
        change.append(moved.cpu().numpy())
    flips = np.array([text != plain.texts[int(i)] for text, i in zip(texts, prompt, strict=True)])
    return texts, {"kl": np.concatenate(kl), "flip": flips}, np.concatenate(change)


# --- Resampled latents ------------------------------------------------------------------------------------------------


def _donors(
    problems: Sequence[Problem], derivation: Sequence[Problem], n: int, draws: int, seed: int
) -> tuple[list[int], list[tuple[str, str, int, int]], list[int]]:
    """Prompt, (level, kind, latent, draw) and donor (-1: none) of every row, for the prompts that have donors.

    Raises:
        ValueError: none has.
    """
    rng = generator(seed, "anchors", "donors")
    pools = by_key(derivation)
    keys = sorted(pools)
    prompt: list[int] = []
    tried: list[tuple[str, str, int, int]] = []
    donor: list[int] = []
    for i, problem in enumerate(problems):
        others = other_keys(keys, problem)
        same = [row for row in pools.get(key_of(problem), []) if derivation[row].prompt_id != problem.prompt_id]
        if not same or not others:
            continue
        rows: list[tuple[tuple[str, str, int, int], int]] = [(("", "none", 0, -1), -1)]
        for draw in range(draws):
            pool = pools[others[int(rng.integers(len(others)))]]
            chosen = {"unmatched": pool[int(rng.integers(len(pool)))], "matched": same[int(rng.integers(len(same)))]}
            rows += [((*pair, k, draw), chosen.get(pair[1], -1)) for pair in KINDS for k in range(1, n + 1)]
        prompt += [i] * len(rows)
        tried += [one for one, _ in rows]
        donor += [row for _, row in rows]
    if not prompt:
        raise ValueError(
            "no evaluation prompt has the intermediate values of a derivation prompt: use more derivation prompts"
        )
    return prompt, tried, donor


def resampling(bench: Workbench, *, draws: int, max_new_tokens: int | None, batch_size: int, seed: int) -> pd.DataFrame:
    """Answers with one latent resampled."""
    model, derivation, n = bench.model, bench.prompts.derivation, bench.model.n_latents
    thoughts = bench.once(evaluation_thoughts, KEPT)
    prompt, tried, wanted = _donors(thoughts.problems, derivation, n, draws, seed)
    used = sorted({row for row in wanted if row >= 0})
    at = {row: place for place, row in enumerate(used)}
    given = latents_of(model, [], [derivation[row] for row in used])
    noise = Noise.like(given.embeddings, draws, seed, "anchors")
    columns = pd.DataFrame(tried, columns=["level", "kind", "latent", "draw"])
    donor = torch.tensor([at.get(row, 0) for row in wanted])
    draw_of = torch.tensor(columns["draw"].to_numpy()).clamp(min=0)
    here = torch.tensor(columns["latent"].to_numpy())[:, None] == torch.arange(1, n + 1)  # (row, latent)
    vector, slot = (
        here & torch.tensor((columns["level"] == level).to_numpy())[:, None] for level in ("vector", "slot")
    )
    noisy = torch.tensor((columns["kind"] == "noise").to_numpy())

    def edits(rows: Tensor, prefill: Prefill) -> Sequence[Intervention]:
        return [
            put_in(
                model, given, noise, donor=donor[rows], draw=draw_of[rows], noisy=noisy[rows], vector=vector[rows],
                slot=slot[rows], first=prefill.next_position,
            )
        ]  # fmt: skip

    texts, effects, _ = _measured(model, thoughts, torch.tensor(prompt), edits, max_new_tokens, batch_size)
    own: dict[str, Any] = {str(name): columns[name].to_numpy() for name in columns}
    return answer_table(thoughts.problems, prompt, texts, **own, **effects)


# --- Cut edges --------------------------------------------------------------------------------------------------------


def _edges(n: int, draws: int) -> list[tuple[Selector, int]]:
    """Every edge that is cut, with its draw (-1: not drawn), the unedited run first."""
    tried: list[tuple[Selector, int]] = [(edge("none", ""), -1)]
    for reader in (*range(1, n + 1), "answer"):
        earlier = range(1, reader if isinstance(reader, int) else n + 1)
        tried += [(hidden_latent(k, reader), -1) for k in earlier]
        tried += [(edge("prompt", reader), -1), (edge("question", reader), -1)]
        tried += [(edge("position", reader), draw) for draw in range(draws)]
    tried += [(hidden_latent(k, "all"), -1) for k in range(1, n + 1)]
    return tried + [(edge("position", "all"), draw) for draw in range(draws)]


def suppression(
    bench: Workbench, *, draws: int, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Answers with one source hidden from one reader.

    Sources: latents 1..n, the prompt (all of it), the question (all but its first token and the protocol's), one random
    prompt position (the control); readers: later latents, the answer, all (every later reader).
    """
    model, n = bench.model, bench.model.n_latents
    thoughts = bench.once(evaluation_thoughts, KEPT)
    width, size = thoughts.prefill.attention_mask.shape[1], len(thoughts)
    tried = _edges(n, draws)
    m = len(tried)
    prompt = torch.arange(size).repeat_interleave(m)
    columns = [width + one["source"] - 1 if one["hidden"] == "latent" else _COLUMN[one["hidden"]] for one, _ in tried]
    readers = [{"answer": n + 1, "latent": one["target"]}.get(one["reader"], 0) for one, _ in tried]
    column, reader_of = torch.tensor(columns).repeat(size), torch.tensor(readers).repeat(size)
    rng = generator(seed, "anchors", "positions")
    lengths = thoughts.prefill.prompt_lengths.cpu().numpy()
    random = torch.from_numpy(width - 1 - rng.integers(1, lengths[prompt.numpy()]))  # never the last prompt position
    column = torch.where(column == _COLUMN["position"], random, column)
    starts = width - torch.from_numpy(lengths)[prompt] + 1
    question = torch.stack((starts, torch.full_like(starts, width - len(model.protocol.before_latents))), dim=1)

    def edits(rows: Tensor, prefill: Prefill) -> Sequence[Intervention]:
        return [HideSlots(column[rows], reader_of[rows], width, question[rows])]

    texts, effects, change = _measured(model, thoughts, prompt, edits, max_new_tokens, batch_size)
    own = [change[row, reader - 1] if 1 <= reader <= n else np.nan for row, reader in enumerate(reader_of.tolist())]
    names: dict[str, Any] = {name: [one[name] for one, _ in tried] * size for name in EDGE}
    draw = [number for _, number in tried] * size
    return answer_table(thoughts.problems, prompt, texts, **names, draw=draw, **effects, change=np.array(own))


# --- Heads ------------------------------------------------------------------------------------------------------------


def heads_schema(n: int) -> pa.Schema:
    """Columns of `heads` for n latents."""
    shares = [(f"share_{k}", pa.float64()) for k in range(1, n + 1)]
    ends = [(name, pa.float64()) for name in ("effective", "score", "null", "p", "q", "preference", "size")]
    return pa.schema([
        ("layer", pa.int64()), ("head", pa.int64()), ("mass", pa.float64()), *shares, ("top", pa.int64()), *ends,
    ])  # fmt: skip


def heads(bench: Workbench, *, shuffles: int, batch_size: int, seed: int) -> pd.DataFrame:
    """`receiver_heads` of the end-of-thought token; and preference, the spread of a head's mean shares over latents
    (their standard deviation), beside size, what the wording of a prompt makes of a share."""
    thoughts = bench.once(evaluation_thoughts, KEPT)
    weights = _attention(bench.model, thoughts, batch_size)
    table = receiver_heads(weights, shuffles, generator(seed, "heads"))
    clusters = np.array([problem.cluster or problem.prompt_id for problem in thoughts.problems])
    forms = np.array([problem.template for problem in thoughts.problems])
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
    sizes = [
        smallest_size(shares[:, layer, head], clusters, forms, seed=seed).size
        for layer in range(shares.shape[1])
        for head in range(shares.shape[2])
    ]
    return table.assign(preference=np.sqrt(table["score"]), size=sizes)


def receiver_heads(weights: np.ndarray, shuffles: int, rng: np.random.Generator) -> pd.DataFrame:
    """Heads that look at the same latents in every prompt.

    score = variance over latents of the mean (over prompts) share of a head's attention to latents. Under the null that
    which latent gets which share is random in every prompt, shares can be shuffled within prompts.

    Args:
        weights: (prompt, layer, head, latent) attention of one reader to the latents.
        shuffles: behind the p-values.
        rng: of the shuffles; all heads of a prompt are shuffled alike.

    Returns:
        One row per head: layer and head (1-based), mass (mean attention to all latents together), share_1..share_n, top
        (latent with the largest share), effective (number of latents that it is spread over, exp of the entropy),
        score, null (mean score of shuffles), p, q (Benjamini-Hochberg over heads).
    """
    prompts, layers, heads, n = weights.shape
    mass = weights.sum(-1)
    shares = weights / np.maximum(mass[..., None], 1e-12)
    observed = shares.mean(0).var(-1)
    null = np.empty((shuffles, layers, heads))
    for number in range(shuffles):
        order = rng.permuted(np.tile(np.arange(n), (prompts, 1)), axis=1)
        null[number] = np.take_along_axis(shares, order[:, None, None, :], axis=-1).mean(0).var(-1)
    p = (1 + (null >= observed - 1e-15).sum(0)) / (1 + shuffles)
    rows = []
    for layer in range(layers):
        for head in range(heads):
            mean = shares[:, layer, head].mean(0)
            rows.append(
                {
                    "layer": layer + 1,
                    "head": head + 1,
                    "mass": mass[:, layer, head].mean(),
                    **{f"share_{k + 1}": mean[k] for k in range(n)},
                    "top": int(mean.argmax()) + 1,
                    "effective": float(np.exp(-(mean * np.log(np.maximum(mean, 1e-12))).sum())),
                    "score": observed[layer, head],
                    "null": null[:, layer, head].mean(),
                    "p": p[layer, head],
                }
            )
    table = pd.DataFrame(rows)
    return table.assign(q=benjamini_hochberg(table["p"].to_numpy()))


def receivers(table: pd.DataFrame, alpha: float = 0.05) -> pd.Series:
    """(head,) bool: which rows of `heads` look at the same latents in every prompt, more than wording makes of it."""
    return (table["q"] < alpha) & (table["preference"] > table["size"])


def _attention(model: CodiModel, thoughts: Thoughts, batch_size: int) -> np.ndarray:
    """(prompt, layer, head, latent) attention of the end-of-thought token to the latents' slots."""
    found = []
    width = thoughts.run.prompt_width
    for start in range(0, len(thoughts), batch_size):
        run = thoughts.run.select(range(start, min(start + batch_size, len(thoughts))))
        _, _, _, weights = forced(model, run, [[] for _ in range(len(run))], attentions=True)
        assert weights is not None
        found.append(weights[..., width : width + run.n_latents].float().cpu().numpy())
    return np.concatenate(found)
