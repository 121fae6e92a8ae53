"""Figures of the lens studies, drawn from the tables of experiments/lens_measures.py and of `codi lens train`.

Page width (7.2 inches), text of 5.5 points or more, colours that colour-blind readers can tell apart: magnitudes in
cividis, signed changes in blue (better) and red (worse), lines in the Okabe-Ito colours with a marker each. A space in
a token is drawn as ␣; a character that the font does not have as its code point.

Knows nothing about models, files or how a number was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from experiments.lens.measures import TOP
from lenses.latent_lens import TEXT

__all__ = [
    "causal_figure",
    "detection_figure",
    "difference_figure",
    "heatmap_figure",
    "held_out_figure",
    "label",
    "summary_figure",
    "transfer_figure",
]

WIDTH = 7.2
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.0,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GLYPHS: set[int] = set()


def label(token: str, width: int = 9) -> str:
    """A token as it is drawn: spaces as ␣, glyphs that the font lacks as their code point, long ones cut."""
    if not _GLYPHS:
        _GLYPHS.update(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
    shown = token.replace(" ", "␣") or "∅"
    shown = "".join(c if ord(c) in _GLYPHS and c.isprintable() else f"U+{ord(c):X}" for c in shown)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def position_label(position: int) -> str:
    """Tick of a position."""
    return {TEXT: "text", 0: "begin of\nthought"}.get(position, f"latent {position}")


def _short(position: int) -> str:
    return {TEXT: "text", 0: "bot"}.get(position, str(position))


def _ink(colour: tuple[float, float, float, float]) -> str:
    red, green, blue, _ = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _matrix(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    colours: str = "cividis",
    limits: tuple[float, float] = (0.0, 1.0),
    size: float = 6.0,
) -> ScalarMappable:
    """A heatmap with a text in every cell; the first row is drawn at the bottom (layer 0)."""
    norm = Normalize(*limits, clip=True)
    scale = matplotlib.colormaps[colours]
    axes.imshow(np.ma.masked_invalid(values), cmap=scale, norm=norm, aspect="auto", origin="lower")
    if texts is not None:
        for i, line in enumerate(texts):
            for j, text in enumerate(line):
                if text:
                    shade = scale(norm(values[i, j])) if np.isfinite(values[i, j]) else (1.0, 1.0, 1.0, 1.0)
                    axes.text(j, i, text, ha="center", va="center", fontsize=size, color=_ink(shade), parse_math=False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for i in range(1, len(rows)):
        axes.axhline(i - 0.5, color="white", linewidth=0.4)
    for j in range(1, len(columns)):
        axes.axvline(j - 0.5, color="white", linewidth=0.4)
    return ScalarMappable(norm, scale)


def _figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in this module's style, whatever matplotlib's settings are."""

    def wrapped(*args: Any, **options: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    wrapped.__doc__, wrapped.__name__ = draw.__doc__, draw.__name__
    return wrapped


def _lens_title(name: str) -> str:
    words = {"plain": "logit lens", "each": "tuned lens, one per position", "text": "tuned lens trained on text"}
    return words.get(name, f"tuned lens “{name}”")


def _signed(value: float) -> str:
    """A difference with its sign and a real minus; zero has none."""
    text = f"{value:+.2f}"
    return "0" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def _bar(figure: Figure, mappable: ScalarMappable, axes: Any, text: str, extend: Any = "neither") -> None:
    bar = figure.colorbar(mappable, ax=axes, fraction=0.03, pad=0.01, aspect=30, extend=extend)
    bar.set_label(text, fontsize=6.5)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=6, width=0.4, length=2)


# --- One prompt -------------------------------------------------------------------------------------------------------


@styled
def heatmap_figure(readings: pd.DataFrame, title: str) -> Figure:
    """Most probable token and its probability at every position and layer, one panel per lens."""
    lenses = list(dict.fromkeys(readings["lens"]))
    layers = sorted(readings["layer"].unique())
    positions = sorted(readings["latent"].unique())
    top = readings[readings["rank"] == 1]
    height = 0.3 + 0.13 * (title.count("\n") + 1) + len(lenses) * (0.45 + 0.21 * len(layers))
    figure, axes = _figure(height, len(lenses), 1)
    figure.suptitle(title, fontsize=7.5, x=0.01, ha="left", parse_math=False)
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
        names = [
            f"{layer}" + (" (output)" if layer == layers[-1] else " (fed)" if layer == 0 else "") for layer in layers
        ]
        shown = _matrix(panel, values, names, [position_label(p) for p in positions], texts=texts)
        panel.set_title(_lens_title(lens), loc="left")
        panel.set_ylabel("layer")
    _bar(figure, shown, axes[:, 0].tolist(), "probability of the shown token")
    return figure


