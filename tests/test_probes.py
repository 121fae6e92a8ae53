"""The command `codi probes`: states are those of the rollout, labels are shuffled by group, a table is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from codi import CodiModel
from experiments.latents.options import ProbesOptions
from experiments.latents.probes import collect, main
from experiments.latents.probes_figures import draw
from experiments.statistics.probes import CONTRAST, Design
from experiments.study.targets import targets_of
from experiments.tasks import load_task


def test_shuffled_labels_move_whole_groups_and_keep_their_frequencies() -> None:
    problems = load_task("templates", "test", 300, 0)
    targets = targets_of(problems)
    assert [target.name for target in targets] == [
        "operation", "operand1", "operand2", "operand3", "step1", "step2", "answer"
    ]  # fmt: skip
    clusters = [problem.cluster for problem in problems]
    design = Design.of(targets, clusters, folds=4, shuffles=3)
    for target, columns in zip(targets, design.columns, strict=True):
        frame = pd.DataFrame({"cluster": clusters, "label": target.labels, "new": columns[1]})
        assert frame.groupby(["cluster", "label"])["new"].nunique().max() == 1
        units = frame.drop_duplicates(["cluster", "label"])
        assert sorted(units["label"]) == sorted(units["new"])
        assert (columns[1:] != target.labels).any()


def test_states_are_those_of_the_rollout(codi_model: CodiModel) -> None:
    problems = load_task("templates", "test", 5, 0)
    states = collect(codi_model, problems, batch_size=3)
    run = codi_model.rollout(codi_model.encode([problem.question for problem in problems]))
    assert run.hidden_states is not None and run.values is not None
    n, layers = 6, codi_model.n_layers
    assert len(states) == (n + 1) * (layers + 1) + n + 2 * n * layers
    for place, expected in {
        ("h", 0, layers): run.states[:, 0],
        ("h", 3, 1): run.hidden_states[:, 2, 1],
        ("values", 6, layers): run.values[:, 5, layers - 1].flatten(1),
    }.items():
        np.testing.assert_allclose(states[place], expected.numpy(), atol=2e-4)
    with pytest.raises(ValueError, match="layers must be in"):
        collect(codi_model, problems, layers=(9,))


def test_command_writes_table_and_figure(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint()
    options = ProbesOptions(
        model=str(folder / "checkpoint"), base=str(folder / "base"), protocol="answer-only", limit=60, folds=3,
        shuffles=1, resamples=100, spaces=("h", "z"), layers=(0, 3), device="cpu", out=tmp_path / "probes",
    )  # fmt: skip
    main(options)
    table = pd.read_csv(tmp_path / "probes" / "probes.csv")
    assert len(table) == (7 * 2 + 6) * 8 and set(table["target"]) >= {"operation", "answer", CONTRAST}
    assert all((tmp_path / "probes" / name).stat().st_size > 0 for name in ("figures/probes.png", "figures/probes.pdf"))
    assert json.loads((tmp_path / "probes" / "manifest.json").read_text())["identity"]["options"]["limit"] == 60
    assert "60 prompts" in capsys.readouterr().out


def test_figure_has_a_panel_per_target_and_space() -> None:
    rows = [
        {
            "space": space,
            "latent": latent,
            "layer": layer,
            "target": target,
            "selectivity": 0.1 * latent - 0.2,
            "n": 40,
            "n_clusters": 20,
        }
        for space, layers in (("h", range(3)), ("keys", range(1, 3)))
        for layer in layers
        for latent in range(1, 7)
        for target in ("step1", CONTRAST)
    ]
    figure = draw(pd.DataFrame(rows))
    panels = [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]
    assert len(panels) == 4
