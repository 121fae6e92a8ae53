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

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.figures.style import DPI, FORMATS, Form, check_formats, drawn_as, save
from experiments.study.folder import RunFolder
from experiments.study.progress import Bar, no_bar, progress
from experiments.study.result import FILE
from experiments.sweep.analysis import Analysis, analyse
from experiments.sweep.options import Colours, PlotOptions
from experiments.sweep.recompute import load_trials, report, settings_of
from experiments.sweep.views import View, captions, views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "figures", "main", "wanted"]


def figures(view: View, only: Sequence[str] = ()) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every figure of a view, drawn one at a time; a figure with nothing to show is left out.

    Args:
        view: what they are drawn from.
        only: names, or patterns with * and ?; empty: all.
    """
    for name, make in _makers(view).items():
        if wanted(name, only) and (figure := make()) is not None:
            yield name, figure


def _makers(view: View) -> dict[str, Callable[[], Figure | None]]:
    """The figures of a view by name, not yet drawn."""
    from experiments.sweep import curves, heatmaps

    found: dict[str, Callable[[], Figure | None]] = {}
    for size in view.sizes:
        if len(view.at(size)):
            for kind, drawing in (
                ("accuracy", heatmaps.accuracy_heatmap),
                ("difference", heatmaps.difference_heatmap),
                ("grids", heatmaps.pair_grids),
            ):
                found[f"{view.slug}-{kind}-c{size:g}"] = functools.partial(drawing, view, size)
    for kind, curve in (
        ("coefficients", curves.coefficient_curves),
        ("rank-consistency", curves.rank_figure),
        ("marginals", curves.marginal_figure),
        ("variance", curves.variance_figure),
        ("signs", curves.sign_figure),
    ):
        found[f"{view.slug}-{kind}"] = functools.partial(curve, view)
    return found


def wanted(name: str, only: Sequence[str]) -> bool:
    """Whether a figure is among those that are asked for: by its name, a pattern, or a part of its name."""
    return not only or any(fnmatchcase(name, one) or one in name for one in only)


def draw(
    analysis: Analysis,
    run: Path,
    *,
    formats: Sequence[str] = FORMATS,
    dpi: int = DPI,
    form: Form = Form(),  # noqa: B008  # frozen
    only: Sequence[str] = (),
    colours: Colours = "shared",
    bar: Bar = no_bar,
) -> list[Path]:
    """Draws every figure into RUN/figures.

    Args:
        analysis: from `cells.analyse`.
        run: the run folder; its manifest, if there is one, gives the model's name.
        formats: file types.
        dpi: dots per inch of the PNG files.
        form: width and caption.
        only: names of figures, patterns, or parts of names; empty: all.
        colours: see `views`.
        bar: makes the progress bar.

    Returns:
        The files written, in order.

    Raises:
        ValueError: an unknown format, an impossible width, or a name that no figure has (all are listed).
        OSError: the folder cannot be written.
    """
    check_formats(formats)
    folder = RunFolder(run)
    notes = _notes(folder.manifest()) if folder.manifest_path.exists() else ()
    seen = views(analysis, notes, colours)
    names = [name for view in seen for name in captions(view)]
    for one in only:
        if names and not any(wanted(name, [one]) for name in names):
            raise ValueError(f"only must name figures of this run, got {one!r}; there are: {', '.join(names)}")
    written: list[Path] = []
    total = sum(wanted(name, only) for name in names)
    with drawn_as(form), bar(total, "figure", "drawing") as advance:
        for view in seen:
            for name, figure in figures(view, only):
                written += save(figure, f"figures/{name}", folder.write, formats, dpi)
                advance(1)
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
    analysis = analyse(trials, settings_of(options.run, options), progress)
    form = Form(options.width, options.caption)
    only, colours = options.only, options.scale
    written = draw(analysis, options.run, dpi=options.dpi, form=form, only=only, colours=colours, bar=progress)
    if (options.run / FILE).exists() and not options.given:
        report(analysis, options.run)
    if not written:
        print(f"nothing to draw: {options.run} holds no direction cells")
    for path in written:
        print(path)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
