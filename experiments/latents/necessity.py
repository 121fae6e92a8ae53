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
replaced as `replaced`, draw). Runs as `codi necessity` or `python -m experiments.latents.necessity`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from experiments.figures.heatmap import draw_matrix
from experiments.figures.series import baseline, draw_series
from experiments.figures.style import CONTROL, SERIES, legend, new_figure
from experiments.latents.claims import MARGIN, number_claims
from experiments.latents.options import NecessityOptions
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Selector, compare, levels, row_of, rows_of
from experiments.statistics.words import interval, p_text
from experiments.study.answers import answer_table, latents_in, set_of, trial_schema
from experiments.study.claims import ClaimsTable, effect_claim, judge
from experiments.study.modes import evaluate
from experiments.study.parts import Part, Workbench
from experiments.study.result import Result, Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.study.thoughts import derivation_means, evaluation_thoughts
from experiments.tasks.split import Split
from steering.directions import generator, patch_coordinate, patch_norm, patch_scalar
from steering.replacements import replace_embeddings

if TYPE_CHECKING:
    from codi import CodiModel
    from steering.means import LatentMeans

__all__ = ["STUDY", "Plan", "main", "run", "shapley", "subsets"]

KINDS = ("mean", "zero", "coordinate", "scalar", "norm")
FIXED = ("mean", "zero")
"""Kinds without draws."""
ON_ALL_SUBSETS = ("mean", "coordinate")
MOST_LATENTS = 8
"""2^8 subsets are the most that are tried."""

COUNTS = trial_schema(mode=pa.string(), n_latents=pa.int16())
"""mode as in `lm.terms.AnswerMode`; n_latents is -1 outside mode "latent"."""
REPLACEMENTS = trial_schema(kind=pa.string(), replaced=pa.int32(), draw=pa.int32(), applied_norm=pa.float64())
"""kind: one of KINDS, or "none" for the unedited run; replaced: the set of latents."""
MODE = ("mode", "n_latents")
REPLACED = ("kind", "replaced")
UNEDITED: Selector = {"kind": "none", "replaced": 0}


def after(k: int) -> Selector:
    """Answers after k latents."""
    return {"mode": "latent", "n_latents": k}


def replaced(kind: str, chosen: Sequence[int]) -> Selector:
    """Answers with these latents replaced."""
    return {"kind": kind, "replaced": set_of(chosen)} if chosen else UNEDITED


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


def counts(bench: Workbench, *, batch_size: int, seed: int) -> pd.DataFrame:
    """Answers after 0..n latents, direct, and after a written chain."""
    problems = bench.prompts.evaluation
    frame = evaluate(bench.model, problems, max_new_tokens=None, seed=seed, batch_size=batch_size)
    where = {problem.prompt_id: i for i, problem in enumerate(problems)}
    return answer_table(
        problems,
        [where[name] for name in frame["prompt_id"]],
        frame["text"].tolist(),
        mode=frame["mode"].to_numpy(),
        n_latents=frame["n_latents"].to_numpy(),
    )


def subsets(n: int) -> list[tuple[int, ...]]:
    """Every non-empty subset of latents 1..n, small ones first."""
    return [chosen for size in range(1, n + 1) for chosen in itertools.combinations(range(1, n + 1), size)]


def _vectors(means: LatentMeans, n: int, draws: int, seed: int) -> tuple[torch.Tensor, dict[tuple[str, int, int], int]]:
    """Table of replacing vectors and where (kind, latent, draw) is in it."""
    rows: list[torch.Tensor] = []
    place: dict[tuple[str, int, int], int] = {}
    forms = {"scalar": patch_scalar, "coordinate": patch_coordinate, "norm": patch_norm}
    for latent in range(1, n + 1):
        fixed = {"mean": means.embeddings[latent - 1], "zero": torch.zeros_like(means.embeddings[0])}
        for kind, vector in fixed.items():
            place[kind, latent, 0] = len(rows)
            rows.append(vector)
        for kind, form in forms.items():
            for draw in range(draws):
                place[kind, latent, draw] = len(rows)
                drawn = form(means, latent, "embedding", generator(seed, "necessity", kind, latent, draw)).vector
                assert drawn is not None
                rows.append(drawn)
    return torch.stack(rows), place