# --- Training ---------------------------------------------------------------------------------------------------------


@styled
def held_out_figure(table: pd.DataFrame, lens_names: Sequence[str]) -> Figure:
    """Held-out KL per layer, plain and trained, one panel per position; several lenses may have read a position.

    Args:
        table: columns lens, position, layer, plain, divergence, lower, upper.
        lens_names: lenses to draw, at most seven.
    """
    positions = sorted(table["position"].unique())
    columns = min(4, len(positions))
    rows = -(-len(positions) // columns)
    figure, axes = _figure(0.45 + 1.55 * rows, rows, columns, sharex=True, sharey=True)
    for panel in axes.flat[len(positions) :]:
        panel.set_visible(False)
    for panel, position in zip(axes.flat[: len(positions)], positions, strict=True):
        here = table[table["position"] == position]
        plain = here.drop_duplicates("layer").sort_values("layer")
        panel.plot(
            plain["layer"],
            plain["plain"],
            color="#6e6e6e",
            linestyle="--",
            marker="x",
            markersize=3.5,
            linewidth=1,
            label="logit lens",
        )
        for place, name in enumerate(lens_names):
            mine = here[here["lens"] == name].sort_values("layer")
            if mine.empty:
                continue
            values = mine["divergence"].to_numpy()
            spread = np.abs(np.stack([values - mine["lower"], mine["upper"] - values]))
            panel.errorbar(
                mine["layer"] + 0.06 * (place - 1),
                values,
                yerr=spread,
                color=COLOURS[place % 7],
                marker=MARKERS[place % 7],
                markersize=3,
                linewidth=1,
                elinewidth=0.7,
                capsize=1.5,
                label=_lens_title(name),
            )
        panel.set_title(position_label(position).replace("\n", " "))
        panel.set_yscale("log")
        panel.spines[["top", "right"]].set_visible(False)
        if len(plain) <= 9:
            panel.set_xticks(plain["layer"])
        else:
            panel.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("layer", fontsize=7)
    figure.supylabel("KL(output ‖ lens), nats, held out", fontsize=7)
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(handles)))
    return figure


# --- Detection --------------------------------------------------------------------------------------------------------


@styled
def detection_figure(rates: pd.DataFrame, targets: Sequence[str], k: int = 5, note: str = "") -> Figure:
    """Rate (upper number) and chance level (lower) at every latent and layer, a row of panels per lens.

    Args:
        rates: of `Detection.rates`.
        targets: columns of panels.
    """
    rates = rates[(rates["answered"] == "all") & (rates["k"] == k) & rates["target"].isin(targets)]
    lenses = list(dict.fromkeys(rates["lens"]))
    positions, layers = sorted(rates["latent"].unique()), sorted(rates["layer"].unique())
    words = {"steps": "any intermediate", "answer": "answer", "question": "a number of the question"}
    height = 0.5 + len(lenses) * (0.35 + 0.27 * len(layers))
    figure, axes = _figure(height, len(lenses), len(targets), sharex=True, sharey=True)
    for row, (panels, lens) in enumerate(zip(axes, lenses, strict=True)):
        for panel, target in zip(panels, targets, strict=True):
            mine = rates[(rates["lens"] == lens) & (rates["target"] == target)]
            value = mine.pivot(index="layer", columns="latent", values="rate").reindex(layers, columns=positions)
            chance = mine.pivot(index="layer", columns="latent", values="chance").reindex(layers, columns=positions)
            texts = [
                [f"{v:.2f}\n{c:.2f}".replace("0.", ".") for v, c in zip(*line, strict=True)]
                for line in zip(value.to_numpy(), chance.to_numpy(), strict=True)
            ]
            shown = _matrix(
                panel,
                value.to_numpy(),
                [str(layer) for layer in layers],
                [_short(p) for p in positions],
                texts=texts,
                size=5.5,
            )
            count = f"n = {int(mine['n'].max())}" if len(mine) else ""
            name = words.get(target, target.replace("step", "step "))
            panel.set_title(f"{name} ({count})" if row == 0 else "", loc="left")
        panels[0].set_ylabel(f"{_lens_title(lens).replace(', ', ',' + chr(10))}\nlayer")
    figure.supxlabel(f"latent (bot: begin-of-thought token). {note}".strip(), fontsize=7)
    _bar(figure, shown, axes.ravel().tolist(), f"in the top {k}: rate (upper), chance (lower)")
    return figure


