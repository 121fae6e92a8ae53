"""What the figures of one (space, part, timing) of a sweep are drawn from, and what their captions say.

`views` splits the tables of an analysis; a `View` knows its baseline, its coefficients, the half range of its colours
and the words below its figures. Nothing is drawn and nothing is calculated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.heatmap import Scale
from experiments.figures.style import DIVERGING
from experiments.statistics.clusters import Settings
from experiments.study.edits.pairing import FAMILY
from experiments.sweep.analysis import Analysis
from experiments.sweep.options import Colours
from experiments.sweep.summary import family_name, number

__all__ = ["View", "captions", "pair_name", "views"]

_WHEN = {
    "early-exit": "Early exit: the baseline at latent k is the unsteered answer after k latents.",
    "continue": "Continue: later latents are computed on the edited past.",
    "cached": "Cached: the edit is made after all latents.",
}


@dataclass(frozen=True)
class View:
    """What the figures of one (space, part, timing) are drawn from."""

    space: str
    part: str
    timing: str
    cells: pd.DataFrame  # both names of every edit
    controls: pd.DataFrame
    marginals: pd.DataFrame
    correlations: pd.DataFrame
    consistency: pd.DataFrame
    variance: pd.DataFrame
    symmetry: pd.DataFrame
    settings: Settings
    notes: tuple[str, ...] = ()
    colours: Colours = "shared"

    @property
    def title(self) -> str:
        return family_name(self.space, self.part, self.timing)

    @property
    def slug(self) -> str:
        return f"{self.space}-{self.part}-{self.timing}"

    @property
    def sizes(self) -> list[float]:
        """|c| of the run, ascending."""
        return sorted(self.cells["coefficient"].abs().unique())

    @property
    def latents(self) -> list[int]:
        return sorted(int(latent) for latent in self.cells["latent"].unique())

    def limit(self, size: float | None = None) -> float:
        """Half the range of the diverging colours, a fraction.

        The half range that was asked for; or the 98th percentile of |difference|, at least 10 points, of the whole
        view, or with colours "each" of the cells of one |c|, then at least 2 points.
        """
        if not isinstance(self.colours, str):
            return self.colours / 100
        each = self.colours == "each" and size is not None
        cells, least = (self.at(size), 0.02) if each and size is not None else (self.cells, 0.1)
        step = 100 if each else 20
        return max(least, float(np.ceil(step * cells["difference"].abs().quantile(0.98)) / step))

    def scale(self, size: float | None = None) -> Scale:
        """Colours of differences: the same in every figure of the view, unless each |c| is to have its own."""
        return Scale(-self.limit(size), self.limit(size), DIVERGING)

    def at(self, size: float) -> pd.DataFrame:
        """Ordered pairs at c = +size."""
        return self.cells[self.cells["coefficient"] == size]

    def baseline(self, latent: int) -> pd.Series:
        """The row of the unsteered model at a latent."""
        rows = self.controls[(self.controls["control"] == "none") & (self.controls["latent"] == latent)]
        return rows.iloc[0]

    def caption(self, text: str, *, controls: bool = True, intervals: bool = True) -> str:
        """The text, then how many prompts, which intervals, which controls, when the edit is made."""
        base = self.controls[self.controls["control"] == "none"]
        level = f"{100 * self.settings.level:g} %"
        who = f"{int(base['n'].max())} prompts in {int(base['n_clusters'].max())} clusters."
        how = f"Intervals: {level} bootstrap over clusters." if intervals else ""
        draws = self.controls[self.controls["control"] == "random"]
        what = ""
        if controls and len(draws):
            per_pair = int(self.cells["random_draws"].max())
            what = f"Random control: {per_pair} Gaussian directions of equal norm per pair, position and |c|."
        elif controls:
            what = "No random directions were run."
        when = _WHEN.get(self.timing, "")
        return " ".join(part for part in (text, who, how, what, when, *self.notes) if part)


def views(analysis: Analysis, notes: Sequence[str] = (), colours: Colours = "shared") -> list[View]:
    """One `View` per (space, part, timing) that has direction cells.

    Args:
        analysis: the tables.
        notes: added to every caption.
        colours: half range of the colours of differences in points; "shared": one for a view; "each": one for each |c|.
    """
    found: list[View] = []
    if analysis.cells.empty:
        return found
    names = ("cells", "controls", "marginals", "correlations", "consistency", "variance", "symmetry")
    for space, part, timing in analysis.cells[list(FAMILY)].drop_duplicates().itertuples(index=False):
        tables: dict[str, Any] = {}
        for name in names:
            table: pd.DataFrame = getattr(analysis, name)
            here = (table["space"] == space) & (table["part"] == part) & (table["timing"] == timing)
            tables[name] = table[here].reset_index(drop=True)
        how = {"settings": analysis.settings, "notes": tuple(notes), "colours": colours}
        found.append(View(space, part, timing, **tables, **how))  # type: ignore[arg-type]
    return found


_EACH_SIZE = {
    "accuracy": "Accuracy by pair and edited latent, c = +{c}; baseline and controls below",
    "difference": "Difference from the baseline by pair and edited latent, c = +{c}; corrected significance marked",
    "grids": "Difference from the baseline, A × B at each edited latent, c = +{c}",
}
_ONCE = {
    "coefficients": "Effect against coefficient, with the band of single random directions",
    "rank-consistency": "Do the same pairs come out best at every position?",
    "marginals": "Mean effect of A and of B, over all positions and at each",
    "variance": "What the effects depend on: pair, position, both, or which prompts were drawn",
    "signs": "Effect at +c against effect at −c",
}


def captions(view: View) -> dict[str, str]:
    """Name of every figure that a view may have -> what it shows, in one line; the names are those of its files."""
    found = {}
    for size in view.sizes:
        for kind, text in _EACH_SIZE.items():
            found[f"{view.slug}-{kind}-c{size:g}"] = f"{text.format(c=number(size))}: {view.title}."
    for kind, text in _ONCE.items():
        found[f"{view.slug}-{kind}"] = f"{text}{'' if text.endswith('?') else ':'} {view.title}."
    return found


def pair_name(source: int, target: int) -> str:
    """A pair as A−B."""
    return f"{source}−{target}"
