"""`codi necessity`: which latents, and which subsets of them, the answer needs.

Three questions, all on the same prompts:
- how many?  accuracy after 0..n latents, beside direct answers (no thought) and answers after a written chain;
- which one?  z_k of one latent, or of latents 1..k, is replaced before it is fed, and the later latents are computed
  on what is left (timing "continue");
- which set?  every one of the 2^n subsets of latents is replaced. The Shapley value of latent k is its share of the
  total loss: the loss from replacing it, averaged over all orders in which the latents could be replaced.

Replacements: the mean of that latent over derivation prompts, zero, and the three published random forms ("scalar":
Gaussian with mean and spread over the coordinates of the mean latent; "coordinate": Gaussian per coordinate over
prompts; "norm": a random direction with the norm of the prompt's own latent). "mean" and "coordinate" are tried on all
subsets.

Trials: `counts` (mode, n_latents) and `replacements` (kind "none" for the unedited run, the set of latents that was
replaced as `replaced`, draw), see necessity_measures.py. Runs as `codi necessity` or
`python -m experiments.latents.necessity`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import factorial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.latents.claims import MARGIN, STAR, number_questions, sizes_table
from experiments.latents.necessity_figures import figures
from experiments.latents.necessity_measures import (
    COUNTS,
    KINDS,
    MODE,
    ON_ALL_SUBSETS,
    REPLACED,
    REPLACEMENTS,
    UNEDITED,
    after,
    counts,
    replaced,
    replacements,
)
from experiments.latents.options import NecessityOptions
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import compare, differences, levels, reach, row_of, weighed
from experiments.statistics.sizes import Smallest
from experiments.statistics.words import interval, p_text
from experiments.study.answers import set_of
from experiments.study.claims import ClaimsTable
from experiments.study.limits import limits
from experiments.study.parts import Part
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.study.verdicts import Question, judged_together, no_room
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "main", "run", "shapley"]

MOST_LATENTS = 8
"""2^8 subsets are the most that are tried."""


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    n_latents: int
    all_subsets: bool
    draws: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings
    asked: str


def make_plan(options: NecessityOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: more subsets of latents than are tried.
    """
    n = model.n_latents
    if options.all_subsets and n > MOST_LATENTS:
        raise ValueError(
            f"2^{n} subsets of latents are too many (at most {MOST_LATENTS} latents): use --no-all-subsets"
        )
    return Plan(
        n_latents=n,
        all_subsets=options.all_subsets,
        draws=options.draws,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
        asked=options.asked,
    )


def parts(plan: Plan) -> list[Part]:
    """Two trial tables of one part each."""
    chosen = {"draws": plan.draws, "all_subsets": plan.all_subsets, "max_new_tokens": plan.max_new_tokens}
    return [
        Part("counts", counts, {"batch_size": plan.batch_size}, plan.seed, COUNTS),
        Part("replacements", replacements, {**chosen, "batch_size": plan.batch_size}, plan.seed, REPLACEMENTS),
    ]


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables_of(plan: Plan, trials: Trials) -> dict[str, pd.DataFrame]:
    """Every table of the study."""
    n, counted, edited = plan.n_latents, trials["counts"], trials["replacements"]
    steps = [(after(k), after(k - 1)) for k in range(1, n + 1)]
    steps += [(after(n), {"mode": mode, "n_latents": -1}) for mode in ("direct", "verbal")]
    conditions = edited.loc[edited["kind"] != "none", [*REPLACED]].drop_duplicates()
    pairs = [(dict(zip(REPLACED, one, strict=True)), UNEDITED) for one in conditions.itertuples(index=False, name=None)]
    single = [(replaced(kind, (k,)), UNEDITED) for kind in KINDS for k in range(1, n + 1)]
    sizes: dict[str, Smallest] = {}
    effects, sizes["effects"] = weighed(edited, pairs, REPLACED, settings=plan.settings, of=single)
    tables = {
        "counts": levels(counted, MODE, settings=plan.settings),
        "steps": compare(counted, steps, MODE, settings=plan.settings),
        "effects": effects,
        "levels": levels(edited, REPLACED, settings=plan.settings),
    }
    if plan.all_subsets:
        tables["shapley"], sizes["shapley"] = shapley_table(edited, n, plan.settings)
    return tables | {"sizes": sizes_table(sizes)}


