"""The summary of `codi circuit` in words, from its tables. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.circuit.tables import NAMED
from experiments.circuit.tables_traced import N_WRITERS
from experiments.statistics.words import interval, p_text
from experiments.study.result import Section

__all__ = ["flow_section", "knockout_section", "mixing_section", "patching_section", "rift_section", "with_interval",
           "writers_section"]  # fmt: skip

Tables = Mapping[str, pd.DataFrame]


def with_interval(row: Any, name: str, scale: float = 1, digits: int = 2) -> str:
    """An estimate with its interval, or in words that there is none."""
    if np.isfinite(row["lower"]) and np.isfinite(row["upper"]):
        return interval(row, name, scale=scale, digits=digits)
    if not np.isfinite(row[name]):
        return "unknown"
    return f"{scale * row[name]:.{digits}f} (one item: no interval)".replace("-", "−")


def patching_section(tables: Tables, level: float) -> Section:
    """A line per subtask: how often the word is predicted, the strongest heads, and what they recover elsewhere."""
    found, chosen = tables["effects"], tables["chosen_heads"]
    lines = [
        f"block.head with E and its {100 * level:g} % interval; the {NAMED} largest of many are larger by chance too. "
        "What can be believed: p (of no recovery, corrected over all heads and subtasks), and what the strongest heads "
        f"of one half of the items recover on the other half, beside a head drawn at random. Smallest E visible: how "
        "far a typical head's interval reaches.",
        "",
    ]
    for _, row in tables["predictions"].iterrows():
        part = found[found["subtask"] == row["subtask"]]
        best = part.nlargest(NAMED, "effect")
        heads = "; ".join(f"{int(one['block'])}.{int(one['head'])} {with_interval(one, 'effect')}"
                          for _, one in best.iterrows())  # fmt: skip
        words = f"- {row['subtask']} ({row['kind']}): word predicted in {interval(row)} % of {row['n']} items; "
        if part.empty:
            lines.append(words + "nothing to patch")
            continue
        reach = float((part["upper"] - part["effect"]).median())
        certain = int((part["p"] < 1 - level).sum())
        words += f"{heads}. {certain or 'No'} head{'s' if certain > 1 else ''} with p < {1 - level:.2g} (smallest "
        words += f"{p_text(float(part['p'].min()))})"
        words += f"; smallest E visible {reach:.2f}" if np.isfinite(reach) else "; one item: no interval"
        own = chosen[chosen["subtask"] == row["subtask"]].set_index("heads")
        if len(own):
            words += (
                f"; on the other half {with_interval(own.loc['chosen'], 'effect')} per chosen head, "
                f"{with_interval(own.loc['random'], 'effect', digits=3)} per random one"
            )
        lines.append(words)
    return Section("\n".join(lines), "Strongest heads")


def knockout_section(tables: Tables, published: int, n_heads: int) -> Section:
    """What circuits of the published share keep, and whether they are all of it."""
    kept = tables["kept"]
    here = kept[(kept["subtask"] == -1) & ~kept["complement"].astype(bool)]
    lines = [
        f"Heads that are not kept say their mean over false ontologies. Agreement: the same word as the whole model "
        f"({n_heads} heads), mean over all subtasks, with {published} heads kept (the published share); accuracy: the "
        "gold word. Held-out: other ontologies of the same words.",
        "",
    ]
    for name, part in here.groupby("set", observed=True):
        whole, none = (part[part["circuit"] == end].iloc[0] for end in ("whole", "none"))
        lines.append(
            f"- {name} items: accuracy of the whole model {100 * whole['accuracy']:.1f} %; with no head "
            f"{with_interval(none, 'agreement', 100, 1)} % agreement"
        )
        for _, row in part[part["kept"] == published].iterrows():
            drawn = (
                f" (draws {100 * row['least']:.1f} to {100 * row['most']:.1f})" if row["circuit"] == "random" else ""
            )
            lines.append(
                f"  - {row['circuit']}: {with_interval(row, 'agreement', 100, 1)} % agreement{drawn}, accuracy "
                f"{100 * row['accuracy']:.1f} %"
            )
    apart = here[here["circuit"] == "outliers"]["kept"]
    lines.append(
        f"- Outliers of the reasoning scores (histogram rule): {int(apart.iloc[0])} heads."
        if len(apart)
        else "- The histogram rule finds no reasoning score that stands apart."
    )
    lines += ["", "Faithfulness and completeness (probability of the right word; 1: does what the model does; nothing "
                  "else does it):", ""]  # fmt: skip
    circuits = tables["circuits"]
    rows = circuits[(circuits["kept"] == published) | (circuits["circuit"] == "outliers")]
    for _, row in rows.iterrows():
        if row["circuit"] in ("reasoning", "outliers", "random"):
            lines.append(f"- {row['set']}, {row['circuit']} ({row['kept']} heads): {row['measure']} "
                         f"{with_interval(row, 'mean')}")  # fmt: skip
    return Section("\n".join(lines), "Knock-out")


def writers_section(tables: Tables, n_blocks: int) -> Section:
    """The loudest writers, and what silencing them does."""
    table, ablation = tables["writers"], tables["ablation"]
    if table.empty:
        return Section("No word was predicted: nobody writes.", "Writers")
    best = table.head(N_WRITERS)
    named = "; ".join(f"{int(one['block'])}.{int(one['head'])} {with_interval(one, 'share', digits=3)}"
                      for _, one in best.head(NAMED).iterrows())  # fmt: skip
    later = int((best["block"] > n_blocks / 2).sum())
    text = (
        f"Share of the words' logits that a head writes itself, the largest: {named}. Of the {len(best)} loudest "
        f"{later} stand in the later half of {n_blocks} blocks (median block {best['block'].median():g})."
    )
    here = ablation[ablation["subtask"] == -1].set_index("silenced") if len(ablation) else ablation
    if len(here):
        said = {name: with_interval(here.loc[name], "mean") for name in ("none", "writers", "random")}
        text += (
            f" On held-out items the right word has probability {said['none']}; with these writers silenced "
            f"{said['writers']}; with as many random heads of the same blocks {said['random']}."
        )
    return Section(text, "Writers")


def flow_section(tables: Tables, n_blocks: int) -> Section:
    """Where writers write from, how many sources at once, the causal check, and the movers."""
    sources, several = tables["sources"], tables["pathways"]
    if sources.empty:
        return Section("No word was predicted: there is no flow.", "Flow")
    lines = [f"What the {N_WRITERS} loudest writers write, by the part of the text that it comes from:", ""]
    groups: Any = sources.groupby(["subtask", "kind"], observed=True)
    for (subtask, kind), part in groups:
        there = part[part["mean"] != 0]
        shares = ", ".join(f"{row['part']} {100 * row['mean']:.0f} %" for _, row in there.iterrows())
        count = several[several["subtask"] == subtask].iloc[0]
        lines.append(f"- {subtask} ({kind}): {shares}; {count['mean']:.1f} sources at once, several in "
                     f"{100 * count['several']:.0f} % of {count['n_clusters']} items")  # fmt: skip
    mentions = tables["mentions"]
    if len(mentions):
        lines += ["", "Inferred words when their earlier mentions are exchanged (probability):", ""]
        for subtask, part in mentions.groupby("subtask", observed=True):
            by = part.set_index("corruption")
            words = ", ".join(name + " " + with_interval(by.loc[name], "mean")
                              for name in ("none", "question", "chain", "both"))  # fmt: skip
            lines.append(f"- {subtask!s}: {words}")
    best = tables["movers"].head(N_WRITERS)
    first = int((best["block"] <= n_blocks / 2).sum())
    named = ", ".join(f"{int(one['block'])}.{int(one['head'])}" for _, one in best.head(NAMED).iterrows())
    lines += ["", f"Heads that attend most from objects of statements to their subjects: {named}; of {len(best)} such "
                  f"{first} stand in the first half."]  # fmt: skip
    return Section("\n".join(lines), "Flow")


def mixing_section(tables: Tables) -> Section:
    """Where probes do best, beside shuffled labels."""
    table = tables["mixing"]
    lines = ["Relation of two words (edge, negated edge, none) from their streams; words of the test are new:", ""]
    for probe, name in (("linear", "linear probe"), ("mlp", "small network")):
        part = table[table["probe"] == probe]
        true, shuffled = part[part["labels"] == "true"], part[part["labels"] == "shuffled"]
        best = true.nlargest(1, "mean").iloc[0]
        other = shuffled[shuffled["layer"] == best["layer"]].iloc[0]
        ends = true.sort_values("layer").iloc[[0, -1]]
        lines.append(
            f"- {name}: best at layer {best['layer']} with {with_interval(best, 'mean', 100, 1)} % right (F1 "
            f"{best['f1']:.2f}; the best of {len(true)} layers), shuffled labels "
            f"{with_interval(other, 'mean', 100, 1)} %; {100 * ends['mean'].iloc[0]:.1f} % at layer "
            f"{ends['layer'].iloc[0]}, "
            f"{100 * ends['mean'].iloc[1]:.1f} % at layer {ends['layer'].iloc[1]}; chance {100 * best['chance']:.1f} %"
        )
    return Section("\n".join(lines), "Token mixing")


def rift_section(tables: Tables, n_layers: int) -> Section:
    """Where the context overtakes pretraining."""
    lines = [
        "Depth (0: embedding, 1: last layer) from which on what followed a token elsewhere in the text is more "
        "probable than what the model says after the token alone:",
        "",
    ]
    for _, row in tables["crossing"].iterrows():
        if np.isfinite(row["depth"]):
            words = f"{with_interval(row, 'depth')}, layer {row['depth'] * n_layers:.1f} of {n_layers}"
        else:
            words = "pretraining leads to the last layer"
        lines.append(f"- {row['kind']}: {words} ({row['n']} items)")
    return Section("\n".join(lines), "Rift")
