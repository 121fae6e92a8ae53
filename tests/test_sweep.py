"""experiments.sweep and the grid of edits: the whole way from options to the trial table, on a toy."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from codi import CodiModel
from codi.decode import decode_answers
from experiments import cli
from experiments.study.edits.cells import cell_statistics
from experiments.study.edits.grid import Grid, conditions, names, unique_cells
from experiments.study.edits.trials import read_trials
from experiments.study.folder import RunFolder
from experiments.study.parts import Workbench
from experiments.study.result import Result
from experiments.study.thoughts import collect_means
from experiments.sweep.options import (
    SweepOptions,
    parse_choices,
    parse_coefficients,
    parse_numbers,
    parse_pairs,
    timings_of,
)
from experiments.sweep.plan import averaged_problems, resolve
from experiments.sweep.run import parts, sweep, unsteered
from experiments.tasks import Problem, extract_answer, is_correct, load_task
from experiments.tasks.split import check_disjoint, load_split
from steering.directions import difference, generator, random_direction
from steering.interventions import AddDirection
from steering.means import LatentMeans

KEYS = ["space", "part", "timing", "control", "source", "target", "coefficient", "draw", "latent", "prompt_id"]


def config(out: Path, **changes) -> SweepOptions:
    """A sweep of seconds: 6 short prompts, 2 pairs, 2 positions."""
    given = {
        "out": out,
        "task": "arithmetic",
        "limit": 6,
        "min_steps": 1,
        "max_steps": 1,
        "derivation": 8,
        "draws": 2,
        "pairs": ("1-2", "3-1"),
        "latents": ("1", "3"),
        "coefficients": ("-1", "0.5"),
        "max_new_tokens": 2,
        "part_prompts": 4,
    }
    return SweepOptions(**{**given, **changes})


def frame(folder: RunFolder) -> pd.DataFrame:
    table = read_trials(folder)
    return table.astype({column: str for column in table.columns[table.dtypes == "category"]})


def everything_of(out: Path) -> SweepOptions:
    """All spaces, parts, timings and controls at once."""
    return config(
        out,
        space=("kv", "embedding", "hidden"),
        part=("keys", "values", "both"),
        timing=("early-exit", "continue", "cached"),
        controls=("random", "covariance", "shuffled", "patch-scalar", "patch-coordinate", "patch-norm"),
    )


@pytest.fixture(scope="module")
def everything(codi_model, tmp_path_factory) -> RunFolder:
    return sweep(everything_of(tmp_path_factory.mktemp("sweep") / "run"), codi_model)


@pytest.fixture(scope="module")
def trials(everything) -> pd.DataFrame:
    return frame(everything)


def test_what_cannot_be_seen_is_said_before_anything_is_tried(codi_model, tmp_path):
    """A baseline of 0 % or 100 %: the first lines of the run, not the last ones of its summary."""
    options = config(tmp_path / "run", space=("kv",), pairs=("1-2",), latents=("1",))
    plan = resolve(options, codi_model)
    texts = codi_model.answer([problem.question for problem in plan.split.evaluation], max_new_tokens=2)
    for answers, says in (
        ([-12345.0] * 6, "0 of 6 prompts are answered right: no edit can be seen to do harm here"),
        ([extract_answer(text) for text in texts], "6 of 6 prompts are answered right: no edit can be seen to improve"),
    ):
        problems = [dataclasses.replace(p, answer=a) for p, a in zip(plan.split.evaluation, answers, strict=True)]
        if None in answers:  # a random model that writes no number
            continue
        split = dataclasses.replace(plan.split, evaluation=tuple(problems))
        assert says in unsteered(dataclasses.replace(plan, split=split), codi_model)
    said: list[str] = []
    sweep(options, codi_model, said.append)
    place = [i for i, line in enumerate(said) if "prompts are answered right" in line]
    assert place == [1] and said[0].startswith("starting")  # before the means, and before every part
    sweep(options, codi_model, said.append)
    assert sum("prompts are answered right" in line for line in said) == 1  # nothing is left to try


# --- What is tried ----------------------------------------------------------------------------------------------------


def test_default_grid_has_every_cell_once():
    pairs = parse_pairs(["all"], 6)
    assert len(pairs) == 30
    sizes = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    cells = unique_cells(pairs, sizes)
    assert len(cells) == 15 * 6 and all(a < b for a, b, _ in cells)
    named = {(a, b, c) for a, b, c in cells} | {(b, a, -c) for a, b, c in cells}
    assert named == {(a, b, c) for a, b in pairs for c in sizes}
    options = Grid(pairs=pairs, draws=20)
    tried = conditions(options, "kv", "both", "early-exit")
    counts = pd.Series([condition.control for condition in tried]).value_counts()
    assert dict(counts) == {"none": 6, "direction": 540, "random": 15 * 20 * 3 * 6}
    pooled = conditions(dataclasses.replace(options, draw_norm="pooled"), "kv", "both", "continue")
    counts = pd.Series([condition.control for condition in pooled]).value_counts()
    assert dict(counts) == {"none": 1, "direction": 540, "random": 20 * 3 * 6}


def test_one_requested_name_is_stored_under_the_other():
    assert unique_cells([(5, 2)], [1.0]) == ((2, 5, -1.0),)
    assert unique_cells([(5, 2), (2, 5)], [1.0]) == ((2, 5, -1.0), (2, 5, 1.0))
    assert unique_cells([(5, 2), (2, 5)], [1.0, -1.0]) == ((2, 5, -1.0), (2, 5, 1.0))


def test_reading_options():
    assert parse_numbers("latents", ["1..3", "5,6"], 6) == (1, 2, 3, 5, 6)
    assert parse_numbers("latents", ["all"], 4) == (1, 2, 3, 4)
    assert parse_coefficients(["-2,1e-1", "0", "-2"]) == (-2.0, 0.1)
    assert parse_pairs(["5-1,1-2"], 6) == ((1, 2), (5, 1))
    assert parse_choices("space", ["kv,hidden", "kv"], ("kv", "embedding", "hidden")) == ("kv", "hidden")
    assert parse_choices("controls", ["none"], ("random",)) == ()


def test_draws_are_matched_and_do_not_depend_on_what_else_is_swept():
    small = Grid(pairs=((1, 2),), draws=3)
    large = Grid(pairs=parse_pairs(["all"], 6), draws=5, controls=("random", "covariance"))
    assert set(names(small, "kv")) < set(names(large, "kv"))


# --- The trial table --------------------------------------------------------------------------------------------------


def test_table_is_complete_and_without_repeats(trials, everything):
    assert not trials.duplicated(KEYS).any()
    assert len(trials) == everything.manifest()["trials"]
    per_space = {space: len(rows) for space, rows in trials.groupby("space")}
    pair_controls, directions = 3 * 2 * 2 * 2 * 2, 2 * 2 * 2  # kinds, pairs, draws, sizes, latents; pairs, c, latents
    vector = 6 * (3 * (pair_controls + directions + 3 * 2 * 2) + 2 + 1 + 1)
    kv = 6 * 3 * (3 * (pair_controls + directions) + 2 + 1 + 1)
    assert per_space == {"kv": kv, "embedding": vector, "hidden": vector}
    direction = trials[trials["control"] == "direction"]
    assert (direction["source"] < direction["target"]).all()
    assert set(direction["coefficient"][direction["target"] == 3]) == {
        1.0,
        -0.5,
    }  # 3-1 at −1 and 0.5 is 1-3 at 1 and −0.5
    random = trials[trials["control"] == "random"]
    assert set(random["coefficient"]) == {1.0, 0.5} and set(random["draw"]) == {0, 1}
    patches = trials[trials["control"].str.startswith("patch")]
    assert (patches[["source", "target", "coefficient"]] == 0).all().all() and "kv" not in set(patches["space"])


def test_baselines(trials, codi_model, problems):
    """One per exit in early-exit, else one per prompt; the answers that the model gives alone, without any of this."""
    baseline = trials[trials["control"] == "none"]
    early = baseline[baseline["timing"] == "early-exit"]
    assert (early["latent"] == early["n_latents"]).all() and set(early["latent"]) == {1, 3}
    late = baseline[baseline["timing"] != "early-exit"]
    assert set(late["latent"]) == {0} and set(late["n_latents"]) == {6}
    assert (baseline["applied_norm"] == 0).all() and (baseline["draw"] == -1).all()
    for row in baseline[baseline["prompt_id"].isin(sorted(problems)[:2])].itertuples():
        question = problems[row.prompt_id].question
        assert codi_model.answer([question], n_latents=row.n_latents, max_new_tokens=2) == [row.text]


@pytest.fixture(scope="module")
def problems(everything, codi_model) -> dict[str, Problem]:
    split = resolve(config(everything.path), codi_model).split
    return {problem.prompt_id: problem for problem in split.evaluation}


def test_rows_equal_one_edit_of_one_prompt_alone(trials, everything, codi_model, problems):
    """Random rows of the table, computed again one at a time: no batch, no branches, no padding."""
    means = LatentMeans.load(everything.path / "means.safetensors")
    rng = np.random.default_rng(0)
    different = 0
    for space in ("kv", "embedding", "hidden"):
        for timing in ("early-exit", "continue"):
            rows = trials[(trials["space"] == space) & (trials["timing"] == timing)]
            rows = rows[rows["control"].isin(["direction", "random"])]
            for row in rows.iloc[rng.choice(len(rows), 6, replace=False)].itertuples():
                batch = codi_model.encode([problems[row.prompt_id].question])
                direction = difference(means, row.source, row.target, space)
                if row.control == "random":
                    rng_of = generator(0, "random", space, row.source, row.target, row.draw)
                    direction = random_direction(direction, rng_of)
                change = AddDirection(direction, row.latent, row.coefficient, part=row.part)
                run = codi_model.rollout(batch, row.n_latents, [change])
                assert decode_answers(codi_model, run, 2).texts == [row.text]
                plain = decode_answers(codi_model, codi_model.rollout(batch, row.n_latents), 2).texts
                different += plain != [row.text]
    assert different > 5  # steering changes answers in this toy, or equality would say nothing


def test_scores_are_those_of_the_readers(trials):
    for row in trials.drop_duplicates(["text", "prompt_id"]).itertuples():
        number = extract_answer(row.text)
        assert row.parsed == (number is not None)
        assert (np.isnan(row.prediction) and number is None) or row.prediction == number
        assert row.correct == is_correct(row.text, row.answer)
    assert 0 < trials["parsed"].mean() < 1


def test_random_draws_have_the_norm_of_their_pair(trials):
    """In the table: what was really applied, per pair, latent, |c| and prompt."""
    table = trials[trials["timing"] == "early-exit"].assign(size=trials["coefficient"].abs())
    keys = ["space", "part", "source", "target", "latent", "size", "prompt_id"]
    direction = table[table["control"] == "direction"].set_index(keys)["applied_norm"]
    for control in ("random", "covariance", "shuffled"):
        draws = table[table["control"] == control].set_index(keys)["applied_norm"]
        expected = direction.reindex(draws.index)
        np.testing.assert_allclose(draws, expected, rtol=1e-4)
    assert direction.groupby(["space", "source", "target"]).mean().std() > 0.01  # norms differ between pairs


def test_patching_leaves_nothing_of_the_latent(trials, codi_model, problems):
    """Form iii has the prompt's own norm: what is applied is patch − own, and at most twice that norm."""
    rows = trials[(trials["control"] == "patch-norm") & (trials["space"] == "embedding")]
    for row in rows.drop_duplicates("prompt_id").itertuples():
        run = codi_model.rollout(codi_model.encode([problems[row.prompt_id].question]), row.latent)
        own = float(run.embeddings[0, row.latent - 1].norm())
        assert 0.5 * own < row.applied_norm < 2 * own


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"part_prompts": 1}, {"space": ("embedding", "kv")}])
def test_same_table_whatever_the_batches_and_order(codi_model, tmp_path, changes):
    one = frame(sweep(config(tmp_path / "one"), codi_model))
    other = frame(sweep(config(tmp_path / "other", **changes), codi_model))
    numbers = ["applied_norm"]
    pd.testing.assert_frame_equal(one.drop(columns=numbers), other.drop(columns=numbers))
    np.testing.assert_allclose(one["applied_norm"], other["applied_norm"], rtol=1e-4, atol=1e-6)


