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

--legacy: the published prompts (50 number triples) and means over the evaluation prompts themselves.

Runs as `codi necessity` or `python -m experiments.latents.necessity`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from experiments.evaluate import evaluate
from experiments.study.claims import Claim, ClaimsTable, judge
from experiments.study.shared import (
    PALETTE,
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
from experiments.sweep.cells import Settings
from experiments.sweep.run import collect_means
from experiments.tasks.split import Split
from steering.directions import generator, patch_coordinate, patch_norm, patch_scalar
from steering.replacements import replace_embeddings

if TYPE_CHECKING:
    from codi import CodiModel
    from steering.means import LatentMeans

__all__ = ["Config", "main", "name_of", "number_claims", "run", "shapley", "subsets"]

KINDS = ("mean", "zero", "coordinate", "scalar", "norm")
ON_ALL_SUBSETS = ("mean", "coordinate")
MOST_LATENTS = 8
"""2^8 subsets are the most that are tried."""
MARGIN = 0.02
"""A loss of less than this (two points) counts as no harm in claims of no effect."""


@dataclass(frozen=True)
class Config(StudyOptions):
    """Which latents, and which subsets of them, the answer needs."""

    out: Path = Path("runs/necessity")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    draws: int = 3
    """Draws of every random replacement."""
    all_subsets: bool = True
    """Replace every one of the 2^n subsets of latents; otherwise only single latents and prefixes."""


def subsets(n: int) -> list[tuple[int, ...]]:
    """Every non-empty subset of latents 1..n, small ones first."""
    return [chosen for size in range(1, n + 1) for chosen in itertools.combinations(range(1, n + 1), size)]


def name_of(kind: str, chosen: Sequence[int]) -> str:
    """Condition in which these latents are replaced."""
    return f"{kind} {','.join(map(str, chosen))}" if chosen else "none"


def shapley(outcomes: pd.DataFrame, kind: str, n: int) -> pd.DataFrame:
    """Shapley value of every latent for every prompt: its share of the loss from replacing all latents.

    phi_k = sum over subsets S without k of |S|! (n - |S| - 1)! / n! · (right with S replaced - right with S
    and k replaced)

    Args:
        outcomes: (prompt × condition), 1 where right (means over draws), conditions as `name_of` gives them.
        kind: of replacement.
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
                without = outcomes[name_of(kind, chosen)].to_numpy(float)
                with_k = outcomes[name_of(kind, sorted((*chosen, k)))].to_numpy(float)
                total += weight * (without - with_k)
        values[k] = total
    return pd.DataFrame(values, index=outcomes.index)


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


def replacements(
    model: CodiModel, thoughts: Thoughts, means: LatentMeans, config: Config, kinds: Sequence[str] = KINDS
) -> pd.DataFrame:
    """Trial table of every replacement; conditions are named by `name_of`, "none" is the unedited run."""
    n = model.n_latents
    run = thoughts.run
    assert run.embeddings is not None
    table, place = _vectors(means, n, config.draws, config.seed)
    short = [(k,) for k in range(1, n + 1)] + [tuple(range(1, k + 1)) for k in range(2, n + 1)]
    short += [(n - 1, n)] if n > 2 else []
    norms = run.embeddings.float().norm(dim=-1).cpu()  # (prompt, latent)
    tried: list[tuple[str, tuple[int, ...], int]] = [("none", (), 0)]
    for kind in kinds:
        many = config.all_subsets and kind in ON_ALL_SUBSETS
        for chosen in subsets(n) if many else short:
            tried += [(kind, chosen, draw) for draw in range(1 if kind in ("mean", "zero") else config.draws)]
    direction = torch.full((len(tried), n), -1)
    own_norm = torch.zeros(len(tried), n, dtype=torch.bool)
    for row, (kind, chosen, draw) in enumerate(tried):
        for latent in chosen:
            direction[row, latent - 1] = place[kind, latent, draw]
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
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    return answer_table(
        thoughts.problems,
        rows,
        answers.texts,
        condition=[name_of(kind, chosen) for kind, chosen, _ in tried] * prompts,
        kind=[kind for kind, _, _ in tried] * prompts,
        replaced=[",".join(map(str, chosen)) for _, chosen, _ in tried] * prompts,
        draw=[draw for _, _, draw in tried] * prompts,
        applied_norm=answers.applied_norm.numpy(),
    )


def counts(model: CodiModel, split: Split, config: Config) -> pd.DataFrame:
    """Trial table of answers after 0..n latents (conditions "0".."n"), direct ("direct") and after a written chain
    ("verbal")."""
    frame = evaluate(model, split.evaluation, max_new_tokens=None, seed=config.seed, batch_size=config.batch_size)
    texts = frame["text"].tolist()
    where = {problem.prompt_id: i for i, problem in enumerate(split.evaluation)}
    condition = [
        str(count) if mode == "latent" else mode for mode, count in zip(frame["mode"], frame["n_latents"], strict=True)
    ]
    return answer_table(split.evaluation, [where[name] for name in frame["prompt_id"]], texts, condition=condition)


def run(config: Config, model: CodiModel, split: Split, say: Callable[[str], None] | None = None) -> Result:
    """The study on a loaded model: trials, tables, figures, claims and summary in the run folder."""
    n = model.n_latents
    if config.all_subsets and n > MOST_LATENTS:
        raise ValueError(
            f"2^{n} subsets of latents are too many (at most {MOST_LATENTS} latents): use --no-all-subsets"
        )
    settings = config.settings
    with open_study("necessity", config, model, split, say) as study:
        counted = study.part("counts", lambda: counts(model, split, config))

        def replaced_trials() -> pd.DataFrame:
            means, _ = collect_means(model, split.derivation, metadata={})
            thoughts = think(model, split.evaluation, keep=("embeddings", "cache"))
            return replacements(model, thoughts, means, config)

        replaced = study.part("replacements", replaced_trials)
        tables = {"counts": study.table("counts", levels(counted, settings=settings))}
        steps = [(str(k), str(k - 1)) for k in range(1, n + 1)] + [(str(n), "direct"), (str(n), "verbal")]
        tables["steps"] = study.table("steps", compare(counted, steps, settings=settings))
        names = [name for name in replaced["condition"].unique() if name != "none"]
        tables["effects"] = study.table(
            "effects", compare(replaced, [(name, "none") for name in names], settings=settings)
        )
        tables["levels"] = study.table("levels", levels(replaced, settings=settings))
        if config.all_subsets:
            tables["shapley"] = study.table("shapley", shapley_table(replaced, n, settings))
        study.draw(lambda: figures(tables, n))
        claims = published_claims(tables, n)
        text = study.finish(f"Necessity of latents: {model.name}", words(tables, n, config), claims)
        return Result(study.path, tables, claims, text)


def shapley_table(trials: pd.DataFrame, n: int, settings: Settings) -> pd.DataFrame:
    """Shapley value of every latent and kind with interval and p against zero, corrected over both."""
    wide = trials.groupby(["cluster", "prompt_id", "condition"], sort=True)["correct"].mean().unstack()
    parts, reference = [], []
    for kind in ON_ALL_SUBSETS:
        values = shapley(wide, kind, n)
        names = wide.index.to_frame(index=False)
        parts += [names.assign(condition=f"{kind} {k}", value=values[k].to_numpy()) for k in values]
    zero = parts[0][["cluster", "prompt_id"]].drop_duplicates()
    reference.append(zero.assign(condition="zero", value=0.0))
    long = pd.concat([*parts, *reference], ignore_index=True)
    contrasts = [(f"{kind} {k}", "zero") for kind in ON_ALL_SUBSETS for k in range(1, n + 1)]
    table = compare(long, contrasts, outcome="value", settings=settings)
    kind_latent = table["condition"].str.split(" ", expand=True)
    table.insert(0, "kind", kind_latent[0])
    table.insert(1, "latent", kind_latent[1].astype(int))
    kept = ["kind", "latent", "difference", "lower", "upper", "n", "n_clusters", "p", "q", "fwer_p"]
    return table[kept].rename(columns={"difference": "value"})


def number_claims(steps: pd.DataFrame, n: int) -> list[Claim]:
    """C1, from paired changes of accuracy per latent (conditions "0".."n")."""
    if n != 6:
        note = f"the claim is about 6 latents, this model has {n}"
        return [Claim("C1", "accuracy peaks at 5 latents", "", "not testable", note=note)]
    jump, sixth = row_of(steps, "5", "4"), row_of(steps, "6", "5")
    return [
        effect_claim(
            "C1 (jump)",
            "accuracy jumps from 4 to 5 latents",
            "accuracy(5) − accuracy(4) is above 0",
            judge(jump["lower"], jump["upper"], above=0.0),
            jump,
        ),
        effect_claim(
            "C1 (sixth)",
            "the sixth latent adds nothing",
            f"accuracy(6) − accuracy(5) is below {MARGIN}",
            judge(sixth["lower"], sixth["upper"], below=MARGIN),
            sixth,
        ),
    ]


def published_claims(tables: dict[str, pd.DataFrame], n: int) -> ClaimsTable:
    """C1 and C4."""
    claims = ClaimsTable(number_claims(tables["steps"], n))
    effects = tables["effects"]
    for kind in ("coordinate", "scalar", "norm"):
        condition = name_of(kind, (n - 1, n))
        if condition in set(effects["condition"]):
            row = row_of(effects, condition)
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


def words(tables: dict[str, pd.DataFrame], n: int, config: Config) -> list[str]:
    """The summary, paragraph by paragraph."""
    count, effects = tables["counts"], tables["effects"]
    base = row_of(count, str(n))
    texts = [
        f"{int(base['n'])} prompts of {config.asked} in {int(base['n_clusters'])} clusters; accuracy and differences "
        "in per cent and points, with 95 % intervals over clusters.",
        "**How many.** Accuracy after k latents: "
        + "; ".join(f"{k}: {interval(row_of(count, str(k)))}" for k in range(n + 1))
        + f". Direct answer: {interval(row_of(count, 'direct'))}; after a written chain: "
        f"{interval(row_of(count, 'verbal'))}.",
    ]
    lines = ["**Which one.** Change of accuracy when one latent is replaced (q: over all replacements tried):", ""]
    lines += ["| latent | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for k in range(1, n + 1):
        cells = []
        for kind in KINDS:
            row = row_of(effects, name_of(kind, (k,)))
            cells.append(interval(row, "difference") + ("*" if row["q"] < 0.05 else ""))
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    lines.append("\n\\* q < 0.05.")
    texts.append("\n".join(lines))
    if "shapley" in tables:
        table = tables["shapley"]
        for kind in ON_ALL_SUBSETS:
            part = table[table["kind"] == kind]
            whole = row_of(effects, name_of(kind, range(1, n + 1)))
            needed = part[(part["q"] < 0.05) & (part["value"] > 0)]["latent"].tolist()
            shares = ", ".join(f"{int(r['latent'])}: {interval(r, 'value')}" for _, r in part.iterrows())
            texts.append(
                f"**Which set ({kind}).** Replacing all latents changes accuracy by "
                f"{interval(whole, 'difference')} points "
                f"({p_text(whole['p'])}). Shapley share of that loss by latent: {shares}. "
                + (
                    f"Latents that the answer needs (q < 0.05): {', '.join(map(str, needed))}."
                    if needed
                    else "No latent has a share that survives correction: **the answer needs none of them in "
                    "particular**."
                )
            )
        texts.append(_sufficient(tables["levels"], n))
    return texts


def _sufficient(table: pd.DataFrame, n: int) -> str:
    """Which latents are enough, the others being means."""
    parts = []
    for size in range(n):
        best = None
        for kept in itertools.combinations(range(1, n + 1), size):
            gone = tuple(k for k in range(1, n + 1) if k not in kept)
            row = row_of(table, name_of("mean", gone))
            if best is None or row["mean"] > best[1]["mean"]:
                best = (kept, row)
        assert best is not None
        parts.append(f"{'{' + ', '.join(map(str, best[0])) + '}' if best[0] else 'none'}: {interval(best[1])}")
    return (
        "**What is enough.** Best set to keep, of each size, the other latents replaced by their means (chosen on "
        "these "
        "prompts, so its accuracy is optimistic): " + "; ".join(parts) + "."
    )


def figures(tables: dict[str, pd.DataFrame], n: int) -> dict[str, Any]:
    """Figures by file name."""
    count, level = tables["counts"], tables["levels"]
    figure, axes = new_figure(1, 3, height=2.5)
    left, middle, right = axes[0]
    rows = pd.DataFrame([row_of(count, str(k)) for k in range(n + 1)])
    draw_series(left, range(n + 1), rows, "after k latents", 2)
    for name, label, colour, style in (
        ("direct", "direct", PALETTE[6], ":"),
        ("verbal", "written chain", PALETTE[3], "--"),
    ):
        left.axhline(100 * row_of(count, name)["mean"], color=colour, linestyle=style, linewidth=1.1, label=label)
    left.set(xlabel="number of latents", ylabel="accuracy (%)", title="How many latents", xticks=range(n + 1))
    left.legend(loc="best")
    for axis, title, chosen in (
        (middle, "One latent replaced", [(k,) for k in range(1, n + 1)]),
        (right, "Latents 1..k replaced", [tuple(range(1, k + 1)) for k in range(1, n + 1)]),
    ):
        axis.axhline(100 * row_of(level, "none")["mean"], color="black", linewidth=0.9, label="unedited")
        for place, kind in enumerate(KINDS):
            rows = pd.DataFrame([row_of(level, name_of(kind, one)) for one in chosen])
            draw_series(axis, range(1, n + 1), rows, kind, place)
        axis.set(xlabel="latent k", title=title, xticks=range(1, n + 1))
    handles, labels = middle.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    top = max(100 * float(table["upper"].max()) for table in (count, level))
    for axis in (left, middle, right):
        axis.set_ylim(-2, min(102, top + 4))
    found = {"necessity": figure}
    if "shapley" in tables:
        figure, axes = new_figure(1, 1 + len(ON_ALL_SUBSETS), height=2.7, width_ratios=[1.25, 1.25, 1])
        half = n // 2
        first = [c for c in [(), *subsets(half)]]
        second = [tuple(k + half for k in c) for c in [(), *subsets(n - half)]]
        for axis, kind in zip(axes[0, :-1], ON_ALL_SUBSETS, strict=True):
            values = np.array([[100 * row_of(level, name_of(kind, (*a, *b)))["mean"] for b in second] for a in first])
            labels = [["".join(map(str, c)) or "–" for c in group] for group in (first, second)]
            draw_matrix(axis, values, labels[0], labels[1], f"Accuracy (%), {kind}", bar=False)
            axis.set(ylabel=f"replaced among 1..{half}", xlabel=f"replaced among {half + 1}..{n}")
            axis.tick_params(labelsize=6.5)
        last = axes[0, -1]
        last.axhline(0, color="black", linewidth=0.8)
        for place, kind in enumerate(ON_ALL_SUBSETS):
            part = tables["shapley"][tables["shapley"]["kind"] == kind]
            draw_series(last, part["latent"].tolist(), part, kind, place, name="value")
        last.set(xlabel="latent", ylabel="points of accuracy", title="Share of the loss", xticks=range(1, n + 1))
        last.legend(loc="best")
        found["subsets"] = figure
    return found


def main(config: Config) -> None:
    """Load, run, print the summary."""
    model = load_model(config)
    split = load_prompts(config, model.protocol.question_suffix)
    print(run(config, model, split, stderr).text)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
