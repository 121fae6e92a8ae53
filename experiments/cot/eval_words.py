"""The summary of `codi cot eval`, section by section, and the texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

from experiments.cot.asking import UNSTEERED, Asking, condition
from experiments.cot.claims import Chosen
from experiments.cot.measures import CONDITION
from experiments.cot.tables import PROMPTS, chain_limits, label, mean_row, records
from experiments.statistics.words import interval
from experiments.study.limits import limits
from experiments.study.result import Section

__all__ = ["Reported", "main_conditions", "samples_text", "words"]


class Reported(Chosen, Protocol):
    """What words need to know of a plan."""

    @property
    def samples(self) -> int: ...
    @property
    def asking(self) -> Asking: ...


def main_conditions(chosen: Mapping[str, tuple[int, float]]) -> list[dict[str, Any]]:
    """The conditions that are always named: the prompts, each way of steering, and its opposite."""
    found = [dict(UNSTEERED[prompt]) for prompt in PROMPTS]
    for way, (layer, c) in chosen.items():
        found += [condition("neutral", way, "all", layer, sign * c) for sign in (1, -1)]
    return found


def words(plan: Reported, trials: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    """The summary, section by section."""
    table, level = tables["levels"], f"{100 * plan.settings.level:g} %"
    plain = trials[(trials["prompt"] == "neutral") & (trials["way"] == "")]
    row = mean_row(table, "chain", UNSTEERED["neutral"])
    number = len(tables["effects_chain"])
    cells = "; ".join(f"{way}: layer {layer}, coefficient {c:g}" for way, (layer, c) in plan.chosen.items())
    found = [
        Section(
            f"{int(row['n'])} test questions in {int(row['n_clusters'])} clusters "
            f"({', '.join(plain['set'].unique())}), answered greedily in at most {plan.asking.max_new_tokens} tokens; "
            f"{cells}. Per cent with {level} intervals. "
            f"{chain_limits(plain, number, plan.settings)} Accuracy: {limits(plain, number, plan.settings)}"
        ),
        Section(_levels(plan, table), "What was measured"),
        Section(_effects(plan, tables), "Changes"),
        Section(_controls(plan, table), "Controls"),
    ]
    return [*found, *_samples(plan, trials)]


def _levels(plan: Reported, table: pd.DataFrame) -> str:
    """Main conditions × measures."""
    lines = [
        "Chains: a valid step before the answer. Read: an answer was found. Repeated: share of 4-word runs that came "
        "before; packed: bytes after compression over before (small: repeats itself).",
        "",
        "| | chains | valid steps | accuracy | accuracy given a chain | read | words | repeated | packed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in main_conditions(plan.chosen):
        cells = [
            interval(mean_row(table, "chain", one)),
            f"{mean_row(table, 'valid_steps', one)['mean']:.2f}",
            interval(mean_row(table, "correct", one)),
            _given_chain(table, one),
            f"{100 * mean_row(table, 'parsed', one)['mean']:.1f}",
            f"{mean_row(table, 'words', one)['mean']:.1f}",
            f"{mean_row(table, 'repetition', one)['mean']:.2f}",
            f"{mean_row(table, 'compression', one)['mean']:.2f}",
        ]
        lines.append(f"| {label(one)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _given_chain(table: pd.DataFrame, one: Mapping[str, Any]) -> str:
    """Accuracy of the texts with a chain, and of how many; a dash where there is none."""
    here = table["outcome"] == "correct given a chain"
    for name in CONDITION:
        here &= table[name] == one[name]
    if not here.any():
        return "–"
    row = table[here].iloc[0]
    return f"{interval(row)}, n = {int(row['n'])}"


def _effects(plan: Reported, tables: Mapping[str, pd.DataFrame]) -> str:
    """Main conditions against no steering and no sentence."""
    lines = [
        f"Paired differences from no steering and no sentence, points; *: q < {plan.settings.alpha:g} over all "
        f"{len(tables['effects_chain'])} comparisons of a column.",
        "", "| | chains | accuracy | words |", "|---|---|---|---|",
    ]  # fmt: skip
    for one in main_conditions(plan.chosen)[1:]:
        cells = []
        for outcome, scale in (("chain", 100.0), ("correct", 100.0), ("words", 1.0)):
            row = _row(tables[f"effects_{outcome}"], one)
            star = "\\*" if row["q"] < plan.settings.alpha else ""
            cells.append(interval(row, "difference", scale) + star)
        lines.append(f"| {label(one)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(table: pd.DataFrame, one: Mapping[str, Any]) -> pd.Series:
    here = (table[list(CONDITION)] == pd.Series(dict(one))).all(axis=1)
    return table[here].iloc[0]


def _controls(plan: Reported, table: pd.DataFrame) -> str:
    """Rate of chains of every other condition."""
    main = [tuple(one[name] for name in CONDITION) for one in main_conditions(plan.chosen)]
    rows = table[table["outcome"] == "chain"]
    texts = [
        f"{label(row)}: {interval(row)}" for row in records(rows) if tuple(row[name] for name in CONDITION) not in main
    ]
    return (
        f"Chains, per cent; {plan.draws} random and {plan.shuffles} shuffled vectors, averaged: "
        + "; ".join(texts)
        + "."
    )


# --- Texts ------------------------------------------------------------------------------------------------------------


def _shown(text: str, most: int = 400) -> str:
    """A text in one line, cut."""
    line = " ⏎ ".join(part.strip() for part in text.strip().splitlines() if part.strip())
    return (line if len(line) <= most else line[: most - 1] + "…") or "(nothing)"


def _sample(trials: pd.DataFrame, prompt_id: str, conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Texts to one question, a line per condition."""
    own = trials[(trials["prompt_id"] == prompt_id) & (trials["draw"] == -1)]
    lines = []
    for one in conditions:
        here = own[(own[list(CONDITION)] == pd.Series(dict(one))).all(axis=1)].iloc[0]
        marks = f"{'right' if here['correct'] else 'wrong'}{', chain' if here['chain'] else ''}"
        lines.append(f"- **{label(one)}** ({marks}): {_shown(here['text'])}")
    return lines


def _samples(plan: Reported, trials: pd.DataFrame) -> list[Section]:
    """The first question of as many sets as are shown."""
    firsts = trials.drop_duplicates("set")[["set", "prompt_id", "answer"]]
    chosen = firsts.iloc[:: max(1, len(firsts) // max(1, plan.samples))][: plan.samples]
    return [
        Section(
            f"Right answer: {row.answer}.\n\n"
            + "\n".join(_sample(trials, str(row.prompt_id), main_conditions(plan.chosen))),
            f"Texts ({row.set})",
        )
        for row in chosen.itertuples()
    ]


def samples_text(plan: Reported, trials: pd.DataFrame) -> str:
    """Every question with its texts under the main conditions, as Markdown."""
    lines = ["# Texts side by side", ""]
    for row in trials.drop_duplicates("prompt_id").itertuples():
        lines += [f"## {row.prompt_id}", "", f"Right answer: {row.answer}.", ""]
        lines += [*_sample(trials, str(row.prompt_id), main_conditions(plan.chosen)), ""]
    return "\n".join(lines)
