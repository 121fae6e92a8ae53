"""`codi circuit`: which heads make each word of a written chain of thought.

    codi circuit                                   # SmolLM2, 20 two-hop ontologies, all heads and subtasks
    codi circuit --positions last --limit 100      # one token per patched run: several times faster

Fictional ontologies with six solved ones before them; at every word of the gold chain that the model predicts, an
earlier mention of the word is exchanged for another one, and the clean output of one head at a time is put into the
corrupted run. E is the share of KL(clean ‖ corrupted) that this takes away, ratio of means over items. Writes
predictions.csv, effects.csv, a figure and result.json.

Source: Dutta et al. 2024, How to think step-by-step, arXiv 2402.18312.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.circuit.items import Ontologies, make_ontologies
from experiments.circuit.options import CircuitOptions
from experiments.circuit.trials import EFFECTS, PREDICTIONS, effects, predictions
from experiments.statistics.clusters import Settings, accuracy_interval, bootstrap_interval
from experiments.statistics.words import interval
from experiments.study.parts import Part
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["STUDY", "Plan", "effect_table", "main", "prediction_table"]

PART_ITEMS = 2
"""Items in one part: how much an interruption can cost."""
TOKENS_PER_ROW = 8
"""A patched row is a few tokens: --batch-size rows are so many tokens at once."""
_EFFECT_COLUMNS = ("subtask", "kind", "block", "head", "effect", "lower", "upper", "n")
NAMED = 5
"""Heads of a subtask that the summary names."""


@dataclass(frozen=True)
class Plan:
    """A run with everything resolved."""

    options: CircuitOptions
    n_items: int
    blocks: tuple[int, ...]
    n_blocks: int
    n_heads: int
    settings: Settings


def make_plan(options: CircuitOptions, model: LanguageModel, prompts: Ontologies) -> Plan:
    """Options against the model."""
    blocks = tuple(range(1, model.n_layers + 1, options.step))
    return Plan(options, len(prompts.items), blocks, model.n_layers, model.n_heads, options.statistics(options.seed))


def parts(plan: Plan) -> list[Part]:
    """Predictions of all items, then effects a few items at a time."""
    options = plan.options
    found = [
        Part(
            "predictions", predictions, {"items": tuple(range(plan.n_items)), "where": options.where},
            schema=PREDICTIONS,
        )
    ]  # fmt: skip
    for start in range(0, plan.n_items, PART_ITEMS):
        items = tuple(range(start, min(start + PART_ITEMS, plan.n_items)))
        arguments = {
            "items": items, "where": options.where, "positions": options.positions, "blocks": plan.blocks,
            "tokens_at_once": TOKENS_PER_ROW * options.batch_size,
        }  # fmt: skip
        found.append(Part(f"effects-{start + 1}", effects, arguments, schema=EFFECTS, table="effects"))
    return found


# --- Tables -----------------------------------------------------------------------------------------------------------


def prediction_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row per subtask: share of items whose word is the most probable one, with its interval over items."""
    rows = []
    for (subtask, kind), part in trials.groupby(["subtask", "kind"], observed=True, sort=True):
        found = accuracy_interval(
            part["right"].to_numpy(), part["item"].to_numpy(), resamples=settings.resamples, level=settings.level,
            seed=settings.seed,
        )  # fmt: skip
        rows.append(
            {
                "subtask": subtask, "kind": kind, "mean": found.estimate, "lower": found.lower, "upper": found.upper,
                "n": found.n, "probability": part["probability"].mean(), "tokens_run": part["tokens_run"].mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def effect_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row per subtask and head: E, ratio of means over items, with a bootstrap interval over items.

    The interval is that of one head; heads that were chosen as the largest are larger by chance too.
    """
    found = []
    groups: Any = trials.groupby(["subtask", "kind"], observed=True, sort=True)
    for (subtask, kind), part in groups:
        gains = part.assign(gain=part["kl_corrupted"] - part["kl"])
        wide = gains.pivot(index=["block", "head"], columns="item", values="gain")
        whole = gains.pivot(index=["block", "head"], columns="item", values="kl_corrupted")
        sums, counts = wide.to_numpy(), whole.to_numpy()
        lower, upper = bootstrap_interval(
            sums, counts, weights=settings.weights(wide.shape[1]), level=settings.level, bounds=(-np.inf, np.inf)
        )
        table = wide.index.to_frame(index=False)
        table.insert(0, "subtask", subtask)
        table.insert(1, "kind", kind)
        found.append(table.assign(effect=sums.sum(1) / counts.sum(1), lower=lower, upper=upper, n=wide.shape[1]))
    if not found:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in _EFFECT_COLUMNS})
    return pd.concat(found, ignore_index=True)


# --- Words ------------------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figure and summary."""
    said = prediction_table(trials["predictions"], plan.settings)
    found = effect_table(trials["effects"], plan.settings)
    options = plan.options
    left = "" if options.step == 1 else f" (blocks {', '.join(map(str, plan.blocks))})"
    about = (
        f"{plan.n_items} ontologies of {options.hops} hops, {options.demonstrations} solved ones before each; words of "
        f"the lexicon {options.lexicon!r}. At each word of the gold chain an earlier mention is exchanged "
        f"({options.where}), and each of the {plan.n_heads} heads of each of the {plan.n_blocks} blocks{left} is put "
        f"back at {'every token' if options.positions == 'all' else 'the last token'}. E: share of KL(clean ‖ "
        "corrupted) that this takes away; 1 is full recovery. Only items count whose word the model predicts."
    )
    sections = [Section(about), Section(_words(said, found, plan), "Strongest heads")]

    def figures() -> dict:
        from experiments.circuit.figures import draw_effects

        return {} if found.empty else {"effects": draw_effects(found, plan.n_blocks, plan.n_heads)}

    return Findings(
        sections, {"predictions": said, "effects": found}, figures,
        captions={} if found.empty else {"effects": "E of every head (columns) of every block (rows), by subtask."},
    )  # fmt: skip


def _words(said: pd.DataFrame, found: pd.DataFrame, plan: Plan) -> str:
    """A line per subtask."""
    level = f"{100 * plan.settings.level:g} %"
    lines = [f"block.head with E and its {level} interval; the {NAMED} largest of many are larger by chance too.", ""]
    for _, row in said.iterrows():
        part = found[found["subtask"] == row["subtask"]].nlargest(NAMED, "effect")
        heads = "; ".join(
            f"{one['block']}.{one['head']} {interval(one, 'effect', scale=1, digits=2)}" for _, one in part.iterrows()
        )
        lines.append(
            f"- {row['subtask']} ({row['kind']}): word predicted in {interval(row)} % of {row['n']} items; "
            f"{heads or 'nothing to patch'}"
        )
    return "\n".join(lines)


def _prompts(options: CircuitOptions, model: LanguageModel) -> Ontologies:
    return make_ontologies(options, model.tokenizer)


STUDY: Study[CircuitOptions, Plan] = Study(
    options=CircuitOptions,
    title="Heads of a written chain of thought",
    prompts=_prompts,
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)


def main(options: CircuitOptions) -> None:
    """Load, run, print the summary."""
    STUDY.main(options)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
