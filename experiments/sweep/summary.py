"""What a run found, in words: a summary in Markdown, plain enough to print.

What it does: `summary` turns the tables of `analysis.analyse` into a page: levels of the baseline and of the controls,
best and worst cells with intervals and corrected p, how many cells survive which correction, what the same rule finds
in random draws alone, and the smallest improvement and harm that could have been found, per space and timing.

What it does not know: trials, models. Every number is read from the tables.

How to run: `codi sweep`, `codi stats RUN` and `codi plot RUN` print it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from experiments.statistics.floors import best_places
from experiments.statistics.power import power_words
from experiments.statistics.words import p_number
from experiments.study.edits.pairing import FAMILY
from experiments.study.edits.words import hidden, together
from experiments.study.result import Section
from experiments.sweep.analysis import Analysis
from lm.terms import PAIR_CONTROLS, PATCH_CONTROLS

__all__ = ["CONTROL_NAMES", "cell_name", "family_name", "figure_paths", "number", "percent", "sections", "summary"]

#: how the controls are called where a person reads them
CONTROL_NAMES = {
    "none": "baseline (unsteered)",
    "random": "random directions",
    "covariance": "covariance-matched",
    "shuffled": "shuffled latents",
    "patch-scalar": "patch: scalar noise",
    "patch-coordinate": "patch: per coordinate",
    "patch-norm": "patch: norm-matched",
}


_WORDS = (
    "A−B: the mean of latent A minus the mean of latent B; c: how many times it is added to the edited latent (−c is "
    "B−A). Cell: one pair, latent and c. Cluster: prompts that share their numbers; intervals and tests take clusters, "
    "not prompts, as independent. Random directions: of the same norm, at the same latent and |c|. Rank: place of a "
    "cell among its random directions, 1 is best. q: p after control of the false discovery rate (Benjamini-Hochberg), "
    "gains and losses in families of their own. Family-wise: p for any false cell at all among all cells. Beyond p: "
    "family-wise p of a cell beyond the random directions, calibrated on these (maximum rule).",
)
_TIMING_WORDS = {
    "cached": "Cached: all latents are computed, then one of them is edited.",
    "continue": "Continue: one latent is edited, the later ones are computed on the edited past.",
    "early-exit": "Early exit: thinking stops after the edited latent.",
}


def number(value: float) -> str:
    """A coefficient without needless zeros, with a real minus sign."""
    return f"{value:g}".replace("-", "−")


def percent(value: float, sign: bool = False) -> str:
    """A fraction in per cent, one decimal, with a real minus sign."""
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return "0.0" if text.strip("+-") == "0.0" else text.replace("-", "−")


def cell_name(cell: pd.Series) -> str:
    """A cell as "A2−B5 · c = +1 · latent 5"."""
    sign = "+" if cell["coefficient"] > 0 else ""
    coefficient = f"{sign}{number(cell['coefficient'])}"
    return f"A{cell['source']}−B{cell['target']} · c = {coefficient} · latent {cell['latent']}"


def family_name(space: str, part: str, timing: str) -> str:
    """A family as "kv (both) · early-exit"; the part is named only where there are parts."""
    return f"{space} ({part}) · {timing}" if space == "kv" else f"{space} · {timing}"


def figure_paths(run: Path) -> list[Path]:
    """The PNG figures of a run folder, sorted."""
    return sorted((run / "figures").glob("*.png"))


def summary(analysis: Analysis, run: Path | None = None, *, shown: int = 3) -> str:
    """The page for one run.

    Args:
        analysis: from `analysis.analyse`.
        run: the run folder, to name the files in it.
        shown: how many of the best and worst cells to name per family.

    Returns:
        Markdown without a trailing newline.
    """
    lines = [f"# Steering sweep{f': {run}' if run else ''}"]
    for section in sections(analysis, shown):
        lines += ["", f"## {section.heading}", "", section.text]
    if run is not None:
        lines += ["", *_files(run)]
    return "\n".join(lines)


def sections(analysis: Analysis, shown: int = 3) -> list[Section]:
    """What the words mean, then one section per family, with its name as heading.

    Args:
        analysis: from `analysis.analyse`.
        shown: how many of the best and worst cells to name per family, at most.
    """
    families = list(analysis.controls[list(FAMILY)].drop_duplicates().itertuples(index=False))
    timings = list(dict.fromkeys(timing for _, _, timing in families))
    words = Section(" ".join([*_WORDS, *(_TIMING_WORDS[timing] for timing in timings)]), "Words")
    return [words] + [
        Section("\n".join(_family(analysis, space, part, timing, shown)), family_name(space, part, timing))
        for space, part, timing in families
    ]


def _of(table: pd.DataFrame, space: str, part: str, timing: str) -> pd.DataFrame:
    if table.empty:
        return table
    return table[(table["space"] == space) & (table["part"] == part) & (table["timing"] == timing)]


def _family(analysis: Analysis, space: str, part: str, timing: str, shown: int) -> list[str]:
    cells, controls = (_of(table, space, part, timing) for table in (analysis.cells, analysis.controls))
    level = f"{100 * analysis.settings.level:g} %"
    base = controls[controls["control"] == "none"]
    prompts, clusters = int(base["n"].max()), int(base["n_clusters"].max())
    lines = [f"{_count(prompts, 'prompt')} in {_count(clusters, 'cluster')}. Accuracy in %, {level} intervals."]
    for text in hidden(_of(analysis.visibility, space, part, timing)):
        lines += ["", f"**{text}**"]
    lines += ["", *_levels(controls, timing, level)]
    unique = cells[~cells["mirrored"].astype(bool)] if len(cells) else cells
    if unique.empty:
        return [*lines, "", "No direction was run: there is nothing to compare."]
    pairs = len(unique[["source", "target"]].drop_duplicates())
    lines += [
        "",
        f"{_count(len(unique), 'cell')}: {_count(pairs, 'pair')} A−B (each also as B−A with the other sign), "
        f"latents {_listed(unique['latent'])}, coefficients {_listed(unique['coefficient'])}. "
        "Corrections are over all of them.",
    ]
    lines += ["", *_extremes(unique, shown), ""]
    evidence, power = (_of(table, space, part, timing) for table in (analysis.evidence, analysis.power))
    lines += _survivors(unique, evidence, power, analysis.settings.alpha)
    lines += _structure(analysis, space, part, timing)
    unparsed = unique["unparsed"].sum() / unique["n"].sum()
    if unparsed > 0:
        lines.append(f"- Answers without a number (counted as wrong): {percent(unparsed)} % of the steered answers.")
    return lines


def _levels(controls: pd.DataFrame, timing: str, level: str) -> list[str]:
    """A table: a row per control and |c|, a column per latent."""
    latents = sorted(controls["latent"].unique())
    header = "exit after latent" if timing == "early-exit" else "edited latent"
    table = [[header, *(str(latent) for latent in latents)]]
    bands = False
    for control in ("none", *PAIR_CONTROLS, *PATCH_CONTROLS):
        rows = controls[controls["control"] == control]
        for size in sorted(rows["coefficient"].unique()):
            name = CONTROL_NAMES[control] + (f", c = ±{number(size)}" if control in PAIR_CONTROLS else "")
            texts = []
            for latent in latents:
                here = rows[(rows["coefficient"] == size) & (rows["latent"] == latent)]
                texts.append(_level(here.iloc[0], control) if len(here) else "")
            bands |= control != "none"
            table.append([name, *texts])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if bands:
        lines += ["", f"Brackets of a control: where {level} of its single draws lie. Of the baseline: its interval."]
    return lines


def _level(row: pd.Series, control: str) -> str:
    lower, upper = ("accuracy_lower", "accuracy_upper") if control == "none" else ("draw_lower", "draw_upper")
    return f"{percent(row['accuracy'])} [{100 * row[lower]:.0f}, {100 * row[upper]:.0f}]"


def _extremes(cells: pd.DataFrame, shown: int) -> list[str]:
    """The best and the worst cells; ties are named whole or not at all."""
    if len(cells) == 1:
        return ["The only cell:", *_named(cells)]
    values = cells["difference"].to_numpy()
    lines = []
    for title, highest in (("Best", True), ("Worst", False)):
        places = best_places(values, highest=highest, most=shown)
        if len(places):
            lines += [f"{title}:", *_named(cells.iloc[places]), ""]
            continue
        extreme = values.max() if highest else values.min()
        tied = int((values == extreme).sum())
        lines += [f"{title}: none to name, {_count(tied, 'cell')} share {percent(extreme, sign=True)} points.", ""]
    return lines[:-1]


def _named(cells: pd.DataFrame) -> list[str]:
    lines = []
    for _, cell in cells.iterrows():
        q = cell["gain_q"] if cell["difference"] > 0 else cell["loss_q"]
        text = (
            f"- {cell_name(cell)}: {percent(cell['accuracy'])} %, {percent(cell['difference'], sign=True)} points "
            f"[{percent(cell['lower'], sign=True)}, {percent(cell['upper'], sign=True)}] "
            f"({cell['gained']} gained, {cell['lost']} lost; q {p_number(q)}, "
            f"family-wise p {p_number(cell['fwer_p'])}); "
        )
        if cell["random_draws"]:
            beyond = cell["beyond_gain_p"] if cell["difference"] > 0 else cell["beyond_harm_p"]
            text += (
                f"random {percent(cell['random_mean'])} % "
                f"[{100 * cell['random_lower']:.0f}, {100 * cell['random_upper']:.0f}], "
                f"rank {number(cell['random_rank'])} of {cell['random_draws'] + 1}, beyond p {p_number(beyond)}"
            )
        else:
            text += "no random draws"
        lines.append(text + ("" if cell["verdict"] == "none" else f" → **{cell['verdict']}**"))
    return lines


def _survivors(cells: pd.DataFrame, evidence: pd.DataFrame, power: pd.DataFrame, alpha: float) -> list[str]:
    """How many cells pass which procedure, what the same rule finds in nothing, and what could have been found."""
    up, down = cells["difference"] > 0, cells["difference"] < 0
    wise = cells["fwer_p"] < alpha
    gains, losses = ((cells[name] <= alpha).sum() for name in ("gain_q", "loss_q"))
    lines = [
        f"- Against the baseline alone: by false discovery rate {alpha:g} (gains and losses corrected apart, each "
        f"one-sided) {gains} better, {losses} worse; by family-wise {alpha:g} (two-sided maximum over all cells) "
        f"{(wise & up).sum()} better, {(wise & down).sum()} worse. These are two procedures, and neither list need "
        "contain the other.",
    ]
    gain, harm = (evidence[evidence["tail"] == tail].iloc[0] for tail in ("gain", "harm"))
    if not cells["random_draws"].any():
        return [*lines, "- **No random directions were run, so no cell can be called an improvement or a harm.**"]
    better, worse = ((cells["verdict"] == verdict).sum() for verdict in ("improvement", "harm"))
    lines.append(
        f"- Beyond both the baseline and the random directions, family-wise {alpha:g} for improvements and for harms: "
        f"**{_count(better, 'improvement')}, {_count(worse, 'harm')}** of {_count(len(cells), 'cell')}"
        f"{_different(gain, harm)}. {_nulls(gain, harm, alpha)}"
    )
    lines.append("- All cells together: " + "; ".join(together(row) for row in (harm, gain)) + ".")
    if gain["least_p"] > alpha + 1e-12:
        words = power_words(power.iloc[0], alpha).rstrip(".")
        return [*lines, f"- **{words}.** That no cell survives says nothing about this run's edits."]
    if better + worse == 0:
        lines.append(
            "- **Nothing survives correction**: no cell differs from both the baseline and its random directions. What "
            "this run could see:"
        )
    elif better == 0:
        lines.append("- **No improvement survives correction.** What this run could see:")
    else:
        lines.append("- What this run could see:")
    for _, row in power.sort_values(["coefficient", "tail"], kind="stable").iterrows():
        lines.append(f"  - |c| = {number(row['coefficient'])}: {power_words(row, alpha)}")
    return lines


def _different(gain: pd.Series, harm: pd.Series) -> str:
    """Effects instead of cells."""
    parts = [
        f"the {row['found']} {noun}s are {_count(int(row['effects']), 'different edit')}"
        for row, noun in ((gain, "improvement"), (harm, "harm"))
        if row["found"] > 1
    ]
    return f"; by the prompts that flip, {' and '.join(parts)}" if parts else ""


def _nulls(gain: pd.Series, harm: pd.Series, alpha: float) -> str:
    """What the same rule finds where there is nothing."""
    if not gain["null_families"]:
        return "There are too few draws to try the same rule on draws alone."
    if gain["null_least_p"] > alpha + 1e-12:
        return "With a draw in the place of each direction, too few others are left for the rule to find anything."
    return (
        f"With random draws in the place of the directions ({gain['null_families']} such families) the same rule finds "
        f"an improvement in {gain['null_with_any']} (at most {gain['null_most']}) and a harm in "
        f"{harm['null_with_any']} (at most {harm['null_most']})."
    )


def _structure(analysis: Analysis, space: str, part: str, timing: str) -> list[str]:
    lines = []
    symmetry = _of(analysis.symmetry, space, part, timing)
    if len(symmetry):
        number_both = int(symmetry["both_improve"].sum())
        lines.append(
            f"- Pairs that help with both signs (same |c| and latent): {number_both or 'none'} of "
            f"{len(symmetry)} that were run with both."
        )
    for _, row in _of(analysis.consistency, space, part, timing).iterrows():
        if pd.notna(row["kendall_w"]):
            shares = _of(analysis.variance, space, part, timing)
            shares = shares[shares["coefficient"] == row["coefficient"]].set_index("term")["share"]
            text = f"- Order of the pairs across positions at c = ±{number(row['coefficient'])}: "
            text += f"Kendall's W {row['kendall_w']:.2f} (p {p_number(row['p'])})"
            if len(shares):
                text += "; variance of the effects: " + ", ".join(
                    f"{term} {100 * shares[term]:.0f} %" for term in ("pair", "position", "interaction", "noise")
                )
            lines.append(text + ".")
    return lines


def _files(run: Path) -> list[str]:
    figures = figure_paths(run)
    lines = [f"Statistics: {run / 'cells.csv'} (and cells.parquet, statistics/)."]
    if figures:
        lines.append(f"Figures: {len(figures)} in {run / 'figures'} (PNG and PDF), for example {figures[0].name}.")
    else:
        lines.append(f"Figures: none yet; draw them with: codi plot {run}")
    return lines


def _count(value: int, noun: str) -> str:
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(number(value) for value in sorted(set(values)))
