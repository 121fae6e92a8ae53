"""`codi plot`: draws every figure of a run folder from its trials, PNG and PDF, into RUN/figures.

For each space, part and timing, and where it says so for each |c|:

    accuracy-c*       pair x position heatmap: accuracy and its interval in every cell, baseline and controls below
    difference-c*     the same as difference from the baseline, corrected significance marked
    grids-c*          A x B grid of the differences, one per position
    coefficients      effect against coefficient, with the band of single random directions
    rank-consistency  do the same pairs come out best at every position?
    marginals         mean effect of A and of B, over all positions and at each
    variance          what the effects depend on: pair, position, both, or which prompts were drawn
    signs             effect at +c against effect at -c

What it does not know: how a figure is drawn (heatmaps.py, curves.py) or a number computed (cells.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figures.style import DPI, FORMATS, check_formats, save
from experiments.study.folder import RunFolder
from experiments.study.result import FILE
from experiments.sweep.analysis import Analysis, analyse
from experiments.sweep.options import PlotOptions
from experiments.sweep.recompute import load_trials, report, settings_of
from experiments.sweep.views import View, views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "figures", "main"]


def figures(view: View) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every figure of a view, drawn one at a time; a figure with nothing to show is left out."""
    from experiments.sweep import curves, heatmaps

    for size in view.sizes:
        if len(view.at(size)):
            yield f"{view.slug}-accuracy-c{size:g}", heatmaps.accuracy_heatmap(view, size)
            yield f"{view.slug}-difference-c{size:g}", heatmaps.difference_heatmap(view, size)
            yield f"{view.slug}-grids-c{size:g}", heatmaps.pair_grids(view, size)
    yield f"{view.slug}-coefficients", curves.coefficient_curves(view)
    for name, function in (
        ("rank-consistency", curves.rank_figure),
        ("marginals", curves.marginal_figure),
        ("variance", curves.variance_figure),
        ("signs", curves.sign_figure),
    ):
        figure = function(view)
        if figure is not None:
            yield f"{view.slug}-{name}", figure


def draw(analysis: Analysis, run: Path, *, formats: Sequence[str] = FORMATS, dpi: int = DPI) -> list[Path]:
    """Draws every figure into RUN/figures.

    Args:
        analysis: from `cells.analyse`.
        run: the run folder; its manifest, if there is one, gives the model's name.
        formats: file types.
        dpi: dots per inch of the PNG files.

    Returns:
        The files written, in order.

    Raises:
        ValueError: an unknown format.
        OSError: the folder cannot be written.
    """
    check_formats(formats)
    folder = RunFolder(run)
    notes = _notes(folder.manifest()) if folder.manifest_path.exists() else ()
    written: list[Path] = []
    for view in views(analysis, notes):
        for name, figure in figures(view):
            written += save(figure, f"figures/{name}", folder.write, formats, dpi)
    return written


def _notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What a caption should add: the model, the task, and the legacy sign."""
    notes = []
    identity = manifest.get("identity", {})
    if manifest.get("model"):
        notes.append(f"Model: {Path(str(manifest['model'])).name}.")
    if isinstance(identity.get("options"), Mapping) and identity["options"].get("legacy"):
        notes.append("Legacy labels: the direction of a pair A−B is the mean of B minus the mean of A.")
    return tuple(notes)


def main(options: PlotOptions) -> None:
    """Analyse, draw, say which files; result.json then names them too, if the folder has its tables."""
    trials = load_trials(options.run)
    analysis = analyse(trials, settings_of(options.run, options))
    written = draw(analysis, options.run, dpi=options.dpi)
    if (options.run / FILE).exists() and not options.given:
        report(analysis, options.run)
    if not written:
        print(f"nothing to draw: {options.run} holds no direction cells")
    for path in written:
        print(path)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
