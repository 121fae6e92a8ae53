"""What patching found, in words. Knows nothing about trials, models or figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.latents.claims import STAR
from experiments.latents.patch.interchange import DONORS, Level, column, levels_of, moved
from experiments.latents.patch.means import KINDS, UNEDITED, replaced
from experiments.latents.patch.plan import Plan
from experiments.latents.patch.values import STATES, patched
from experiments.statistics.effects import Selector, row_of
from experiments.statistics.words import interval
from experiments.study.answers import latents_in
from experiments.study.result import Section

__all__ = ["intervals", "level_name", "predictions_of", "words"]

PREDICTIONS = ((1, "local", "t + own step 2"), (1, "propagated", "t·Z + t"), (2, "local", "own step 1 + t"))
"""Of (X±Y)·Z + (X±Y): step that is patched, prediction, and how it is written."""
_TITLES = {"other": "another prompt", "operation": "the other operation", "twin": "the same key (control)"}
_MIXED = {(1, "local"): "donor's step 1 + own step 2", (2, "local"): "own step 1 + donor's step 2"}
_INTERCHANGED = {"interchange_correct": "accuracy", "interchange_donor": "the donor's answer"}


def words(plan: Plan, tables: Mapping[str, pd.DataFrame], seen: str) -> list[Section]:
    """The summary, section by section; `seen` says what the run can see at all."""
    found = [Section(f"Differences in points of accuracy (per cent of prompts), {intervals(plan)}. {seen}".strip())]
    if not plan.form:
        found.append(Section(_OTHER_FORM))
    if "means" in tables:
        found.append(_mean_words(plan, tables))
    if "values_hit" in tables:
        found.append(_value_words(plan, tables))
    if "interchange_donor" in tables:
        found += _interchange_words(plan, tables)
    return found


_OTHER_FORM = (
    "These prompts are not all of the form (X±Y)·Z + (X±Y): a prediction is the answer of the chain worked out again "
    "from the patched step on; local predictions, donors with the other operation and claim C5 are about that form "
    "alone. Key: all intermediate values."
)


def predictions_of(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> list[tuple[int, str, str]]:
    """As PREDICTIONS, what is shown of value patching; of steps that were patched at all."""
    if plan.form:
        return list(PREDICTIONS[2:] if plan.legacy else PREDICTIONS)
    steps = set(tables["values_hit"]["step"])
    return [(step, "propagated", "t carried through") for step in plan.steps if step in steps]


def intervals(plan: Plan) -> str:
    """Which intervals are shown."""
    return f"{100 * plan.settings.level:g} % intervals over clusters"


def level_name(level: Level) -> str:
    """A level for a person: "vector", "slot layer 2", "residual 3"."""
    word, layer = level
    return word if layer == -1 else f"{word} {layer}" if word == "residual" else f"{word} layer {layer}"


def _sets(n: int) -> list[tuple[str, list[int]]]:
    """Which latents are replaced: one after another, then all; with a label."""
    return [*((str(k), [k]) for k in range(1, n + 1)), ("all", list(range(1, n + 1)))]


def _cell(row: pd.Series | Mapping[str, Any]) -> str:
    return interval(row, "difference") + ("*" if row["matters"] else "")


def _star(tables: Mapping[str, pd.DataFrame], names: Mapping[str, str]) -> list[str]:
    """What a star below these tables says: name of a table -> what its numbers are called, "" if it is the only one."""
    rows = {name: row_of(tables["sizes"], {"table": name}) for name in names}
    sizes = [f"{names[name]} {100 * row['size']:.1f} points ({row['words']})".strip() for name, row in rows.items()]
    return ["", f"\\{STAR}: {'; '.join(sizes)}."]


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head, *body = (f"| {' | '.join(line)} |" for line in (heads, *lines))
    return [head, "|" + "---|" * len(heads), *body]


def _mean_words(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Section:
    table, base = tables["means"], row_of(tables["means_levels"], UNEDITED)
    lines = []
    for label, chosen in _sets(plan.n_latents):
        cells = [_cell(row_of(table, replaced(kind, chosen), UNEDITED)) for kind in KINDS]
        other = row_of(table, replaced("other key", chosen), replaced("same key", chosen))
        lines.append([label, *cells, _cell(other)])
    text = (
        f"{int(base['n'])} prompts whose key is among the derivation prompts; unedited accuracy {interval(base)}. "
        "Change of accuracy, and the other key's mean against the same key's:"
    )
    table_lines = _table(["latent", *KINDS, "other − same"], lines)
    return Section("\n".join([text, "", *table_lines, *_star(tables, {"means": ""})]), "Mean patching")


def _value_words(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Section:
    latents = plan.value_latents
    lines, shown = [], predictions_of(plan, tables)
    for step, outcome, label in shown:
        for scope in plan.scopes:
            for state in STATES:
                rows = [row_of(tables[f"values_{outcome}"], patched("target", step, scope, state, k)) for k in latents]
                lines.append([f"step {step}, {scope}, {state}", label, *map(_cell, rows)])
    text = (
        "Share of answers that are the predicted one, minus the share when a third value's mean is put in the same "
        "place:"
    )
    heads = ["patch", "prediction", *(f"latent {k}" for k in latents)]
    called: dict[str, list[str]] = {}
    for _, outcome, label in shown:
        if label not in called.setdefault(f"values_{outcome}", []):
            called[f"values_{outcome}"].append(label)
    star = _star(tables, {name: " and ".join(labels) for name, labels in called.items()})
    return Section("\n".join([text, "", *_table(heads, lines), *star]), "Value patching")


def _interchange_words(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    known = set(tables["interchange_correct"]["kind"])
    found = [_donor_words(plan, tables, kind) for kind in DONORS if kind in known]
    best = []
    called = {f"interchange_{column(one)}_hit": _MIXED.get(one, f"donor's step {one[0]} carried through")
              for one in plan.mixed if f"interchange_{column(one)}_hit" in tables}  # fmt: skip
    for outcome, label in called.items():
        table = tables[outcome]
        top = table[table["kind"] == "other"].sort_values("difference").iloc[-1]
        best.append(f"{label}: most often with {_name(top, plan.n_latents)!r}, {_cell(top)}")
    text = f"Neither prompt's own, minus chance: {'; '.join(best)}."
    if not called:
        return found
    star = _star(tables, called)
    return [*found, Section("\n".join([text, *star]), "Mixed answers")]


def _donor_words(plan: Plan, tables: Mapping[str, pd.DataFrame], kind: str) -> Section:
    """Change of accuracy and, but for the control, share of the donor's answers, by level and latent."""
    accuracy, answers = tables["interchange_correct"], tables["interchange_donor"]
    *singles, whole = (chosen for _, chosen in _sets(plan.n_latents))
    lines = []
    for level in levels_of(kind, plan.n_layers):
        cells = []
        for chosen in (whole, *singles):
            name = moved(kind, level, chosen)
            rows = [_found(accuracy, name), *([] if kind == "twin" else [_found(answers, name)])]
            cells.append(" / ".join(_points(row) for row in rows if row is not None))
        lines.append([level_name(level), *cells])
    star = _star(tables, _INTERCHANGED) if kind == DONORS[0] else []
    read = "" if kind == "twin" else " / share that gives the donor's answer, minus a third prompt's (the chance level)"
    heads = ["level", "all", *(str(k) for k in range(1, plan.n_latents + 1))]
    return Section(
        "\n".join([f"Change of accuracy{read}:", "", *_table(heads, lines), *star]),
        f"Interchange with {_TITLES[kind]}",
    )


def _found(table: pd.DataFrame, name: Selector) -> Mapping[str, Any] | None:
    """The row of a table, None where that was not tried."""
    rows = table[(table[list(name)] == pd.Series(name)).all(axis=1)]
    return None if rows.empty else row_of(rows, name)


def _points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['difference']:+.0f}{'*' if row['matters'] else ''}".replace("-", "−")


def _name(row: pd.Series, n: int) -> str:
    """A condition for a person: "other slot layer 2 5", "other vector all"."""
    latents = latents_in(row["replaced"])
    where = "all" if len(latents) == n and n > 1 else " ".join(map(str, latents))
    return f"{row['kind']} {level_name((row['level'], row['layer']))} {where}"
