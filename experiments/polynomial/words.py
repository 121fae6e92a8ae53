"""What the study of polynomial iteration found, in words. Knows nothing about trials, models or figures."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from experiments.polynomial.claims import place_name
from experiments.polynomial.measures import READERS
from experiments.polynomial.plan import Plan
from experiments.statistics.effects import row_of
from experiments.statistics.words import interval
from experiments.study.result import Section

__all__ = ["words"]


def words(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    """The summary, section by section."""
    kind = "prime" if plan.prime else "composite"
    over = f"{100 * plan.settings.level:g} % intervals over sequences"
    about = (
        f"s ← s · x + {plan.b} modulo {plan.m} ({kind}), hop by hop; s1 is the state after the first hop, the last "
        f"state is the answer, those before it are bridge states. Per cent of prompts, {over}; chance "
        f"{100 / plan.m:.1f} %."
    )
    return [Section(about), _accuracy(plan, tables), _reads(plan, tables), _hidden(plan, tables)]


def _table(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def _accuracy(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Section:
    rows = [row_of(tables["accuracy"], {"hops": hops}) for hops in plan.hops]
    lines = [[str(hops), interval(row), str(int(row["n"]))] for hops, row in zip(plan.hops, rows, strict=True)]
    table = _table(["hops", "answered right", "prompts"], lines)
    return Section(f"After {plan.n_latents} latents:\n\n{table}", "Accuracy")


def _reads(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Section:
    lines = []
    for hops in plan.hops:
        for state in range(1, hops + 1):
            thought, end = (
                row_of(tables["reads"], {"hops": hops, "state": state, "within": within})
                for within in ("thought", "end")
            )
            name = f"s{state}" + (" (answer)" if state == hops else "")
            lines.append([str(hops), name, interval(thought), place_name(plan, thought), interval(end)])
    text = (
        "Read right at the place of the thought where it is read best, and at the end of thought, by lens or probe; "
        "the place is chosen on other prompts:"
    )
    heads = ["hops", "state", "in the thought", "read at", "at the end of thought"]
    return Section(f"{text}\n\n{_table(heads, lines)}", "Where states are read")


def _hidden(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Section:
    lines = []
    for hops in plan.hops:
        for number in range(hops + 1):
            cells = [row_of(tables["hidden"], {"hops": hops, "number": number, "reader": who}) for who in READERS]
            name = f"x{number}" if number else "s0 (start)"
            lines.append([str(hops), name, *(interval(cell, "difference") for cell in cells)])
    text = (
        "Change of accuracy, in points, when a number of the question is hidden from all latents, or from the "
        "end-of-thought token and the answer (tokens of the question after it still see it):"
    )
    heads = ["hops", "hidden", "from the latents", "from the answer"]
    return Section(f"{text}\n\n{_table(heads, lines)}", "Which way the numbers go")