def test_seed(codi_model, tmp_path):
    same = [frame(sweep(config(tmp_path / name), codi_model)) for name in ("a", "b")]
    pd.testing.assert_frame_equal(*same)
    # another seed divides a file differently
    prompts = write_prompts(tmp_path)
    tables = [
        frame(
            sweep(
                config(
                    tmp_path / f"s{seed}",
                    task=str(prompts),
                    min_steps=None,
                    max_steps=None,
                    limit=None,
                    derivation=4,
                    seed=seed,
                ),
                codi_model,
            )
        )
        for seed in (0, 1)
    ]
    assert set(tables[0]["prompt_id"]) != set(tables[1]["prompt_id"])


def test_mirrored_requests_give_the_same_rows(codi_model, tmp_path):
    one = frame(sweep(config(tmp_path / "a", pairs=("1-2",), coefficients=("-1",), controls=("none",)), codi_model))
    two = frame(sweep(config(tmp_path / "b", pairs=("2-1",), coefficients=("1",), controls=("none",)), codi_model))
    pd.testing.assert_frame_equal(one, two)


def test_pooled_draws(codi_model, tmp_path):
    table = frame(sweep(config(tmp_path / "run", draw_norm="pooled", space=("embedding",)), codi_model))
    draws = table[table["control"] == "random"]
    assert (draws[["source", "target"]] == 0).all().all() and set(draws["coefficient"]) == {0.5, 1.0}
    assert len(draws) == 6 * 2 * 2 * 2  # prompts, draws, sizes, latents: not times pairs
    norms = table[(table["control"] == "direction") & (table["coefficient"].abs() == 1)].groupby("target")[
        "applied_norm"
    ]
    mean = norms.mean().mean()  # over the two pairs
    np.testing.assert_allclose(draws[draws["coefficient"] == 1]["applied_norm"], mean, rtol=1e-4)
    cells = cell_statistics(table)
    assert (cells["random_draws"] == 2).all()  # every cell is compared with the pooled draws of its latent and |c|