def _tried(n: int, draws: int, all_subsets: bool) -> list[tuple[str, tuple[int, ...], int]]:
    """(kind, latents, draw) of every replacement, the unedited run first; draw is -1 where nothing is drawn."""
    short = [(k,) for k in range(1, n + 1)] + [tuple(range(1, k + 1)) for k in range(2, n + 1)]
    short += [(n - 1, n)] if n > 2 else []
    tried: list[tuple[str, tuple[int, ...], int]] = [("none", (), -1)]
    for kind in KINDS:
        for chosen in subsets(n) if all_subsets and kind in ON_ALL_SUBSETS else short:
            tried += [(kind, chosen, draw) for draw in ([-1] if kind in FIXED else range(draws))]
    return tried


def replacements(
    bench: Workbench, *, draws: int, all_subsets: bool, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Answers after every replacement, prompt by prompt."""
    model, n = bench.model, bench.model.n_latents
    means = bench.once(derivation_means)
    thoughts = bench.once(evaluation_thoughts, ("embeddings", "cache"))
    run = thoughts.run
    assert run.embeddings is not None
    table, place = _vectors(means, n, draws, seed)
    norms = run.embeddings.float().norm(dim=-1).cpu()  # (prompt, latent)
    tried = _tried(n, draws, all_subsets)
    direction = torch.full((len(tried), n), -1)
    own_norm = torch.zeros(len(tried), n, dtype=torch.bool)
    for row, (kind, chosen, draw) in enumerate(tried):
        for latent in chosen:
            direction[row, latent - 1] = place[kind, latent, max(draw, 0)]
            own_norm[row, latent - 1] = kind == "norm"
    prompts, m = len(thoughts), len(tried)
    directions = direction.repeat(prompts, 1)
    coefficient = torch.where(own_norm.repeat(prompts, 1), norms.repeat_interleave(m, 0), torch.ones(()))
    rows = torch.arange(prompts).repeat_interleave(m)
    answers = replace_embeddings(
        model,
        run,
        table,
        rows,
        torch.arange(1, n + 1).expand(len(rows), n),
        directions,
        coefficient,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return answer_table(
        thoughts.problems,
        rows,
        answers.texts,
        kind=[kind for kind, _, _ in tried] * prompts,
        replaced=[set_of(chosen) for _, chosen, _ in tried] * prompts,
        draw=[draw for _, _, draw in tried] * prompts,
        applied_norm=answers.applied_norm.numpy(),
    )


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables_of(plan: Plan, trials: Trials) -> dict[str, pd.DataFrame]:
    """Every table of the study."""
    n, counted, edited = plan.n_latents, trials["counts"], trials["replacements"]
    steps = [(after(k), after(k - 1)) for k in range(1, n + 1)]
    steps += [(after(n), {"mode": mode, "n_latents": -1}) for mode in ("direct", "verbal")]
    conditions = edited.loc[edited["kind"] != "none", [*REPLACED]].drop_duplicates()
    pairs = [(dict(zip(REPLACED, one, strict=True)), UNEDITED) for one in conditions.itertuples(index=False, name=None)]
    tables = {
        "counts": levels(counted, MODE, settings=plan.settings),
        "steps": compare(counted, steps, MODE, settings=plan.settings),
        "effects": compare(edited, pairs, REPLACED, settings=plan.settings),
        "levels": levels(edited, REPLACED, settings=plan.settings),
    }
    if plan.all_subsets:
        tables["shapley"] = shapley_table(edited, n, plan.settings)
    return tables


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


def shapley_table(trials: pd.DataFrame, n: int, settings: Settings) -> pd.DataFrame:
    """Shapley value of every latent and kind with interval and p against zero, corrected over both."""
    rows: list[pd.DataFrame] = []
    for kind in ON_ALL_SUBSETS:
        mine = trials[trials["kind"].isin([kind, "none"])]
        wide = mine.groupby(["cluster", "prompt_id", "replaced"], sort=True)["correct"].mean().unstack()
        values, names = shapley(wide, n), wide.index.to_frame(index=False)
        rows += [names.assign(kind=kind, latent=k, value=values[k].to_numpy()) for k in range(1, n + 1)]
    zero = rows[0].assign(kind="", latent=0, value=0.0)
    contrasts = [({"kind": kind, "latent": k}, {"kind": ""}) for kind in ON_ALL_SUBSETS for k in range(1, n + 1)]
    long = pd.concat([*rows, zero], ignore_index=True)
    table = compare(long, contrasts, ("kind", "latent"), outcome="value", settings=settings)
    kept = ["kind", "latent", "difference", "lower", "upper", "n", "n_clusters", "p", "q", "fwer_p"]
    return table[kept].rename(columns={"difference": "value"})


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
    return Findings(
        words(plan, tables), tables, lambda: figures(tables, plan.n_latents), captions, claims_of(plan, tables)
    )


def _intervals(plan: Plan) -> str:
    return f"{100 * plan.settings.level:g} % intervals over clusters"


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> ClaimsTable:
    """C1 and C4."""
    n, effects = plan.n_latents, tables["effects"]
    claims = ClaimsTable(number_claims(lambda k: row_of(tables["steps"], after(k), after(k - 1)), n))
    if n < 3:
        return claims
    for kind in ("coordinate", "scalar", "norm"):
        row = row_of(effects, replaced(kind, (n - 1, n)))
        claims.add(
            effect_claim(
                f"C4 ({kind})",
                "random vectors in the last two latents do no harm",
                f"paired change of accuracy is above −{MARGIN}",
                judge(row["lower"], row["upper"], above=-MARGIN),
                row,
            )
        )
    return claims


def words(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    """The summary, section by section."""
    n, count, effects = plan.n_latents, tables["counts"], tables["effects"]
    base = row_of(count, after(n))
    modes = {mode: interval(row_of(count, {"mode": mode})) for mode in ("direct", "verbal")}
    found = [
        Section(
            f"{int(base['n'])} prompts of {plan.asked} in {int(base['n_clusters'])} clusters; accuracy and differences "
            f"in per cent and points, with {_intervals(plan)}."
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
            cells.append(interval(row, "difference") + ("*" if row["q"] < 0.05 else ""))
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    lines.append("\n\\* q < 0.05.")
    found.append(Section("\n".join(lines), "Which one"))
    if "shapley" in tables:
        found += [Section(_shares(tables, kind, n), f"Which set ({kind})") for kind in ON_ALL_SUBSETS]
        found.append(Section(_sufficient(tables["levels"], n), "What is enough"))
    return found


def _shares(tables: Mapping[str, pd.DataFrame], kind: str, n: int) -> str:
    """How the loss from replacing all latents is shared among them."""
    part = tables["shapley"][tables["shapley"]["kind"] == kind]
    whole = row_of(tables["effects"], replaced(kind, range(1, n + 1)))
    needed = part[(part["q"] < 0.05) & (part["value"] > 0)]["latent"].tolist()
    shares = ", ".join(f"{int(r['latent'])}: {interval(r, 'value')}" for _, r in part.iterrows())
    return (
        f"Replacing all latents changes accuracy by {interval(whole, 'difference')} points "
        f"({p_text(whole['p'])}). Shapley share of that loss by latent: {shares}. "
        + (
            f"Latents that the answer needs (q < 0.05): {', '.join(map(str, needed))}."
            if needed
            else "No latent has a share that survives correction: **the answer needs none of them in particular**."
        )
    )


def _sufficient(table: pd.DataFrame, n: int) -> str:
    """Which latents are enough, the others being means."""
    everything = set(range(1, n + 1))
    lines = []
    for size in range(n):
        best = None
        for kept in itertools.combinations(range(1, n + 1), size):
            row = row_of(table, replaced("mean", sorted(everything - set(kept))))
            if best is None or row["mean"] > best["mean"]:
                best = row
        assert best is not None
        names = ", ".join(map(str, sorted(everything - set(latents_in(best["replaced"])))))
        lines.append(f"{'{' + names + '}' if names else 'none'}: {interval(best)}")
    return (
        "Best set to keep, of each size, the other latents replaced by their means (chosen on these prompts, so its "
        "accuracy is optimistic): " + "; ".join(lines) + "."
    )


# --- Figures ----------------------------------------------------------------------------------------------------------


def figures(tables: Mapping[str, pd.DataFrame], n: int) -> dict[str, Any]:
    """Figures by file name."""
    count, level = tables["counts"], tables["levels"]
    figure, axes = new_figure(1, 3, height=2.5)
    left, middle, right = axes[0]
    draw_series(left, range(n + 1), rows_of(count, [after(k) for k in range(n + 1)]), "after k latents", 2)
    for mode, label, colour, style in (
        ("direct", "direct", CONTROL, ":"),
        ("verbal", "written chain", SERIES[3], "--"),
    ):
        line = 100 * row_of(count, {"mode": mode})["mean"]
        left.axhline(line, color=colour, linestyle=style, linewidth=1.1, label=label)
    left.set(xlabel="number of latents", ylabel="accuracy (%)", title="How many latents", xticks=range(n + 1))
    left.legend(loc="best")
    for axis, title, chosen in (
        (middle, "One latent replaced", [(k,) for k in range(1, n + 1)]),
        (right, "Latents 1..k replaced", [tuple(range(1, k + 1)) for k in range(1, n + 1)]),
    ):
        baseline(axis, 100 * row_of(level, UNEDITED)["mean"], "unedited")
        for place, kind in enumerate(KINDS):
            draw_series(axis, range(1, n + 1), rows_of(level, [replaced(kind, one) for one in chosen]), kind, place)
        axis.set(xlabel="latent k", title=title, xticks=range(1, n + 1))
    legend(figure, (middle, right))
    top = max(100 * float(table["upper"].max()) for table in (count, level))
    for axis in (left, middle, right):
        axis.set_ylim(-2, min(102, top + 4))
    return {"necessity": figure} | ({"subsets": _subsets_figure(tables, n)} if "shapley" in tables else {})


def _subsets_figure(tables: Mapping[str, pd.DataFrame], n: int) -> Any:
    """Accuracy by subset, latents of the first half against those of the second, and the shares of the loss."""
    level = tables["levels"]
    figure, axes = new_figure(1, 1 + len(ON_ALL_SUBSETS), height=2.7, width_ratios=[1.25, 1.25, 1])
    half = n // 2
    first = [(), *subsets(half)]
    second = [tuple(k + half for k in one) for one in [(), *subsets(n - half)]]
    for axis, kind in zip(axes[0, :-1], ON_ALL_SUBSETS, strict=True):
        values = [[100 * row_of(level, replaced(kind, (*a, *b)))["mean"] for b in second] for a in first]
        labels = [["".join(map(str, one)) or "–" for one in group] for group in (first, second)]
        draw_matrix(axis, np.array(values), labels[0], labels[1], f"Accuracy (%), {kind}", bar=False)
        axis.set(ylabel=f"replaced among 1..{half}", xlabel=f"replaced among {half + 1}..{n}")
        axis.tick_params(labelsize=6.5)
    last = axes[0, -1]
    baseline(last)
    for place, kind in enumerate(ON_ALL_SUBSETS):
        part = tables["shapley"][tables["shapley"]["kind"] == kind]
        draw_series(last, part["latent"].tolist(), part, kind, place, name="value")
    last.set(xlabel="latent", ylabel="points of accuracy", title="Share of the loss", xticks=range(1, n + 1))
    last.legend(loc="best")
    return figure


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=NecessityOptions,
    title="Necessity of latents",
    prompts=lambda options, suffix: options.load_split(options.seed, suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)


def run(
    options: NecessityOptions, model: CodiModel, prompts: Split, say: Callable[[str], None] | None = None
) -> Result:
    """The study on a loaded model."""
    return run_study(STUDY, options, model, prompts, say)


def main(options: NecessityOptions) -> None:
    """Load, run, print the summary."""
    print(run_study(STUDY, options, say=to_stderr).markdown())


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
