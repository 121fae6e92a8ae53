"""`codi transfer`: ablate the prompt, carry latents from one prompt to another, and read whose answer comes.

The prompt is ablated: at every prompt position the input embedding and the output of every block become their mean over
derivation prompts of the same story (template and operation) and the same length, so that nothing of the prompt's own
numbers is left. Then latents are put back, all n of them, as vectors (z_k is fed; its slot is computed over the ablated
prompt) or as cache slots (keys and values as their donor wrote them, keys turned to the new position):

    own          the prompt's own latents, from its unablated run
    same value   of a derivation prompt in other words with the same key (templates: step 1, Z; others: all values)
    other value  of a derivation prompt in other words with another key: the control (the donor's answer is read)
    noise        Gaussian vectors with the mean and spread of each latent's coordinates
    nothing      latents are computed over the ablated prompt: the chance level

and into the unablated prompt ("intact"), to see which of the two the answer follows. "leaky" is the published ablation,
which leaves the embeddings alone: the first block still reads the numbers from them.

Trials: `transfer` (state of the prompt, kind of latents, level "vectors" or "slots", draw, donor_answer, donor: the
donor's answer came). Runs as `codi transfer` or `python -m experiments.latents.transfer`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import Intervention
from experiments.figures.series import draw_points, spread
from experiments.figures.style import GUIDE, SERIES, legend, new_figure
from experiments.latents.claims import STAR, sizes_table
from experiments.latents.donors import (
    Given,
    Noise,
    another_wording,
    by_key,
    check_known,
    key_of,
    latents_of,
    other_keys,
    put_in,
)
from experiments.latents.options import TransferOptions
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Selector, differences, levels, row_of, rows_of, weighed
from experiments.statistics.words import interval, visible
from experiments.study.answers import answer_table, trial_schema
from experiments.study.claims import ClaimsTable
from experiments.study.limits import limits
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.rows import answer_rows
from experiments.study.run import Findings, Study, Trials
from experiments.study.thoughts import think
from experiments.study.verdicts import Question, judged_together, no_room
from experiments.tasks import Problem
from experiments.tasks.split import Split
from steering.directions import generator
from steering.replacements import AblatePrompt, RecordPrompt

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "given_back", "main", "prompt_means", "run", "transferred"]

Story = tuple[str, str, int]
"""Template, operation, number of tokens."""
LEVELS = ("vectors", "slots")
DONORS = ("same value", "other value")
RECOVERED = 0.05
"""A recovery of accuracy by less than this (five points) counts as none, in claims of both kinds."""
ENOUGH = 0.2
"""Unedited accuracy below this leaves nothing that could be recovered."""

TRANSFERS = trial_schema(
    state=pa.string(),
    kind=pa.string(),
    level=pa.string(),
    draw=pa.int32(),
    donor_answer=pa.float64(),
    donor=pa.bool_(),
)
"""state: intact, ablated or leaky; kind: nothing, own, same value, other value or noise; level: "" for nothing."""
GIVEN = ("state", "kind", "level")


def given_back(state: str, kind: str = "nothing", level: str = "") -> Selector:
    """Latents of some kind put into prompts in some state."""
    return {"state": state, "kind": kind, "level": level}


def conditions() -> list[Selector]:
    """Everything that is tried, in the order in which it is shown."""
    others = [(kind, level) for kind in DONORS for level in LEVELS] + [("noise", "vectors")]
    own = [("own", level) for level in LEVELS]
    tried = {"intact": others, "ablated": own + others, "leaky": own}
    return [given_back(state, *one) for state, ones in tried.items() for one in [("nothing", ""), *ones]]


def label(row: Mapping[str, Any]) -> str:
    """A condition in words."""
    return f"{row['state']} + {row['kind']} {row['level']}".strip()


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        whole: the ablation takes the embeddings too.
    """

    whole: bool
    draws: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings
    asked: str