def test_layers_and_heads(codi_model, tmp_path):
    whole = frame(sweep(config(tmp_path / "a", space=("kv",), controls=("none",)), codi_model))
    part = frame(
        sweep(config(tmp_path / "b", space=("kv",), controls=("none",), layers=("1",), kv_heads=("2",)), codi_model)
    )
    steered = whole["control"] == "direction"
    assert (part["applied_norm"][steered] < whole["applied_norm"][steered]).all()
    assert (part["applied_norm"][steered] > 0).all()


def test_scales(codi_model, tmp_path):
    both = frame(sweep(config(tmp_path / "a", space=("kv",), controls=("none",), key_scale=0.0), codi_model))
    only = frame(sweep(config(tmp_path / "b", space=("kv",), controls=("none",), part=("values",)), codi_model))
    pd.testing.assert_frame_equal(both.drop(columns="part"), only.drop(columns="part"))


def test_out_of_memory_halves_the_prompts(codi_model, tmp_path, monkeypatch):
    expected = frame(sweep(config(tmp_path / "a"), codi_model))
    rollout, seen = CodiModel.rollout, []

    def small(self, source, *args, **kwargs):
        if len(source) > 1:
            raise torch.OutOfMemoryError("out of memory")
        seen.append(len(source))
        return rollout(self, source, *args, **kwargs)

    monkeypatch.setattr(CodiModel, "rollout", small)
    found = frame(sweep(config(tmp_path / "b"), codi_model))
    pd.testing.assert_frame_equal(expected.drop(columns="applied_norm"), found.drop(columns="applied_norm"))
    assert len(seen) >= 6


