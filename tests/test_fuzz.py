"""A slice of the fuzz run (tests/fuzz.py, `make fuzz`), and that its judge lets nothing pass that it should not."""

from __future__ import annotations

import random
import re
import time
import warnings
from pathlib import Path

import fuzz
import pytest


def test_a_slice_of_broken_files_is_refused_or_read_right() -> None:
    outcomes, failures = fuzz.run("files", 400, seed=1)
    assert failures == []
    assert outcomes["refused"] > 100 and outcomes["read"] > 100 and sum(outcomes.values()) == 400
    assert fuzz.summary("files", 1, outcomes, 3.0).startswith("400 broken files (seed 1): ")


def test_a_slice_of_broken_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    outcomes, failures = fuzz.run("folders", 8, seed=1)
    assert failures == [] and sum(outcomes.values()) == 8


def test_a_slice_of_broken_checkpoints() -> None:
    outcomes, failures = fuzz.run("checkpoints", 40, seed=1)
    assert failures == []
    assert outcomes["refused"] > 10 and outcomes["read"] > 5 and sum(outcomes.values()) == 40


def test_a_case_can_be_made_again(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        case = fuzz.broken_bytes(random.Random("files-0-3"), tmp_path / name)
        found.append([case.what, *(path.read_bytes() for path in (tmp_path / name).iterdir())])
    assert found[0] == found[1]


def refuse(message: str) -> None:
    raise ValueError(message)


def warn() -> None:
    warnings.warn("odd", RuntimeWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("run", "wrong", "must", "outcome", "why"),
    [
        (lambda: refuse("a.json: no"), "", "", "refused", ""),
        (lambda: 3, "", "read", "read", ""),
        (lambda: refuse("no"), "", "", "failed", "a.json is not named"),
        (lambda: refuse("a.json\nno"), "", "", "failed", "several lines"),
        (lambda: refuse("a.json: no"), "", "read", "failed", "must be read"),
        (lambda: 3, "", "refused", "failed", "must be refused"),
        (lambda: 3, "three", "", "failed", "three"),
        (lambda: [][0], "", "", "failed", "crash: .*IndexError"),
        (lambda: b"\xff".decode(), "", "", "failed", "not a message for people"),
        (warn, "", "", "failed", "crash: .*odd"),
        (lambda: time.sleep(0.05), "", "", "failed", "took"),
    ],
)
def test_the_judge(run, wrong, must, outcome, why, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "PATIENCE", 0.04)
    found, reason = fuzz.judge(fuzz.Case("odd", "a.json", run, lambda result: wrong, must))
    assert found == outcome
    assert re.search(why, reason) if why else not reason
