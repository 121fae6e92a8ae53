"""Figures of `codi circuit`: heat maps of heads, curves of what is kept, pathways, mixing, priors, one flow tree.

From tables (and the tree's record) alone. Knows nothing about models or texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.figures.heatmap import Scale, colour_bar, matrix
from experiments.figures.series import band, baseline, draw_bars, draw_series, from_zero
from experiments.figures.style import CONTROL, SERIES, legend, new_figure, number_text, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_effects", "draw_kept", "draw_mixing", "draw_pathways", "draw_rift", "draw_tree"]

_COLUMNS = 4
RANKINGS = ("reasoning", "copy", "decision")


@styled
def draw_effects(table: pd.DataFrame, n_blocks: int, n_heads: int) -> Figure:
    """Heads to the right, blocks upwards, one panel per subtask, one scale for all.

    Args:
        table: columns subtask, kind, block, head, effect.
        n_blocks, n_heads: of the model; heads that were not patched stay grey.
    """
    subtasks = list(table.groupby(["subtask", "kind"], observed=True, sort=True))
    rows = -(-len(subtasks) // _COLUMNS)
    height = float(np.clip(0.08 * n_blocks, 0.7, 2.6))
    figure, axes = new_figure(rows, min(_COLUMNS, len(subtasks)), total=0.6 + (height + 0.45) * rows)
    scale = Scale.signed(table["effect"], least=0.1, quantile=0.995)  # a few heads must not take all the colours
    every = max(1, n_blocks // 6)
    for axis in axes.flat[len(subtasks) :]:
        axis.set_visible(False)
    for place, ((subtask, kind), part) in enumerate(subtasks):
        axis = axes.flat[place]
        values = np.full((n_blocks, n_heads), np.nan)
        values[part["block"] - 1, part["head"]] = part["effect"]
        labels = [block if (block - 1) % every == 0 else "" for block in range(1, n_blocks + 1)]
        matrix(axis, values, labels, range(n_heads), scale, upwards=True)
        axis.set_title(f"{subtask}: {kind}")
        if place % _COLUMNS == 0:
            axis.set_ylabel("block")
        if place + _COLUMNS >= len(subtasks):
            axis.set_xlabel("head")
    colour_bar(figure, scale, "E, share of KL recovered", of=axes, values=table["effect"])
    return figure


@styled
def draw_kept(table: pd.DataFrame, n_heads: int) -> Figure:
    """Agreement against heads kept: over all subtasks, then by kind of subtask; random sets as a band.

    Args:
        table: of `kept_table`, held-out items.
        n_heads: of the whole model.
    """
    held = table[(table["set"] == "held-out") & ~table["complement"].astype(bool)]
    kinds = ["all", *sorted(set(held["kind"]) - {"all"})]
    figure, axes = new_figure(1, len(kinds), height=2.4, sharey=True)
    columns = ["agreement", "lower", "upper", "least", "most"]
    for axis, kind in zip(axes.flat, kinds, strict=True):
        part = held[held["kind"] == kind].groupby(["circuit", "kept"], observed=True)[columns].mean().reset_index()
        drawn = part[part["circuit"] == "random"]
        low, high, mean = (100 * drawn[name] for name in ("least", "most", "agreement"))
        band(axis, drawn["kept"], low, high, "random heads, all draws", mean, "random heads, mean")
        for place, name in enumerate(RANKINGS):
            own = part[part["circuit"] == name]
            if len(own):  # by kind the mean of several subtasks: no interval of its own
                shown = own if kind == "all" else own.assign(lower=np.nan, upper=np.nan)
                draw_series(axis, own["kept"], shown, f"ranked by {name}", place, "agreement", step=0.004 * n_heads)
        none = part[part["circuit"] == "none"]
        if len(none):
            baseline(axis, 100 * float(none["agreement"].iloc[0]), "no head kept")
        axis.set_ylim(-3, 104)
        axis.set_title("all subtasks" if kind == "all" else kind)
        axis.set_xlabel("heads kept")
    axes.flat[0].set_ylabel("same word as the whole model, %")
    legend(figure, axes)
    return figure


@styled
def draw_pathways(table: pd.DataFrame) -> Figure:
    """Bars: share of every part of the text in what the writers write, by subtask.

    Args:
        table: of `source_table`.
    """
    figure, axes = new_figure(1, 1, height=2.6)
    axis = axes[0, 0]
    found = set(table.loc[table["mean"] != 0, "part"])  # a part that no item has is no bar, and needs no place
    parts = [name for name in ("demonstrations", "question", "chain", "rest") if name in found]
    subtasks = table[["subtask", "kind"]].drop_duplicates().sort_values("subtask")
    for place, part in enumerate(parts):
        own = table[(table["part"] == part) & (table["mean"] != 0)].sort_values("subtask")
        at = subtasks["subtask"].tolist()
        draw_bars(axis, [at.index(x) for x in own["subtask"]], own, part, place, len(parts), control=part == "rest")
    axis.set_xticks(range(len(subtasks)), [f"{row['subtask']}\n{row['kind']}" for _, row in subtasks.iterrows()])
    axis.set_xlabel("subtask")
    axis.set_ylabel("share of what writers write, %")
    from_zero(axis)
    legend(figure, axes)
    return figure


@styled
def draw_mixing(table: pd.DataFrame) -> Figure:
    """Accuracy of both probes by layer, with shuffled labels in grey.

    Args:
        table: of `mixing_table`.
    """
    figure, axes = new_figure(1, 2, height=2.4, sharey=True)
    for axis, probe in zip(axes.flat, ("linear", "mlp"), strict=True):
        for place, labels in enumerate(("true", "shuffled")):
            own = table[(table["probe"] == probe) & (table["labels"] == labels)].sort_values("layer")
            draw_series(axis, own["layer"], own, f"{labels} labels", place, control=labels == "shuffled")
        baseline(axis, 100 * float(table["chance"].iloc[0]), "chance")
        axis.set_title("linear probe" if probe == "linear" else "small network")
        axis.set_xlabel("layer")
    axes.flat[0].set_ylabel("right relation, %")
    legend(figure, axes)
    return figure


@styled
def draw_rift(table: pd.DataFrame, marks: Mapping[str, Sequence[int]]) -> Figure:
    """Probability of both priors by layer, one panel per kind of position; where writers and movers stand.

    Args:
        table: of `rift_table`.
        marks: name ("writers", "movers") -> blocks, drawn as ticks in the first panel.
    """
    kinds = ["all", *sorted(set(table["kind"]) - {"all"})]
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = new_figure(rows, columns, height=1.9, sharex=True)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for place, (axis, kind) in enumerate(zip(axes.flat[: len(kinds)], kinds, strict=True)):
        for number, prior in enumerate(("context", "pretraining")):
            own = table[(table["kind"] == kind) & (table["prior"] == prior)].sort_values("layer")
            draw_series(axis, own["layer"], own, f"{prior} prior", number, step=0.0, markersize=0)
        axis.set_title("all positions" if kind == "all" else kind)
        if place + columns >= len(kinds):
            axis.set_xlabel("layer")
        if place % columns == 0:
            axis.set_ylabel("probability, %")
        from_zero(axis)
    axis = axes.flat[0]
    for number, (name, blocks) in enumerate(marks.items()):
        height = axis.get_ylim()[1] * (1.0 - 0.08 * number)
        axis.plot(list(blocks), [height] * len(blocks), "|" if number else "v", color=(CONTROL, SERIES[3])[number % 2],
                  markersize=4, label=f"blocks of {name}", clip_on=False)  # fmt: skip
    legend(figure, axes)
    return figure


@styled
def draw_tree(record: Mapping[str, Any]) -> Figure:
    """A flow tree: tokens to the right in order of the text, heads at their blocks, arrows from reader to read.

    Args:
        record: of `circuits.flow.tree_record`, with the text of tokens.
    """
    nodes = {node["id"]: node for node in record["nodes"]}
    places = sorted({node["position"] for node in nodes.values()})
    at = {position: i for i, position in enumerate(places)}
    figure, axes = new_figure(1, 1, height=3.6)
    axis = axes[0, 0]
    shift, row = {name: 0.0 for name in nodes}, {name: 0 for name in nodes}
    for name, node in nodes.items():
        if node["kind"] == "head":
            same = [n for n, other in nodes.items() if other["kind"] == "head"
                    and (other["position"], other["block"]) == (node["position"], node["block"])]  # fmt: skip
            row[name] = same.index(name)
            shift[name] = 0.28 * (row[name] - (len(same) - 1) / 2)

    def where(name: str) -> tuple[float, float]:
        node = nodes[name]
        return at[node["position"]] + shift[name], float(node.get("block", 0))

    for edge in record["edges"]:
        reads = edge["kind"] == "attends"
        axis.annotate(
            "", xy=where(edge["target"]), xytext=where(edge["source"]),
            arrowprops={"arrowstyle": "->", "lw": 0.4 + 2.0 * edge.get("attention", edge.get("share", 0.0)),
                        "color": SERIES[0] if reads else CONTROL, "alpha": 0.7, "shrinkA": 5, "shrinkB": 5},
        )  # fmt: skip
    for name, node in nodes.items():
        x, y = where(name)
        if node["kind"] == "head":
            axis.plot(x, y, "o", color=SERIES[1], markersize=5)
            label, above = f"{node['block']}.{node['head']}", (0, 5 + 8 * row[name])
            axis.annotate(label, (x, y), above, textcoords="offset points", ha="center")
        else:
            axis.plot(x, y, "s", color=CONTROL, markersize=4)
    texts = {node["position"]: node["text"] for node in nodes.values() if node["kind"] == "token"}
    names = [f"{texts.get(p, '').strip() or '·'}\n{number_text(p, 'd')}" for p in places]
    axis.set_xticks(range(len(places)), names)
    axis.set_xlabel("token and its place in the text; the word is predicted at the last one")
    axis.set_ylabel("block (0: the token)")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.margins(0.08, 0.1)
    return figure
