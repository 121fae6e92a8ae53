"""Legacy mode on a checkpoint in the published layout, against the tensors that the seed study's scripts computed.

`codi sweep --legacy` is run as a person runs it, and its trial table is compared with the golden grids.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from codi import CodiModel
from codi.branches import decode_branches
from experiments.study.edits.grid import Grid, conditions, directions
from experiments.study.edits.trials import read_trials
from experiments.study.folder import RunFolder
from experiments.study.thoughts import collect_means
from experiments.sweep.options import SweepOptions
from experiments.sweep.run import sweep
from experiments.tasks import Problem, load_task
from steering.interventions import branches, edit_table
from steering.means import LatentMeans

TOLERANCE = 2e-3  # golden/README.md: rounding grows from latent to latent in a random network


@pytest.fixture(scope="module")
def case(golden):
    return golden("llama_answer_only")


@pytest.fixture(scope="module")
def prompts(case, tmp_path_factory) -> Path:
    """The case's prompts as a file in the format of prompts.json."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps({"config": {}, "prompts": case.expected["prompts"]}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(case) -> CodiModel:
    return case.load()


@pytest.fixture(scope="module")
def problems(case, prompts) -> list[Problem]:
    found = load_task(str(prompts))
    assert [problem.question for problem in found] == case.expected["texts"]
    return found


@pytest.fixture(scope="module")
def means(model, problems) -> dict[str, LatentMeans]:
    """What each script averages over: the KV one the addition prompts, the embedding one all of them."""
    addition = [problem for problem in problems if problem.operation == "addition"]
    assert len(addition) == 6
    return {
        "kv": collect_means(model, addition, metadata={})[0],
        "embedding": collect_means(model, problems, metadata={})[0],
    }


@pytest.fixture(scope="module")
def trials(model, case, prompts, tmp_path_factory) -> pd.DataFrame:
    """The trial table of a legacy sweep over the golden coefficients."""
    config = SweepOptions(
        prompts=prompts,
        out=tmp_path_factory.mktemp("run") / "legacy",
        limit=None,
        space=("kv", "embedding"),
        timing=("early-exit",),
        coefficients=("-1", "0", "0.5", "1"),
        controls=("none",),
        legacy=True,
        part_prompts=5,
    )
    return read_trials(sweep(config, model))


def test_means_are_those_of_the_scripts(means, case):
    tensors = case.tensors
    torch.testing.assert_close(means["kv"].keys("raw").float(), tensors["kv_mean.keys"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(means["kv"].values.float(), tensors["kv_mean.values"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(means["embedding"].hidden_states.float(), tensors["hidden_mean"], atol=TOLERANCE, rtol=0)
    # un-rotated keys are another thing: the comparison above can fail
    assert (means["kv"].keys("content").float() - tensors["kv_mean.keys"]).abs().max() > 0.1


@pytest.mark.parametrize("space", ["kv", "embedding"])
def test_sweep_gives_the_golden_argmax_grid(trials, case, problems, space):
    name = {"kv": "kv_steer", "embedding": "embed_steer"}[space]
    table = trials[trials["space"] == space]
    pairs = case.expected["pairs"]
    ids = [problem.prompt_id for problem in problems]
    compared = 0
    for coefficient in (-1.0, 0.0, 0.5, 1.0):
        golden = case.tensors.get(f"{name}.c{coefficient}.argmax")
        if golden is None:
            continue
        compared += 1
        control = "direction" if coefficient else "none"
        rows = table[(table["control"] == control) & (table["coefficient"] == coefficient)]
        at = rows.set_index(["prompt_id", "latent", "source", "target"])["first_token"].to_dict()
        ours = np.array(
            [
                [[at[(i, latent, *(pair if coefficient else (0, 0)))] for pair in pairs] for latent in range(1, 7)]
                for i in ids
            ]
        )
        wrong = np.argwhere(ours != golden.numpy())
        assert len(wrong) == 0, (
            f"{name} c={coefficient}: {len(wrong)} of {ours.size} tokens differ, first at {wrong[0]}"
        )
    assert compared == 3
    # steering changes answers at all, or equal grids would say nothing
    steered, plain = case.tensors[f"{name}.c-1.0.argmax"], case.tensors[f"{name}.c0.0.argmax"]
    assert (steered != plain).float().mean() > 0.1
    assert set(table["n_latents"] - table["latent"]) == ({0} if space == "kv" else {1})


@pytest.mark.parametrize("engine", ["clones", "shared"])
@pytest.mark.parametrize("space", ["kv", "embedding"])
def test_logits_are_those_of_the_scripts(model, means, case, problems, space, engine):
    name = {"kv": "kv_steer", "embedding": "embed_steer"}[space]
    options = Grid(
        spaces=(space,),
        pairs=tuple((a, b) for a, b in case.expected["pairs"][:2]),
        coefficients=(-1.0, 0.5, 1.0),
        controls=(),
        keys="raw",
        formula="published",
        extra_latents=1,
    )
    table = edit_table(directions(options, space, means[space]))
    run = model.rollout(model.encode([problem.question for problem in problems[:2]]), 7)
    tried = [c for c in conditions(options, space, "both", "early-exit") if c.control == "direction"]
    answers = decode_branches(
        model,
        run,
        table,
        branches([c.edit for c in tried], run, space),
        max_new_tokens=1,
        engine=engine,
        keep_first_logits=True,
    )
    logits = answers.first_logits.reshape(2, len(tried), -1)
    compared = 0
    for place, condition in enumerate(tried):
        golden = case.tensors.get(f"{name}.c{condition.coefficient}.logits_first2")
        if golden is not None:
            pair = condition.target - 2  # of (1, 2), (1, 3)
            torch.testing.assert_close(logits[:, place], golden[:, condition.latent - 1, pair], atol=TOLERANCE, rtol=0)
            compared += 1
    assert compared == 24


def test_sign_of_the_label(model, means):
    """Label "A-B" adds mean_B − mean_A in legacy mode; the corrected direction is its negative."""
    options = Grid(spaces=("kv",), pairs=((1, 2),), controls=(), keys="raw", formula="published")
    (legacy,) = directions(options, "kv", means["kv"])
    torch.testing.assert_close(legacy.values, means["kv"].values[1] - means["kv"].values[0])
    corrected = Grid(spaces=("kv",), pairs=((1, 2),), controls=(), keys="raw")
    torch.testing.assert_close(
        directions(corrected, "kv", means["kv"])[0].values, means["kv"].values[0] - means["kv"].values[1]
    )


def test_manifest_says_what_was_done(model, prompts, tmp_path):
    config = SweepOptions(
        prompts=prompts,
        out=tmp_path / "run",
        limit=None,
        space=("kv",),
        pairs=("1-2",),
        coefficients=("1",),
        latents=("1",),
        controls=("none",),
        legacy=True,
    )
    sweep(config, model)
    identity = RunFolder(tmp_path / "run").manifest()["identity"]
    assert identity["max_new_tokens"] == 1
    assert identity["protocol"]["excluded_logits"] == [model.vocab_size - 1]
    assert identity["options"]["legacy"] and identity["options"]["keys"] == "raw"