def shapley(outcomes: pd.DataFrame, n: int) -> pd.DataFrame:
    """Shapley value of every latent for every prompt: its share of the loss from replacing all latents.

    phi_k = sum over subsets S without k of |S|! (n - |S| - 1)! / n! · (right with S replaced - right with S
    and k replaced)

    Args:
        outcomes: (prompt × set of latents that is replaced, 0..2^n - 1), 1 where right (means over draws).
        n: number of latents.

    Returns:
        (prompt × latent 1..n); over latents they sum to (right with nothing replaced - right with all replaced).

    Source: Shapley 1953, A value for n-person games.
    """
    values = {}
    for k in range(1, n + 1):
        total = np.zeros(len(outcomes))
        others = [latent for latent in range(1, n + 1) if latent != k]
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for chosen in itertools.combinations(others, size):
                without = outcomes[set_of(chosen)].to_numpy(float)
                with_k = outcomes[set_of((*chosen, k))].to_numpy(float)
                total += weight * (without - with_k)
        values[k] = total
    return pd.DataFrame(values, index=outcomes.index)


def shapley_table(trials: pd.DataFrame, n: int, settings: Settings) -> tuple[pd.DataFrame, Smallest]:
    """Shapley value of every latent and kind with interval and p against zero, corrected over both; and the size that
    matters."""
    rows: list[pd.DataFrame] = []
    for kind in ON_ALL_SUBSETS:
        mine = trials[trials["kind"].isin([kind, "none"])]
        wide = mine.groupby(["cluster", "prompt_id", "template", "replaced"], sort=True)["correct"].mean().unstack()
        values, names = shapley(wide, n), wide.index.to_frame(index=False)
        rows += [names.assign(kind=kind, latent=k, value=values[k].to_numpy()) for k in range(1, n + 1)]
    zero = rows[0].assign(kind="", latent=0, value=0.0)
    contrasts = [({"kind": kind, "latent": k}, {"kind": ""}) for kind in ON_ALL_SUBSETS for k in range(1, n + 1)]
    long = pd.concat([*rows, zero], ignore_index=True)
    table, size = weighed(long, contrasts, ("kind", "latent"), "value", settings, (-1.0, 1.0))
    kept = ["kind", "latent", "difference", "lower", "upper", "n", "n_clusters", "p", "q", "fwer_p", "matters"]
    return table[kept].rename(columns={"difference": "value"}), size


# --- What they say ----------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    tables = tables_of(plan, trials)
    captions = {"necessity": f"Accuracy after k latents, and with latents replaced; {_intervals(plan)}."}
    if plan.all_subsets:
        captions["subsets"] = (
            "Accuracy with every subset of latents replaced, and each latent's Shapley share of the loss; "
            f"{_intervals(plan)}."
        )
    edited = trials["replacements"]
    first = limits(edited[edited["kind"] == "none"], len(tables["effects"]), plan.settings)
    return Findings(
        words(plan, tables, first),
        tables,
        lambda: figures(tables, plan.n_latents),
        captions,
        claims_of(plan, tables, trials),
    )


def _intervals(plan: Plan) -> str:
    return f"{100 * plan.settings.level:g} % intervals over clusters"


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame], trials: Trials) -> ClaimsTable:
    """C1 and C4, judged together."""
    n, kinds = plan.n_latents, ("coordinate", "scalar", "norm")
    steps = {k: (after(k), after(k - 1)) for k in range(1, n + 1)}
    lasts = {kind: (replaced(kind, (n - 1, n)), UNEDITED) for kind in kinds if n > 2}
    gained = differences(trials["counts"], list(steps.values()), MODE)
    lost = differences(trials["replacements"], list(lasts.values()), REPLACED)
    change = pd.concat([gained, lost], axis=1, keys=["steps", "lasts"])
    questions = number_questions(
        lambda k: change["steps", k - 1].to_numpy(), lambda k: row_of(tables["counts"], after(k))["mean"], n
    )
    base = row_of(tables["levels"], UNEDITED)["mean"]
    for place, kind in enumerate(lasts):
        questions.append(
            Question(
                f"C4 ({kind})",
                "random vectors in the last two latents do no harm",
                f"paired change of accuracy is above −{MARGIN}",
                change["lasts", place].to_numpy(),
                absent=MARGIN,
                side="below",
                bounds=(-1, 1),
                room=(-base, 1 - base),
                blocked=no_room(base, "below", MARGIN),
            )
        )
    return ClaimsTable(judged_together(questions, change.index.get_level_values("cluster").to_numpy(), plan.settings))