@styled
def curves_figure(rates: pd.DataFrame, target: str, layers: Sequence[int]) -> Figure:
    """Detection rate against k, a line per latent, a panel per lens and layer; dotted: chance."""
    rates = rates[(rates["answered"] == "all") & (rates["target"] == target) & (rates["latent"] > 0)]
    lenses = list(dict.fromkeys(rates["lens"]))
    figure, axes = _figure(0.5 + 1.6 * len(lenses), len(lenses), len(layers), sharex=True, sharey=True)
    for row, (panels, lens) in enumerate(zip(axes, lenses, strict=True)):
        for panel, layer in zip(panels, layers, strict=True):
            here = rates[(rates["lens"] == lens) & (rates["layer"] == layer)]
            for place, latent in enumerate(sorted(here["latent"].unique())):
                mine = here[here["latent"] == latent].sort_values("k")
                style = {"color": COLOURS[place % 7], "linewidth": 1}
                panel.plot(
                    mine["k"],
                    mine["rate"],
                    marker=MARKERS[place % 7],
                    markersize=2.8,
                    label=f"latent {latent}",
                    **style,
                )
                few = mine[mine["k"].isin((1, 5, TOP))]  # intervals at three k, shifted so that none hides another
                spread = np.abs(np.stack([few["rate"] - few["lower"], few["upper"] - few["rate"]]))
                panel.errorbar(
                    few["k"] + 0.12 * (place - 2),
                    few["rate"],
                    yerr=spread,
                    fmt="none",
                    elinewidth=0.6,
                    alpha=0.7,
                    ecolor=style["color"],
                )
                panel.plot(mine["k"], mine["chance"], linestyle=":", color=style["color"], linewidth=0.8)
            panel.set_title(f"layer {layer}" if row == 0 else "")
            panel.set_ylim(0, 1)
            panel.set_xticks([1, 5, TOP])
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{_lens_title(lens).replace(', ', ',' + chr(10))}\ndetection rate")
    figure.supxlabel("k (dotted: chance, other prompts' values; bars at k = 1, 5, 10: 95 % over clusters)", fontsize=7)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=6)
    return figure


@styled
def summary_figure(summaries: pd.DataFrame, measure: str, title: str) -> Figure:
    """One measure per latent, a panel per layer, a line per lens, with intervals."""
    here = summaries[summaries["measure"] == measure]
    lenses, layers = list(dict.fromkeys(here["lens"])), sorted(here["layer"].unique())
    columns = min(5, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = _figure(0.6 + 1.45 * rows, rows, columns, sharex=True, sharey=True)
    for panel in axes.flat[len(layers) :]:
        panel.set_visible(False)
    for panel, layer in zip(axes.flat[: len(layers)], layers, strict=True):
        for place, lens in enumerate(lenses):
            mine = here[(here["lens"] == lens) & (here["layer"] == layer)].sort_values("latent")
            values = mine["mean"].to_numpy()
            spread = np.abs(np.stack([values - mine["lower"], mine["upper"] - values]))
            panel.errorbar(
                mine["latent"] + 0.08 * place,
                values,
                yerr=spread,
                color=COLOURS[place % 7],
                marker=MARKERS[place % 7],
                markersize=3,
                linewidth=1,
                elinewidth=0.7,
                capsize=1.5,
                label=_lens_title(lens),
            )
        panel.set_title(f"layer {layer}")
        panel.set_xticks(sorted(here["latent"].unique()), [_short(p) for p in sorted(here["latent"].unique())])
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(bottom=0)  # shared by all panels, once all of them are drawn
    figure.supylabel(title, fontsize=7)
    figure.supxlabel("latent (bot: begin-of-thought token); intervals: 95 % over clusters", fontsize=7)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4)
    return figure


# --- Difference lens, transfer, causes --------------------------------------------------------------------------------


@styled
def difference_figure(table: pd.DataFrame, layer: int, note: str = "") -> Figure:
    """A × B grid of the three most probable tokens of mean_A − mean_B at one layer, a panel per lens."""
    here = table[table["layer"] == layer]
    lenses = list(dict.fromkeys(here["lens"]))
    latents = sorted(set(here["source"]) | set(here["target"]))
    figure, axes = _figure(0.55 + (0.4 + 0.42 * len(latents)) * len(lenses), len(lenses), 1)
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
        names = [str(latent) for latent in latents]
        shown = _matrix(panel, values, [f"A = {n}" for n in names], [f"B = {n}" for n in names], texts=texts, size=5.5)
        panel.invert_yaxis()
        panel.set_title(f"{_lens_title(lens)}, layer {layer}", loc="left")
    figure.supxlabel(f"three most probable tokens of mean A − mean B. {note}".strip(), fontsize=7)
    _bar(figure, shown, axes[:, 0].tolist(), f"share of the top {TOP} that two halves of the prompts agree on")
    return figure