def test_manifest(everything, codi_model):
    manifest = everything.manifest()
    identity = manifest["identity"]
    assert identity["checkpoint_hash"] == codi_model.checkpoint_hash
    assert identity["protocol"]["name"] == "answer-only" and len(identity["split"]["evaluation"]) == 64
    assert identity["seed"] == 0 and identity["numerics"]["dtype"] == "float32"
    assert manifest["versions"]["torch"] == torch.__version__ and "git_commit" in manifest["versions"]
    (sitting,) = manifest["sittings"]
    assert sitting["trials"] == manifest["trials"] and sitting["peak_memory_gb"] > 0 and sitting["seconds"] > 0
    summary = pd.read_csv(everything.path / "means.csv")
    assert {"norm", "split_half_cosine", "split_half_cosine_centred"} < set(summary.columns)


def test_it_says_how_many_trials_are_coming(codi_model, tmp_path):
    lines: list[str] = []
    folder = sweep(config(tmp_path / "run"), codi_model, lines.append)
    assert f"{len(read_trials(folder)):,} trials in all" in lines[0]
    sweep(config(tmp_path / "run"), codi_model, lines.append)
    assert lines[0].startswith("starting") and any(line.startswith("continuing") for line in lines)


def test_parts_are_data_that_any_process_can_run(everything, trials, codi_model):
    """Pickled, and run with a workbench that has nothing of the run folder: the rows of the table."""
    plan = resolve(everything_of(everything.path), codi_model)
    assert json.loads(json.dumps(plan.identity())) == everything.manifest()["identity"]
    chosen = pickle.loads(pickle.dumps(parts(plan)[::5]))
    assert len(chosen) >= 3
    for part in chosen:
        rows = part.run(Workbench(codi_model, plan.split))
        stored = everything.read_parts([part.name])
        assert part.rows == len(stored) == len(rows["text"])
        for column in ("text", "control", "coefficient", "draw", "prompt_id", "correct"):
            assert stored[column].astype(object).tolist() == list(rows[column]), (part.name, column)


