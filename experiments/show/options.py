"""Options of `codi show`. Free of torch and pandas."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from experiments.study.manifest import command_of, read_manifest
from experiments.study.options import Options
from lm.terms import Part, Space, Timing

__all__ = ["ShowOptions"]


@dataclass(frozen=True)
class ShowOptions(Options):
    """Look at a run: the summary of any study, or the answers behind one cell of a sweep, flips first.

    `codi show RUN` prints what was found, `codi show RUN --pair 5-2 --latent 4 --coefficient 1` lists question, gold,
    unsteered and steered answer of every prompt.
    """

    COMMAND: ClassVar[str] = "show"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"latent": 1, "draw": 0, "limit": 1}

    run: tyro.conf.Positional[Path]
    """Run folder of any command."""
    pair: Annotated[str | None, tyro.conf.arg(metavar="A-B")] = None
    """Of a sweep: the pair whose direction was added, mean of latent A minus mean of latent B."""
    latent: int | None = None
    """Of a sweep: the latent that was edited."""
    coefficient: float | None = None
    """Of a sweep: how many times the direction was added; negative: taken away."""
    space: Space | None = None
    """Of a sweep: only this space; None: every one that was run."""
    part: Part | None = None
    """Of a sweep: only this part of the cache slot; None: every one that was run."""
    timing: Timing | None = None
    """Of a sweep: only this timing; None: every one that was run."""
    draw: int | None = None
    """Of a sweep: the answers under this random direction of the pair's norm (0, 1, …) in place of the pair's own."""
    limit: int | None = 20
    """Answers that are listed for a cell; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pair is not None:
            a, b = self.latents_of_pair
            if a == b or min(a, b) < 1:
                raise ValueError(f"the latents of a pair must be different and from 1, got {self.pair!r}")
        if self.coefficient is not None and not (math.isfinite(self.coefficient) and self.coefficient):
            raise ValueError(f"coefficient must be a number other than 0 (that is unsteered), got {self.coefficient}")
        missing = [name for name in ("pair", "latent", "coefficient") if getattr(self, name) is None]
        if self.asks_for_a_cell and missing:
            raise ValueError(
                "a cell is named by --pair, --latent and --coefficient: "
                f"{' and '.join(f'--{name}' for name in missing)} must be given too"
            )

    @property
    def asks_for_a_cell(self) -> bool:
        """Whether answers of a sweep are asked for, not a summary."""
        names = ("pair", "latent", "coefficient", "space", "part", "timing", "draw")
        return any(getattr(self, name) is not None for name in names)

    @property
    def latents_of_pair(self) -> tuple[int, int]:
        """A and B of the pair.

        Raises:
            ValueError: it is not written as A-B.
        """
        found = re.fullmatch(r"(\d{1,4})-(\d{1,4})", (self.pair or "").strip())
        if found is None:
            raise ValueError(f"pair must look like 5-2 (A-B), got {self.pair!r}")
        return int(found[1]), int(found[2])

    def check_inputs(self) -> None:
        super().check_inputs()
        if not self.run.is_dir():
            raise ValueError(f"no run folder {str(self.run)!r}")
        if not (self.run / "manifest.json").exists() and any((self.run / "trials").glob("part-*.parquet")):
            return  # trials of a sweep alone
        command = command_of(read_manifest(self.run)["identity"])
        if self.asks_for_a_cell and command != "sweep":
            raise ValueError(
                f"{self.run} is a run of `codi {command}`: cells (--pair, --latent, …) are of `codi sweep`; "
                f"codi show {self.run} shows its summary"
            )
