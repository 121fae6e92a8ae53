"""`codi control transfer`: the vector of every task on the items of every other one.

The coefficient of a task's vector is chosen on the validation items of that task alone; what it does is reported on the
test items of every task, beside random directions of its norm. Rows of the matrix are the tasks that vectors are from.

Claim R6, vectors transfer: the change of accuracy on other tasks than the vector's own is above MARGIN, and beyond
random directions. Where no vector raises accuracy on its own task there is nothing to transfer: not testable.

Runs as `codi control transfer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.control.cells import Choice, choose, effects, validation_table
from experiments.control.claims import MARGIN, all_of
from experiments.control.figures import transfer_figure
from experiments.control.options import TransferOptions, parse_layers
from experiments.control.plan import making_of, setup_of
from experiments.control.trials import TRIALS, Setup, steered_trials
from experiments.control.vectors import TaskItems
from experiments.statistics.beyond import beyond_draws, judge_beyond
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import row_of
from experiments.statistics.words import interval
from experiments.study.claims import Claim, ClaimsTable, effect_claim
from experiments.study.limits import limits
from experiments.study.parts import Part
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.study.verdicts import Question, judged_together, no_room
from steering.control_vectors import middle_layer

if TYPE_CHECKING:
    from experiments.study.parts import Workbench
    from lm.model import LanguageModel

__all__ = ["STUDY", "Plan", "main", "matrix", "run", "transfer_claim"]


@dataclass(frozen=True)
class Plan:
    """The matrix with everything resolved; setups and numbers of items by task, in the order of the tasks."""

    tasks: tuple[str, ...]
    setups: tuple[Setup, ...]
    n_validation: tuple[int, ...]
    n_test: tuple[int, ...]
    layer: int
    settings: Settings

    @property
    def method(self) -> str:
        """Of all vectors."""
        return self.setups[0].making.methods[0]


def load_tasks(options: TransferOptions, model: LanguageModel) -> TaskItems:
    """The items of every task.

    Raises:
        ValueError: a task that cannot be loaded, or two that share an item between their parts.
    """
    return TaskItems({task: options.load_items(options.seed, model.tokenizer, task) for task in options.tasks})


def make_plan(options: TransferOptions, model: LanguageModel, prompts: TaskItems) -> Plan:
    """The plan of the matrix.

    Raises:
        ValueError: a layer that the model does not have, or items that cannot be compared.
    """
    setups = []
    for task, splits in prompts.tasks.items():
        making = making_of(options, options.seed, min(options.batch_size, 64), options.shuffled)
        making = dataclasses.replace(making, task=task)
        setups.append(setup_of(options, making, model, splits, "as-is", options.batch_size)[0])
    (layer,) = parse_layers(options.layers, model.n_layers, middle_layer(model.n_layers))
    return Plan(
        tuple(prompts.tasks), tuple(setups), tuple(len(one.validation) for one in prompts.tasks.values()),
        tuple(len(one.test) for one in prompts.tasks.values()), layer, options.statistics(options.seed),
    )  # fmt: skip


# --- Trials -----------------------------------------------------------------------------------------------------------


def validation_trials(bench: Workbench, setup: Setup, layer: int, number: int) -> pd.DataFrame:
    """Every alpha on the validation items of the vector's own task; for `bench.once`."""
    return steered_trials(
        bench, seed=setup.seed, setup=setup, split="validation", start=0, stop=number, layer=layer, unsteered=True,
        task=setup.making.task,
    )  # fmt: skip


def own_trials(bench: Workbench, *, seed: int, setup: Setup, layer: int, number: int) -> pd.DataFrame:
    """The part of these trials."""
    return bench.once(validation_trials, setup, layer, number)


def crossed_trials(
    bench: Workbench, *, seed: int, setup: Setup, other: Setup, layer: int, number: int, n_test: int
) -> pd.DataFrame:
    """The vector of one task, at the coefficient that was chosen there and its opposite, on the test items of another.

    Args:
        bench: model and items.
        seed: of the part.
        setup: of the vector's task.
        other: of the task that is steered: its answers and lengths.
        layer: of the edit.
        number, n_test: validation items of the one, test items of the other.
    """
    chosen = choose(validation_table(_plain(bench.once(validation_trials, setup, layer, number))))
    size = abs(chosen.alpha)
    here = dataclasses.replace(
        setup, alphas=(-size, 0.0, size), everyone=other.everyone, limit=other.limit, judged=other.judged
    )
    return steered_trials(
        bench, seed=seed, setup=here, split="test", start=0, stop=n_test, layer=layer, unsteered=True,
        task=other.making.task,
    )  # fmt: skip


