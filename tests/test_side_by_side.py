"""benchmarks.side_by_side: what is compared with what; the sweeps themselves are stand-ins here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import side_by_side


def test_two_at_once_against_half_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lone sweep takes 10 s; two take 24 s, and 200 s where they spin. Each first run is slowed down by somebody."""
    calls: list[tuple[int, tuple[str, ...]]] = []

    def fake(n: int, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> float:
        calls.append((n, tuple(words)))
        slowed = 3.0 if len(calls) <= 4 else 1.0
        return slowed * (10.0 if n == 1 else 200.0 if "OMP_WAIT_POLICY" in environment else 24.0)

    monkeypatch.setattr(side_by_side, "seconds", fake)
    out = tmp_path / "new" / "side.json"
    side_by_side.main(["--repeats", "2", "--ways", "default", "spinning", "--out", str(out)])
    found = json.loads(out.read_text())["ways"]
    assert found["default"]["ratio"] == pytest.approx(1.2) and found["spinning"]["ratio"] == pytest.approx(10.0)
    assert [n for n, _ in calls] == [1, 2] * 4 and len(found["default"]["alone"]) == 2  # in turn
    assert all("--limit" in words and "--no-plots" in words for _, words in calls)
    assert "1.20" in capsys.readouterr().out


def test_a_sweep_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a sweep failed: .*draws must be at least 1, got 0"):
        side_by_side.seconds(2, ["--draws", "0"], {}, tmp_path)
