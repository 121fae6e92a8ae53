"""`codi probes`: what a linear map reads from each latent, space and layer, on combinations of numbers it has not seen.

For every space (h: residual stream, z: the fed embedding, keys, values), latent and layer a linear classifier is fitted
to each target (operation, operands, step1, step2, …, answer) and scored on held-out prompts: by number triple, and for
step 1 and operands by the pair (X, Y) that they depend on. Beside the accuracy stand shuffled labels, a control task
that only memory can solve, what is reachable at all, and r2 of numbers; how, and from whom, is said in
experiments/statistics/probes.py and experiments/study/targets.py. (A published probe took its labels for "intermediate
or final" from the lens it was meant to confirm and let prompts with the same numbers into both parts; here nothing but
the problem gives a label.)

Trials: `scores` (a row per space, latent, layer, target and prompt), `design` (label, fold and type, a row per target
and prompt). Knows nothing about lenses, answers or interventions. Runs as `codi probes` or
`python -m experiments.latents.probes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments.latents.options import PROBED_SPACES, ProbedSpace, ProbesOptions
from experiments.latents.probes_figures import draw
from experiments.statistics.clusters import Settings
from experiments.statistics.probes import CONTRAST, Design, ProbeScores, Target, probe, probe_table
from experiments.study.folder import TEXT
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.study.targets import design_of
from experiments.tasks import Problem
from experiments.tasks.split import Split
from steering.means import content_keys

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "collect", "main", "run", "summary"]

SCORES = pa.schema({
    "space": TEXT, "latent": pa.int16(), "layer": pa.int16(), "target": TEXT, "prompt_id": TEXT,
    "correct": pa.float64(), "shuffled": pa.float64(), "control": pa.float64(), "r2": pa.float64(),
})  # fmt: skip
"""correct: 0 or 1 (NaN: a target with too many classes); shuffled, control: means over draws; r2: of the place."""
DESIGN = pa.schema({
    "target": TEXT, "prompt_id": TEXT, "cluster": TEXT, "fold": pa.int16(), "label": pa.int32(),
    "type": pa.int32(),
})  # fmt: skip


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved; places are (space, latent)."""

    places: tuple[tuple[ProbedSpace, int], ...]
    layers: tuple[int, ...]
    folds: int
    shuffles: int
    control_draws: int
    seed: int
    batch_size: int
    settings: Settings
    asked: str


