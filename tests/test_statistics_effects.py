"""Effects on typed columns: tables keep their level, find what was planted, and are those of conditions in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.statistics.clusters import Settings
from experiments.statistics.effects import beyond, compare, differences, levels, per_prompt, row_of, rows_of

QUICK = Settings(resamples=200, permutations=200)
EDITED = ({"kind": "edited"}, {"kind": "none"})


def paired(rng: np.random.Generator, effect: float, clusters: int = 30, size: int = 4) -> pd.DataFrame:
    """Trials of "edited" and "none": whole clusters tend to flip together, up or down alike but for `effect`."""
    rows = []
    for cluster in range(clusters):
        up = rng.random() < 0.5 + effect / 2
        for prompt in range(size):
            before = rng.random() < 0.5
            after = up if rng.random() < 0.4 else before
            for name, right in (("none", before), ("edited", after)):
                rows.append({"kind": name, "cluster": f"c{cluster}", "prompt_id": f"{cluster}-{prompt}",
                             "correct": right})  # fmt: skip
    return pd.DataFrame(rows)


def test_compare_holds_its_level_and_finds_an_effect() -> None:
    rng = np.random.default_rng(0)
    p = [compare(paired(rng, 0.0), [EDITED], ["kind"], settings=QUICK)["p"][0] for _ in range(200)]
    assert np.mean(np.array(p) < 0.05) < 0.09
    row = compare(paired(rng, 0.9), [EDITED], ["kind"], settings=QUICK).iloc[0]
    assert row["p"] < 0.01 and row["lower"] > 0 and row["gained"] > row["lost"]


def test_compare_by_hand() -> None:
    """Four prompts in four clusters, three gained, none lost: exact p = 2/8."""
    rows = []
    for i, (before, after) in enumerate(((0, 1), (0, 1), (0, 1), (1, 1))):
        for name, right in (("none", before), ("edited", after)):
            rows.append({"kind": name, "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": right})
    row = compare(pd.DataFrame(rows).astype({"correct": bool}), [EDITED], ["kind"], settings=QUICK).iloc[0]
    assert (row["difference"], row["gained"], row["lost"]) == (0.75, 3, 0)
    assert row["p"] == row["mcnemar_p"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no kind 'other'"):
        compare(pd.DataFrame(rows), [({"kind": "other"}, {"kind": "none"})], ["kind"])


def test_draws_are_averaged_before_they_are_compared() -> None:
    """Ten copies of one prompt's draw are not ten prompts."""
    rows = [{"kind": "none", "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": True} for i in range(3)]
    rows += [{"kind": "edited", "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": d % 2 == 0}
             for i in range(3) for d in range(10)]  # fmt: skip
    row = compare(pd.DataFrame(rows), [EDITED], ["kind"], settings=QUICK).iloc[0]
    assert row["n"] == 3 and row["difference"] == -0.5 and np.isnan(row["mcnemar_p"]) and row["p"] > 0.2
    assert levels(pd.DataFrame(rows), ["kind"], settings=QUICK).set_index("kind").loc["edited", "mean"] == 0.5


def typed_trials() -> pd.DataFrame:
    """Kinds mean and other at latents 1..3 (other in three draws), beside none; a few prompts are missing somewhere.

    The column condition says the same in one word. Clusters come in no order, and differ in size.
    """
    rng = np.random.default_rng(4)
    clusters = rng.permutation(np.repeat([f"t{number}" for number in (10, 2, 1, 33, 7)], [2, 5, 1, 4, 6]))
    rows = []
    for kind, latent, draws in [("none", 0, 1), *((kind, k, d) for kind, d in (("mean", 1), ("other", 3))
                                                   for k in (3, 1, 2))]:  # fmt: skip
        for prompt, cluster in enumerate(clusters):
            for draw in range(draws):
                if rng.random() > 0.1:
                    rows.append({
                        "kind": kind, "latent": latent, "draw": draw, "cluster": cluster, "prompt_id": f"p{prompt}",
                        "condition": kind if kind == "none" else f"{kind} {latent}",
                        "correct": bool(rng.random() < 0.6), "kl": rng.gamma(1.0),
                    })  # fmt: skip
    return pd.DataFrame(rows)


