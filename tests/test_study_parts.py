"""Parts: the same rows in whatever process; what is shared is computed once."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from planted import planted_model, planted_split

from codi import load_codi
from experiments.latents.necessity_measures import COUNTS, counts
from experiments.study.options import PromptOptions
from experiments.study.parts import Part, Recipe, Workbench, run_here, run_part, workbench_of

ROOT = Path(__file__).resolve().parent.parent
asked: list[str] = []


def slow(bench: Workbench, name: str = "x") -> str:
    asked.append(name)
    return f"{name} of {len(bench.prompts.evaluation)}"


def rows(bench: Workbench, *, first: int, seed: int) -> pd.DataFrame:
    return pd.DataFrame({"word": [bench.once(slow)] * 2, "number": [first, seed]})


def test_a_part_is_computed_from_function_arguments_and_seed() -> None:
    bench = Workbench(planted_model(), planted_split())
    parts = [Part("a", rows, {"first": 3}, 7), Part("b", rows, {"first": 4})]
    found = dict((part.name, part.run(bench)["number"].tolist()) for part in parts)
    assert found == {"a": [3, 7], "b": [4, 0]}
    assert [part.name for part, _ in run_here(parts, bench)] == ["a", "b"]
    assert parts[0].belongs_to == "a" and Part("a-0", rows, table="a").belongs_to == "a"


def test_what_parts_share_is_computed_once_by_name_and_arguments() -> None:
    bench = Workbench(planted_model(), planted_split())
    asked.clear()
    for name in ("x", "y", "x", "x"):
        assert bench.once(slow, name).startswith(name)
    assert bench.once(slow, name="x") and asked == ["x", "y", "x"]  # given by name: another key, the same value
    Workbench(planted_model(), planted_split()).once(slow, "x")
    assert asked.count("x") == 3


def test_a_part_must_be_found_by_its_name() -> None:
    def inside(bench: Workbench, *, seed: int) -> pd.DataFrame:
        return pd.DataFrame()

    functions: list[Any] = [inside, lambda bench, seed: {}]
    for function in functions:
        with pytest.raises(ValueError, match="part x: .* must be a function of a module"):
            Part("x", function)


def test_a_pickled_part_gives_the_same_table_in_a_fresh_process() -> None:
    prompts = PromptOptions(limit=4, derivation=4).load_split(0)
    recipe = Recipe(load_codi, {"path": str(ROOT / "checkpoints" / "tiny")}, prompts)
    part = Part("counts", counts, {"batch_size": 4}, 0, COUNTS)
    here = run_part(part, recipe)
    assert isinstance(here, pd.DataFrame) and workbench_of(recipe) is workbench_of(pickle.loads(pickle.dumps(recipe)))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there: Any = pool.submit(run_part, pickle.loads(pickle.dumps(part)), recipe).result()
    pd.testing.assert_frame_equal(there, here)
    assert set(here) == set(COUNTS.names) and isinstance(COUNTS, pa.Schema)
