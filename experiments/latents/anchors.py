"""`codi anchors`: thought anchors on latents: which latent the answer hangs on, and who reads whom.

Counterfactual importance. Latent k is resampled and the rest recomputed: its vector z_k ("vector": latent k and
everything after it see the change) or its cache slot ("slot": only later readers see it) becomes that of a derivation
prompt with another key ("unmatched"; key: step 1 and Z of template problems, all values of others), with the same key
("matched", the control: nothing that the answer depends on has changed), or per-coordinate Gaussian noise ("noise",
vectors only). Measured at the answer, against the unedited run:
    KL    divergence of the answer's distribution, in nats, along the unedited answer (see `codi.divergence`)
    flip  whether the greedy answer is another one
Importance = unmatched minus matched, paired.

Dependencies. Attention from one reader (a later latent, or the whole answer) to one latent's slot is suppressed.
Measured at the answer (KL, flips) and at the reader (change of h_j, relative to how far h_j lies from its mean over
prompts). Control: one random prompt position is hidden from the same reader instead.

Receiver heads. Attention of the end-of-thought token to the latents, per head. A head is a receiver if the same latents
get its attention in every prompt: variance over latents of the mean share, against shares shuffled within each prompt.

Source: Bogdan et al. 2025, Thought anchors (arXiv 2506.19143), there on sentences of written chains.

Trials: `resampling`, `suppression`, `heads` (anchors_measures.py). Runs as `codi anchors` or
`python -m experiments.latents.anchors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from experiments.latents.anchors_figures import figures
from experiments.latents.anchors_measures import (
    EDGE,
    HIDDEN,
    RESAMPLED,
    RESAMPLED_BY,
    edge,
    heads,
    heads_schema,
    hidden_latent,
    receivers,
    resampled_at,
    resampling,
    suppression,
)
from experiments.latents.claims import CLAIMED, STAR, claimed_latents, sizes_table
from experiments.latents.donors import check_known
from experiments.latents.options import AnchorsOptions
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Selector, differences, levels, per_prompt, reach, row_of, weighed
from experiments.statistics.sizes import Smallest
from experiments.statistics.words import interval, p_text
from experiments.study.claims import ClaimsTable
from experiments.study.limits import least_flips
from experiments.study.parts import Part
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.study.verdicts import Question, judged_together
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "main", "run"]

LEVELS = ("vector", "slot")
RANGE = {"kl": (0.0, math.inf), "flip": (0.0, 1.0), "change": (0.0, math.inf)}
HARM = 0.05
"""A share of changed answers below this (five points) counts as no harm."""


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    n_latents: int
    draws: int
    shuffles: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings


def make_plan(options: AnchorsOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: a model that gives no attention weights, or prompts whose numbers and steps are not known.
    """
    if model.attention != "eager":
        raise ValueError(f"receiver heads need a model loaded with attention='eager', got {model.attention!r}")
    check_known("anchors", prompts)
    return Plan(
        n_latents=model.n_latents,
        draws=options.draws,
        shuffles=options.shuffles,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
    )


def parts(plan: Plan) -> list[Part]:
    """Three tables of one part each."""
    how = {"draws": plan.draws, "max_new_tokens": plan.max_new_tokens, "batch_size": plan.batch_size}
    seen = {"shuffles": plan.shuffles, "batch_size": plan.batch_size}
    return [
        Part("resampling", resampling, how, plan.seed, RESAMPLED),
        Part("suppression", suppression, how, plan.seed, HIDDEN),
        Part("heads", heads, seen, plan.seed, heads_schema(plan.n_latents)),
    ]


# --- Tables -----------------------------------------------------------------------------------------------------------


def _cut(n: int) -> list[tuple[Selector, Selector]]:
    """Every edge against a random prompt position hidden from the same reader."""
    pairs: list[tuple[Selector, Selector]] = []
    for reader in (*range(1, n + 1), "answer"):
        earlier = range(1, reader if isinstance(reader, int) else n + 1)
        cut = [*(hidden_latent(k, reader) for k in earlier), edge("prompt", reader), edge("question", reader)]
        pairs += [(one, edge("position", reader)) for one in cut]
    return pairs + [(hidden_latent(k, "all"), edge("position", "all")) for k in range(1, n + 1)]