NUMBERS = ["n", "n_clusters", "mean", "lower", "upper"]
EFFECTS = [*NUMBERS, "reference_mean", "difference", "gained", "lost", "mcnemar_p", "p", "q", "fwer_p"]


@pytest.mark.parametrize("outcome", ["correct", "kl"])
def test_typed_columns_and_words_give_the_same_numbers(outcome: str) -> None:
    trials = typed_trials()
    typed = levels(trials, ["kind", "latent"], outcome, QUICK)
    words = levels(trials, ["condition"], outcome, QUICK).set_index("condition")
    assert list(typed.columns) == ["kind", "latent", *NUMBERS] and typed["latent"].dtype == np.int64
    assert typed[["kind", "latent"]].to_numpy().tolist() == [
        ["mean", 1], ["mean", 2], ["mean", 3], ["none", 0], ["other", 1], ["other", 2], ["other", 3]
    ]  # fmt: skip
    labels = zip(typed["kind"], typed["latent"], strict=True)
    names = [kind if kind == "none" else f"{kind} {latent}" for kind, latent in labels]
    np.testing.assert_array_equal(typed[NUMBERS].to_numpy(), words.loc[names, NUMBERS].to_numpy())

    none: dict[str, object] = {"kind": "none"}
    contrasts = [({"kind": kind, "latent": k}, none) for kind in ("other", "mean") for k in (2, 3, 1)]
    contrasts += [({"kind": "mean", "latent": 1}, {"kind": "other", "latent": 1})]
    found = compare(trials, contrasts, ["kind", "latent"], outcome, QUICK)
    pairs = [(f"{kind} {k}", "none") for kind in ("other", "mean") for k in (2, 3, 1)] + [("mean 1", "other 1")]
    named = [({"condition": a}, {"condition": b}) for a, b in pairs]
    expected = compare(trials, named, ["condition"], outcome, QUICK)
    assert list(found.columns)[:4] == ["kind", "latent", "reference_kind", "reference_latent"]
    assert list(found.columns)[4:] == list(expected.columns)[2:] and set(EFFECTS) <= set(found)
    np.testing.assert_array_equal(found[EFFECTS].to_numpy(), expected[EFFECTS].to_numpy())
    assert found["reference_latent"].tolist() == [0] * 6 + [1]  # none has no latent
    wide = trials.pivot_table(index="prompt_id", columns="condition", values=outcome, aggfunc="mean").astype(float)
    both = wide[["mean 1", "none"]].dropna()  # by another way: only prompts that both conditions have
    row = row_of(found, {"kind": "mean", "latent": 1}, {"kind": "none"})
    assert row["n"] == len(both) < 18
    assert row["difference"] == pytest.approx((both["mean 1"] - both["none"]).mean())


def test_a_column_that_does_not_apply_need_not_be_named() -> None:
    """Empty word, latent 0, layer -1, mask 0."""
    base = {"kind": "none", "donor": "", "latent": 0, "layer": -1, "replaced": 0}
    edited = {"kind": "patch", "donor": "same", "latent": 2, "layer": 0, "replaced": 3}
    trials = pd.DataFrame(
        [{**row, "prompt_id": f"p{i}", "cluster": f"c{i}", "correct": right} for i in range(4)
         for row, right in ((base, i > 1), (edited, i > 2))]
    )  # fmt: skip
    by = list(base)
    found = compare(trials, [(edited, {"kind": "none"})], by, settings=QUICK).iloc[0]
    assert {column: found[f"reference_{column}"] for column in by} == base and found["lost"] == 1
    with pytest.raises(ValueError, match="no kind 'patch', donor '', latent 2, layer -1, replaced 0"):
        compare(trials, [({"kind": "patch", "latent": 2}, {"kind": "none"})], by)
    with pytest.raises(ValueError, match="a condition is named by kind, latent, got donor"):
        compare(trials, [({"kind": "patch", "donor": "same"}, {"kind": "none"})], ["kind", "latent"])
    with pytest.raises(ValueError, match="lack the columns step"):
        levels(trials, ["kind", "step"])
    with pytest.raises(ValueError, match="missing values in latent"):
        levels(trials.assign(latent=trials["latent"].where(trials["latent"] > 0)), ["kind", "latent"])
    apart = trials[(trials["kind"] == "none") == (trials["prompt_id"] < "p2")]
    with pytest.raises(ValueError, match="kind 'patch' and kind 'none' have no prompt in common"):
        compare(apart, [({"kind": "patch"}, {"kind": "none"})], ["kind"])
    empty = compare(trials, [], ["kind", "latent"])
    assert empty.empty and list(empty)[:5] == ["kind", "latent", "reference_kind", "reference_latent", "n"]


