"""`codi sweep`: steer every latent pair, position and coefficient, beside random controls; one run folder.

    options  ->  plan: grid, prompts, what the means are taken over
             ->  means of latents, directions and controls
             ->  every edit on every evaluation prompt, in parts  ->  statistics, figures, summary, result.json

This module only composes: options are resolved in plan.py, what is tried and how a part is run is in
experiments/study/edits, decoding in codi/branches.py, statistics in analysis.py, files in experiments/study/folder.py.
The same command goes on with an interrupted run and ends in the same table.

Runs as `codi sweep` or `python -m experiments.sweep`.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from experiments.statistics.clusters import Settings
from experiments.study.edits.grid import Grid, directions
from experiments.study.edits.run import EditPart, run_part
from experiments.study.edits.trials import TRIAL_SCHEMA, read_trials
from experiments.study.folder import RunFolder
from experiments.study.parts import Executor, Part, Recipe, Workbench, run_here
from experiments.study.progress import progress
from experiments.study.prompts_file import write_prompts
from experiments.study.result import Result
from experiments.study.run import fill, to_stderr
from experiments.study.thoughts import collect_means
from experiments.sweep.analysis import analyse
from experiments.sweep.options import SweepOptions
from experiments.sweep.plan import Averaged, Plan, averaged_problems, resolve, when
from experiments.sweep.recompute import report, write
from experiments.tasks.split import digest
from lm.terms import KeyFrame, Space
from steering.interventions import edit_table
from steering.means import ControlDraws, LatentMeans

if TYPE_CHECKING:
    from codi import CodiModel
    from codi.edits import EditTable

__all__ = ["latent_means", "main", "parts", "run", "sweep", "trials_of", "tried_directions", "unsteered"]

Means = tuple[LatentMeans, ControlDraws | None]


def main(options: SweepOptions) -> None:
    """Entry point: run or continue the sweep, then statistics, figures and summary, printed."""
    result = run(options, say=to_stderr)
    print((result.path / "summary.md").read_text(encoding="utf-8"), end="")


def run(
    options: SweepOptions, model: CodiModel | None = None, say: Callable[[str], None] = lambda line: None
) -> Result:
    """The whole sweep, or the rest of it: trials, statistics, figures, result.json and summary.md.

    Args:
        options: what is asked for.
        model: already loaded as the options say; None: it is loaded.
        say: called with lines for a person.

    Raises:
        ValueError, OSError: as `resolve` and `RunFolder.open`.
    """
    handed_over = model is not None
    model = model or options.load()
    plan = resolve(options, model)
    bench = Workbench(model, plan.split, None if handed_over else _recipe(options, plan))
    try:
        folder = carry_out(plan, bench, say)
    except KeyboardInterrupt:
        say(f"\ninterrupted; finished parts are in {options.out}, the same command goes on from them")
        raise
    return conclude(folder, plan)


def sweep(options: SweepOptions, model: CodiModel, say: Callable[[str], None] = lambda line: None) -> RunFolder:
    """Everything up to and including the trial table.

    Args:
        options: what is asked for.
        model: loaded; not modified.
        say: called with lines for a person.

    Returns:
        The run folder, all parts there.
    """
    plan = resolve(options, model)
    return carry_out(plan, Workbench(model, plan.split), say)


def _recipe(options: SweepOptions, plan: Plan) -> Recipe:
    from codi import load_codi

    return Recipe(load_codi, options.load_arguments(), plan.split)


# --- Parts ------------------------------------------------------------------------------------------------------------


def parts(plan: Plan) -> list[Part]:
    """The trial table as data."""
    return [
        Part(
            name,
            trials_of,
            {"job": job, "averaged": plan.averaged[job.space]},
            plan.grid.seed,
            TRIAL_SCHEMA,
            table="trials",
            rows=job.rows,
        )
        for name, job in plan.jobs()
    ]


def trials_of(bench: Workbench, *, job: EditPart, averaged: Averaged, seed: int) -> dict[str, Any]:
    """Rows of one part."""
    del seed  # the draws are those of the grid's seed
    return run_part(bench.model, bench.once(tried_directions, job.grid, job.space, averaged), job, bench.advance)


def tried_directions(bench: Workbench, grid: Grid, space: Space, averaged: Averaged) -> EditTable:
    """Directions and controls of one space."""
    means, draws = bench.once(latent_means, averaged, *_drawn(grid))
    return edit_table(directions(grid, space, means, draws), bench.model.device)


def latent_means(bench: Workbench, averaged: Averaged, n_draws: int, seed: int, keys: KeyFrame) -> Means:
    """Means of the latents over some prompts, and the raw draws of two controls if `n_draws` is above 0."""
    problems = averaged_problems(bench.prompts, averaged)
    return collect_means(bench.model, problems, metadata={}, n_draws=n_draws, seed=seed, keys=keys)


def _drawn(grid: Grid) -> tuple[int, int, KeyFrame]:
    """Number of raw draws, seed and key frame that the means of a grid are collected with."""
    return grid.draws if {"covariance", "shuffled"} & set(grid.controls) else 0, grid.seed, grid.keys


# --- The run ----------------------------------------------------------------------------------------------------------


def carry_out(plan: Plan, bench: Workbench, say: Callable[[str], None], executor: Executor = run_here) -> RunFolder:
    """Compute the parts that the run folder lacks.

    Args:
        plan: what is run.
        bench: model and prompts.
        say: called with lines for a person.
        executor: computes the parts that are missing.

    Raises:
        ValueError, OSError: as `RunFolder.open`.
    """
    folder = RunFolder(plan.out)
    with folder.open(plan.identity(), plan.record()) as known:
        began = time.time()
        say(plan.announcement(known))
        write_prompts(folder, plan.split)
        missing = [part for part in parts(plan) if not folder.has_part(part.name, part.schema, part.rows)]
        todo = sum(part.rows or 0 for part in missing)
        if missing and not plan.legacy:  # which answers with one token, from part of the vocabulary
            say(unsteered(plan, bench.model))
        with tqdm(total=plan.n_trials, initial=plan.n_trials - todo, unit="trial", unit_scale=True, **_bar()) as bar:
            bench.advance = bar.update
            for space, group in itertools.groupby(missing, key=lambda part: part.arguments["job"].space):
                averaged = plan.averaged[space]
                bench.put(_stored_means(folder, plan, space, bench, say), latent_means, averaged, *_drawn(plan.grid))
                fill(folder, list(group), bench, executor=executor)
        sittings = folder.manifest().get("sittings", [])
        seconds = time.time() - began
        memory = _peak_memory(bench.model)
        sittings.append({"started": when(began), "seconds": round(seconds, 1), "trials": todo, **memory})
        folder.add_to_manifest(sittings=sittings, finished=when(time.time()))
        say(f"{todo:,} trials in {seconds:.0f} s" + (f", {todo / seconds:,.0f} per second" if todo else ""))
    return folder


def unsteered(plan: Plan, model: CodiModel) -> str:
    """How many prompts the model answers right without any edit, before an edit is tried; and what cannot be seen then.

    The whole thought; the first exits of an early-exit sweep are less often right.
    """
    prompts = plan.split.evaluation
    texts = model.answer([problem.question for problem in prompts], max_new_tokens=plan.max_new_tokens)
    right = sum(problem.is_answered_by(text) for problem, text in zip(prompts, texts, strict=True))
    line = f"  unsteered, {right} of {len(prompts)} prompts are answered right"
    if right == 0:
        return f"{line}: no edit can be seen to do harm here; take prompts that the model can answer"
    if right == len(prompts):
        return f"{line}: no edit can be seen to improve anything here; take harder prompts"
    return line


def _stored_means(folder: RunFolder, plan: Plan, space: Space, bench: Workbench, say: Callable[[str], None]) -> Means:
    """The means and draws of the run folder; computed and written there if they are missing or damaged.

    One file serves all spaces, except in legacy mode, whose scripts average over different prompts.
    """
    problems, ending = averaged_problems(plan.split, plan.averaged[space]), plan.means_suffix[space]
    n_draws, seed, keys = _drawn(plan.grid)
    metadata = {
        "checkpoint_hash": plan.checkpoint_hash,
        "derivation": digest(problems),
        "fingerprint": folder.fingerprint,
    }
    try:
        means = LatentMeans.load(folder.path / f"means{ending}.safetensors")
        draws = ControlDraws.load(folder.path / f"draws{ending}.safetensors") if n_draws else None
        if all(means.metadata.get(name) == value for name, value in metadata.items()):
            return means, draws
    except (FileNotFoundError, ValueError):
        pass
    say(f"averaging the latents of {len(problems)} prompts")
    means, draws = collect_means(bench.model, problems, metadata=metadata, n_draws=n_draws, seed=seed, keys=keys)
    folder.write(f"means{ending}.csv", pd.DataFrame(means.summary()).to_csv(index=False).encode())
    if draws is not None:
        folder.write(f"draws{ending}.safetensors", draws.to_bytes())
    folder.write(f"means{ending}.safetensors", means.to_bytes())
    return means, draws


def conclude(folder: RunFolder, plan: Plan) -> Result:
    """Statistics, figures, result.json and summary.md of a finished trial table."""
    analysis = analyse(read_trials(folder), Settings(seed=plan.grid.seed), progress)
    write(analysis, folder.path)
    if plan.plots:
        from experiments.sweep.draw import draw

        draw(analysis, folder.path, bar=progress)
    return report(analysis, folder.path)[0]


# --- For a person -----------------------------------------------------------------------------------------------------


def _bar() -> dict[str, Any]:
    """Progress on stderr: rate and time left; rarely where nobody watches."""
    return {"desc": "sweep", "smoothing": 0.05, "mininterval": 0.5 if sys.stderr.isatty() else 15.0, "file": sys.stderr}


def _peak_memory(model: CodiModel) -> dict[str, float | str]:
    """Largest memory so far in GB: of the process, and of the GPU where there is one."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found: dict[str, float | str] = {"peak_memory_gb": round(peak / 1e9, 3)}
    if model.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(model.device)
        found["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(model.device) / 1e9, 3)
    return found


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