def make_plan(options: ProbesOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: a layer that the model does not have, or more folds than clusters.
    """
    design_of(prompts.evaluation, options.folds, options.shuffles, options.seed)
    spaces = tuple(dict.fromkeys(options.spaces))
    return Plan(
        places=tuple((s, k) for s in spaces for k in range(0 if s == "h" else 1, model.n_latents + 1)),
        layers=_wanted(model, options.layers),
        folds=options.folds,
        shuffles=options.shuffles,
        control_draws=options.control_draws,
        seed=options.seed,
        batch_size=options.batch_size,
        settings=options.statistics(options.seed),
        asked=f"{options.task}, split {options.chosen_split}",
    )


def _wanted(model: CodiModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to read, all or those given, ascending."""
    wanted = tuple(range(model.n_layers + 1)) if layers is None else tuple(sorted(set(layers)))
    wrong = [layer for layer in wanted if not 0 <= layer <= model.n_layers]
    if wrong:
        raise ValueError(f"layers must be in 0..{model.n_layers}, got {wrong[0]}")
    return wanted


def parts(plan: Plan) -> list[Part]:
    """The design, and a part of the scores per space and latent."""
    chosen = {"folds": plan.folds, "shuffles": plan.shuffles, "draws": plan.control_draws}
    rolled = {"layers": plan.layers, "batch_size": plan.batch_size}
    return [
        Part("design", design, chosen, plan.seed, DESIGN),
        *(
            Part(
                f"{space}-{latent}", scores, {"space": space, "latent": latent, **rolled, **chosen}, plan.seed, SCORES,
                table="scores",
            )
            for space, latent in plan.places
        ),
    ]  # fmt: skip


def the_design(bench: Workbench, folds: int, shuffles: int, draws: int, seed: int) -> Design:
    """Targets, folds, shuffles and control tasks of the evaluation prompts."""
    return design_of(bench.prompts.evaluation, folds, shuffles, seed, draws=draws)


def states_of(
    bench: Workbench, space: ProbedSpace, layers: tuple[int, ...], batch_size: int
) -> dict[tuple[str, int, int], np.ndarray]:
    """States of one space at all latents and layers."""
    problems = bench.prompts.evaluation
    with bench.bar(len(problems), "prompt", f"states ({space})") as advance:
        return collect(bench.model, problems, (space,), layers, batch_size, advance)


def design(bench: Workbench, *, seed: int, folds: int, shuffles: int, draws: int) -> pd.DataFrame:
    """What every probe has to read, and in which fold each prompt is held out."""
    drawn = bench.once(the_design, folds, shuffles, draws, seed)
    ids = [problem.prompt_id for problem in bench.prompts.evaluation]
    frames = []
    for target, folds_of, types in zip(drawn.targets, drawn.folds, drawn.types, strict=True):
        assert types is not None
        columns = {"cluster": drawn.clusters, "fold": folds_of, "label": target.labels, "type": types}
        frames.append(pd.DataFrame({"target": target.name, "prompt_id": ids, **columns}))
    return pd.concat(frames, ignore_index=True)


def scores(
    bench: Workbench,
    *,
    seed: int,
    space: ProbedSpace,
    latent: int,
    layers: tuple[int, ...],
    batch_size: int,
    folds: int,
    shuffles: int,
    draws: int,
) -> pd.DataFrame:
    """Held-out results of one space and latent, at every layer."""
    drawn = bench.once(the_design, folds, shuffles, draws, seed)
    ids = [problem.prompt_id for problem in bench.prompts.evaluation]
    frames = []
    read = {layer: x for (_, k, layer), x in bench.once(states_of, space, layers, batch_size).items() if k == latent}
    with bench.bar(len(read), "layer", f"probes ({space}, latent {latent})") as advance:
        for layer, x in read.items():
            found = probe(x, drawn)
            given = {"space": space, "latent": latent, "layer": layer, "prompt_id": ids}
            for name, correct in found.correct.items():
                beside = {"shuffled": found.shuffled[name], "control": found.control[name], "r2": found.r2[name]}
                frames.append(pd.DataFrame({**given, "target": name, "correct": correct, **beside}))
            advance(1)
    return pd.concat(frames, ignore_index=True)


# --- States of a model ------------------------------------------------------------------------------------------------


def collect(
    model: CodiModel,
    problems: Sequence[Problem],
    spaces: Sequence[ProbedSpace] = PROBED_SPACES,
    layers: Sequence[int] | None = None,
    batch_size: int = 128,
    advance: Callable[[int], object] = lambda prompts: None,
) -> dict[tuple[str, int, int], np.ndarray]:
    """States of every prompt, one array per place.

    Args:
        model: the model.
        problems: at least one.
        spaces: any of h, z, keys, values.
        layers: of h (0..n_layers) and blocks of keys and values (1..n_layers); None: all. z has layer 0.
        batch_size: prompts at once.
        advance: called with the number of prompts just done.

    Returns:
        (space, latent, layer) -> (prompt, feature) float32, in order. h also has latent 0, the begin-of-thought token.
        Keys have their rotation undone (a probe must not read the length of the prompt from it).

    Raises:
        ValueError: an unknown space, a layer outside 0..n_layers.
    """
    unknown = sorted(set(spaces) - set(PROBED_SPACES))
    if unknown or not spaces:
        raise ValueError(f"spaces may be {', '.join(PROBED_SPACES)}, got {', '.join(unknown) or 'none'}")
    wanted = _wanted(model, layers)
    kept = {"h": "hidden_states", "z": "embeddings", "keys": "keys", "values": "values"}
    found: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for start in range(0, len(problems), batch_size):
        questions = [problem.question for problem in problems[start : start + batch_size]]
        run = model.rollout(model.encode(questions), model.n_latents, keep=[kept[space] for space in spaces])
        for space in dict.fromkeys(spaces):
            if space == "h":
                assert run.hidden_states is not None and run.bot_hidden_states is not None
                states = {0: run.bot_hidden_states}
                states |= {k + 1: run.hidden_states[:, k] for k in range(run.n_latents)}
                cells = {(k, layer): state[:, layer] for k, state in states.items() for layer in wanted}
            elif space == "z":
                assert run.embeddings is not None
                cells = {(k + 1, 0): run.embeddings[:, k] for k in range(run.n_latents)}
            else:
                slots = content_keys(run, model) if space == "keys" else run.values
                assert slots is not None
                blocks = [layer for layer in wanted if layer > 0]
                cells = {(k + 1, b): slots[:, k, b - 1].flatten(1) for k in range(run.n_latents) for b in blocks}
            for (latent, layer), tensor in cells.items():
                found.setdefault((space, latent, layer), []).append(tensor.float().cpu().numpy())
        advance(len(questions))
    return {place: np.concatenate(parts) for place, parts in found.items()}


# --- What they say ----------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """The table, its figure and its summary."""
    drawn, places, found = read_trials(trials)
    settings = plan.settings
    table = probe_table(
        places, found, drawn, resamples=settings.resamples, level=settings.level, seed=settings.seed
    )  # fmt: skip
    about = (
        f"{plan.asked}, {len(drawn.clusters)} prompts in {len(set(drawn.clusters))} number triples; linear probes, "
        f"{plan.folds} folds by triple (step 1 and operands: by the pair X, Y), {plan.shuffles} label shuffles, "
        f"{plan.control_draws} control tasks."
    )
    caption = "Selectivity of linear probes of every target, by space, layer and latent."
    return Findings(
        [Section(about), Section(summary(table))], {"probes": table}, lambda: {"probes": draw(table)},
        {"probes": caption},
    )  # fmt: skip


def _between(row: pd.Series, name: str) -> str:
    """An estimate with its interval."""
    return f"{row[name]:.2f} [{row[f'{name}_lower']:.2f}, {row[f'{name}_upper']:.2f}]"


def read_trials(trials: Trials) -> tuple[Design, list[tuple[str, int, int]], list[ProbeScores]]:
    """Design (without its columns of labels), places and their scores, from the trial tables."""
    rows = {str(name): part for name, part in trials["design"].groupby("target", observed=True, sort=False)}
    first = next(iter(rows.values()))
    targets = tuple(
        Target(name, part["label"].to_numpy(), tuple(range(part["label"].max() + 1))) for name, part in rows.items()
    )
    drawn = Design(
        targets,
        np.array(first["cluster"].tolist()),
        np.stack([part["fold"].to_numpy() for part in rows.values()]),
        (),
        types=tuple(part["type"].to_numpy() for part in rows.values()),
    )
    places, found = [], []
    for _, cell in trials["scores"].groupby(["space", "latent", "layer"], observed=True, sort=False):
        by_target = {str(name): part for name, part in cell.groupby("target", observed=True, sort=False)}
        one = cell.iloc[0]
        places.append((str(one["space"]), int(one["latent"]), int(one["layer"])))
        found.append(
            ProbeScores(
                correct={name: part["correct"].to_numpy() for name, part in by_target.items()},
                shuffled={name: part["shuffled"].to_numpy() for name, part in by_target.items()},
                r2={name: float(part["r2"].iloc[0]) for name, part in by_target.items()},
                control={name: part["control"].to_numpy() for name, part in by_target.items()},
            )
        )
    return drawn, places, found


def summary(table: pd.DataFrame) -> str:
    """The best place of every target with its limits, and its readability from h_k by latent, as markdown."""
    heads = [
        "target", "classes", "reachable", "shuffled", "control task", "its limit", "best place", "accuracy",
        "over shuffled [95 %]", "over control [95 %]", "r2",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for target, cells in table[table["target"] != CONTRAST].groupby("target", sort=False):
        cells = cells.sort_values("selectivity", ascending=False, na_position="last")
        best, alike = cells.iloc[0], int((cells["selectivity"] == cells["selectivity"].iloc[0]).sum())
        place = f"{best['space']}, latent {best['latent']}, layer {best['layer']}"
        place += f" and {alike - 1} alike" if alike > 1 else ""
        r2 = "–" if np.isnan(best["r2"]) else f"{best['r2']:.2f}"
        numbers = (
            f"{best['reachable']:.3f}", f"{best['shuffled']:.2f}", f"{best['control']:.2f}", f"{best['memory']:.2f}",
            place, f"{best['accuracy']:.3f}", _between(best, "selectivity"), _between(best, "over_control"), r2,
        )  # fmt: skip
        lines.append(f"| {target} | {best['classes']} | {' | '.join(numbers)} |")
    lines += [
        "",
        "reachable: the most that any probe can score, because a value that is only in the held-out part cannot be "
        "named. control task: labels that are random but the same wherever a type recurs; its limit: how many held-out "
        "prompts have a type that was in the training part, the most that memory can reach.",
    ]
    last = table[(table["space"] == "h") & (table["layer"] == table.loc[table["space"] == "h", "layer"].max())]
    if len(last):
        grid = last.pivot(index="target", columns="latent", values="selectivity")
        grid = grid.loc[list(dict.fromkeys(last["target"]))]
        lines += ["", "Selectivity (and r2 of numbers) from h_k, the last layer, by latent (0: begin of thought):", ""]
        lines += ["| target | " + " | ".join(map(str, grid.columns)) + " |", "|---|" + "---|" * grid.shape[1]]
        for name, row in zip(grid.index, grid.to_numpy(), strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
        numbers = last.dropna(subset="r2").pivot(index="target", columns="latent", values="r2")
        for name in [target for target in grid.index if target in numbers.index]:
            lines.append(f"| {name}, r2 | " + " | ".join(f"{value:.2f}" for value in numbers.loc[name]) + " |")
    return "\n".join(lines)


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=ProbesOptions,
    title="Probes of latents",
    prompts=lambda options, model: options.load_problems(options.seed, model.protocol.question_suffix, known_steps=1),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
