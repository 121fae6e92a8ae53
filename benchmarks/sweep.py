"""How long does a whole sweep take, with shared prefixes and with packed cache clones in their place?

Runs `codi sweep` with its defaults on a few prompts, trials, statistics and figures included, once per engine, in one
process, compares the answers and prints both wall times. Writes benchmarks/results/sweep.json::

    python -m benchmarks.sweep                  # 6 prompts, about two minutes on two CPU cores
    python -m benchmarks.sweep --limit 20
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

from codi import branches
from experiments.sweep import run as sweep
from experiments.sweep.options import SweepOptions
from lm.terms import Engine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sweep.json"
ENGINES: tuple[Engine, ...] = ("shared", "clones")


def timed(engine: Engine, limit: int, out: Path) -> tuple[float, pd.DataFrame]:
    """Wall time (s) of one sweep with an engine, and its trials in a fixed order."""
    config = SweepOptions(model=str(ROOT / "checkpoints" / "tiny"), limit=limit, out=out)
    decode = functools.partial(branches.decode_branches, engine=engine)
    began = time.perf_counter()
    with mock.patch.object(branches, "decode_branches", decode), contextlib.redirect_stdout(io.StringIO()):
        sweep.main(config)
    seconds = time.perf_counter() - began
    trials = pd.concat([pd.read_parquet(part) for part in sorted((out / "trials").glob("*.parquet"))])
    return seconds, trials.reset_index(drop=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=6, help="evaluation prompts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "prompts": options.limit}
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            results[engine], tables[engine] = timed(engine, options.limit, Path(folder) / engine)
    shared, clones = (tables[engine] for engine in ENGINES)
    results["trials"] = len(shared)
    results["same_answers"] = float((shared["text"].astype(str) == clones["text"].astype(str)).mean())
    results["ratio"] = results["clones"] / results["shared"]
    size = f"{results['trials']:,} trials on {options.limit} prompts"
    print(f"{size}, statistics and figures; {results['threads']} threads")
    for engine in ENGINES:
        print(f"  {engine:7} {results[engine]:7.1f} s")
    print(f"  clones / shared {results['ratio']:.1f}; same answers {100 * results['same_answers']:.2f} %")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
