"""experiments.circuit.tables and tables_traced: numbers by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from circuit_model import rows

from experiments.circuit.tables import circuit_table, kept_table, means_by
from experiments.circuit.tables_traced import (
    ablation_table,
    crossing_table,
    mention_table,
    mixing_table,
    mover_table,
    pathway_rows,
    rift_table,
    source_table,
    top_heads,
    writer_table,
)
from experiments.statistics.clusters import Settings

SETTINGS = Settings(resamples=200)
KEPT = "set item subtask kind circuit complement kept draw agrees right probability"


def test_means_by_has_no_bounds_with_one_item_and_exact_ones_where_all_agree():
    table = rows("item kind value", (0, "a", 1.0), (0, "a", 0.0), (0, "b", 1.0), (1, "b", 1.0), (2, "b", 1.0))
    found = means_by(table, ["kind"], "value", SETTINGS).set_index("kind")
    assert found["mean"].tolist() == [0.5, 1.0] and np.isnan(found.loc["a", "lower"])
    assert found.loc["b", "lower"] < 1 == found.loc["b", "upper"] and found.loc["b", "n_clusters"] == 3
    plain = means_by(table, ["kind"], "value", SETTINGS, exact=False).set_index("kind")
    assert plain.loc["b", "lower"] == 1


def test_kept_table_by_hand():
    """Agreement over items; draws of one size are one row with the lowest and highest of them."""
    table = rows(
        KEPT,
        *[("held-out", item, 1, "copy", "random", False, 3, draw, draw == 0, True, 0.5) for item in (0, 1)
          for draw in (0, 1)],
        *[("held-out", item, subtask, "copy", "reasoning", False, 3, -1, subtask == 1, item == 0, 0.5)
          for item in (0, 1) for subtask in (1, 3)],
    )  # fmt: skip
    found = kept_table(table, SETTINGS).set_index(["circuit", "subtask"])
    random = found.loc[("random", 1)]
    assert (random["agreement"], random["least"], random["most"], random["n"]) == (0.5, 0.0, 1.0, 2)
    assert found.loc[("reasoning", 1), "agreement"] == 1 and found.loc[("reasoning", 3), "agreement"] == 0
    every = found.loc[("reasoning", -1)]
    assert every["agreement"] == 0.5 and every["accuracy"] == 0.5 and every["least"] == every["most"] == 0.5


def test_faithfulness_and_completeness_by_hand():
    """whole 0.8, none 0.2: a circuit with 0.5 is half of the model; a complement with 0.35 leaves 0.75 to it."""
    values = {("whole", False): 0.8, ("none", False): 0.2, ("reasoning", False): 0.5, ("reasoning", True): 0.35}
    table = rows(
        KEPT,
        *[("held-out", item, 1, "copy", circuit, complement, 3, -1, True, True, p + shift)
          for (circuit, complement), p in values.items() for item, shift in ((0, 0.0), (1, 0.1))],
    )  # fmt: skip
    table["kept"] = table["circuit"].map({"whole": 9, "none": 0, "reasoning": 3})
    found = circuit_table(table, SETTINGS).set_index("measure")
    assert found.loc["faithfulness", "mean"] == pytest.approx(0.5)
    assert found.loc["completeness", "mean"] == pytest.approx(0.75) and (found["kept"] == 3).all()


def writers() -> pd.DataFrame:
    return rows(
        "item subtask kind block head contribution alone total",
        (0, 1, "copy", 1, 0, 2.0, 0.5, 4.0), (0, 1, "copy", 2, 0, 1.0, 0.9, 4.0),
        (1, 1, "copy", 1, 0, 1.0, 0.3, 4.0), (1, 1, "copy", 2, 0, -1.0, 0.7, 4.0),
    )  # fmt: skip


def test_writer_table_by_hand():
    found = writer_table(writers(), SETTINGS)
    assert found[["block", "head"]].to_numpy().tolist() == [[1, 0], [2, 0]]
    assert found["share"].tolist() == [0.375, 0.0] and found["alone"].tolist() == pytest.approx([0.4, 0.8])
    best = top_heads(writers(), "alone", ["item"], 1)
    assert best["block"].tolist() == [2, 2]


def test_sources_and_pathways_by_hand():
    """Item 0: question 3 of 4, chain 1 of 4; item 1: demonstrations alone, what is negative counts as nothing."""
    values = {0: (0.0, 3.0, 1.0, 0.0), 1: (2.0, -1.0, 0.1, 0.0)}
    table = rows(
        "item subtask kind block head part attention written",
        *[(item, 1, "copy", 1, 0, part, 0.25, value) for item, four in values.items()
          for part, value in zip(("demonstrations", "question", "chain", "rest"), four, strict=True)],
    )  # fmt: skip
    found = source_table(table, writer_table(writers(), SETTINGS), SETTINGS).set_index("part")["mean"]
    assert found["question"] == pytest.approx(0.375) and found["chain"] == pytest.approx((0.25 + 0.1 / 2.1) / 2)
    several = pathway_rows(table, writer_table(writers(), SETTINGS)).set_index("item")["pathways"]
    assert several.to_dict() == {0: 2, 1: 1}


def test_other_tables_by_hand():
    silenced = rows(
        "item subtask kind silenced heads draw right probability",
        *[(item, 1, "copy", name, 2, -1, right, p + 0.01 * item) for item in (0, 1)
          for name, right, p in (("none", True, 0.8), ("writers", False, 0.2))],
    )  # fmt: skip
    found = ablation_table(silenced, SETTINGS).set_index(["silenced", "subtask"])
    assert found.loc[("writers", -1), "mean"] == pytest.approx(0.205) and found.loc[("none", -1), "accuracy"] == 1
    mention = rows("item subtask kind corruption probability kl",
                   (0, 5, "induction", "both", 0.1, 1.0), (1, 5, "induction", "both", 0.3, 1.0))  # fmt: skip
    assert mention_table(mention, SETTINGS).loc[0, "mean"] == pytest.approx(0.2)
    moved = rows("item block head attention control", (0, 1, 0, 0.9, 0.9), (1, 1, 0, 0.9, 0.9), (0, 2, 1, 0.5, 0.1),
                 (1, 2, 1, 0.5, 0.0))  # fmt: skip
    assert mover_table(moved, SETTINGS).loc[0, ["block", "head"]].tolist() == [2, 1]
    pairs = rows("layer probe labels text pair correct f1 chance",
                 (0, "mlp", "true", 0, 0, True, 0.4, 0.3), (0, "mlp", "true", 1, 1, False, 0.4, 0.3))  # fmt: skip
    assert mixing_table(pairs, SETTINGS).loc[0, ["mean", "f1", "chance"]].tolist() == [0.5, 0.4, 0.3]


def test_crossing_by_hand():
    """The context overtakes between layers 1 and 2 of 4: at the middle, a depth of 1.5 of 4."""
    table = rows(
        "item position part kind layer pretraining context",
        *[(item, 3, "chain", "copy", layer, 0.2, value) for item in (0, 1, 2)
          for layer, value in enumerate((0.0, 0.1, 0.3, 0.4, 0.5))],
    )  # fmt: skip
    found = crossing_table(table, SETTINGS).set_index("kind")
    assert found.loc["all", "depth"] == pytest.approx(1.5 / 4) and found.loc["copy", "n"] == 3
    curves = rift_table(table, SETTINGS)
    assert set(curves["kind"]) == {"all", "copy"}
    assert curves[(curves["prior"] == "context") & (curves["layer"] == 2)]["mean"].tolist() == pytest.approx([0.3, 0.3])
