"""`codi anchors`: thought anchors on latents: which latent the answer hangs on, and who reads whom.

Counterfactual importance. Latent k is resampled and the rest recomputed: its vector z_k ("vector": latent k and
everything after it see the change) or its cache slot ("slot": only later readers see it) becomes that of a derivation
prompt with another key (step 1, Z) ("unmatched"), with the same key ("matched", the control: nothing that the answer
depends on has changed), or per-coordinate Gaussian noise ("noise", vectors only). Measured at the answer, against the
unedited run:
    KL    divergence of the answer's distribution, in nats, along the unedited answer (see `codi.divergence`)
    flip  whether the greedy answer is another one
Importance = unmatched minus matched, paired.

Dependencies. Attention from one reader (a later latent, or the whole answer) to one latent's slot is suppressed.
Measured at the answer (KL, flips) and at the reader (change of h_j, relative to how far h_j lies from its mean over
prompts). Control: one random prompt position is hidden from the same reader instead.

Receiver heads. Attention of the end-of-thought token to the latents, per head. A head is a receiver if the same latents
get its attention in every prompt: variance over latents of the mean share, against shares shuffled within each prompt.

Source: Bogdan et al. 2025, Thought anchors (arXiv 2506.19143), there on sentences of written chains. No numbers were
published on latents, so --legacy only changes prompts.

Runs as `codi anchors` or `python -m experiments.latents.anchors`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from codi import Intervention, Prefill
from codi.decode import decode_answers
from codi.forced import divergence, forced
from codi.rope import rotate, unrotate
from experiments.figures.series import baseline, from_zero
from experiments.figures.style import legend
from experiments.latents.claims import claimed_latents
from experiments.statistics import effects
from experiments.study.claims import Claim, ClaimsTable, judge
from experiments.study.shared import (
    Result,
    StudyOptions,
    Thoughts,
    answer_table,
    compare,
    draw_matrix,
    draw_series,
    effect_claim,
    interval,
    levels,
    load_model,
    load_prompts,
    new_figure,
    open_study,
    p_text,
    row_of,
    stderr,
    think,
)
from experiments.tasks import Problem
from experiments.tasks.split import Split
from steering.directions import generator
from steering.replacements import HideSlots, ReplaceRows

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Config", "main", "receiver_heads", "resampling", "run", "suppression"]

KINDS = (
    ("vector", "unmatched"),
    ("vector", "matched"),
    ("vector", "noise"),
    ("slot", "unmatched"),
    ("slot", "matched"),
)


@dataclass(frozen=True)
class Config(StudyOptions):
    """Thought anchors: resample a latent, suppress attention, see what changes."""

    out: Path = Path("runs/anchors")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    limit: int | None = 160
    """Number of evaluation prompts (a seeded choice); None: all."""
    draws: int = 3
    """Donors per prompt and latent, and draws of noise and of random prompt positions."""
    shuffles: int = 1000
    """Shuffles behind the p-values of receiver heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffles < 20:
            raise ValueError(f"shuffles must be at least 20, got {self.shuffles}")


def _key(problem: Problem) -> tuple[float, int]:
    return problem.intermediates[0], problem.numbers[2]


