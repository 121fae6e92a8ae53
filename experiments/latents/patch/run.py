"""`codi patch`: replace latents by means, by values, by other prompts' latents or noise, and read the answer.

Three families of edits, always on the unedited prompt, later latents computed on the edited past:

means        z_k replaced by the mean latent of derivation prompts with the same key (step 1, Z), with another key, of
             all prompts, by zero or by the three published random forms; one latent or all of them.
values       z_k replaced by the mean latent of derivation prompts whose step 1 (step 2) is a target t; from prompts of
             the same template or of other templates; the vector alone, or with the residual stream of every layer.
             Success = the answer becomes the predicted one. The prediction is the task's own arithmetic:
                 step 1 -> t, local: t + own step 2;  step 1 -> t, propagated: t · Z + t;  step 2 -> t: own step 1 + t
             Control: the mean of a third value in the same place, read against the same prediction.
interchange  latent k of prompt A becomes that of prompt B: the vector, the residual stream at one layer, the cache slot
             (keys, values, both; all layers or one). B is another prompt ("other"), the same story with the other
             operation ("operation"), or a derivation prompt with the same key ("twin", the control: nothing that the
             answer depends on changes). Read: A's answer, B's answer, and the mixed predictions above.

--legacy: the published prompts (50 number triples), means over the evaluation prompts themselves (so a prompt
is part of its own mean) and step-2 patching at z_5 only.

Runs as `codi patch` or `python -m experiments.latents.patch.run`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from codi import Intervention
from codi.rope import rotate, unrotate
from experiments.figures.heatmap import Scale, colour_bar
from experiments.figures.series import baseline
from experiments.figures.style import DIVERGING, legend
from experiments.statistics.clusters import Settings
from experiments.study.claims import Claim, ClaimsTable, judge
from experiments.study.shared import (
    Bank,
    Result,
    StudyOptions,
    Thoughts,
    answer_rows,
    answer_table,
    compare,
    draw_matrix,
    draw_series,
    effect_claim,
    interval,
    levels,
    load_model,
    load_prompts,
    new_figure,
    open_study,
    row_of,
    stderr,
    think,
)
from experiments.tasks import Problem
from experiments.tasks import templates as template_task
from experiments.tasks.split import Split
from steering.directions import generator
from steering.replacements import ReplaceRows, replace_embeddings

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Config", "claimed_latents", "counterpart", "main", "mean_patching", "run", "value_patching"]

RANDOM_FORMS = ("coordinate", "scalar", "norm")
ENOUGH = 0.2
"""Unedited accuracy below this leaves claims about lost answers not testable."""


@dataclass(frozen=True)
class Config(StudyOptions):
    """Replace latents by means, values, other prompts' latents or noise."""

    out: Path = Path("runs/patch")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    draws: int = 3
    """Draws of every random replacement."""
    families: tuple[str, ...] = ("means", "values", "interchange")
    """Which edits: means, values, interchange."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.families) - {"means", "values", "interchange"})
        if unknown or not self.families:
            raise ValueError(f"families must be among means, values, interchange, got {' '.join(unknown) or 'none'}")


def _key(problem: Problem) -> tuple[float, int]:
    """(step 1, Z): with these every intermediate value is known."""
    return problem.intermediates[0], problem.numbers[2]


def _check(split: Split) -> None:
    for problem in (*split.evaluation, *split.derivation):
        if len(problem.numbers) != 3 or len(problem.intermediates) != 3:
            raise ValueError(
                f"patching needs prompts of the form (X±Y)·Z + (X±Y), as in the task 'templates' or prompts.json; "
                f"{problem.prompt_id!r} has {len(problem.numbers)} numbers and {len(problem.intermediates)} steps"
            )


# --- Mean patching ----------------------------------------------------------------------------------------------------


def mean_patching(model: CodiModel, thoughts: Thoughts, bank: Bank, config: Config) -> pd.DataFrame:
    """Trial table: conditions "<kind> <latent>" and "<kind> all"; only prompts whose key has a derivation prompt."""
    n = model.n_latents
    rng = generator(config.seed, "patch", "means")
    groups: dict[tuple[float, int], list[int]] = defaultdict(list)
    for row, problem in enumerate(bank.problems):
        groups[_key(problem)].append(row)
    keys = sorted(groups)
    mean = bank.embeddings.double().mean(0)
    spread = bank.embeddings.double().std(0, correction=0)
    vectors: list[Tensor] = [
        mean, torch.zeros_like(mean), *(bank.embeddings[groups[key]].double().mean(0) for key in keys)
    ]  # each (latent, d_model)  # fmt: skip
    kinds: list[tuple[str, int]] = [("same key", 0), ("other key", 0), ("mean", 0), ("zero", 0)]
    first_random = len(vectors)
    for form in RANDOM_FORMS:
        for draw in range(config.draws):
            noise = torch.from_numpy(generator(config.seed, "patch", form, draw).standard_normal(tuple(mean.shape)))
            if form == "coordinate":
                noise = mean + spread * noise
            elif form == "scalar":
                noise = mean.mean(1, keepdim=True) + mean.std(1, keepdim=True) * noise
            else:
                noise = noise / noise.norm(dim=1, keepdim=True)
            vectors.append(noise)
            kinds.append((form, draw))
    table = torch.stack(vectors).float()  # (vector, latent, d_model)
    chosen: list[int] = [i for i, problem in enumerate(thoughts.problems) if _key(problem) in groups]
    if len(chosen) < 2:
        raise ValueError("fewer than 2 evaluation prompts share (step 1, Z) with a derivation prompt: use more prompts")
    assert thoughts.run.embeddings is not None
    norms = thoughts.run.embeddings.float().norm(dim=-1).cpu()
    columns: dict[str, list[Any]] = defaultdict(list)
    prompt: list[int] = []
    direction: list[list[int]] = []
    scale: list[list[float]] = []
    for i in chosen:
        problem = thoughts.problems[i]
        others = [
            k for k, key in enumerate(keys) if key[0] != problem.intermediates[0] and key[1] != problem.numbers[2]
        ]
        other = int(rng.choice(others)) if others else keys.index(_key(problem))
        donor = bank.problems[groups[keys[other]][0]]

        for place, (kind, draw) in enumerate([("none", 0), *kinds]):
            fixed = {"same key": 2 + keys.index(_key(problem)), "other key": 2 + other, "mean": 0, "zero": 1}
            vector = fixed.get(kind)
            if vector is None:
                vector = first_random + place - 5
            for where in ["all", *range(1, n + 1)] if kind != "none" else ["none"]:
                hit = range(1, n + 1) if where == "all" else [] if where == "none" else [where]
                prompt.append(i)
                direction.append([vector * n + k - 1 if k in hit else -1 for k in range(1, n + 1)])
                scale.append([float(norms[i, k - 1]) if kind == "norm" else 1.0 for k in range(1, n + 1)])
                columns["condition"].append("none" if kind == "none" else f"{kind} {where}")
                columns["kind"].append(kind)
                columns["where"].append(str(where))
                columns["draw"].append(draw)
                columns["donor_answer"].append(float(donor.answer))
    rows = torch.tensor(prompt)
    answers = replace_embeddings(
        model,
        thoughts.run,
        table.flatten(0, 1),
        rows,
        torch.arange(1, n + 1).expand(len(rows), n),
        torch.tensor(direction),
        torch.tensor(scale),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
    )
    frame = answer_table(thoughts.problems, rows, answers.texts, **columns)
    return frame.assign(donor=frame["prediction"] == frame["donor_answer"])


# --- Value patching ---------------------------------------------------------------------------------------------------


def _state_edits(model: CodiModel, k: int, active: Tensor, z: Tensor, h: Tensor, layers: Tensor) -> dict[Any, Any]:
    """Replacements that make everything at latent k that of given means: z_k, the residual stream, and h_k after the
    final norm. z (row, d_model), h (row, d_model) = h_k, layers (row, layer 0..n_layers, d_model)."""
    values: dict[Any, Any] = {("embedding", k, 0): (active, z)}
    for layer in range(1, model.n_layers):
        values["layer", k, layer] = (active, layers[:, layer])
    values["hidden", k + 1, 0] = (active, h)
    return values


def value_patching(model: CodiModel, thoughts: Thoughts, bank: Bank, config: Config) -> pd.DataFrame:
    """Trial table of value patching; `hit` is whether the answer is the predicted one, `local` and `propagated`
    for step 1; conditions "<target|control> step<1|2> <scope> <vector|residual> <latent>" and "none ..."."""
    n = model.n_latents
    rng = generator(config.seed, "patch", "values")
    steps = (2,) if config.legacy else (1, 2)
    latents = (min(5, n),) if config.legacy else tuple(range(1, n + 1))
    pools: dict[tuple[int, str], dict[float, list[int]]] = {}
    for step in steps:
        for template in sorted({p.template for p in bank.problems}):
            pools[step, template] = defaultdict(list)
            for row, problem in enumerate(bank.problems):
                if problem.template == template:
                    pools[step, template][problem.intermediates[step - 1]].append(row)
    groups: list[list[int]] = []
    index: dict[tuple[int, ...], int] = {}

    def group(members: list[int]) -> int:
        key = tuple(members)
        if key not in index:
            index[key] = len(groups)
            groups.append(members)
        return index[key]

    columns: dict[str, list[Any]] = defaultdict(list)
    prompt: list[int] = []
    which: list[int] = []
    for i, problem in enumerate(thoughts.problems):
        step1, step2, answer = problem.intermediates
        z = problem.numbers[2]
        for step in steps:
            own = problem.intermediates[step - 1]
            same = pools.get((step, problem.template), {})
            elsewhere: dict[float, list[int]] = defaultdict(list)
            for (s, template), pool in pools.items():
                if s == step and template != problem.template:
                    for value, rows in pool.items():
                        elsewhere[value] += rows
            values = [v for v in sorted(set(same) & set(elsewhere)) if v not in (own, 0)]
            if len(values) < 2:
                continue
            target, third = (float(v) for v in rng.choice(values, size=2, replace=False))
            local = target + step2 if step == 1 else step1 + target
            propagated = target * z + target if step == 1 else step1 + target
            for scope, pool in (("same template", same), ("other templates", elsewhere)):
                for kind, value in (("target", target), ("control", third), ("none", own)):
                    chosen = group(sorted(pool[value])) if kind != "none" else -1
                    for state in ("vector", "residual"):
                        for k in latents:
                            if kind == "none" and (k != latents[0] or state != "vector"):
                                continue
                            prompt.append(i)
                            which.append(chosen)
                            where = "" if kind == "none" else f" {state} {k}"
                            columns["condition"].append(f"{kind} step{step} {scope}{where}")
                            for name, entry in (
                                ("kind", kind), ("step", step), ("scope", scope), ("state", state), ("latent", k),
                                ("target", value), ("local_prediction", float(local)),
                                ("propagated_prediction", float(propagated)),
                            ):  # fmt: skip
                                columns[name].append(entry)
    if not prompt:
        raise ValueError("no prompt has two other values of a step among the derivation prompts: use more of them")
    means = [bank.mean(members) for members in groups]
    z_means = torch.stack([mean[0] for mean in means])
    h_means = torch.stack([mean[1] for mean in means])
    layer_means = torch.stack([mean[2] for mean in means])
    member, latent = torch.tensor(which), torch.tensor(columns["latent"])
    residual = torch.tensor([state == "residual" for state in columns["state"]])

    def edits(rows: Tensor) -> Sequence[Intervention]:
        values: dict[Any, Any] = {}
        m = member[rows].clamp(min=0)
        for k in latents:
            at_k = (latent[rows] == k) & (member[rows] >= 0)
            whole = _state_edits(
                model, k, at_k & residual[rows], z_means[m, k - 1], h_means[m, k], layer_means[m, k - 1]
            )
            whole["embedding", k, 0] = (at_k, z_means[m, k - 1])
            if k == n:
                whole.pop(("hidden", k + 1, 0))
            for place, (active, value) in whole.items():
                if place in values:  # h_{k} and z_{k+1} of different rows are different places
                    raise AssertionError(place)
                values[place] = (active, value)
        return [ReplaceRows(values)]

    texts = answer_rows(
        model, thoughts.prefill, prompt, edits, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size
    )
    frame = answer_table(thoughts.problems, prompt, texts, **columns)
    frame["local"] = frame["prediction"] == frame["local_prediction"]
    frame["propagated"] = frame["prediction"] == frame["propagated_prediction"]
    frame["hit"] = frame["local"] | frame["propagated"]
    return frame


# --- Interchange ------------------------------------------------------------------------------------------------------


def counterpart(problem: Problem, problems: Sequence[Problem]) -> int | None:
    """Row of the same story and numbers with the other operation, if it is there."""
    for row, other in enumerate(problems):
        if (other.cluster, other.template) == (problem.cluster, problem.template) and (
            other.operation != problem.operation
        ):
            return row
    return None


def _operation_donors(problems: Sequence[Problem], config: Config) -> list[Problem | None]:
    """The same story with the other operation, for each prompt: from the prompts or, of the task "templates", made."""
    made: dict[tuple[str, str, str], Problem] = {}
    if config.task == "templates":
        made = {(p.cluster, p.template, p.operation): p for p in template_task.generate(split="all")}
    found: list[Problem | None] = []
    for problem in problems:
        row = counterpart(problem, problems)
        other = {"addition": "subtraction", "subtraction": "addition"}.get(problem.operation, "")
        generated = made.get((problem.cluster, problem.template, other))
        if generated is not None and generated.question in problem.question:
            generated = None
        if row is None and generated is not None:  # with the ending that the questions have
            ending = problem.question[len(made[problem.cluster, problem.template, problem.operation].question) :]
            generated = Problem(**{**generated.__dict__, "question": generated.question + ending})
        found.append(problems[row] if row is not None else generated)
    return found


def interchange(model: CodiModel, thoughts: Thoughts, derivation: Sequence[Problem], config: Config) -> pd.DataFrame:
    """Trial table of interchange; conditions "<donor> <level> <where>" with where = a latent or "all", and "none"."""
    n, depth = model.n_latents, model.n_layers
    rng = generator(config.seed, "patch", "interchange")
    problems = thoughts.problems
    operations = _operation_donors(problems, config)
    twins: dict[tuple[float, int], list[Problem]] = defaultdict(list)
    for problem in derivation:
        twins[_key(problem)].append(problem)
    donors: list[Problem] = []
    of: list[dict[str, int]] = []
    for problem, operation in zip(problems, operations, strict=True):
        others = [
            p for p in problems
            if p.answer != problem.answer and p.intermediates[0] != problem.intermediates[0]
            and p.numbers[2] != problem.numbers[2]
        ]  # fmt: skip
        mine: dict[str, int] = {}
        same = [p for p in twins.get(_key(problem), []) if p.prompt_id != problem.prompt_id]
        picks = {
            "other": others[int(rng.integers(len(others)))] if others else None,
            "operation": operation if operation is not None and operation.answer != problem.answer else None,
            "twin": same[int(rng.integers(len(same)))] if same else None,
        }
        for name, pick in picks.items():
            if pick is not None:
                mine[name] = len(donors)
                donors.append(pick)
        of.append(mine)
    if not donors:
        raise ValueError("no evaluation prompt has a donor: use more prompts")
    banks = [
        think(model, donors[start : start + 128], keep=("embeddings", "hidden_states", "keys", "values"))
        for start in range(0, len(donors), 128)
    ]
    given = {
        name: torch.cat([getattr(bank.run, name) for bank in banks])
        for name in ("embeddings", "hidden_states", "keys", "values")
    }
    positions = torch.cat([bank.run.latent_positions for bank in banks])
    content = unrotate(given["keys"], positions[:, :, None, None], model)

    levels_of: list[tuple[str, str, int]] = [("vector", "vector", 0), ("slot", "kv", 0), ("keys", "keys", 0)]
    levels_of += [("values", "values", 0)] + [(f"residual {layer}", "layer", layer) for layer in range(1, depth)]
    per_layer = [(f"slot layer {layer}", "kv", layer) for layer in range(1, depth + 1)]
    columns: dict[str, list[Any]] = defaultdict(list)
    prompt: list[int] = []
    donor_row: list[int] = []
    code: list[tuple[str, int]] = []
    latent: list[int] = []
    for i, mine in enumerate(of):
        choices: list[tuple[str, str, tuple[str, int], int]] = [("none", "", ("none", 0), 1)]
        taken = {problems[i].answer, *(donors[row].answer for row in mine.values())}
        strangers = [p.answer for p in problems if p.answer not in taken]
        chance = float(strangers[int(rng.integers(len(strangers)))]) if strangers else float("nan")
        for kind in mine:
            for name, level, layer in levels_of + (per_layer if kind == "other" else []):
                whole = [0] if not name.startswith(("slot layer", "residual")) else []
                choices += [(kind, name, (level, layer), k) for k in [*whole, *range(1, n + 1)]]
        for kind, name, level_code, k in choices:
            donor = donors[mine[kind]] if kind != "none" else problems[i]
            own, theirs = problems[i].intermediates, donor.intermediates
            where = "all" if k == 0 else str(k)
            columns["condition"].append("none" if kind == "none" else f"{kind} {name} {where}")
            for column, entry in (
                ("donor_kind", kind), ("level", name), ("where", where),
                ("donor_answer", float(donor.answer)),
                ("chance_answer", chance),
                ("step1_local", float(theirs[0] + own[1])),
                ("step1_propagated", float(theirs[0] * problems[i].numbers[2] + theirs[0])),
                ("step2_local", float(own[0] + theirs[1])),
            ):  # fmt: skip
                columns[column].append(entry)
            prompt.append(i)
            donor_row.append(mine.get(kind, 0))
            code.append(level_code)
            latent.append(k)
    source, where_at = torch.tensor(donor_row), torch.tensor(latent)
    level_names = sorted(set(code))
    coded = torch.tensor([level_names.index(one) for one in code])
    first = thoughts.run.first_position

    def edits(rows: Tensor) -> Sequence[Intervention]:
        values: dict[Any, Any] = {}
        at = source[rows].to(model.device)
        prompts = torch.tensor(prompt)[rows].to(model.device)
        for k in range(1, n + 1):
            here = (where_at[rows] == k) | (where_at[rows] == 0)
            chosen = {
                level: here & (coded[rows] == number) for number, level in enumerate(level_names) if level[0] != "none"
            }
            slot = [chosen[level] for level in chosen if level == ("vector", 0)]
            if slot:
                values["embedding", k, 0] = (slot[0], given["embeddings"][at, k - 1])
            for layer in range(1, depth):
                if ("layer", layer) in chosen:
                    values["layer", k, layer] = (chosen["layer", layer], given["hidden_states"][at, k - 1, layer])
            for layer in range(1, depth + 1):
                both = _either(chosen, [("kv", 0), ("kv", layer)], here)
                keys = _either(chosen, [("keys", 0)], both)
                keep_values = _either(chosen, [("values", 0)], both)
                slots = rotate(content[at, k - 1, layer - 1], (first[prompts] + k - 1)[:, None], model)
                values["keys", k, layer] = (both | keys, slots)
                values["values", k, layer] = (both | keep_values, given["values"][at, k - 1, layer - 1])
        return [ReplaceRows(values)]

    texts = answer_rows(
        model, thoughts.prefill, prompt, edits, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size
    )
    frame = answer_table(problems, prompt, texts, **columns)
    for name in ("donor", "chance"):
        frame[name] = frame["prediction"] == frame[f"{name}_answer"]
    for name in ("step1_local", "step1_propagated", "step2_local"):
        mixed = (frame[name] != frame["answer"]) & (frame[name] != frame["donor_answer"])
        frame[f"{name}_hit"] = (frame["prediction"] == frame[name]) & mixed
    return frame


def _either(chosen: dict[Any, Tensor], names: Sequence[tuple[str, int]], like: Tensor) -> Tensor:
    result = torch.zeros_like(like, dtype=torch.bool)
    for name in names:
        if name in chosen:
            result = result | chosen[name]
    return result


# --- The study --------------------------------------------------------------------------------------------------------


def run(config: Config, model: CodiModel, split: Split, say: Callable[[str], None] | None = None) -> Result:
    """The study on a loaded model: trials, tables, figures, claims and summary in the run folder."""
    _check(split)
    n, settings = model.n_latents, config.settings
    with open_study("patch", config, model, split, say) as study:
        held: list[Any] = []

        def thoughts() -> tuple[Thoughts, Bank]:
            if not held:
                held.append((think(model, split.evaluation), Bank.collect(model, split.derivation)))
            return held[0]

        trials: dict[str, pd.DataFrame] = {}
        if "means" in config.families:
            trials["means"] = study.part("means", lambda: mean_patching(model, *thoughts(), config))
        if "values" in config.families:
            trials["values"] = study.part("values", lambda: value_patching(model, *thoughts(), config))
        if "interchange" in config.families:
            trials["interchange"] = study.part(
                "interchange", lambda: interchange(model, thoughts()[0], split.derivation, config)
            )
        tables: dict[str, pd.DataFrame] = {}
        if "means" in trials:
            part = trials["means"]
            names = [name for name in part["condition"].unique() if name != "none"]
            contrasts = [(name, "none") for name in names]
            contrasts += [(f"other key {w}", f"same key {w}") for w in ["all", *range(1, n + 1)]]
            tables["means"] = compare(part, contrasts, settings=settings)
            tables["means_levels"] = levels(part, settings=settings)
            if n >= 5:
                tables["claimed_latents"] = claimed_latents(part, "correct", "other key", "same key", settings)
        if "values" in trials:
            part = trials["values"]
            names = [name for name in part["condition"].unique() if name.startswith("target")]
            contrasts = [(name, name.replace("target", "control", 1)) for name in names]
            for outcome in ("hit", "local", "propagated"):
                tables[f"values_{outcome}"] = compare(part, contrasts, outcome=outcome, settings=settings)
            tables["values_levels"] = levels(part, outcome="hit", settings=settings)
        if "interchange" in trials:
            part = trials["interchange"]
            names = [name for name in part["condition"].unique() if name != "none"]
            tables["interchange_correct"] = compare(part, [(name, "none") for name in names], settings=settings)
            long = part[part["condition"] != "none"]
            for outcome in ("donor", "step1_local_hit", "step1_propagated_hit", "step2_local_hit"):
                both = pd.concat([
                    long.assign(value=long[outcome]),
                    long.assign(value=long["chance"], condition="chance: " + long["condition"]),
                ])  # fmt: skip
                pairs = [(name, f"chance: {name}") for name in names]
                tables[f"interchange_{outcome}"] = compare(both, pairs, outcome="value", settings=settings)
        for name, table in tables.items():
            study.table(name, table)
        study.draw(lambda: figures(tables, n, model.n_layers, config))
        claims = published_claims(tables, n, config)
        text = study.finish(f"Patching latents: {model.name}", words(tables, trials, n, config), claims)
        return Result(study.path, tables, claims, text)


def _value_name(step: int, scope: str, state: str, latent: int) -> str:
    return f"target step{step} {scope} {state} {latent}"


def claimed_latents(trials: pd.DataFrame, outcome: str, kind: str, control: str, settings: Settings) -> pd.DataFrame:
    """Claim C3 in one number: (kind − control) at latents 3 and 5, against the same at the other latents.

    Args:
        trials: with conditions "<kind> <latent>" and "<control> <latent>".
        outcome, kind, control: as named.
        settings: of the statistics.
    """
    means = trials.groupby(["cluster", "prompt_id", "condition"])[outcome].mean().unstack()
    names = [str(name) for name in means.columns]
    latents = [name.split()[-1] for name in names if name.startswith(f"{kind} ") and name.split()[-1].isdecimal()]
    rows = []
    for latent in latents:
        value = means[f"{kind} {latent}"].astype(float) - means[f"{control} {latent}"].astype(float)
        group = "latents 3, 5" if latent in ("3", "5") else "other latents"
        rows.append(value.rename("value").dropna().reset_index().assign(condition=group))
    return compare(pd.concat(rows), [("latents 3, 5", "other latents")], "value", settings)


def published_claims(tables: dict[str, pd.DataFrame], n: int, config: Config) -> ClaimsTable:
    """C3 and C5."""
    claims = ClaimsTable()
    if "means" in tables:
        base = float(row_of(tables["means"], "mean 1", "none")["reference_mean"])
        text = "the mean of another key hurts at latents 3 and 5 only"
        rule = "accuracy (other key − same key) at latents 3 and 5, minus the other latents, is below 0"
        if n < 5 or base < ENOUGH:
            reason = f"this model has {n} latents" if n < 5 else f"unedited accuracy is {base:.2f}: little to lose"
            claims.add(Claim("C3", text, rule, "not testable", note=reason))
        else:
            each = [row_of(tables["means"], f"other key {k}", f"same key {k}") for k in range(1, n + 1)]
            note = "points per latent: " + ", ".join(interval(row, "difference") for row in each)
            row = row_of(tables["claimed_latents"], "latents 3, 5")
            claims.add(effect_claim("C3", text, rule, judge(row["lower"], row["upper"], below=0.0), row, note))
    if "values_local" in tables:
        k = min(5, n)
        for scope in ("same template", "other templates"):
            for state in ("vector", "residual"):
                row = row_of(tables["values_local"], _value_name(2, scope, state, k))
                claims.add(
                    effect_claim(
                        f"C5 ({scope}, {state})",
                        f"step-2 patching at latent {k} moves the answer as predicted, far above random",
                        "share of predicted answers, minus the control value's, is above 0.1",
                        judge(row["lower"], row["upper"], above=0.1),
                        row,
                    )
                )
    return claims


def words(tables: dict[str, pd.DataFrame], trials: dict[str, pd.DataFrame], n: int, config: Config) -> list[str]:
    """The summary, paragraph by paragraph."""
    texts = ["Differences in points of accuracy (per cent of prompts), 95 % intervals over clusters; * q < 0.05."]
    if "means" in tables:
        table = tables["means"]
        base = row_of(tables["means_levels"], "none")
        lines = [
            f"**Mean patching** ({int(base['n'])} prompts whose key is among the derivation prompts; unedited accuracy "
            f"{interval(base)}). Change of accuracy, and the other key's mean against the same key's:",
            "",
        ]
        kinds = ["same key", "other key", "mean", "zero", *RANDOM_FORMS]
        lines += ["| latent | " + " | ".join(kinds) + " | other − same |", "|---|" + "---|" * (len(kinds) + 1)]
        for where in [*range(1, n + 1), "all"]:
            cells = [_cell(row_of(table, f"{kind} {where}", "none")) for kind in kinds]
            cells.append(_cell(row_of(table, f"other key {where}", f"same key {where}")))
            lines.append(f"| {where} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    if "values_hit" in tables:
        latents = (min(5, n),) if config.legacy else range(1, n + 1)
        lines = [
            "**Value patching.** Share of answers that are the predicted one, minus the share when a third value's "
            "mean is put in the same place:",
            "",
            "| patch | prediction | " + " | ".join(f"latent {k}" for k in latents) + " |",
            "|---|---|" + "---|" * len(latents),
        ]
        kinds_of = [(1, "local", "t + own step 2"), (1, "propagated", "t·Z + t"), (2, "local", "own step 1 + t")]
        for step, outcome, label in kinds_of[2:] if config.legacy else kinds_of:
            for scope in ("same template", "other templates"):
                for state in ("vector", "residual"):
                    names = [_value_name(step, scope, state, k) for k in latents]
                    cells = [_cell(row_of(tables[f"values_{outcome}"], name)) for name in names]
                    lines.append(f"| step {step}, {scope}, {state} | {label} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    if "interchange_donor" in tables:
        texts += _interchange_words(tables, trials["interchange"], n)
    return texts


def _cell(row: pd.Series | Mapping[str, Any]) -> str:
    return interval(row, "difference") + ("*" if row["q"] < 0.05 else "")


def _interchange_words(tables: dict[str, pd.DataFrame], trials: pd.DataFrame, n: int) -> list[str]:
    kinds = [kind for kind in ("other", "operation", "twin") if kind in set(trials["donor_kind"])]
    texts = []
    for kind in kinds:
        level_names = [x for x in trials[trials["donor_kind"] == kind]["level"].unique()]
        title = {"other": "another prompt", "operation": "the other operation", "twin": "the same key (control)"}[kind]
        read = (
            ""
            if kind == "twin"
            else " / share that gives the donor's answer, minus a third prompt's (the chance level)"
        )
        lines = [
            f"**Interchange with {title}.** Change of accuracy{read}:",
            "",
            "| level | " + " | ".join(["all", *map(str, range(1, n + 1))]) + " |",
            "|---|" + "---|" * (n + 1),
        ]
        for level in level_names:
            cells = []
            for where in ["all", *range(1, n + 1)]:
                name = f"{kind} {level} {where}"
                if name not in set(trials["condition"]):
                    cells.append("")
                    continue
                lost, moved = row_of(tables["interchange_correct"], name), row_of(tables["interchange_donor"], name)
                shown = [
                    f"{100 * row['difference']:+.0f}{'*' if row['q'] < 0.05 else ''}".replace("-", "−")
                    for row in ((lost,) if kind == "twin" else (lost, moved))
                ]
                cells.append(" / ".join(shown))
            lines.append(f"| {level} | " + " | ".join(cells) + " |")
        texts.append("\n".join(lines))
    best = []
    for outcome, label in (
        ("step1_local_hit", "donor's step 1 + own step 2"),
        ("step1_propagated_hit", "donor's step 1 carried through"),
        ("step2_local_hit", "own step 1 + donor's step 2"),
    ):
        table = tables[f"interchange_{outcome}"]
        table = table[table["condition"].str.startswith("other")]
        top = table.sort_values("difference").iloc[-1]
        best.append(f"{label}: most often with {top['condition']!r}, {_cell(top)}")
    texts.append("**Mixed answers** (neither prompt's own), minus chance: " + "; ".join(best) + ".")
    return texts


def figures(tables: dict[str, pd.DataFrame], n: int, depth: int, config: Config) -> dict[str, Any]:
    """Figures by file name."""
    found: dict[str, Any] = {}
    latents = range(1, n + 1)
    if "means" in tables:
        figure, axes = new_figure(1, 2, height=2.9)
        left, right = axes[0]
        level = tables["means_levels"]
        baseline(left, 100 * row_of(level, "none")["mean"], "unedited")
        for place, kind in enumerate(["same key", "other key", "mean", "zero", *RANDOM_FORMS]):
            rows = pd.DataFrame([row_of(level, f"{kind} {w}") for w in [*latents, "all"]])
            control = kind == "same key"
            draw_series(left, range(1, n + 2), rows, kind, 0 if control else place - 1, joined=n, control=control)
        left.set(xlabel="replaced latent", ylabel="accuracy (%)", title="Mean patching", ylim=(-2, None))
        left.set_xticks(range(1, n + 2), [*map(str, latents), "all"])
        legend(figure, [left])
        rows = pd.DataFrame([row_of(tables["means"], f"other key {w}", f"same key {w}") for w in [*latents, "all"]])
        baseline(right)
        draw_series(right, range(1, n + 2), rows, "other − same", 0, name="difference", joined=n)
        right.set(xlabel="replaced latent", ylabel="points of accuracy", title="Other key against same key")
        right.set_xticks(range(1, n + 2), [*map(str, latents), "all"])
        found["means"] = figure
    if "values_hit" in tables and not config.legacy:
        figure, axes = new_figure(1, 3, height=2.8, sharey=True)
        panels = ((1, "local", "Step 1 → t: t + own step 2"), (1, "propagated", "Step 1 → t: t·Z + t"),
                  (2, "local", "Step 2 → t: own step 1 + t"))  # fmt: skip
        for axis, (step, outcome, title) in zip(axes[0], panels, strict=True):
            baseline(axis)
            place = 0
            for scope in ("same template", "other templates"):
                for state in ("vector", "residual"):
                    names = [_value_name(step, scope, state, k) for k in latents]
                    rows = pd.DataFrame([row_of(tables[f"values_{outcome}"], name) for name in names])
                    draw_series(axis, latents, rows, f"{scope}, {state}", place, name="difference")
                    place += 1
            axis.set(xlabel="patched latent", title=title, xticks=latents)
        axes[0, 0].set_ylabel("predicted answers,\ntarget − control (points)")
        legend(figure, axes)
        found["values"] = figure
    if "interchange_donor" in tables:
        table, lost = tables["interchange_donor"], tables["interchange_correct"]
        names = [f"residual {layer}" for layer in range(1, depth)]
        names = ["vector", *names, "keys", "values", "slot", *(f"slot layer {layer}" for layer in range(1, depth + 1))]
        figure, axes = new_figure(1, 2, height=0.9 + 0.22 * len(names), sharey=True)
        scale = Scale(-100, 100, DIVERGING)
        for axis, part, title in (
            (axes[0, 0], lost, "Change of accuracy (points)"),
            (axes[0, 1], table, "Donor's answer, above chance (points)"),
        ):
            index = part.set_index("condition")
            wanted = [[f"other {name} {w}" for w in ["all", *latents]] for name in names]
            values = np.array([
                [100 * index["difference"].get(name, np.nan) for name in row] for row in wanted
            ])  # fmt: skip
            strong = np.array([[index["q"].get(name, 1.0) < 0.05 for name in row] for row in wanted])
            draw_matrix(axis, values, names, ["all", *map(str, latents)], title, form="+.0f",
                        significant=strong, bar=False, scale=scale)  # fmt: skip
            axis.set_xlabel("interchanged latent")
        colour_bar(figure, scale, "points", of=axes)
        found["interchange"] = figure
    return found


def main(config: Config) -> None:
    """Load, run, print the summary."""
    split = load_prompts(config, known_steps=3)
    _check(split)
    model = load_model(config)
    if config.suffix and model.protocol.question_suffix:
        split = load_prompts(config, model.protocol.question_suffix, known_steps=3)
    print(run(config, model, split, stderr).text)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