def tables_of(plan: Plan, trials: Trials) -> dict[str, pd.DataFrame]:
    """Every table of the study."""
    n, settings = plan.n_latents, plan.settings
    resampled, hidden = trials["resampling"], trials["suppression"]
    tables, sizes = {"heads": trials["heads"]}, dict[str, Smallest]()
    important = [
        (resampled_at(level, "unmatched", k), resampled_at(level, "matched", k))
        for level in LEVELS
        for k in range(1, n + 1)
    ]
    noise = [(resampled_at("vector", "noise", k), resampled_at("vector", "matched", k)) for k in range(1, n + 1)]
    of_latents = [(one, reference) for one, reference in _cut(n) if one["hidden"] == "latent"]
    for outcome in ("kl", "flip"):
        span, name = RANGE[outcome], f"importance_{outcome}"
        tables[f"resampled_{outcome}"] = levels(resampled, RESAMPLED_BY, outcome, settings, span)
        tables[name], sizes[name] = weighed(
            resampled, [*important, *noise], RESAMPLED_BY, outcome, settings, span, of=important
        )
        name = f"edges_{outcome}"
        tables[f"hidden_{outcome}"] = levels(hidden, EDGE, outcome, settings, span)
        tables[name], sizes[name] = weighed(hidden, _cut(n), EDGE, outcome, settings, span, of=of_latents)
    if n >= max(CLAIMED):
        tables["claimed_latents"] = claimed_latents(
            resampled,
            lambda k: (resampled_at("vector", "unmatched", k), resampled_at("vector", "matched", k)),
            n,
            "flip",
            settings,
        )
    at_latents = [(one, reference) for one, reference in _cut(n) if one["reader"] == "latent"]
    tables["edges_change"], sizes["edges_change"] = weighed(
        hidden[hidden["change"].notna()], at_latents, EDGE, "change", settings, RANGE["change"]
    )
    return tables | {"sizes": sizes_table(sizes)}


# --- What they say ----------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    tables, n = tables_of(plan, trials), plan.n_latents
    over = f"{100 * plan.settings.level:g} % intervals over clusters"
    captions = {
        "importance": f"What resampling each latent does to the answer, and importance (other minus same key); {over}.",
        "dependencies": "What hiding each source from each reader does to the answer and to the reader's own state. ○: "
        "more than hiding a random prompt position does (q < 0.05), and beyond the size that matters.",
        "heads": "Which latents each head of the end-of-thought token looks at, the heads with the most attention to "
        "latents. ○: the most, of a head that prefers the same latents in every prompt (q < 0.05) by more than the "
        "wording makes of it.",
    }
    resampled = trials["resampling"]
    unedited = resampled[resampled["kind"] == "none"]
    seen = least_flips(unedited, len(tables["importance_flip"]), plan.settings)
    return Findings(
        words(plan, tables, seen), tables, lambda: figures(tables, n), captions, claims_of(plan, tables, resampled)
    )


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame], resampled: pd.DataFrame) -> ClaimsTable:
    """C3 and C4 as resampling sees them, judged together."""
    n, latents = plan.n_latents, range(1, plan.n_latents + 1)
    pairs = [(resampled_at("vector", "unmatched", k), resampled_at("vector", "matched", k)) for k in latents]
    change = differences(resampled, pairs, RESAMPLED_BY, "flip").set_axis(latents, axis=1)
    claimed, others = [k for k in latents if k in CLAIMED], [k for k in latents if k not in CLAIMED]
    each = [row_of(tables["importance_flip"], pair[0], pair[1]) for pair in pairs]
    blocked = f"this model has {n} latents" if n < max(CLAIMED) else ""
    questions = [
        Question(
            "C3 (resampled)",
            "a latent of another key changes the answer at latents 3 and 5 only",
            "flips (other key − same key) at latents 3 and 5, minus the other latents, are above 0",
            (change[claimed].mean(axis=1) - change[others].mean(axis=1)).to_numpy(),
            above=0.0,
            bounds=(-2, 2),
            blocked=blocked,
            note="" if blocked else "points per latent: " + ", ".join(interval(row, "difference") for row in each),
        )
    ]
    flips = per_prompt(resampled, [resampled_at("vector", "noise", k) for k in latents], RESAMPLED_BY, "flip")
    flips = flips.reindex(change.index).set_axis(latents, axis=1)
    questions += [
        Question(
            f"C4 (noise {k})",
            "a random vector in one of the last two latents does no harm",
            f"share of changed answers is below {HARM}",
            flips[k].to_numpy(),
            absent=HARM,
            side="above",
            bounds=(0, 1),
        )
        for k in latents[-2:]
    ]
    clusters = change.index.get_level_values("cluster").to_numpy()
    return ClaimsTable(judged_together(questions, clusters, plan.settings))


def words(plan: Plan, tables: Mapping[str, pd.DataFrame], seen: str) -> list[Section]:
    """The summary, section by section; `seen` says which change of the answers could be told from none."""
    n, kl = plan.n_latents, tables["importance_kl"]
    first = row_of(kl, resampled_at("vector", "unmatched", 1))
    anchors = {}
    for level in LEVELS:
        part = kl[(kl["level"] == level) & (kl["kind"] == "unmatched")]
        anchors[level] = part["latent"][part["matters"] & (part["difference"] > 0)].tolist()
    listed = "; ".join(f"{level}: {', '.join(map(str, found)) or 'none'}" for level, found in anchors.items())
    nulls = kl[(kl["kind"] == "unmatched") & ~kl["matters"]]
    least = f" At the others {_most(nulls):.3f} nats could have been told from none." if len(nulls) else ""
    return [
        Section(
            f"{int(first['n'])} prompts in {int(first['n_clusters'])} clusters; KL in nats, flips in points; "
            f"{100 * plan.settings.level:g} % intervals over clusters. {seen}"
        ),
        Section(_importance(tables, n), "Importance"),
        Section(
            f"Importance by KL survives correction and is beyond the size that matters: {listed}.{least}", "Anchors"
        ),
        Section(_dependencies(tables), "Dependencies"),
        Section(_prompt_read(tables), "Does the answer read the prompt?"),
        Section(_receivers(tables["heads"], n), "Receiver heads"),
    ]


