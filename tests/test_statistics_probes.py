"""Probes: planted codes are found and noise is not, no triple is on both sides, shuffled labels give chance."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.probes import CONTRAST, Design, Target, _discriminate, _ridge, probe, probe_table


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


def test_a_probe_that_is_always_right_has_an_interval_all_the_same() -> None:
    labels, clusters, coded, _ = planted(noise=0.0)
    design = Design.of([Target.of("step1", labels.tolist())], clusters, folds=5, shuffles=4)
    table = probe_table([("h", 1, 0)], [probe(coded, design)], design, resamples=500)
    lower, upper = table.loc[0, ["lower", "upper"]]
    assert (table["accuracy"][0], upper) == (1.0, 1.0) and lower == pytest.approx(0.025 ** (1 / 30))  # Clopper-Pearson


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
    assert all(len(set(design.folds[0][np.array(clusters) == name])) == 1 for name in set(clusters))
    assert probe(names, design).correct["answer"].mean() < 0.7
    leaky = Design.of([Target.of("answer", labels.tolist())], [f"{i}" for i in range(120)], folds=5, shuffles=2)
    assert probe(names, leaky).correct["answer"].mean() > 0.95


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
    monkeypatch.setattr("experiments.statistics.probes.MOST_CLASSES", 2)
    found = probe(coded, Design.of([Target.of("answer", labels.tolist())], clusters))
    assert np.isnan(found.correct["answer"]).all() and found.r2["answer"] > 0.8


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


def test_a_type_is_held_out_whole_and_its_control_task_shows_what_memory_reads() -> None:
    """Labels that are a function of a pair which recurs in other clusters, and features that only name the pair."""
    rng = np.random.default_rng(0)
    pairs = np.repeat(np.arange(12), 20)
    clusters = [f"{pair},{i % 4}" for i, pair in enumerate(pairs)]
    labels = rng.integers(3, size=12)[pairs]
    names = np.eye(12)[pairs] + 0.01 * rng.normal(size=(240, 12))
    targets = [Target.of("step1", labels.tolist())]
    options = {"types": {"step1": pairs}, "draws": 3}
    by_cluster = Design.of(targets, clusters, **options)  # type: ignore[arg-type]
    by_pair = Design.of(targets, clusters, whole={"step1": pairs}, **options)  # type: ignore[arg-type]
    leaky, clean = probe(names, by_cluster), probe(names, by_pair)
    assert leaky.correct["step1"].mean() > 0.95 and leaky.control["step1"].mean() > 0.95  # it reads pairs, not step 1
    assert clean.correct["step1"].mean() < 0.7 and clean.control["step1"].mean() < 0.7
    assert all(len(set(by_pair.folds[0][pairs == pair])) == 1 for pair in range(12))
    table = probe_table([("h", 1, 0)], [leaky], by_cluster, resamples=200)
    assert table["memory"][0] == 1.0 and abs(table["over_control"][0]) < 0.05
    assert probe_table([("h", 1, 0)], [clean], by_pair, resamples=200)["memory"][0] == 0.0
    coded = np.eye(3)[labels] + 0.1 * rng.normal(size=(240, 3))  # a code of the label itself
    table = probe_table([("h", 1, 0)], [probe(coded, by_pair)], by_pair, resamples=200)
    assert table["accuracy"][0] > 0.9 and table["over_control_lower"][0] > 0.1
