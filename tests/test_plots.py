"""The figures: what is written in them is in the tables, and nothing is cut off, too small or on top of something."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from simulated_sweep import simulate_trials

from experiments.figures.heatmap import Scale
from experiments.figures.style import DIVERGING, STYLE, Form, colour_map, drawn_as
from experiments.statistics.clusters import Settings
from experiments.sweep import draw as plots
from experiments.sweep.analysis import analyse
from experiments.sweep.heatmaps import accuracy_heatmap
from experiments.sweep.options import PlotOptions
from experiments.sweep.views import View, captions, views

FAST = Settings(resamples=150, permutations=150)
SMALL: dict = {"pairs": 3, "latents": (2, 5), "sizes": (1.0,), "draws": 3, "prompts": 40, "clusters": 20}


@pytest.fixture(scope="module")
def view() -> View:
    """A whole grid with every control and real effects: 30 ordered pairs, six positions, two sizes."""
    trials = simulate_trials(
        sizes=(0.5, 2.0),
        draws=8,
        prompts=80,
        clusters=40,
        structured=True,
        controls=("random", "covariance", "shuffled"),
        patches=("patch-scalar", "patch-coordinate", "patch-norm"),
    )
    found = analyse(trials, FAST)
    assert (found.cells["verdict"] == "none").all()  # so few draws allow no verdict: some are given, to be drawn
    side = np.where(found.cells["difference"] < 0, "harm", "improvement")
    given = np.where(found.cells["fwer_p"] < 0.01, side, "none")
    found = dataclasses.replace(found, cells=found.cells.assign(verdict=given))
    (only,) = views(found, notes=("Model: a-model-with-a-rather-long-name-1b.",))
    return only


@pytest.fixture(scope="module")
def drawn(view: View) -> dict[str, Figure]:
    return dict(plots.figures(view))


def shown(figure: Figure) -> list[tuple[Text, np.ndarray]]:
    """Texts that are really drawn (ticks outside the axes are not), with their boxes in pixels."""
    texts: list[Text] = []
    original = Text.draw

    def draw(text: Text, renderer: object, *arguments: object) -> None:
        if text.get_visible() and text.get_text().strip():
            texts.append(text)
        original(text, renderer, *arguments)

    with matplotlib.rc_context(STYLE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        return [(text, text.get_window_extent(renderer).extents) for text in texts]


def clashes(figure: Figure) -> list[str]:
    """Texts that leave the page, are smaller than 6 points, or lie on another text."""
    found = []
    texts = shown(figure)
    width, height = figure.bbox.size
    for text, (left, low, right, high) in texts:
        if left < 0 or low < 0 or right > width or high > height:
            found.append(f"cut off: {text.get_text()!r}")
        if text.get_fontsize() < 6.0:
            found.append(f"too small: {text.get_text()!r}")
    boxes = np.array([box for _, box in texts])
    for i, (left, low, right, high) in enumerate(boxes):
        wide = np.minimum(right, boxes[i + 1 :, 2]) - np.maximum(left, boxes[i + 1 :, 0])
        tall = np.minimum(high, boxes[i + 1 :, 3]) - np.maximum(low, boxes[i + 1 :, 1])
        for j in np.flatnonzero((wide > 0.5) & (tall > 0.5)):
            found.append(f"overlap: {texts[i][0].get_text()!r} and {texts[i + 1 + j][0].get_text()!r}")
    return found


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_every_kind_of_figure_is_drawn(drawn: dict[str, Figure]) -> None:
    kinds = {name.removeprefix("kv-both-early-exit-") for name in drawn}
    once = {"coefficients", "rank-consistency", "marginals", "variance", "signs"}
    assert kinds == once | {f"{kind}-c{size}" for kind in ("accuracy", "difference", "grids") for size in ("0.5", "2")}


def test_nothing_is_cut_off_small_or_overlapping(drawn: dict[str, Figure]) -> None:
    problems = {name: clashes(figure) for name, figure in drawn.items()}
    assert not {name: found for name, found in problems.items() if found}
    for figure in drawn.values():
        assert figure.get_figwidth() == pytest.approx(7.2) and figure.get_figheight() < 10.5


def test_the_check_of_the_layout_can_fail() -> None:
    figure = Figure(figsize=(2, 1))
    figure.text(0.9, 0.5, "leaves the page")
    figure.text(0.1, 0.5, "one over")
    figure.text(0.12, 0.52, "another", fontsize=5)
    kinds = sorted(problem.split(":")[0] for problem in clashes(figure))
    assert kinds == ["cut off", "overlap", "too small"]


def test_cell_texts_stay_in_their_cells(drawn: dict[str, Figure]) -> None:
    for name in ("accuracy-c2", "difference-c2", "grids-c2"):
        figure = drawn[f"kv-both-early-exit-{name}"]
        boxes = {id(text): box for text, box in shown(figure)}
        checked = 0
        for axes in figure.axes:
            if not axes.images:
                continue
            for text in axes.texts:
                left, low, right, high = boxes[id(text)]
                (x0, y0), (x1, y1) = axes.transData.inverted().transform([(left, low), (right, high)])
                x, y = text.get_position()
                assert max(abs(x0 - round(x)), abs(x1 - round(x))) <= 0.5, text.get_text()
                assert max(abs(y0 - round(y)), abs(y1 - round(y))) <= 0.5, text.get_text()
                checked += 1
        assert checked >= 180


def test_heatmaps_write_the_numbers_of_the_tables(view: View, drawn: dict[str, Figure]) -> None:
    accuracy, difference = (drawn[f"kv-both-early-exit-{kind}-c2"] for kind in ("accuracy", "difference"))
    main, below = [axes for axes in accuracy.axes if axes.images][:2]
    rows = [label.get_text() for label in main.get_yticklabels()]
    assert len(rows) == 30 and rows[0] == "1−2"
    written = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in main.texts}
    for _, cell in view.at(2.0).iterrows():
        place = (cell["latent"] - 1, rows.index(f"{cell['source']}−{cell['target']}"))
        low, high = (f"{100 * cell[f'accuracy_{side}']:.0f}" for side in ("lower", "upper"))
        assert written[place] == f"{100 * cell['accuracy']:.1f} [{low}, {high}]"
        assert main.images[0].get_array()[place[1], place[0]] == pytest.approx(cell["difference"])
    labels = [label.get_text() for label in below.get_yticklabels()]
    assert labels[:2] == ["baseline (unsteered)", "random directions"] and len(labels) == 7
    base = view.baseline(3)["accuracy"]
    assert any(text.get_text().startswith(f"{100 * base:.1f} [") for text in below.texts)
    marked = [axes for axes in difference.axes if axes.images][0]
    cells = view.at(2.0)
    frames = [patch for patch in marked.patches if isinstance(patch, Rectangle)]
    assert len(frames) == 2 * (cells["verdict"] != "none").sum() > 0  # a white and a black line each
    dots = [line for line in marked.lines if line.get_marker() == "o"]
    assert len(dots) == ((cells[["gain_q", "loss_q"]].min(axis=1) < 0.05) | (cells["fwer_p"] < 0.05)).sum()
    filled = [dot for dot in dots if dot.get_markerfacecolor() != "none"]
    assert 0 < len(filled) == (cells["fwer_p"] < 0.05).sum() < len(dots)


def test_colours_are_centred_on_the_baseline(view: View, drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        if "heat" in name or "accuracy" in name or "difference" in name or "grids" in name:
            for axes in figure.axes:
                for image in axes.images:
                    low, high = image.get_clim()
                    assert low == -high == -view.limit()
    diverging = colour_map(DIVERGING)
    middle, better, worse = (diverging(value)[:3] for value in (0.5, 0.9, 0.1))
    assert min(middle) > 0.93  # equal to the baseline: white
    assert better[2] > better[0] + 0.2 and worse[0] > worse[2] + 0.2  # blue against red, never red against green
    for value in np.linspace(-0.4, 0.4, 41):  # text can be read on every colour
        red, green, blue, _ = diverging((np.clip(value / 0.3, -1, 1) + 1) / 2)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        assert Scale(-0.3, 0.3, DIVERGING).ink(value) == ("white" if dark else "black")


def test_captions_say_how_many_and_against_what(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        text = " ".join(words(figure)).replace("\n", " ")
        assert "80 prompts in 40 clusters" in text, name
        assert "a-model-with-a-rather-long-name-1b" in text
    text = " ".join(words(drawn["kv-both-early-exit-difference-c2"])).replace("\n", " ")
    assert "95 % bootstrap over clusters" in text and "8 Gaussian directions" in text and "q < 0.05" in text
    assert "whatever its q" in text  # a cell with a family-wise mark may have a q above alpha


@pytest.mark.parametrize(
    "changes",
    [
        {"timing": "cached", "sizes": (0.25, 0.5, 4.0), "pairs": 15, "latents": (6,)},
        {"pairs": 1, "latents": (4,), "draws": 2},
        {"controls": (), "signs": (1,)},
        {
            "space": "embedding",
            "part": "both",
            "timing": "continue",
            "patches": ("patch-norm",),
            "latents": (1, 2, 3, 4),
        },
    ],
)
def test_other_shapes_of_sweep(changes: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (some,) = views(analyse(simulate_trials(**(SMALL | changes)), FAST))
        figures = dict(plots.figures(some))
        problems = {name: clashes(figure) for name, figure in figures.items()}
    assert not {name: found for name, found in problems.items() if found}
    assert any("difference" in name for name in figures)
    assert any("signs" in name for name in figures) == (len(changes.get("signs", (1, -1))) == 2)


def test_a_grid_in_which_nothing_happens() -> None:
    trials = simulate_trials(**SMALL)
    trials["correct"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (some,) = views(analyse(trials, FAST))
        for name, figure in plots.figures(some):
            assert not clashes(figure), name
    assert some.limit() == 0.1


def test_cells_that_were_not_run_stay_empty() -> None:
    trials = simulate_trials(**SMALL)
    gone = (trials["control"] == "direction") & (trials["target"] == 3) & (trials["latent"] == 5)
    (some,) = views(analyse(trials[~gone], FAST))
    main = next(axes for axes in accuracy_heatmap(some, 1.0).axes if axes.images)
    empty = np.ma.getmaskarray(np.ma.masked_invalid(main.images[0].get_array()))
    assert empty.sum() == 2 and len(main.texts) == empty.size - 2  # both names of the pair 1-3


def test_a_run_folder(tmp_path: Path, capsys) -> None:
    trials = simulate_trials(**SMALL)
    (tmp_path / "trials").mkdir()
    trials.to_parquet(tmp_path / "trials" / "part-0.parquet")
    plots.main(PlotOptions(tmp_path, dpi=60, resamples=150, permutations=150))
    files = sorted((tmp_path / "figures").iterdir())
    assert {file.suffix for file in files} == {".png", ".pdf"}
    assert len(files) == 2 * len({file.stem for file in files})
    assert sorted(capsys.readouterr().out.split()) == [str(file) for file in files]
    assert all(file.stat().st_size > 1000 for file in files)
    said = captions(views(analyse(trials, FAST))[0])
    assert {file.stem for file in files} == said.keys()
    assert all(text.endswith("kv (both) · early-exit.") for text in said.values())
    first = {file.name: file.read_bytes() for file in files}
    plots.draw(analyse(trials, FAST), tmp_path, dpi=60, formats=("pdf",))  # as in the folder, byte for byte
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}


def test_legacy_labels_are_explained() -> None:
    notes = plots._notes({"model": "x/y/tiny", "identity": {"options": {"legacy": True}}})
    assert "Model: tiny." in notes and any("mean of B minus the mean of A" in note for note in notes)
    assert plots._notes({"identity": {"options": {"legacy": False}}}) == ()


def test_another_width_and_no_caption(view: View) -> None:
    """Panels take the room, letters keep their size, nothing is cut off or overlaps; the form ends with the block."""
    with drawn_as(Form(12.0, caption=False)):
        found = dict(plots.figures(view, ["difference-c0.5", "grids-c0.5", "variance", "marginals"]))
    assert len(found) == 4
    for name, figure in found.items():
        assert figure.get_figwidth() == pytest.approx(12.0), name
        assert not clashes(figure), name
        assert not any("Intervals:" in text for text in words(figure)), name
    (figure,) = dict(plots.figures(view, ["accuracy-c0.5"])).values()
    assert figure.get_figwidth() == pytest.approx(7.2) and any("Intervals:" in text for text in words(figure))


def test_only_some_figures(tmp_path: Path) -> None:
    analysis = analyse(simulate_trials(**SMALL), FAST)
    for only, kinds in ((("signs",), {"signs"}), (("kv-*-grids-c1", "variance"), {"grids-c1", "variance"})):
        written = plots.draw(analysis, tmp_path, dpi=60, only=only)
        assert {path.stem for path in written} == {f"kv-both-early-exit-{kind}" for kind in kinds}
    with pytest.raises(ValueError, match="only must name figures of this run, got 'sings'; there are: kv-both-early-"):
        plots.draw(analysis, tmp_path, only=("sings",))


def test_colours_of_a_scale(view: View) -> None:
    def ends(name: str, colours: object) -> tuple[float, float]:
        (figure,) = dict(plots.figures(dataclasses.replace(view, colours=colours), [name])).values()
        return next(axes.images[0] for axes in figure.axes if axes.images).get_clim()

    shared = [ends(f"difference-c{size}", "shared") for size in ("0.5", "2")]
    assert shared[0] == shared[1] == (-view.limit(), view.limit())
    each = [ends(f"difference-c{size}", "each") for size in ("0.5", "2")]
    assert each[0][1] < each[1][1]  # small effects have all the colours
    for size, (_, high) in zip((0.5, 2.0), each, strict=True):
        beyond = (view.at(size)["difference"].abs() > high).mean()
        assert beyond < 0.03 and high <= view.at(size)["difference"].abs().max() + 0.02
    assert ends("grids-c2", 5.0) == (-0.05, 0.05)
    for scale in (0.0, 101.0):
        with pytest.raises(ValueError, match="scale must be shared, each, or above 0"):
            PlotOptions(Path(), scale=scale)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="formats must be among png, pdf, got svg"):
        plots.draw(analyse(simulate_trials(**SMALL), FAST), tmp_path, formats=("svg",))
    with pytest.raises(ValueError, match="dpi must be in"):
        PlotOptions(tmp_path, dpi=0)
    with pytest.raises(ValueError, match=r"width must be in 7\.2\.\.20 inches, got 3"):
        PlotOptions(tmp_path, width=3)
    with pytest.raises(ValueError, match=r"width must be in 7\.2\.\.20 inches, got 3"):
        plots.draw(analyse(simulate_trials(**SMALL), FAST), tmp_path, form=Form(3))


def test_drawing_leaves_the_settings_of_the_process_alone(view: View) -> None:
    before = dict(matplotlib.rcParams)
    generator = plots.figures(view)
    next(generator)
    assert dict(matplotlib.rcParams) == before