def make_plan(options: TransferOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: prompts whose numbers and steps are not known.
    """
    check_known("transfer", prompts)
    return Plan(
        whole=not options.legacy,
        draws=options.draws,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
        asked=options.asked,
    )


def parts(plan: Plan) -> list[Part]:
    """One trial table of one part."""
    how = {"batch_size": plan.batch_size, "max_new_tokens": plan.max_new_tokens}
    return [Part("transfer", transferred, {"whole": plan.whole, "draws": plan.draws, **how}, plan.seed, TRANSFERS)]


# --- Who gives to whom ------------------------------------------------------------------------------------------------


def _story(problem: Problem, length: int) -> Story:
    return problem.template, problem.operation, length


def prompt_means(
    model: CodiModel, problems: Sequence[Problem], stories: set[Story], batch_size: int = 64
) -> dict[Story, Tensor]:
    """Mean residual stream of every position and layer over the prompts of each story.

    Args:
        model: the model.
        problems: prompts to average over.
        stories: which stories (template, operation, number of tokens) are wanted.
        batch_size: prompts at once.

    Returns:
        story -> (layer 0..n_layers, position, d_model), before the final norm; stories without a prompt are left out.
    """
    lengths = model.encode([problem.question for problem in problems]).lengths.tolist()
    members: dict[Story, list[int]] = defaultdict(list)
    for row, (problem, length) in enumerate(zip(problems, lengths, strict=True)):
        if _story(problem, length) in stories:
            members[_story(problem, length)].append(row)
    means = {}
    for story, rows in members.items():
        total = torch.zeros(())
        for start in range(0, len(rows), batch_size):
            chunk = [problems[row].question for row in rows[start : start + batch_size]]
            record = RecordPrompt()
            model.prefill(model.encode(chunk), [record], keep=())
            layers = torch.stack([record.layers[layer] for layer in range(model.n_layers + 1)], dim=1)
            total = total + layers.double().sum(0).cpu()
        means[story] = (total / len(rows)).to(model.dtype)
    return means


@dataclass(frozen=True)
class _Pairs:
    """Prompts that have donors.

    Attributes:
        problems: the prompts.
        means: per prompt, of its story.
        donors: per prompt and draw, kind -> place of the donor among the derivation prompts.
    """

    problems: list[Problem]
    means: list[Tensor]
    donors: list[list[dict[str, int]]]


def _pairs(model: CodiModel, prompts: Split, draws: int, seed: int) -> _Pairs:
    """Donors for every evaluation prompt that has a story mean and a donor of the same value.

    Raises:
        ValueError: no prompt has both.
    """
    rng = generator(seed, "transfer", "donors")
    derivation = prompts.derivation
    lengths = model.encode([problem.question for problem in prompts.evaluation]).lengths.tolist()
    stories = [_story(problem, length) for problem, length in zip(prompts.evaluation, lengths, strict=True)]
    means = prompt_means(model, derivation, set(stories))
    pools = by_key(derivation)
    keys = sorted(pools)
    found = _Pairs([], [], [])
    for problem, story in zip(prompts.evaluation, stories, strict=True):
        same = [row for row in pools.get(key_of(problem), []) if another_wording(derivation[row], problem)]
        others = other_keys(keys, problem)
        if story not in means or not same or not others:
            continue
        drawn = []
        for _ in range(draws):
            pool: list[int] = []
            while not pool:
                key = others[int(rng.integers(len(others)))]
                pool = [row for row in pools[key] if another_wording(derivation[row], problem)] or pools[key]
            drawn.append(
                {"same value": same[int(rng.integers(len(same)))], "other value": pool[int(rng.integers(len(pool)))]}
            )
        found.problems.append(problem)
        found.means.append(means[story])
        found.donors.append(drawn)
    if not found.problems:
        raise ValueError(
            "no evaluation prompt has among the derivation prompts both a donor of the same value (other words, the "
            "same intermediate values) and prompts of its own story and length: use more of them (--derivation)"
        )
    return found


# --- Answers ----------------------------------------------------------------------------------------------------------


def transferred(
    bench: Workbench, *, whole: bool, draws: int, batch_size: int, max_new_tokens: int | None, seed: int
) -> pd.DataFrame:
    """Answers with every kind of latents in every state of the prompt."""
    model, derivation = bench.model, bench.prompts.derivation
    pairs = _pairs(model, bench.prompts, draws, seed)
    own = think(model, pairs.problems, keep=("embeddings", "keys", "values", "cache"))
    used = sorted({row for drawn in pairs.donors for one in drawn for row in one.values()})
    at = {row: len(own) + place for place, row in enumerate(used)}  # own latents first, then the donors'
    given = latents_of(model, [own], [derivation[row] for row in used])
    noise = Noise.like(given.embeddings[len(own) :], draws, seed, "transfer")
    answers = [float(problem.answer) for problem in (*pairs.problems, *(derivation[row] for row in used))]
    batch = model.encode([problem.question for problem in pairs.problems])
    prefills = {
        "intact": own.prefill,
        "ablated": model.prefill(batch, [AblatePrompt(pairs.means, embeddings=whole)], keep=()),
        "leaky": model.prefill(batch, [AblatePrompt(pairs.means, embeddings=False)], keep=()),
    }
    frames = []
    for state, prefill in prefills.items():
        rows = _tried(state, pairs, at)
        texts = answer_rows(
            model, prefill, rows["prompt"].tolist(), _edits(model, rows, given, noise, prefill.next_position),
            max_new_tokens=max_new_tokens, batch_size=batch_size,
        )  # fmt: skip
        columns = {name: rows[name].to_numpy() for name in (*GIVEN, "draw")}
        donor_answer = [answers[row] if row >= 0 else float("nan") for row in rows["source"]]
        table = answer_table(pairs.problems, rows["prompt"].tolist(), texts, **columns, donor_answer=donor_answer)
        frames.append(table.assign(donor=table["prediction"] == table["donor_answer"]))
    return pd.concat(frames, ignore_index=True)


def _tried(state: str, pairs: _Pairs, at: Mapping[int, int]) -> pd.DataFrame:
    """Rows of one state: the columns GIVEN, draw, prompt, and source (row of the given latents; -1: none)."""
    rows: list[tuple[str, str, str, int, int, int]] = []
    for i, drawn in enumerate(pairs.donors):
        rows.append((state, "nothing", "", -1, i, -1))
        if state != "intact":
            rows += [(state, "own", level, -1, i, i) for level in LEVELS]
        for draw, one in enumerate(drawn if state != "leaky" else []):
            rows += [(state, kind, level, draw, i, at[row]) for kind, row in one.items() for level in LEVELS]
            rows.append((state, "noise", "vectors", draw, i, -1))
    return pd.DataFrame(rows, columns=[*GIVEN, "draw", "prompt", "source"])


def _edits(
    model: CodiModel, rows: pd.DataFrame, given: Given, noise: Noise, first: Tensor
) -> Callable[[Tensor], Sequence[Intervention]]:
    """What puts the latents of each row in place; first: (prompt,) position of latent 1."""
    source = torch.tensor(rows["source"].to_numpy()).clamp(min=0)
    draw = torch.tensor(rows["draw"].to_numpy()).clamp(min=0)
    where = torch.tensor(rows["prompt"].to_numpy())
    slot, vector = (torch.tensor((rows["level"] == level).to_numpy()) for level in ("slots", "vectors"))
    noisy = torch.tensor((rows["kind"] == "noise").to_numpy())

    def edits(here: Tensor) -> Sequence[Intervention]:
        everywhere = (len(here), model.n_latents)
        return [
            put_in(
                model, given, noise, donor=source[here], draw=draw[here], noisy=noisy[here],
                vector=vector[here, None].expand(everywhere), slot=slot[here, None].expand(everywhere),
                first=first[where[here].to(first.device)],
            )
        ]  # fmt: skip

    return edits


# --- What they say ----------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figure, claims and words."""
    moved, settings = trials["transfer"], plan.settings
    put_back = [(one, given_back(one["state"])) for one in conditions() if one["kind"] != "nothing"]
    pairs = [*put_back]
    pairs += [(given_back("ablated"), given_back("intact")), (given_back("leaky"), given_back("ablated"))]
    pairs += [
        (given_back("ablated", "same value", level), given_back("ablated", "other value", level)) for level in LEVELS
    ]
    effects, size = weighed(moved, pairs, GIVEN, settings=settings, of=put_back)
    tables = {
        "levels": levels(moved, GIVEN, settings=settings),
        "effects": effects,
        "donor_levels": levels(moved[moved["donor_answer"].notna()], GIVEN, "donor", settings),
        "sizes": sizes_table({"effects": size}),
    }
    unedited = moved[(moved["state"] == "intact") & (moved["kind"] == "nothing")]
    caption = (
        "Share of prompts whose own answer, and whose donor's answer, comes, for every state of the prompt and kind of "
        f"latents put in; {100 * settings.level:g} % intervals over clusters."
    )
    return Findings(
        words(plan, tables, limits(unedited, len(pairs), settings)),
        tables,
        lambda: {"transfer": figure_of(tables)},
        {"transfer": caption},
        claims_of(plan, tables, moved),
    )


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame], trials: pd.DataFrame) -> ClaimsTable:
    """C6, judged together: latents recover part of the accuracy that the ablation took, those of another value none."""
    base, chance = (row_of(tables["levels"], given_back(state))["mean"] for state in ("intact", "ablated"))
    blocked = no_room(chance, "above", RECOVERED)
    if base < ENOUGH:
        blocked = f"unedited accuracy is {base:.2f}: there is too little to recover"
    statements = {
        "own": "own latents recover part of the ablated prompt",
        "same value": "latents of the same value from another template recover part of it",
        "other value": "latents of another value recover nothing",
    }
    asked = [(kind, level) for level in LEVELS for kind in statements]
    pairs = [(given_back("ablated", kind, level), given_back("ablated")) for kind, level in asked]
    change = differences(trials, pairs, GIVEN)
    questions = []
    for place, (kind, level) in enumerate(asked):
        absence = kind == "other value"
        questions.append(
            Question(
                f"C6 ({kind}, {level})",
                statements[kind],
                f"accuracy against nothing put back is {'below' if absence else 'above'} {RECOVERED}",
                change[place].to_numpy(),
                above=None if absence else RECOVERED,
                absent=RECOVERED if absence else None,
                side="above",
                bounds=(-1, 1),
                room=(-chance, 1 - chance),
                blocked=blocked,
            )
        )
    clusters = change.index.get_level_values("cluster").to_numpy()
    return ClaimsTable(judged_together(questions, clusters, plan.settings))