def test_directions_from_another_task(codi_model, tmp_path):
    other = str(write_prompts(tmp_path))
    plain = resolve(config(tmp_path / "a", derivation_task=other), codi_model)
    known = tuple(problem.question for problem in load_task(other))
    assert all(problem.question.startswith(known) for problem in plain.split.derivation)
    assert plain.split.evaluation == resolve(config(tmp_path / "a"), codi_model).split.evaluation
    # the published means: keys and values of the evaluated additions, embeddings of another data set
    published = config(tmp_path / "b", task="templates", legacy=True, min_steps=None, max_steps=None, limit=12)
    alone = resolve(published, codi_model)
    both = resolve(dataclasses.replace(published, derivation_task=other), codi_model)
    assert averaged_problems(alone.split, alone.averaged["embedding"]) == alone.split.evaluation
    for plan in (alone, both):
        kv = averaged_problems(plan.split, plan.averaged["kv"])
        assert kv and set(kv) < set(plan.split.evaluation) and {p.operation for p in kv} == {"addition"}
    embedding = averaged_problems(both.split, both.averaged["embedding"])
    assert embedding and not set(embedding) & set(both.split.evaluation)
    assert both.identity() != alone.identity()


# --- Split ------------------------------------------------------------------------------------------------------------


def write_prompts(folder: Path, number: int = 8) -> Path:
    records = [
        {
            "id": i,
            "template_idx": i % 2,
            "X": i + 3,
            "Y": 1,
            "Z": 2,
            "addition": {"prompt": f"{i + 3}+1, then *2?", "ground_truth": (i + 4) * 3},
            "subtraction": {"prompt": f"{i + 3}-1, then *2?", "ground_truth": (i + 2) * 3},
        }
        for i in range(number)
    ]
    path = folder / "prompts.json"
    path.write_text(json.dumps({"config": {}, "prompts": records}))
    return path


@pytest.mark.parametrize("task", ["arithmetic", "templates", "file"])
def test_derivation_and_evaluation_share_nothing(tmp_path, task):
    source = str(write_prompts(tmp_path)) if task == "file" else task
    split = load_split(source, limit=40, derivation=40, seed=3, suffix=" Answer?")
    traits = [
        {(kind, getattr(problem, kind)) for problem in problems for kind in ("question", "cluster", "numbers")}
        for problems in (split.derivation, split.evaluation)
    ]
    assert not traits[0] & traits[1] and len(split.derivation) >= 2 and len(split.evaluation) >= 2
    assert all(problem.question.endswith(" Answer?") for problem in split.evaluation)
    again = load_split(source, limit=40, derivation=40, seed=3, suffix=" Answer?")
    assert again == split
    with pytest.raises(ValueError, match="share their"):
        check_disjoint([*split.derivation, split.evaluation[0]], split.evaluation)


def test_sharing_is_checked_trait_by_trait():
    one = Problem("a", "1+2?", 3, cluster="x", numbers=(1, 2))
    for other, trait in (
        (Problem("b", "1+2?", 3, cluster="y", numbers=(5, 6)), "question"),
        (Problem("b", "5+6?", 11, cluster="x", numbers=(5, 6)), "cluster"),
        (Problem("b", "1 and 2?", 3, cluster="y", numbers=(1, 2)), "numbers"),
    ):
        with pytest.raises(ValueError, match=f"'a' and evaluation prompt 'b' share their {trait}"):
            check_disjoint([one], [other])
    check_disjoint([one], [Problem("b", "3-1?", 2, cluster="z", numbers=(3, 1))])


# --- Interruptions ----------------------------------------------------------------------------------------------------