def words(plan: Plan, tables: Mapping[str, pd.DataFrame], first: str) -> list[Section]:
    """The summary, section by section; `first` says what the run can see."""
    n, count, effects = plan.n_latents, tables["counts"], tables["effects"]
    size = row_of(tables["sizes"], {"table": "effects"})
    base = row_of(count, after(n))
    modes = {mode: interval(row_of(count, {"mode": mode})) for mode in ("direct", "verbal")}
    found = [
        Section(
            f"{int(base['n'])} prompts of {plan.asked} in {int(base['n_clusters'])} clusters; accuracy and differences "
            f"in per cent and points, with {_intervals(plan)}. {first}".strip()
        ),
        Section(
            "Accuracy after k latents: "
            + "; ".join(f"{k}: {interval(row_of(count, after(k)))}" for k in range(n + 1))
            + f". Direct answer: {modes['direct']}; after a written chain: {modes['verbal']}.",
            "How many",
        ),
    ]
    lines = ["Change of accuracy when one latent is replaced (q: over all replacements tried):", ""]
    lines += ["| latent | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for k in range(1, n + 1):
        cells = []
        for kind in KINDS:
            row = row_of(effects, replaced(kind, (k,)))
            cells.append(interval(row, "difference") + ("*" if row["matters"] else ""))
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    lines.append(f"\n\\{STAR}, {100 * size['size']:.1f} points: {size['words']}.")
    found.append(Section("\n".join(lines), "Which one"))
    if "shapley" in tables:
        found += [Section(_shares(tables, kind, n), f"Which set ({kind})") for kind in ON_ALL_SUBSETS]
        found.append(Section(_sufficient(tables["levels"], n), "What is enough"))
    return found


def _shares(tables: Mapping[str, pd.DataFrame], kind: str, n: int) -> str:
    """How the loss from replacing all latents is shared among them."""
    part = tables["shapley"][tables["shapley"]["kind"] == kind]
    whole = row_of(tables["effects"], replaced(kind, range(1, n + 1)))
    size = row_of(tables["sizes"], {"table": "shapley"})
    needed = part[part["matters"] & (part["value"] > 0)]["latent"].tolist()
    shares = ", ".join(f"{int(r['latent'])}: {interval(r, 'value')}" for _, r in part.iterrows())
    largest = max(reach(r, "value") for _, r in part.iterrows())
    return (
        f"Replacing all latents changes accuracy by {interval(whole, 'difference')} points "
        f"({p_text(whole['p'])}). Shapley share of that loss by latent: {shares}. "
        + (
            f"Latents that the answer needs (q < 0.05, interval beyond {100 * size['size']:.1f} points: "
            f"{size['words']}): {', '.join(map(str, needed))}."
            if needed
            else "No latent has a share that survives correction and is beyond the size that matters, "
            f"{100 * size['size']:.1f} points ({size['words']}); a share of {100 * largest:.1f} points could have been "
            "told from none."
        )
    )


def _sufficient(table: pd.DataFrame, n: int) -> str:
    """Which latents are enough, the others being means; no set is named where several tie."""
    everything = set(range(1, n + 1))
    lines = []
    for size in range(n):
        found = []
        for kept in itertools.combinations(range(1, n + 1), size):
            found.append((kept, row_of(table, replaced("mean", sorted(everything - set(kept))))))
        most = max(row["mean"] for _, row in found)
        best = [(kept, row) for kept, row in found if row["mean"] == most]
        name = f"{{{', '.join(map(str, best[0][0]))}}}" if size else "none"
        if len(best) > 1:
            name = f"{len(best)} of {len(found)} sets of {size} alike"
        lines.append(f"{name}: {interval(best[0][1])}")
    return (
        "Best set to keep, of each size, the other latents replaced by their means (chosen on these prompts, so its "
        "accuracy is optimistic): " + "; ".join(lines) + "."
    )


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=NecessityOptions,
    title="Necessity of latents",
    prompts=lambda options, model: options.load_split(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
