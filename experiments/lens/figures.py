"""Figures of the lens studies, drawn from their tables.

The logit lens, which everything is compared with, is grey; trained lenses have the colours of series. A space in a
token is drawn as ␣; a character that the font does not have as its code point.

Knows nothing about models, files or how a number was computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from experiments.figures.heatmap import Scale, colour_bar, matrix, numbers
from experiments.figures.series import draw_points, draw_series, from_zero, spread
from experiments.figures.style import (
    LOWER_IS_BETTER,
    MARKERS,
    STYLE,
    legend,
    look,
    new_figure,
    note,
    ordered,
    sample_text,
    styled,
)
from experiments.lens.options import TOP
from experiments.lens.prompts import per_cent
from lenses.latent_lens import TEXT

__all__ = [
    "causal_figure",
    "curves_figure",
    "detection_figure",
    "difference_figure",
    "heatmap_figure",
    "held_out_figure",
    "label",
    "summary_figure",
    "transfer_figure",
]

PLAIN = "plain"
_GLYPHS: set[int] = set()


def label(token: str, width: int = 9) -> str:
    """A token as it is drawn: spaces as ␣, glyphs that the font lacks as their code point, long ones cut."""
    if not _GLYPHS:
        _GLYPHS.update(get_font(findfont(FontProperties(family=STYLE["font.family"]))).get_charmap())
    shown = token.replace(" ", "␣") or "∅"
    shown = "".join(c if ord(c) in _GLYPHS and c.isprintable() else f"U+{ord(c):X}" for c in shown)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def position_label(position: int) -> str:
    """Tick of a position."""
    return {TEXT: "text", 0: "begin of\nthought"}.get(position, f"latent {position}")


def _short(position: int) -> str:
    return {TEXT: "text", 0: "bot"}.get(position, str(position))


def _lens_title(name: str) -> str:
    words = {PLAIN: "logit lens", "each": "tuned lens, one per position", "text": "tuned lens trained on text"}
    return words.get(name, f"tuned lens “{name}”")


def _two_lines(name: str) -> str:
    return _lens_title(name).replace(", ", ",\n")


# --- One prompt -------------------------------------------------------------------------------------------------------


@styled
def heatmap_figure(readings: pd.DataFrame, title: str) -> Figure:
    """Most probable token and its probability at every position and layer, one panel per lens."""
    lenses = list(dict.fromkeys(readings["lens"]))
    layers = sorted(readings["layer"].unique())
    positions = sorted(readings["latent"].unique())
    top = readings[readings["rank"] == 1]
    height = 0.3 + 0.13 * (title.count("\n") + 1) + len(lenses) * (0.45 + 0.21 * len(layers))
    figure, axes = new_figure(len(lenses), 1, total=height)
    figure.suptitle(title, fontsize=7.5, x=0.01, ha="left", parse_math=False)
    ends = {layers[0]: f"{layers[0]} (fed)", layers[-1]: f"{layers[-1]} (output)"}
    scale = Scale()
    for panel, lens in zip(axes[:, 0], lenses, strict=True):
        mine = top[top["lens"] == lens].set_index(["layer", "latent"])
        values = np.full((len(layers), len(positions)), np.nan)
        texts = [["" for _ in positions] for _ in layers]
        for i, layer in enumerate(layers):
            for j, position in enumerate(positions):
                if (layer, position) in mine.index:
                    row = mine.loc[(layer, position)]
                    values[i, j] = row["probability"]
                    texts[i][j] = f"{label(row['token'])}  {row['probability']:.2f}"
        rows, columns = [ends.get(layer, layer) for layer in layers], [position_label(p) for p in positions]
        matrix(panel, values, rows, columns, scale, texts=texts, upwards=True)
        panel.set_title(_lens_title(lens), loc="left")
        panel.set_ylabel("layer")
    colour_bar(figure, scale, "probability of the shown token", of=axes)
    return figure


# --- Training ---------------------------------------------------------------------------------------------------------


@styled
def held_out_figure(table: pd.DataFrame, lens_names: Sequence[str], level: float = 0.95) -> Figure:
    """Held-out KL per layer, plain and trained, one panel per position; several lenses may have read a position.

    Args:
        table: columns lens, position, layer, plain, divergence, lower, upper, n, n_clusters.
        lens_names: lenses to draw, at most seven.
        level: coverage of the intervals.
    """
    positions = sorted(table["position"].unique())
    columns = min(4, len(positions))
    rows = -(-len(positions) // columns)
    figure, axes = new_figure(rows, columns, total=0.65 + 1.55 * rows, sharex=True, sharey=True)
    for panel in axes.flat[len(positions) :]:
        panel.set_visible(False)
    for at, position in enumerate(positions):
        panel = axes.flat[at]
        here = table[table["position"] == position]
        plain = here.drop_duplicates("layer").sort_values("layer")
        draw_points(
            panel, plain["layer"], plain["plain"], _lens_title(PLAIN), 0, control=True, linestyle="--", marker="x",
            markersize=3.5,
        )  # fmt: skip
        for place, name in enumerate(lens_names):
            mine = here[here["lens"] == name].sort_values("layer")
            if len(mine):
                draw_series(
                    panel, mine["layer"], mine, _lens_title(name), place, "divergence", 1, step=0.06, linewidth=1
                )
        panel.set_title(position_label(position).replace("\n", " "))
        panel.set_yscale("log")
        if len(plain) <= 9:
            panel.set_xticks(plain["layer"])
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
        if at + columns >= len(positions):
            panel.set_xlabel("layer")
            panel.tick_params(labelbottom=True)
    figure.supylabel("KL(output ‖ lens), nats, held out", fontsize=7)
    legend(figure, axes)
    note(figure, f"Held-out questions: {sample_text(table)} Intervals: {per_cent(level)} over clusters.")
    return figure


# --- Detection --------------------------------------------------------------------------------------------------------


@styled
def detection_figure(rates: pd.DataFrame, targets: Sequence[str], k: int = 5, remark: str = "") -> Figure:
    """Rate (upper number) and chance level (lower) at every latent and layer, a row of panels per lens.

    Args:
        rates: of `rates.rates`.
        targets: columns of panels.
        k: how many tokens count.
        remark: added to the caption.
    """
    rates = rates[(rates["answered"] == "all") & (rates["k"] == k) & rates["target"].isin(targets)]
    lenses = list(dict.fromkeys(rates["lens"]))
    positions, layers = sorted(rates["latent"].unique()), sorted(rates["layer"].unique())
    words = {"steps": "any intermediate", "answer": "answer", "question": "a number of the question"}
    height = 0.65 + len(lenses) * (0.35 + 0.27 * len(layers))
    figure, axes = new_figure(len(lenses), len(targets), total=height, sharex=True, sharey=True)
    scale, columns = Scale(), [_short(position) for position in positions]
    for row, (panels, lens) in enumerate(zip(axes, lenses, strict=True)):
        for panel, target in zip(panels, targets, strict=True):
            mine = rates[(rates["lens"] == lens) & (rates["target"] == target)]
            value, chance = (
                mine.pivot(index="layer", columns="latent", values=name).reindex(layers, columns=positions).to_numpy()
                for name in ("rate", "chance")
            )
            pairs = zip(numbers(value, bare=True), numbers(chance, bare=True), strict=True)
            texts = [[f"{a}\n{b}".strip() for a, b in zip(*lines, strict=True)] for lines in pairs]
            matrix(panel, value, layers, columns, scale, texts=texts, upwards=True)
            count = f"n = {int(mine['n'].max())}" if len(mine) else "none"
            name = words.get(target, target.replace("step", "step "))
            panel.set_title(f"{name} ({count})" if row == 0 else "", loc="left")
        panels[0].set_ylabel(f"{_two_lines(lens)}\nlayer")
    colour_bar(figure, scale, f"in the top {k}: rate (upper number)", of=axes)
    note(
        figure,
        f"Columns: latents (bot: begin-of-thought token). Upper number and colour: share of prompts whose value is in "
        f"the top {k}; lower number: chance, the values of other prompts. {sample_text(rates)} {remark}",
    )
    return figure


@styled
def curves_figure(rates: pd.DataFrame, target: str, layers: Sequence[int], level: float = 0.95) -> Figure:
    """Detection rate against k, a line per latent, a panel per lens and layer; dotted: chance. level: of intervals."""
    rates = rates[(rates["answered"] == "all") & (rates["target"] == target) & (rates["latent"] > 0)]
    lenses, latents = list(dict.fromkeys(rates["lens"])), sorted(rates["latent"].unique())
    figure, axes = new_figure(len(lenses), len(layers), total=0.6 + 1.6 * len(lenses), sharex=True, sharey=True)
    colours = ordered(len(latents))
    for row, (panels, lens) in enumerate(zip(axes, lenses, strict=True)):
        for panel, layer in zip(panels, layers, strict=True):
            here = rates[(rates["lens"] == lens) & (rates["layer"] == layer)]
            for place, latent in enumerate(latents):
                mine = here[here["latent"] == latent].sort_values("k")
                style: dict[str, Any] = {"color": colours[place], "linewidth": 1}
                marker = MARKERS[place % len(MARKERS)]
                panel.plot(mine["k"], mine["rate"], marker=marker, markersize=2.8, label=f"latent {latent}", **style)
                few = mine[mine["k"].isin((1, 5, TOP))]  # intervals at three k, shifted so that none hides another
                panel.errorbar(
                    few["k"] + 0.12 * (place - 2), few["rate"], yerr=spread(few, "rate"), fmt="none", elinewidth=0.6,
                    alpha=0.7, ecolor=colours[place],
                )  # fmt: skip
                panel.plot(mine["k"], mine["chance"], linestyle=":", color=colours[place], linewidth=0.8)
            panel.set_title(f"layer {layer}" if row == 0 else "")
            panel.set_ylim(-0.03, 1.03)
            panel.set_xticks([1, 5, TOP])
        panels[0].set_ylabel(f"{_two_lines(lens)}\ndetection rate")
    for panel in axes[-1]:
        panel.set_xlabel("k")
    legend(figure, axes)
    note(
        figure,
        f"Share of prompts whose {target.replace('step', 'step ')} is among the k most probable tokens; dotted: "
        f"chance, the values of other prompts. {sample_text(rates)} Bars at k = 1, 5, {TOP}: "
        f"{per_cent(level)} over clusters.",
    )
    return figure


@styled
def summary_figure(summaries: pd.DataFrame, measure: str, title: str, level: float = 0.95) -> Figure:
    """One measure per latent, a panel per layer, a line per lens, with intervals of coverage `level`."""
    here = summaries[summaries["measure"] == measure]
    lenses, layers = list(dict.fromkeys(here["lens"])), sorted(here["layer"].unique())
    latents = sorted(here["latent"].unique())
    columns = min(5, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = new_figure(rows, columns, total=0.7 + 1.45 * rows, sharex=True, sharey=True)
    for panel in axes.flat[len(layers) :]:
        panel.set_visible(False)
    trained = [lens for lens in lenses if lens != PLAIN]
    for panel, layer in zip(axes.flat[: len(layers)], layers, strict=True):
        for lens in lenses:
            mine = here[(here["lens"] == lens) & (here["layer"] == layer)].sort_values("latent")
            control = lens == PLAIN
            draw_series(
                panel, mine["latent"], mine, _lens_title(lens), 0 if control else trained.index(lens), scale=1,
                step=0.08, control=control, linewidth=1, marker="x" if control else look(trained.index(lens))["marker"],
            )  # fmt: skip
        panel.set_title(f"layer {layer}")
        panel.set_xticks(latents, [_short(latent) for latent in latents])
    from_zero(axes[0, 0])  # shared by all panels, once all of them are drawn
    figure.supylabel(title, fontsize=7)
    legend(figure, axes)
    note(
        figure,
        f"Across: latent (bot: begin-of-thought token). {sample_text(here)} Intervals: {per_cent(level)} over "
        "clusters.",
    )
    return figure


# --- Difference lens, transfer, causes --------------------------------------------------------------------------------


@styled
def difference_figure(table: pd.DataFrame, layer: int, remark: str = "") -> Figure:
    """A × B grid of the three most probable tokens of mean_A − mean_B at one layer, a panel per lens."""
    here = table[table["layer"] == layer]
    lenses = list(dict.fromkeys(here["lens"]))
    latents = sorted(set(here["source"]) | set(here["target"]))
    figure, axes = new_figure(len(lenses), 1, total=0.55 + (0.4 + 0.42 * len(latents)) * len(lenses))
    scale = Scale()
    for panel, lens in zip(axes[:, 0], lenses, strict=True):
        mine = here[(here["lens"] == lens) & (here["rank"] <= 3)].set_index(["source", "target", "rank"])
        values = np.full((len(latents), len(latents)), np.nan)
        texts = [["" for _ in latents] for _ in latents]
        for i, a in enumerate(latents):
            for j, b in enumerate(latents):
                if (a, b, 1) in mine.index:
                    values[i, j] = mine.loc[(a, b, 1), "overlap"]
                    texts[i][j] = "\n".join(
                        f"{label(row['token'])} {row['probability']:.2f}"
                        for row in (mine.loc[(a, b, rank)] for rank in (1, 2, 3))
                    )
        matrix(panel, values, [f"A = {a}" for a in latents], [f"B = {b}" for b in latents], scale, texts=texts)
        panel.set_title(f"{_lens_title(lens)}, layer {layer}", loc="left")
    colour_bar(figure, scale, f"share of the top {TOP} that two halves of the prompts agree on", of=axes)
    note(figure, f"In each cell the three most probable tokens of mean A − mean B, and their probability. {remark}")
    return figure


@styled
def transfer_figure(table: pd.DataFrame, remark: str = "") -> Figure:
    """KL per lens and position (mean over layers), and its change against the plain lens."""
    here = table[table["layer"] == -1]
    lenses = list(dict.fromkeys(here["lens"]))
    positions = sorted(here["position"].unique())
    figure, axes = new_figure(1, 2, total=0.85 + 0.24 * len(lenses), sharey=True)
    level, change = (
        here.pivot(index="lens", columns="position", values=name).reindex(lenses, columns=positions).to_numpy()
        for name in ("divergence", "change")
    )
    words = {PLAIN: "logit lens", "text": "text", "each": "one per position", "0": "begin of thought"}
    names = [words.get(name, f"latent {name}" if name.isdigit() else name) for name in lenses]
    columns = [_short(position) for position in positions]
    # one bad position must not take all the colours: they end at the ninth decile, the numbers say the rest
    for panel, values, scale, form, title in (
        (axes[0, 0], level, Scale.magnitude(level, quantile=0.9), ".2f", "KL(output ‖ lens), nats, mean over layers"),
        (axes[0, 1], change, Scale.signed(change, LOWER_IS_BETTER, quantile=0.9), "+.2f",
         "change against the logit lens (blue: better)"),
    ):  # fmt: skip
        matrix(panel, values, names, columns, scale, texts=numbers(values, form))
        panel.set_title(title, loc="left")
        panel.set_xlabel("applied to")
        colour_bar(figure, scale, "nats", of=panel, values=values)
    axes[0, 0].set_ylabel("lens trained on")
    note(
        figure,
        f"Applied to: a token of a question (text), begin of thought (bot), latents. Colours end at the 90th "
        f"percentile. {remark}",
    )
    return figure


_KINDS = {
    "lens": ("lens", "lens"),
    "component": ("principal\ncomp.", "principal component"),
    "covariance": ("covariance\ndraw", "drawn from covariance"),
    "random": ("random", "random"),
}


@styled
def causal_figure(summary: pd.DataFrame, points: pd.DataFrame, level: float = 0.95) -> Figure:
    """What one ablated direction does, by kind, and its effect against the lens's energy, a point per direction."""
    figure, axes = new_figure(1, 3, total=2.9)
    # directions that are drawn by chance are controls
    looks = {
        "lens": look(0),
        "component": look(1),
        "covariance": look(1, True) | {"marker": "^"},
        "random": look(0, True),
    }
    looks["random"]["marker"] = "D"
    for panel, measure, title in (
        (axes[0, 0], "output", "own output at that latent"),
        (axes[0, 1], "answer", "first answer token"),
    ):
        mine = summary[summary["measure"] == measure].set_index("kind").reindex(list(_KINDS))
        for place, kind in enumerate(_KINDS):
            row = mine.loc[[kind]]
            draw_points(panel, [place], row["mean"].tolist(), kind, place, up=spread(row), markersize=5, **looks[kind])
        panel.set_xticks(range(len(_KINDS)), [short for short, _ in _KINDS.values()], fontsize=6)
        panel.set_xlim(-0.5, len(_KINDS) - 0.5)
        highest = float(mine["upper"].max())
        panel.set_ylim(-0.03 * highest, 1.05 * highest)  # a marker at zero is not cut
        panel.set_title(title)
    axes[0, 0].set_ylabel("KL after ablating one direction, nats")
    panel = axes[0, 2]
    for kind, (_, words) in _KINDS.items():
        mine = points[points["kind"] == kind]
        panel.scatter(mine["energy"], mine["output"], s=8, alpha=0.7, linewidths=0, label=words, **looks[kind])
    panel.set_xscale("symlog", linthresh=1e-3)
    panel.set_yscale("symlog", linthresh=1e-3)
    panel.set_xlim(left=-1e-4)
    panel.set_ylim(bottom=-1e-4)
    panel.set_xlabel("energy: KL of the lens, nats")
    panel.set_ylabel("KL of the model's output, nats")
    panel.set_title("each direction")
    legend(figure, [panel], markerscale=1.6)
    note(
        figure,
        f"One direction of the state is replaced by its mean; what moves. Grey: directions drawn by chance. "
        f"{sample_text(summary)} Intervals: {per_cent(level)} over clusters.",
    )
    return figure