def in_child(options: SweepOptions, model: CodiModel) -> int:
    """Process id of a child that runs the sweep; exit code 0 when done, 3 on Ctrl-C."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sweep(options, model)
        code = 0
    except KeyboardInterrupt:
        code = 3
    finally:
        os._exit(code)


def test_killed_at_random_moments_and_continued_is_one_run(codi_model, tmp_path):
    changes = {"limit": 24, "part_prompts": 1, "pairs": ("all",), "controls": ("random", "shuffled"), "draws": 1}
    began = time.monotonic()
    whole = frame(sweep(config(tmp_path / "whole", **changes), codi_model))
    duration = time.monotonic() - began
    options = config(tmp_path / "killed", **changes)
    rng = np.random.default_rng(1)
    kills, moments, finished = 0, [], False
    while not finished:
        child = in_child(options, codi_model)
        if kills < 40:
            time.sleep(rng.uniform(0.02, 0.35) * duration)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        finished = os.WIFEXITED(status)
        if finished:
            assert os.WEXITSTATUS(status) == 0
        else:
            kills += 1
            moments.append(len(list((tmp_path / "killed" / "trials").glob("part-*"))))
    assert kills >= 3 and len(set(moments)) >= 3, (kills, moments)
    pd.testing.assert_frame_equal(frame(RunFolder(tmp_path / "killed")), whole)
    assert not list((tmp_path / "killed").rglob("*.partial"))


def test_default_timing_is_cached_and_early_exit_with_legacy():
    assert timings_of(SweepOptions()) == ("cached",)
    assert timings_of(SweepOptions(legacy=True)) == ("early-exit",)
    assert timings_of(SweepOptions(legacy=True, timing=("continue",))) == ("continue",)  # refused later, by its name


def test_ctrl_c_leaves_a_folder_that_goes_on(codi_model, tmp_path):
    changes = {"limit": 24, "part_prompts": 1, "pairs": ("all",), "draws": 1}
    options = config(tmp_path / "run", **changes)
    child = in_child(options, codi_model)
    while len(list((tmp_path / "run" / "trials").glob("part-*.parquet"))) < 3:
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 3
    parts = len(list((tmp_path / "run" / "trials").glob("part-*.parquet")))
    assert 3 <= parts < 48 and not list((tmp_path / "run").rglob("*.partial"))
    folder = sweep(options, codi_model)
    assert folder.manifest()["sittings"][-1]["trials"] < folder.manifest()["trials"]  # finished parts were not repeated
    pd.testing.assert_frame_equal(frame(folder), frame(sweep(config(tmp_path / "whole", **changes), codi_model)))


def test_damaged_parts_and_means_are_computed_again(codi_model, tmp_path):
    folder = sweep(config(tmp_path / "run"), codi_model)
    expected = frame(folder)
    parts = sorted((folder.path / "trials").glob("part-*.parquet"))
    assert len(parts) == 4
    content = parts[0].read_bytes()
    parts[0].write_bytes(content[: len(content) // 2])
    parts[2].write_bytes(b"")
    means = folder.path / "means.safetensors"
    means.write_bytes(means.read_bytes()[:-100])
    untouched = parts[1].stat().st_mtime_ns
    pd.testing.assert_frame_equal(frame(sweep(config(tmp_path / "run"), codi_model)), expected)
    assert parts[1].stat().st_mtime_ns == untouched
    LatentMeans.load(means)


def test_full_disk_loses_nothing(codi_model, tmp_path, monkeypatch):
    expected = frame(sweep(config(tmp_path / "whole"), codi_model))
    write, count = os.fsync, 0

    def full(handle):
        nonlocal count
        count += 1
        if count > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk is full; make room"):
            sweep(config(tmp_path / "run"), codi_model)
    kept = list((tmp_path / "run" / "trials").glob("part-*.parquet"))
    assert 1 <= len(kept) < 4
    pd.testing.assert_frame_equal(frame(sweep(config(tmp_path / "run"), codi_model)), expected)


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    """command("--pairs", "7-1", …) -> (exit code, what stderr said) of `codi sweep` on the toy."""
    folder = tiny_checkpoint()

    def run(capsys, *arguments: str, model: str | None = None, steps: str = "1") -> tuple[int, str]:
        given = [
            "sweep",
            "--model",
            model or str(folder / "checkpoint"),
            "--base",
            str(folder / "base"),
            "--protocol",
            "answer-only",
            "--out",
            str(tmp_path / "run"),
            "--limit",
            "4",
            "--derivation",
            "4",
            "--draws",
            "1",
            "--pairs",
            "1-2",
            "--latents",
            "1",
            "--coefficients",
            "1",
            "--max-new-tokens",
            "2",
            "--space",
            "kv",
            "--no-plots",
        ]
        if "--task" not in arguments and "--prompts" not in arguments:
            given += ["--min-steps", steps, "--max-steps", steps]
        capsys.readouterr()
        try:
            cli.main([*given, *arguments])
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def write_text(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


BAD = {
    "task": (["--task", "juggling"], "juggling"),
    "pair": (["--pairs", "7-1"], "1..6"),
    "pair words": (["--pairs", "one-two"], "one-two"),
    "same pair": (["--pairs", "3-3"], "must differ"),
    "position 0": (["--latents", "0"], "1..6, got 0"),
    "position 7": (["--latents", "7"], "1..6, got 7"),
    "positions 5..9": (["--latents", "5..9"], "1..6, got 9"),
    "coefficient": (["--coefficients", "abc"], "abc"),
    "coefficient nan": (["--coefficients", "nan"], "finite"),
    "only zero": (["--coefficients", "0"], "other than 0"),
    "space": (["--space", "logits"], "logits"),
    "timing": (["--timing", "later"], "later"),
    "part": (["--part", "queries"], "queries"),
    "control": (["--controls", "placebo"], "placebo"),
    "layer": (["--layers", "4"], "1..3, got 4"),
    "kv head": (["--kv-heads", "3"], "1..2, got 3"),
    "draws": (["--draws", "0"], "at least 1"),
    "limit": (["--limit", "0"], "at least 1"),
    "derivation": (["--derivation", "1"], "at least 2"),
    "seed": (["--seed", "-1"], "0 or more"),
    "legacy timing": (["--legacy", "--task", "templates", "--timing", "cached"], "early-exit"),
    "legacy hidden": (["--legacy", "--task", "templates", "--space", "hidden"], "hidden"),
    "legacy without addition": (["--legacy", "--task", "arithmetic"], "addition"),
    "unknown option": (["--frobnicate", "3"], "frobnicate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(command, capsys, tmp_path, case):
    arguments, said = BAD[case]
    code, error = command(capsys, *arguments)
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_unknown_model(command, capsys, tmp_path):
    code, error = command(capsys, model=str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("empty.json", "", "empty"),
        ("none.json", '{"prompts": []}', "no prompts"),
        ("unanswered.jsonl", '{"question": "1+1?"}\n{"question": "2+2?"}\n', "answer"),
        ("one.jsonl", '{"question": "1+1?", "answer": "2"}\n', "cluster"),
        ("missing.json", None, "missing.json"),
    ],
)
def test_prompt_files_that_cannot_be_used(command, capsys, tmp_path, name, content, said):
    path = str(tmp_path / name) if content is None else write_text(tmp_path, name, content)
    code, error = command(capsys, "--prompts", path)
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_command_runs_continues_and_refuses_another_configuration(command, capsys, tmp_path):
    code, error = command(capsys)
    assert code == 0, error
    for name in ("manifest.json", "cells.parquet", "cells.csv", "means.safetensors"):
        assert (tmp_path / "run" / name).is_file()
    found = Result.read(tmp_path / "run")
    assert found.study == "sweep" and "--coefficients 1" in found.command and found.figures == ()
    assert [section.heading for section in found.sections] == ["Words", "kv (both) · cached"]
    assert len(found.tables["cells"]) == 2 and len(found.tables["statistics/controls"]) == 2
    before = frame(RunFolder(tmp_path / "run"))
    code, error = command(capsys)
    assert code == 0 and "continuing" in error
    code, error = command(capsys, "--coefficients", "2")
    assert code == 2 and "options.coefficients: [1.0] -> [2.0]" in error and len(error.strip().splitlines()) == 1
    pd.testing.assert_frame_equal(frame(RunFolder(tmp_path / "run")), before)


def test_a_refused_folder(command, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    code, error = command(capsys)
    assert code == 2 and "read-only" in error and len(error.strip().splitlines()) == 1


def test_collected_means_do_not_depend_on_the_batch(codi_model):
    problems = load_split("arithmetic", limit=2, derivation=9, seed=0, suffix="", min_steps=1, max_steps=1).derivation
    one, two = (collect_means(codi_model, problems, metadata={}, batch_size=size)[0] for size in (32, 2))
    assert one.counts == two.counts and abs(one.counts[0] - one.counts[1]) <= 1
    torch.testing.assert_close(one.values, two.values, atol=1e-3, rtol=0)