@torch.no_grad()
def _measured(
    model: CodiModel,
    thoughts: Thoughts,
    prompt: Tensor,
    edits: Callable[[Tensor, Prefill], Sequence[Intervention]],
    config: Config,
) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Answers, KL (row,), relative change of h_1..h_n (row, latent), and the unedited answers of all prompts."""
    plain = decode_answers(model, thoughts.run, config.max_new_tokens)
    states = thoughts.run.states[:, 1:].float()
    spread = (states - states.mean(0)).norm(dim=-1).square().mean(0).sqrt().clamp_min(1e-6)  # (latent,)
    texts, kl, change = [], [], []
    for start in range(0, len(prompt), config.batch_size):
        rows = torch.arange(start, min(start + config.batch_size, len(prompt)))
        here = prompt[rows]
        prefill = thoughts.prefill.select(here)
        interventions = list(edits(rows, prefill))
        edited = model.rollout(prefill, model.n_latents, interventions, keep=("cache",))
        texts += decode_answers(model, edited, config.max_new_tokens, interventions=interventions).texts
        tokens = [plain.tokens[int(i)] for i in here]
        before, there, _, _ = forced(model, thoughts.run.select(here), tokens)
        after, _, _, _ = forced(model, edited, tokens, interventions)
        kl.append(divergence(before, after, there).cpu().numpy())
        moved = (edited.states[:, 1:].float() - states[here.to(states.device)]).norm(dim=-1) / spread
        change.append(moved.cpu().numpy())
    return texts, np.concatenate(kl), np.concatenate(change), plain.texts


def resampling(model: CodiModel, thoughts: Thoughts, derivation: Sequence[Problem], config: Config) -> pd.DataFrame:
    """Trial table of resampled latents: conditions "<level> <kind> <latent>" and "none", with `kl` and `flip`."""
    n, depth = model.n_latents, model.n_layers
    rng = generator(config.seed, "anchors", "donors")
    pools: dict[tuple[float, int], list[int]] = defaultdict(list)
    for row, problem in enumerate(derivation):
        pools[_key(problem)].append(row)
    keys = sorted(pools)
    wanted: list[int] = []
    columns: dict[str, list[Any]] = defaultdict(list)
    prompt: list[int] = []
    for i, problem in enumerate(thoughts.problems):
        others = [key for key in keys if key[0] != problem.intermediates[0] and key[1] != problem.numbers[2]]
        same = [row for row in pools.get(_key(problem), []) if derivation[row].prompt_id != problem.prompt_id]
        if not same or not others:
            continue
        prompt.append(i)
        for name, entry in (("condition", "none"), ("level", ""), ("kind", "none"), ("latent", 0), ("draw", 0)):
            columns[name].append(entry)
        wanted.append(-1)
        for draw in range(config.draws):
            pool = pools[others[int(rng.integers(len(others)))]]
            donors = {"unmatched": pool[int(rng.integers(len(pool)))], "matched": same[int(rng.integers(len(same)))]}
            for level, kind in KINDS:
                for k in range(1, n + 1):
                    prompt.append(i)
                    wanted.append(donors.get(kind, -1))
                    for name, entry in (
                        ("condition", f"{level} {kind} {k}"), ("level", level), ("kind", kind), ("latent", k),
                        ("draw", draw),
                    ):  # fmt: skip
                        columns[name].append(entry)
    if not prompt:
        raise ValueError("no evaluation prompt shares (step 1, Z) with a derivation prompt: use more prompts")
    used = sorted({row for row in wanted if row >= 0})
    at = {row: place for place, row in enumerate(used)}
    banks = [
        think(model, [derivation[row] for row in used[start : start + 128]], keep=("embeddings", "keys", "values"))
        for start in range(0, len(used), 128)
    ]
    given = {name: torch.cat([getattr(b.run, name) for b in banks]) for name in ("embeddings", "keys", "values")}
    positions = torch.cat([bank.run.latent_positions for bank in banks])
    content = unrotate(given["keys"], positions[:, :, None, None], model)
    mean, spread = given["embeddings"].mean(0), given["embeddings"].std(0, correction=0)  # (latent, d_model)
    noise = torch.stack([
        torch.from_numpy(generator(config.seed, "anchors", "noise", draw).standard_normal(tuple(mean.shape)))
        for draw in range(config.draws)
    ]).to(mean)  # fmt: skip
    donor = torch.tensor([at.get(row, 0) for row in wanted])
    latent, draw_of = torch.tensor(columns["latent"]), torch.tensor(columns["draw"])
    code = torch.tensor([KINDS.index(pair) if pair in KINDS else -1 for pair in zip(
        columns["level"], columns["kind"], strict=True)])  # fmt: skip

    def edits(rows: Tensor, prefill: Prefill) -> Sequence[Intervention]:
        values: dict[Any, Any] = {}
        d = donor[rows].to(model.device)
        for k in range(1, n + 1):
            here = latent[rows] == k
            vector, slot = here & (code[rows] >= 0) & (code[rows] <= 2), here & (code[rows] >= 3)
            is_noise = (code[rows] == 2).to(model.device)[:, None]
            random = mean[k - 1] + spread[k - 1] * noise[draw_of[rows].to(model.device), k - 1]
            values["embedding", k, 0] = (vector, torch.where(is_noise, random, given["embeddings"][d, k - 1]))
            for layer in range(1, depth + 1):
                turned = rotate(content[d, k - 1, layer - 1], (prefill.next_position + k - 1)[:, None], model)
                values["keys", k, layer] = (slot, turned)
                values["values", k, layer] = (slot, given["values"][d, k - 1, layer - 1])
        return [ReplaceRows(values)]

    rows = torch.tensor(prompt)
    texts, kl, _, plain = _measured(model, thoughts, rows, edits, config)
    flips = [text != plain[i] for text, i in zip(texts, prompt, strict=True)]
    return answer_table(thoughts.problems, prompt, texts, **columns).assign(kl=kl, flip=flips)


def suppression(model: CodiModel, thoughts: Thoughts, config: Config) -> pd.DataFrame:
    """Trial table of hidden slots: conditions "<source> > <reader>" and "none", with `kl`, `flip` and `change`.

    Sources: latents 1..n, "prompt" (all of it), "question" (all but its first token and the protocol's), "position"
    (one random prompt position, the control); readers: later latents, "answer", "all" (every later reader). `change` is
    that of the reader's own state (NaN for the answer).
    """
    n = model.n_latents
    width = thoughts.prefill.attention_mask.shape[1]
    readers = [*range(1, n + 1), n + 1]
    tried: list[tuple[str, int, int, int]] = [("none", -1, 0, 0)]
    for reader in readers:
        name = "answer" if reader == n + 1 else str(reader)
        tried += [(f"{k} > {name}", width + k - 1, reader, 0) for k in range(1, n + 1) if k < reader]
        tried += [(f"prompt > {name}", -2, reader, 0), (f"question > {name}", -3, reader, 0)]
        tried += [(f"position > {name}", -4, reader, draw) for draw in range(config.draws)]
    tried += [(f"{k} > all", width + k - 1, 0, 0) for k in range(1, n + 1)]
    tried += [("position > all", -4, 0, draw) for draw in range(config.draws)]
    m, size = len(tried), len(thoughts)
    prompt = torch.arange(size).repeat_interleave(m)
    column = torch.tensor([one[1] for one in tried]).repeat(size)
    reader_of = torch.tensor([one[2] for one in tried]).repeat(size)
    rng = generator(config.seed, "anchors", "positions")
    lengths = thoughts.prefill.prompt_lengths.cpu().numpy()
    random = torch.from_numpy(width - 1 - rng.integers(1, lengths[prompt.numpy()]))  # never the last prompt position
    column = torch.where(column == -4, random, column)

    starts = width - torch.from_numpy(lengths)[prompt] + 1
    question = torch.stack((starts, torch.full_like(starts, width - len(model.protocol.before_latents))), dim=1)

    def edits(rows: Tensor, prefill: Prefill) -> Sequence[Intervention]:
        return [HideSlots(column[rows], reader_of[rows], width, question[rows])]

    texts, kl, change, plain = _measured(model, thoughts, prompt, edits, config)
    flips = [text != plain[int(i)] for text, i in zip(texts, prompt, strict=True)]
    own = np.array([
        change[row, reader - 1] if 1 <= reader <= n else np.nan for row, reader in enumerate(reader_of.tolist())
    ])  # fmt: skip
    names = [one[0] for one in tried] * size
    return answer_table(
        thoughts.problems,
        prompt,
        texts,
        condition=names,
        source=[name.split(" > ")[0] for name in names],
        reader=[name.split(" > ")[-1] for name in names],
        draw=[one[3] for one in tried] * size,
    ).assign(kl=kl, flip=flips, change=own)


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
        (latent with the largest share), score, null (mean score of shuffles), p, q (Benjamini-Hochberg over heads).
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
    return table.assign(q=multipletests(table["p"], method="fdr_bh")[1])


def _attention(model: CodiModel, thoughts: Thoughts, batch_size: int) -> np.ndarray:
    """(prompt, layer, head, latent) attention of the end-of-thought token to the latents' slots."""
    parts = []
    width = thoughts.run.prompt_width
    for start in range(0, len(thoughts), batch_size):
        run = thoughts.run.select(range(start, min(start + batch_size, len(thoughts))))
        _, _, _, weights = forced(model, run, [[] for _ in range(len(run))], attentions=True)
        assert weights is not None
        parts.append(weights[..., width : width + run.n_latents].float().cpu().numpy())
    return np.concatenate(parts)


def run(config: Config, model: CodiModel, split: Split, say: Callable[[str], None] | None = None) -> Result:
    """The study on a loaded model (with eager attention): trials, tables, figures, claims and summary."""
    if model.attention != "eager":
        raise ValueError(f"receiver heads need a model loaded with attention='eager', got {model.attention!r}")
    lacking = [p for p in (*split.evaluation, *split.derivation) if len(p.numbers) < 3 or not p.intermediates]
    if lacking:
        raise ValueError(f"anchors need prompts with three numbers and known steps, {lacking[0].prompt_id!r} has not")
    n, settings = model.n_latents, config.settings
    with open_study("anchors", config, model, split, say) as study:
        held: list[Thoughts] = []

        def thoughts() -> Thoughts:
            if not held:
                held.append(think(model, split.evaluation, keep=("embeddings", "cache")))
            return held[0]

        resampled = study.part("resampling", lambda: resampling(model, thoughts(), split.derivation, config))
        hidden = study.part("suppression", lambda: suppression(model, thoughts(), config))
        heads = study.part(
            "heads",
            lambda: receiver_heads(
                _attention(model, thoughts(), config.batch_size), config.shuffles, generator(config.seed, "heads")
            ),
        )
        tables = {"heads": heads}
        pairs = [
            (f"{level} unmatched {k}", f"{level} matched {k}") for level in ("vector", "slot") for k in range(1, n + 1)
        ]
        pairs += [(f"vector noise {k}", f"vector matched {k}") for k in range(1, n + 1)]
        for outcome in ("kl", "flip"):
            tables[f"resampled_{outcome}"] = levels(resampled, outcome, settings)
            tables[f"importance_{outcome}"] = compare(resampled, pairs, outcome, settings)
            tables[f"hidden_{outcome}"] = levels(hidden, outcome, settings)
            edges = [name for name in hidden["condition"].unique() if not name.startswith(("none", "position"))]
            contrasts = [(name, f"position > {name.split(' > ')[1]}") for name in edges]
            tables[f"edges_{outcome}"] = compare(hidden, contrasts, outcome, settings)
        if n >= 5:
            tables["claimed_latents"] = claimed_latents(
                resampled,
                lambda k: ({"condition": f"vector unmatched {k}"}, {"condition": f"vector matched {k}"}),
                n,
                "flip",
                settings,
            )
        to_latents = hidden[hidden["change"].notna()]
        contrasts = [
            (name, f"position > {name.split(' > ')[1]}")
            for name in to_latents["condition"].unique()
            if not name.startswith("position")
        ]
        tables["edges_change"] = compare(to_latents, contrasts, "change", settings)
        for name, table in tables.items():
            study.table(name, table)
        study.draw(lambda: figures(tables, n))
        claims = published_claims(tables, n)
        text = study.finish(f"Thought anchors on latents: {model.name}", words(tables, n), claims)
        return Result(study.path, tables, claims, text)


def published_claims(tables: dict[str, pd.DataFrame], n: int) -> ClaimsTable:
    """C3 and C4 as resampling sees them."""
    claims = ClaimsTable()
    text = "a latent of another key changes the answer at latents 3 and 5 only"
    rule = "flips (other key − same key) at latents 3 and 5, minus the other latents, are above 0"
    if n < 5:
        claims.add(Claim("C3 (resampled)", text, rule, "not testable", note=f"this model has {n} latents"))
    else:
        each = [row_of(tables["importance_flip"], f"vector unmatched {k}") for k in range(1, n + 1)]
        note = "points per latent: " + ", ".join(interval(row, "difference") for row in each)
        row = effects.row_of(tables["claimed_latents"], {"claimed": True})
        verdict = judge(row["lower"], row["upper"], above=0.0)
        claims.add(effect_claim("C3 (resampled)", text, rule, verdict, row, note))
    for k in (n - 1, n):
        row = row_of(tables["resampled_flip"], f"vector noise {k}")
        text = "a random vector in one of the last two latents does no harm"
        verdict = judge(row["lower"], row["upper"], below=0.05)
        claims.add(
            effect_claim(f"C4 (noise {k})", text, "share of changed answers is below 0.05", verdict, row, of="mean")
        )
    return claims


def words(tables: dict[str, pd.DataFrame], n: int) -> list[str]:
    """The summary, paragraph by paragraph."""
    kl, flip, level = tables["importance_kl"], tables["importance_flip"], tables["resampled_kl"]
    first = row_of(kl, "vector unmatched 1")
    lines = [
        f"{int(first['n'])} prompts in {int(first['n_clusters'])} clusters; KL in nats, flips in points; 95 % "
        "intervals over clusters, * q < 0.05.",
        "",
        "**Importance** (resampled from another key, minus from the same key):",
        "",
        "| latent | KL, vector | flips, vector | KL, slot | flips, slot | KL of same key / of noise (vector) |",
        "|---|---|---|---|---|---|",
    ]
    for k in range(1, n + 1):
        cells = []
        for what in ("vector", "slot"):
            row = row_of(kl, f"{what} unmatched {k}")
            cells.append(interval(row, "difference", 1, 3) + ("*" if row["q"] < 0.05 else ""))
            row = row_of(flip, f"{what} unmatched {k}")
            cells.append(interval(row, "difference") + ("*" if row["q"] < 0.05 else ""))
        same, noise = (row_of(level, f"vector {kind} {k}")["mean"] for kind in ("matched", "noise"))
        lines.append(f"| {k} | " + " | ".join(cells) + f" | {same:.3f} / {noise:.3f} |")
    texts = ["\n".join(lines)]
    anchors = {}
    for what in ("vector", "slot"):
        part = kl[kl["condition"].str.startswith(f"{what} unmatched")]
        anchors[what] = [
            int(name.split()[-1]) for name in part["condition"][(part["q"] < 0.05) & (part["difference"] > 0)]
        ]
    texts.append(
        "**Anchors** (importance by KL survives correction): "
        + "; ".join(f"{what}: {', '.join(map(str, found)) or 'none'}" for what, found in anchors.items())
        + "."
    )
    edges = tables["edges_kl"]
    strong = edges[(edges["q"] < 0.05) & (edges["difference"] > 0)].sort_values("difference", ascending=False)
    latent_edges = strong[~strong["condition"].str.startswith(("prompt", "question"))]
    named = [f"{r['condition']}: {interval(r, 'difference', 1, 3)}" for _, r in latent_edges.head(8).iterrows()]
    texts.append(
        "**Dependencies** (source > reader; KL at the answer when the edge is cut, minus a random prompt position): "
        + (
            "; ".join(named)
            if named
            else "no edge between latents, or from a latent to the answer, survives correction"
        )
        + "."
    )
    shown = []
    for source in ("prompt", "question"):
        row, moved = (row_of(tables[f"edges_{what}"], f"{source} > answer") for what in ("kl", "flip"))
        shown.append(
            f"the whole {source}: KL {interval(row, 'difference', 1, 3)} ({p_text(row['p'])}), flips "
            f"{interval(moved, 'difference')} points"
        )
    texts.append(
        "**Does the answer read the prompt?** Hidden from the answer, against one random position: "
        + "; ".join(shown)
        + ' ("question": without the first token and the protocol\'s tokens, on which attention may rest).'
    )
    heads = tables["heads"]
    found = heads[heads["q"] < 0.05].sort_values("score", ascending=False)
    text = f"**Receiver heads** (end-of-thought token): {len(found)} of {len(heads)} heads look at the same latents in "
    text += (
        f"every prompt (q < 0.05); {int((found['effective'] < n / 2).sum())} of them spread over fewer than {n / 2:g} "
        "latents"
    )
    if len(found):
        named = []
        for _, head in found.head(4).iterrows():
            share = head[f"share_{int(head['top'])}"]
            named.append(
                f"layer {head['layer']:.0f} head {head['head']:.0f} → latent {head['top']:.0f} ({100 * share:.0f} % of "
                f"its attention to latents, which is {head['mass']:.2f} of all)"
            )
        text += "; the clearest: " + ", ".join(named)
    texts.append(text + ".")
    return texts


def figures(tables: dict[str, pd.DataFrame], n: int) -> dict[str, Any]:
    """Figures by file name."""
    latents = list(range(1, n + 1))
    figure, axes = new_figure(1, 3, height=2.6)
    names = {
        "vector unmatched": "vector, other key",
        "vector matched": "vector, same key",
        "vector noise": "vector, noise",
        "slot unmatched": "slot, other key",
        "slot matched": "slot, same key",
    }
    for axis, outcome, scale, label in ((axes[0, 0], "kl", 1, "KL (nats)"), (axes[0, 1], "flip", 100, "flips (%)")):
        table = tables[f"resampled_{outcome}"].set_index("condition")
        for place, (name, text) in enumerate(names.items()):
            rows = table.loc[[f"{name} {k}" for k in latents]]
            draw_series(axis, latents, rows, text, place, scale=scale, control=not name.endswith("unmatched"))
        axis.set(xlabel="resampled latent", ylabel=label, title=f"Effect on the answer: {label}", xticks=latents)
        from_zero(axis)
    legend(figure, axes[0, :1])
    table = tables["importance_kl"].set_index("condition")
    baseline(axes[0, 2])
    for place, what in ((0, "vector"), (3, "slot")):
        rows = table.loc[[f"{what} unmatched {k}" for k in latents]]
        draw_series(axes[0, 2], latents, rows, what, place, name="difference", scale=1)
    axes[0, 2].set(xlabel="resampled latent", ylabel="KL (nats)", title="Importance: other − same key", xticks=latents)
    found = {"importance": figure}

    figure, axes = new_figure(1, 2, height=2.9)
    sources = ["prompt", "question", *map(str, latents)]
    readers = [*map(str, latents), "answer"]
    for axis, name, scale, form, title in (
        (axes[0, 0], "edges_kl", 1, ".2f", "KL of the answer (nats)"),
        (axes[0, 1], "edges_change", 100, ".0f", "Change of the reader's state (% of spread)"),
    ):
        table = tables[name].set_index("condition")
        used = readers if name == "edges_kl" else readers[:-1]
        values = np.array([[scale * table["mean"].get(f"{s} > {r}", np.nan) for r in used] for s in sources])
        strong = np.array([
            [table["q"].get(f"{s} > {r}", 1.0) < 0.05 and table["difference"].get(f"{s} > {r}", 0.0) > 0 for r in used]
            for s in sources
        ])  # fmt: skip
        draw_matrix(axis, values, sources, used, title, form=form, significant=strong)
        axis.set(xlabel="reader", ylabel="hidden from it")
    found["dependencies"] = figure

    heads = tables["heads"]
    shares = heads[[f"share_{k}" for k in latents]].to_numpy() * 100
    names_of = [f"{row['layer']:.0f}.{row['head']:.0f} ({row['mass']:.2f})" for _, row in heads.iterrows()]
    keep = np.argsort(-heads["mass"].to_numpy())[:32]
    keep = np.sort(keep)
    figure, axes = new_figure(1, 1, height=0.9 + 0.19 * len(keep))
    strong = np.repeat((heads["q"].to_numpy() < 0.05)[keep, None], n, axis=1)
    strong &= shares[keep] == shares[keep].max(1, keepdims=True)
    draw_matrix(
        axes[0, 0], shares[keep], [names_of[i] for i in keep], list(map(str, latents)),
        "Attention of the end-of-thought token: share of each latent (%)", significant=strong,
    )  # fmt: skip
    axes[0, 0].set(xlabel="latent", ylabel="layer.head (attention to latents)")
    found["heads"] = figure
    return found


def main(config: Config) -> None:
    """Load, run, print the summary."""
    load_prompts(config, known_steps=3)
    model = load_model(config, attention="eager")
    split = load_prompts(config, model.protocol.question_suffix, known_steps=3)
    print(run(config, model, split, stderr).text)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
