"""What does a sweep cost when another one runs beside it? Two commands at once, against half the machine.

A small `codi sweep` is run alone and then two of them at once, as anybody would start them (with the command's own
setting of OpenMP, and without it for comparison), again and again in turn; of every way the fastest run counts, because
whatever else the machine does only adds. Two that share the machine fairly take twice as long as one alone:

    ratio = wall time of two at once / (2 × wall time of one alone)            target: at most 1.4

With --threads 1 each may keep a core of its own, so there the ratio may fall to 0.5 (with two cores or more). Writes
benchmarks/results/side_by_side.json::

    python -m benchmarks.side_by_side                     # a few minutes on two CPU cores
    python -m benchmarks.side_by_side --limit 40 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.cli import SPINS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "side_by_side.json"
TARGET = 1.4
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
WAYS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "default": ((), {}),
    "threads 1": (("--threads", "1"), {}),
    "spinning": ((), {"OMP_WAIT_POLICY": "active"}),
}
"""Name -> options of the command and environment. "spinning" is what OpenMP would do if the command let it."""


def seconds(n: int, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> float:
    """Wall time until n equal sweeps that are started together have all ended.

    Raises:
        RuntimeError: one of them failed.
    """
    given = {name: value for name, value in os.environ.items() if name not in (*SPINNING, "OMP_NUM_THREADS")}
    given |= {"HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "experiments.sweep", "--model", str(ROOT / "checkpoints" / "tiny"), *words]
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            [*command, "--out", str(folder / f"{began}-{i}")], cwd=ROOT, env=given,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(n)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in running]
    took = time.perf_counter() - began
    for process, words_of in zip(running, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a sweep failed: {words_of.strip().splitlines()[-1]}")
    return took


def measured(ways: Sequence[str], limit: int, draws: int, repeats: int) -> dict[str, dict[str, Any]]:
    """For every way the seconds of each repeat, alone and together, and the ratio of the fastest."""
    sweep = ["--limit", str(limit), "--draws", str(draws), "--space", "kv", "--no-plots"]
    found: dict[str, dict[str, Any]] = {way: {"alone": [], "together": []} for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):  # in turn: what else the machine does hits all of them alike
            for way in ways:
                words, environment = WAYS[way]
                for name, n in (("alone", 1), ("together", 2)):
                    found[way][name].append(seconds(n, [*sweep, *words], environment, Path(folder)))
    for one in found.values():
        one["ratio"] = ratio(min(one["alone"]), min(one["together"]))
    return found


def ratio(alone: float, together: float) -> float:
    """Wall time of two at once against two one after another."""
    return together / (2 * alone)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=20, help="evaluation prompts")
    parser.add_argument("--draws", type=int, default=3, help="random directions beside each pair")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every way; the fastest counts")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], help="how the commands are started")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    found = measured(options.ways, options.limit, options.draws, options.repeats)
    print(f"{os.cpu_count()} cores, load before {load:.1f}; {options.limit} prompts, fastest of {options.repeats}")
    print(f"  {'':10} {'alone':>8} {'two at once':>12} {'ratio':>6}   at most {TARGET}; GOMP_SPINCOUNT={SPINS}")
    for way, one in found.items():
        print(f"  {way:10} {min(one['alone']):7.1f}s {min(one['together']):11.1f}s {one['ratio']:6.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"cores": os.cpu_count(), "load": load, "limit": options.limit, "draws": options.draws, "target": TARGET}
    options.out.write_text(json.dumps({**record, "ways": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