def words(plan: Plan, tables: Mapping[str, pd.DataFrame], seen: str) -> list[Section]:
    """The summary, section by section; `seen` says what the run can see."""
    level_of, effects, size = tables["levels"], tables["effects"], row_of(tables["sizes"], {"table": "effects"})
    first = row_of(level_of, given_back("intact"))
    lines = [
        f"{int(first['n'])} prompts of {plan.asked} in {int(first['n_clusters'])} clusters; per cent, "
        f"{100 * plan.settings.level:g} % intervals over clusters; change against nothing put back into the same "
        f"prompt ({STAR}, {100 * size['size']:.1f} points: {size['words']}). {seen}".strip(),
        "",
        "| prompt + latents | own answer | change | donor's answer |",
        "|---|---|---|---|",
    ]
    for one in conditions():
        change = shown = ""
        if one["kind"] != "nothing":
            row = row_of(effects, one, given_back(one["state"]))
            change = interval(row, "difference") + ("*" if row["matters"] else "")
        if one["kind"] == "other value":
            shown = interval(row_of(tables["donor_levels"], one))
        lines.append(f"| {label(one)} | {interval(row_of(level_of, one))} | {change} | {shown} |")
    leak = row_of(effects, given_back("leaky"), given_back("ablated"))
    found = [
        Section("\n".join(lines)),
        Section(
            f"Leaving the embeddings alone gives {interval(leak, 'difference')} points more accuracy than the whole "
            "ablation.",
            "The leak",
        ),
    ]
    for level in LEVELS:
        row = row_of(effects, *(given_back("ablated", kind, level) for kind in DONORS))
        found_or_not = "survives correction and is beyond the size that matters"
        if not row["matters"]:
            found_or_not = "not found: it does not survive correction, or is not beyond the size that matters"
            found_or_not += f"; {visible(row)} points could have been told from none"
        text = f"Same value against other value: {interval(row, 'difference')} points ({found_or_not})."
        found.append(Section(text, f"What the latents carry ({level})"))
    return found