@styled
def transfer_figure(table: pd.DataFrame, note: str = "") -> Figure:
    """KL per lens and position (mean over layers), and its change against the plain lens."""
    here = table[table["layer"] == -1]
    lenses = list(dict.fromkeys(here["lens"]))[::-1]
    positions = sorted(here["position"].unique())
    figure, axes = _figure(0.75 + 0.24 * len(lenses), 1, 2, sharey=True)
    level = (
        here.pivot(index="lens", columns="position", values="divergence").reindex(lenses, columns=positions).to_numpy()
    )
    change = here.pivot(index="lens", columns="position", values="change").reindex(lenses, columns=positions).to_numpy()
    names = [
        {"plain": "logit lens", "text": "text", "each": "one per position"}.get(
            n, f"latent {n}" if n.isdigit() and n != "0" else "begin of thought" if n == "0" else n
        )
        for n in lenses
    ]
    columns = [_short(position) for position in positions]
    # one bad position must not take all the colours: they end at the ninth decile, the numbers say the rest
    largest = float(np.nanquantile(level, 0.9))
    texts = [["" if np.isnan(v) else f"{v:.2f}" for v in line] for line in level]
    shown = _matrix(axes[0, 0], level, names, columns, texts=texts, limits=(0.0, largest))
    axes[0, 0].set_title("KL(output ‖ lens), nats, mean over layers", loc="left")
    axes[0, 0].set_ylabel("lens trained on")
    _bar(figure, shown, axes[0, 0], "nats", extend="max")
    limit = max(float(np.nanquantile(np.abs(change), 0.9)), 1e-6)
    texts = [["" if np.isnan(v) else _signed(v) for v in line] for line in change]
    shown = _matrix(axes[0, 1], change, names, columns, texts=texts, colours="RdBu_r", limits=(-limit, limit))
    axes[0, 1].set_title("change against the logit lens (blue: better)", loc="left")
    _bar(figure, shown, axes[0, 1], "nats", extend="both")
    figure.supxlabel(
        f"applied to: token of a question (text), begin of thought (bot), latent. {note}".strip(), fontsize=7
    )
    return figure


@styled
def causal_figure(summary: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """What one ablated direction does, by kind, and its effect against the lens's energy, a point per direction."""
    figure, axes = _figure(2.9, 1, 3)
    kinds = ["lens", "component", "covariance", "random"]
    words = {
        "lens": "lens",
        "component": "principal\ncomp.",
        "covariance": "covari-\nance",
        "random": "random",
    }
    for panel, measure, title in (
        (axes[0, 0], "output", "own output at that latent"),
        (axes[0, 1], "answer", "first answer token"),
    ):
        mine = summary[summary["measure"] == measure].set_index("kind").reindex(kinds)
        for place, kind in enumerate(kinds):
            row = mine.loc[kind]
            panel.errorbar(
                place,
                row["mean"],
                yerr=[[row["mean"] - row["lower"]], [row["upper"] - row["mean"]]],
                color=COLOURS[place],
                marker=MARKERS[place],
                markersize=5,
                capsize=3,
            )
        panel.set_xticks(range(len(kinds)), [words[kind] for kind in kinds], fontsize=6)
        panel.set_xlim(-0.5, len(kinds) - 0.5)
        panel.set_ylim(bottom=-0.03 * float(mine["upper"].max()))  # a marker at zero is not cut
        panel.set_title(title)
        panel.set_ylabel("KL after ablating one direction, nats")
        panel.spines[["top", "right"]].set_visible(False)
    panel = axes[0, 2]
    for place, kind in enumerate(kinds):
        mine = points[points["kind"] == kind]
        panel.scatter(
            mine["energy"],
            mine["output"],
            s=7,
            color=COLOURS[place],
            marker=MARKERS[place],
            alpha=0.7,
            linewidths=0,
            label={"component": "principal component", "covariance": "drawn from covariance"}.get(kind, kind),
        )
    panel.set_xscale("symlog", linthresh=1e-3)
    panel.set_yscale("symlog", linthresh=1e-3)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("energy: KL of the lens, nats")
    panel.set_ylabel("KL of the model's output, nats")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("each direction")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), fontsize=7)
    return figure