def _importance(tables: Mapping[str, pd.DataFrame], n: int) -> str:
    """Importance of each latent."""
    kl, flip, level_of = tables["importance_kl"], tables["importance_flip"], tables["resampled_kl"]
    sizes = {name: row_of(tables["sizes"], {"table": f"importance_{name}"}) for name in ("kl", "flip")}
    lines = [
        f"Resampled from another key, minus from the same key. {STAR}: {sizes['kl']['size']:.3f} nats "
        f"({sizes['kl']['words']}), {100 * sizes['flip']['size']:.1f} points ({sizes['flip']['words']}).",
        "",
        "| latent | KL, vector | flips, vector | KL, slot | flips, slot | KL of same key / of noise (vector) |",
        "|---|---|---|---|---|---|",
    ]
    for k in range(1, n + 1):
        cells = []
        for level in LEVELS:
            row = row_of(kl, resampled_at(level, "unmatched", k))
            cells.append(interval(row, "difference", 1, 3) + ("*" if row["matters"] else ""))
            row = row_of(flip, resampled_at(level, "unmatched", k))
            cells.append(interval(row, "difference") + ("*" if row["matters"] else ""))
        same, noise = (row_of(level_of, resampled_at("vector", kind, k))["mean"] for kind in ("matched", "noise"))
        lines.append(f"| {k} | " + " | ".join(cells) + f" | {same:.3f} / {noise:.3f} |")
    return "\n".join(lines)


def _most(table: pd.DataFrame) -> float:
    """What could have been told from none in every row."""
    return max((reach(row) for _, row in table.iterrows()), default=math.nan)


def _edge_name(row: Mapping[str, object] | pd.Series) -> str:
    """An edge in words."""
    source = row["source"] if row["hidden"] == "latent" else row["hidden"]
    return f"{source} > {row['target'] if row['reader'] == 'latent' else row['reader']}"


def _dependencies(tables: Mapping[str, pd.DataFrame]) -> str:
    """The strongest edges from latents."""
    edges, size = tables["edges_kl"], row_of(tables["sizes"], {"table": "edges_kl"})
    of_latents = edges[edges["hidden"] == "latent"]
    strong = of_latents[of_latents["matters"] & (of_latents["difference"] > 0)]
    strong = strong.sort_values("difference", ascending=False)
    named = [f"{_edge_name(row)}: {interval(row, 'difference', 1, 3)}" for _, row in strong.head(8).iterrows()]
    return (
        f"Source > reader; KL at the answer when the edge is cut, minus a random prompt position; beyond "
        f"{size['size']:.3f} nats ({size['words']}) and q < 0.05: "
        + (
            "; ".join(named)
            if named
            else "no edge between latents, or from a latent to the answer; "
            f"{_most(of_latents):.3f} nats could have been told from none at every one"
        )
        + "."
    )


def _prompt_read(tables: Mapping[str, pd.DataFrame]) -> str:
    """What the answer does when the prompt is hidden from it."""
    shown = []
    for source in ("prompt", "question"):
        row, moved = (row_of(tables[f"edges_{what}"], edge(source, "answer")) for what in ("kl", "flip"))
        shown.append(
            f"the whole {source}: KL {interval(row, 'difference', 1, 3)} ({p_text(row['p'])}), flips "
            f"{interval(moved, 'difference')} points"
        )
    return (
        "Hidden from the answer, against one random position: "
        + "; ".join(shown)
        + ' ("question": without the first token and the protocol\'s tokens, on which attention may rest).'
    )


def _receivers(table: pd.DataFrame, n: int) -> str:
    """Heads that look at the same latents in every prompt."""
    found = table[receivers(table)].sort_values("score", ascending=False)
    text = (
        f"{len(found)} of {len(table)} heads of the end-of-thought token look at the same latents in every prompt "
        "(q < 0.05, and shares that differ by more than the wording makes of them); "
        f"{int((found['effective'] < n / 2).sum())} of them spread over fewer than {n / 2:g} latents"
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
    return text + "."


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=AnchorsOptions,
    title="Thought anchors on latents",
    prompts=lambda options, model: options.load_split(
        options.seed, model.protocol.question_suffix, known_steps=1, donors=True
    ),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    attention="eager",
)


run = STUDY.run  # on a model that was loaded with eager attention
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