def test_rows_by_selector() -> None:
    table = levels(typed_trials(), ["kind", "latent"], settings=QUICK)
    chosen = rows_of(table, [{"kind": "mean", "latent": k} for k in (3, 1)])
    assert chosen["latent"].tolist() == [3, 1]
    assert row_of(table, {"kind": "none"})["latent"] == 0
    with pytest.raises(ValueError, match="one row must have kind 'mean', got 3"):
        row_of(table, {"kind": "mean"})
    with pytest.raises(ValueError, match="one row must have kind 'mean', latent 9, got 0"):
        row_of(table, {"kind": "mean", "latent": 9})
    with pytest.raises(ValueError, match="no column reference_kind"):
        row_of(table, {"kind": "mean"}, {"kind": "none"})


def test_no_table_has_an_interval_of_no_width() -> None:
    rows = [{"kind": kind, "cluster": f"c{i}", "prompt_id": f"p{i}", "correct": i < 9, "kl": 0.0, "half": 0.5}
            for i in range(12) for kind in ("none", "edited")]  # fmt: skip
    trials = pd.DataFrame(rows)
    share = 1 - 0.025 ** (1 / 12)
    row = compare(trials, [EDITED], ["kind"], settings=QUICK).iloc[0]
    assert (row["difference"], row["lower"], row["upper"]) == pytest.approx((0, -0.75 * share, 0.25 * share))
    nats = levels(trials, ["kind"], "kl", QUICK, (0.0, np.inf)).iloc[0]
    assert (nats["lower"], nats["upper"]) == (0.0, np.inf)
    assert np.isinf(levels(trials, ["kind"], "half", QUICK)[["lower", "upper"]]).all(axis=None)  # range not known
    known = levels(trials, ["kind"], "half", QUICK, (0.0, 1.0)).iloc[0]
    assert (known["lower"], known["upper"]) == pytest.approx((0.5 - share / 2, 0.5 + share / 2))


def test_prompt_by_prompt_is_what_tables_are_made_of() -> None:
    trials = typed_trials()
    pairs = [({"kind": "mean", "latent": 1}, {"kind": "none"}), ({"kind": "other", "latent": 2}, {"kind": "none"})]
    table, wide = (
        compare(trials, pairs, ["kind", "latent"], settings=QUICK),
        differences(trials, pairs, ["kind", "latent"]),
    )
    np.testing.assert_allclose(wide.mean(), table["difference"])
    assert wide.notna().sum().tolist() == table["n"].tolist() and wide.index.names == ["cluster", "prompt_id"]
    level = per_prompt(trials, [{"kind": "none"}], ["kind", "latent"])
    assert level[0].mean() == pytest.approx(
        row_of(levels(trials, ["kind", "latent"], settings=QUICK), {"kind": "none"})["mean"]
    )


def test_beyond_needs_significance_and_size_on_the_side_of_the_estimate() -> None:
    table = pd.DataFrame(
        [(0.5, 0.3, 0.7, 0.01), (0.003, 0.001, 0.005, 0.001), (-0.5, -0.7, -0.3, 0.01), (0.5, 0.3, 0.7, 0.2),
         (0.3, -0.1, 0.7, 0.01), (0.0, 0.0, 0.0, 0.01)], columns=["difference", "lower", "upper", "q"],
    )  # fmt: skip
    assert beyond(table, 0.02).tolist() == [True, False, True, False, False, False]
    assert beyond(table, 0.0).tolist() == [True, True, True, False, False, False]