def parts(plan: Plan) -> list[Part]:
    """Validation trials of every task, then every vector on every task."""
    found = []
    for i, (setup, number) in enumerate(zip(plan.setups, plan.n_validation, strict=True)):
        own = {"setup": setup, "layer": plan.layer, "number": number}
        found.append(Part(f"validation-{i:02d}", own_trials, own, setup.seed, TRIALS, "validation"))
    for i, setup in enumerate(plan.setups):
        for j, other in enumerate(plan.setups):
            arguments = {
                "setup": setup, "other": other, "layer": plan.layer, "number": plan.n_validation[i],
                "n_test": plan.n_test[j],
            }  # fmt: skip
            found.append(Part(f"test-{i:02d}-{j:02d}", crossed_trials, arguments, setup.seed, TRIALS, "test"))
    return found


# --- Tables -----------------------------------------------------------------------------------------------------------

BETWEEN = " > "
"""Between source and target in the name of a pair."""


def _plain(trials: pd.DataFrame) -> pd.DataFrame:
    """Words as texts, not as categories."""
    return trials.astype({name: str for name in ("kind", "method", "source", "target")})


def matrix(
    test: pd.DataFrame, choices: Mapping[str, Choice], targets: Sequence[str], settings: Settings
) -> pd.DataFrame:
    """Every vector on every task, at the alpha of the vector's task and at its opposite.

    Args:
        test: trials.
        choices: by source.
        targets: order of tasks.
        settings: resamples, permutations, level, seed.

    Returns:
        The columns of `cells.effects` with source and target instead of method, and own (alpha is the chosen one, not
        its opposite).
    """
    named = test.assign(
        method=np.where(test["kind"] == "none", BETWEEN + test["target"], test["source"] + BETWEEN + test["target"])
    )
    # the unsteered rows of a target come once with every source, and are the same
    plain = named[named["kind"] == "none"].drop_duplicates(["method", "prompt_id"])
    kept = pd.concat([plain, named[(named["kind"] != "none") & (named["alpha"] != 0)]], ignore_index=True)

    def reference(one: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"kind": "none", "method": BETWEEN + one["method"].split(BETWEEN)[1], "layer": -1, "alpha": 0.0}

    table = effects(kept, settings, reference)
    sides = table["method"].str.split(BETWEEN, regex=False)
    table = table.assign(source=sides.str[0], target=sides.str[1])
    own = table["alpha"] == table["source"].map({task: choice.alpha for task, choice in choices.items()})
    table["place"] = table["target"].map({task: i for i, task in enumerate(targets)})
    ordered = table.assign(own=own).sort_values(["outcome", "source", "place", "alpha"], ignore_index=True)
    return ordered.drop(columns=["method", "place"])


