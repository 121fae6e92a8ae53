"""What `codi polynomial` does, with everything resolved: plain values, from options, model and prompts.

Knows nothing about how it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.polynomial.options import PolynomialOptions
from experiments.statistics.clusters import Settings
from experiments.study.manifest import read_manifest
from experiments.study.prompts import Asked, JoinedSplit
from experiments.tasks import polynomial
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Other", "Plan", "make_plan"]


@dataclass(frozen=True)
class Other:
    """What another run of this study found: its modulus, and (hops, answered right, asked)."""

    m: int
    prime: bool
    answered: tuple[tuple[int, int, int], ...]

    @classmethod
    def read(cls, folder: Path) -> Other:
        """From a run folder.

        Raises:
            ValueError: it is not finished.
        """
        kind = polynomial.parse(read_manifest(folder)["identity"]["options"]["task"])
        assert kind is not None, "a run of this study asks polynomials"
        table = folder / "accuracy.csv"
        if not table.exists():
            raise ValueError(f"{folder} is not finished, it has no {table.name}: continue that run first")
        rows = pd.read_csv(table).to_dict("records")
        counts = tuple((int(row["hops"]), round(row["mean"] * row["n"]), int(row["n"])) for row in rows)
        return cls(kind.m, kind.prime, counts)


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        asked: prompts of each number of hops, in the order of `hops`.
        m, b, prime: constants of the task.
        other: a run on a model of another modulus.
    """

    hops: tuple[int, ...]
    asked: tuple[Asked, ...]
    m: int
    b: int
    prime: bool
    n_latents: int
    n_layers: int
    hidden: int
    folds: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings
    other: Other | None = None

    @property
    def latents(self) -> range:
        """Places of the thought: h_0..h_n; the end of thought comes after them."""
        return range(self.n_latents + 1)


def make_plan(options: PolynomialOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: prompts that are not those of these options, or another run that is not finished.
    """
    kind = polynomial.parse(options.task)
    if kind is None or not isinstance(prompts, JoinedSplit) or len(prompts.tasks) != len(options.hops):
        raise ValueError(f"the prompts must be those that the options load, for hops {options.hops}")
    return Plan(
        hops=options.hops,
        asked=prompts.tasks,
        m=kind.m,
        b=kind.b,
        prime=kind.prime,
        n_latents=model.n_latents,
        n_layers=model.n_layers,
        hidden=options.hidden,
        folds=options.folds,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
        other=None if options.against is None else Other.read(options.against),
    )
