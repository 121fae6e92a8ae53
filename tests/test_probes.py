"""Probes: planted codes are found and noise is not, no triple is on both sides, shuffled labels give chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from codi import CodiModel
from experiments.latents.probes import (
    CONTRAST,
    Config,
    Design,
    Target,
    _discriminate,
    _ridge,
    collect,
    main,
    probe,
    probe_table,
    targets_of,
)
from experiments.latents.probes_figures import draw
from experiments.tasks import load_task


def planted(n_clusters: int = 30, per_cluster: int = 4, classes: int = 3, noise: float = 0.3) -> tuple:
    """Labels constant within clusters, features that hold them one-hot in the first columns, and pure noise."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(classes, size=n_clusters), per_cluster)
    clusters = [f"c{i}" for i in np.repeat(np.arange(n_clusters), per_cluster)]
    noise_part = rng.normal(size=(len(labels), 8))
    coded = np.concatenate([np.eye(classes)[labels] + noise * rng.normal(size=(len(labels), classes)), noise_part], 1)
    return labels, clusters, coded, noise_part


def test_a_planted_code_is_read_and_noise_is_not() -> None:
    labels, clusters, coded, noise = planted()
    design = Design.of([Target.of("step1", labels.tolist())], clusters, folds=5, shuffles=4)
    read, unread = probe(coded, design), probe(noise, design)
    assert read.correct["step1"].mean() > 0.9 and read.r2["step1"] > 0.6
    assert abs(read.shuffled["step1"].mean() - 1 / 3) < 0.2  # the same probe with labels of other clusters: chance
    assert abs(unread.correct["step1"].mean() - unread.shuffled["step1"].mean()) < 0.2 and unread.r2["step1"] < 0.1
    table = probe_table([("h", 1, 0), ("h", 2, 0)], [read, unread], design, resamples=500)
    assert table["selectivity_lower"][0] > 0.4 and table["selectivity_lower"][1] < 0.05
    assert (table["lower"] <= table["accuracy"]).all() and (table["accuracy"] <= table["upper"]).all()
    assert table["n"].tolist() == [120, 120] and table["n_clusters"].tolist() == [30, 30]


def test_numbers_on_a_line_hide_no_class_and_the_rule_is_that_of_discriminant_analysis() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    labels = rng.integers(7, size=420)
    x = labels[:, None] * np.array([[1.0, 0.5, 0.0]]) + 0.15 * rng.normal(size=(420, 3))
    train, test = np.arange(420) < 300, np.arange(420) >= 300
    [fitted], [predicted] = _ridge(x[train], [np.eye(7)[labels[train]]], 1e-6, x[train], x[test])
    ours = _discriminate(fitted, labels[train], predicted)
    oracle = LinearDiscriminantAnalysis().fit(x[train], labels[train]).predict(x[test])
    assert (ours == oracle).mean() > 0.98 and (ours == labels[test]).mean() > 0.95
    plain = Ridge(alpha=1e-6).fit(x[train], np.eye(7)[labels[train]]).predict(x[test]).argmax(1)
    assert (plain == labels[test]).mean() < 0.7  # the largest column: middle classes are masked


def test_a_cluster_that_gives_itself_away_does_not_help() -> None:
    """Features that name the cluster and nothing else: a split that leaks prompts would read every label from them."""
    labels, clusters, _, _ = planted()
    names = np.eye(30)[np.repeat(np.arange(30), 4)]
    design = Design.of([Target.of("answer", labels.tolist())], clusters, folds=5, shuffles=2)
    assert all(len(set(design.folds[np.array(clusters) == name])) == 1 for name in set(clusters))
    assert probe(names, design).correct["answer"].mean() < 0.7
    leaky = Design.of([Target.of("answer", labels.tolist())], [f"{i}" for i in range(120)], folds=5, shuffles=2)
    assert probe(names, leaky).correct["answer"].mean() > 0.95


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


def test_contrast_is_steps_minus_answer() -> None:
    labels, clusters, coded, _ = planted()
    rng = np.random.default_rng(1)
    other = np.repeat(rng.integers(3, size=30), 4)
    targets = [Target.of("step1", labels.tolist()), Target.of("answer", other.tolist())]
    design = Design.of(targets, clusters)
    table = probe_table([("h", 1, 4)], [probe(coded, design)], design, resamples=200).set_index("target")
    gain = table["selectivity"]
    assert gain[CONTRAST] == pytest.approx(gain["step1"] - gain["answer"]) and gain[CONTRAST] > 0.3
    assert table["accuracy"].isna()[CONTRAST]


def test_a_number_with_too_many_values_is_read_by_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, clusters, coded, _ = planted(noise=0.05)
    monkeypatch.setattr("experiments.latents.probes.MOST_CLASSES", 2)
    found = probe(coded, Design.of([Target.of("answer", labels.tolist())], clusters))
    assert np.isnan(found.correct["answer"]).all() and found.r2["answer"] > 0.8


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
    config = Config(
        model=str(folder / "checkpoint"), base=str(folder / "base"), protocol="answer-only", limit=60, folds=3,
        shuffles=1, resamples=100, spaces=("h", "z"), layers=(0, 3), device="cpu", out=tmp_path / "probes",
    )  # fmt: skip
    main(config)
    table = pd.read_csv(tmp_path / "probes" / "probes.csv")
    assert len(table) == (7 * 2 + 6) * 8 and set(table["target"]) >= {"operation", "answer", CONTRAST}
    assert all((tmp_path / "probes" / name).stat().st_size > 0 for name in ("probes.png", "probes.pdf"))
    assert json.loads((tmp_path / "probes" / "manifest.json").read_text())["options"]["limit"] == 60
    assert "60 prompts" in capsys.readouterr().out


def test_figure_has_a_panel_per_target_and_space() -> None:
    rows = [
        {"space": space, "latent": latent, "layer": layer, "target": target, "selectivity": 0.1 * latent - 0.2,
         "n": 40, "n_clusters": 20}
        for space, layers in (("h", range(3)), ("keys", range(1, 3)))
        for layer in layers
        for latent in range(1, 7)
        for target in ("step1", CONTRAST)
    ]
    figure = draw(pd.DataFrame(rows))
    panels = [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]
    assert len(panels) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 2}, "folds must be in 3..30"),
        ({"folds": 31}, "folds must be in 3..30"),
        ({"shuffles": 0}, "shuffles must be at least 1"),
    ],
)
def test_impossible_designs_are_refused(options: dict[str, int], message: str) -> None:
    labels, clusters, _, _ = planted()
    with pytest.raises(ValueError, match=message):
        Design.of([Target.of("step1", labels.tolist())], clusters, **options)


def test_features_must_fit_and_be_finite() -> None:
    labels, clusters, coded, _ = planted()
    design = Design.of([Target.of("step1", labels.tolist())], clusters)
    with pytest.raises(ValueError, match="120 prompts"):
        probe(coded[:10], design)
    with pytest.raises(ValueError, match="finite"):
        probe(np.where(coded == coded[0, 0], np.nan, coded), design)