def _values(test: pd.DataFrame, choices: Mapping[str, Choice], same: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Per test item, averaged over sources (the item's own task, or the others): correct at the chosen alpha and
    unsteered; and correct of every random draw. Index (cluster, item)."""
    mine = test["source"] == test["target"]
    part = test[mine if same else ~mine]
    alpha = part["source"].map({task: choice.alpha for task, choice in choices.items()})
    index = ["cluster", "item"]
    part = part.assign(item=part["target"] + ": " + part["prompt_id"], correct=part["correct"].astype(float))

    def mean(rows: pd.Series) -> pd.Series:
        return part[rows].groupby(index)["correct"].mean()

    steered = mean((part["kind"] == "vector") & (part["alpha"] == alpha))
    values = pd.DataFrame({"steered": steered, "plain": mean(part["kind"] == "none")})
    random = part[(part["kind"] == "random") & np.isclose(part["alpha"], alpha.abs())]
    draws = random.pivot_table(index=index, columns="draw", values="correct", aggfunc="mean")
    return values, draws.reindex(values.index)


def transfer_claim(test: pd.DataFrame, choices: Mapping[str, Choice], settings: Settings) -> ClaimsTable:
    """R6 and, before it, whether vectors help on their own task.

    Args:
        test: trials.
        choices: by source.
        settings: resamples, level, seed.
    """
    found: list[Claim] = []
    rule = f"accuracy − accuracy(0), and − that of random directions, above {MARGIN}; first of them"
    for name, statement, same in (
        ("R6 (own task)", "a vector raises accuracy on other items of its own task", True),
        ("R6 (transfer)", "a vector raises accuracy on other tasks", False),
    ):
        values, draws = _values(test, choices, same)
        clusters = values.index.get_level_values("cluster").to_numpy()
        before = float(values["plain"].mean())
        blocked = no_room(before, "above", MARGIN)
        if not same and found[0].verdict in ("not held", "not testable"):
            blocked = f"no rise on the vectors' own tasks was found ({found[0].verdict}): there is nothing to transfer"
        change = (values["steered"] - values["plain"]).to_numpy()
        question = Question(
            "gain", statement, rule, change, above=MARGIN, bounds=(-1, 1), room=(-before, 1 - before), blocked=blocked
        )
        (gain,) = judged_together([question], clusters, settings)
        parts_of = [gain]
        if not draws.empty:
            beyond = beyond_draws(values["steered"].to_numpy(), draws.to_numpy(), clusters, settings)
            row = {"estimate": beyond.estimate, "n": beyond.n, "n_clusters": beyond.n_clusters}
            judged = judge_beyond(beyond, MARGIN, settings.alpha)
            parts_of.append(effect_claim("beyond random", statement, rule, judged, row, of="estimate"))
        found.append(all_of(name, statement, rule, parts_of))
    return ClaimsTable(found)


# --- What they say ----------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figure, claim and words."""
    validation, test = (_plain(trials[name]) for name in ("validation", "test"))
    choices = {task: choose(validation_table(validation[validation["source"] == task])) for task in plan.tasks}
    table = matrix(test, choices, plan.tasks, plan.settings)
    chosen = pd.DataFrame([{"task": task, **dataclasses.asdict(choice)} for task, choice in choices.items()])
    sample = f"Layer {plan.layer}, {plan.method} vectors, {_span(plan.n_test)} test items per task."
    return Findings(
        _words(plan, test, table, choices),
        {"transfer": table, "chosen": chosen},
        lambda: {"transfer": transfer_figure(table[table["own"]], plan.tasks, plan.settings.alpha, sample)},
        {"transfer": "Change by the vector of the row's task on the items of the column's task."},
        transfer_claim(test, choices, plan.settings),
    )


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _words(plan: Plan, test: pd.DataFrame, table: pd.DataFrame, choices: Mapping[str, Choice]) -> list[Section]:
    plain = test[(test["kind"] == "none")].drop_duplicates(["target", "prompt_id"])
    first = limits(plain.assign(parsed=True), len(plan.tasks) ** 2, plan.settings)
    found = [
        Section(
            f"{len(plain)} test items of {len(plan.tasks)} tasks; {plan.method} vectors of each task, added at layer "
            f"{plan.layer}. The coefficient of a vector was chosen on {_span(plan.n_validation)} "
            f"validation items of its own task: "
            + ", ".join(f"{task} {choice.alpha:g}" for task, choice in choices.items())
            + f". {first}"
        )
    ]
    for outcome, title in (("correct", "Exact match, change in points"), ("p_right", "p(right), change in points")):
        lines = [
            "At the coefficient that the vector's own task chose:\n",
            "| vector from \\ on | " + " | ".join(plan.tasks) + " |",
            "|---|" + "---|" * len(plan.tasks),
        ]
        own = table[table["own"] & (table["outcome"] == outcome)]
        for source in plan.tasks:
            cells = []
            for target in plan.tasks:
                row = row_of(own, {"source": source, "target": target})
                rank = "^" if row["difference"] > 0 and row["p_above"] <= plan.settings.alpha else ""
                cells.append(interval(row, "difference") + ("*" if row["q"] < plan.settings.alpha else "") + rank)
            lines.append(f"| {source} | " + " | ".join(cells) + " |")
        lines.append(f"\n\\* q < {plan.settings.alpha:g} over the table, both signs; ^ first of its random directions.")
        found.append(Section("\n".join(lines), title))
    return found


STUDY = Study(
    options=TransferOptions,
    title="Transfer of control vectors",
    prompts=load_tasks,
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main