def figure_of(tables: Mapping[str, pd.DataFrame]) -> Any:
    """Whose answer comes, for every prompt and kind of latents."""
    shown = conditions()
    figure, axes = new_figure(1, 1, height=0.8 + 0.21 * len(shown))
    axis = axes[0, 0]
    others = [one for one in shown if one["kind"] == "other value"]
    for name, chosen, colour, marker, text, shift in (
        ("levels", shown, SERIES[0], "o", "the prompt's own answer", -0.1),
        ("donor_levels", others, SERIES[1], "D", "the donor's answer", 0.1),
    ):
        rows = rows_of(tables[name], chosen)
        draw_points(
            axis, (100 * rows["mean"]).tolist(), [shown.index(one) + shift for one in chosen], text, 0,
            across=spread(rows, scale=100), color=colour, marker=marker,
        )  # fmt: skip
    axis.set_yticks(range(len(shown)), [label(one) for one in shown])
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.3, color=GUIDE)
    axis.set(xlabel="prompts (%)", xlim=(-2, 102), title="Prompt + latents put in: whose answer comes?")
    legend(figure, axes)
    return figure


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=TransferOptions,
    title="Latent transfer",
    prompts=lambda options, model: options.load_split(
        options.seed, model.protocol.question_suffix, known_steps=1, donors=True
    ),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
