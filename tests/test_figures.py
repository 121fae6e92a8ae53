"""The one style: same input, same bytes; colours with roles; one width; marks; no module has a style of its own."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from experiments.figures import heatmap, series, style
from experiments.figures.heatmap import CORRECTED, FAMILY_WISE, Scale, colour_bar, draw_matrix, matrix, numbers
from experiments.figures.series import band, baseline, draw_bars, draw_points, draw_series, from_zero, spread

ROOT = Path(__file__).resolve().parent.parent


def estimates(points: int = 5, seed: int = 0) -> pd.DataFrame:
    mean = np.random.default_rng(seed).random(points)
    return pd.DataFrame({"mean": mean, "lower": mean - 0.1, "upper": mean + 0.05, "n": 40, "n_clusters": 20})


@style.styled
def example() -> Figure:
    """Every kind of drawing on one page."""
    figure, axes = style.new_figure(2, 2, 2.2)
    table, x = estimates(), range(5)
    band(axes[0, 0], x, np.zeros(5), np.full(5, 30.0), "random, single draws", np.full(5, 15.0), "random, mean")
    baseline(axes[0, 0], 80, "unedited")
    draw_series(axes[0, 0], x, table, "edited", 0)
    draw_series(axes[0, 0], x, table, "shuffled", 1, control=True, joined=3)
    from_zero(axes[0, 0])
    draw_points(axes[0, 1], x, table["mean"], "vectors", 2, up=spread(table), across=np.full((2, 5), 0.2))
    for place in range(2):
        draw_bars(axes[1, 0], x, estimates(seed=place), f"part {place}", place, 2)
    values = np.random.default_rng(1).normal(size=(4, 6))
    draw_matrix(axes[1, 1], values, list("abcd"), list("123456"), "Effect", ".1f", True, np.abs(values) > 1)
    style.legend(figure, axes)
    style.note(figure, f"Something measured. {style.sample_text(table)} {heatmap.MARKS}")
    return figure


def digests() -> list[str]:
    page = style.Page(1.0, "Title", "A caption of some length, 95 % of it idle words. " * 5)
    next(page.panels(1, 1, 0.6)).plot([1, 2], [2, 1])
    return [hashlib.sha256(style.encode(one, form)).hexdigest() for one in (example(), page.figure)
            for form in style.FORMATS]  # fmt: skip


# --- Files ------------------------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes_in_every_process() -> None:
    """Two processes that order their sets and dicts of words differently, years apart, and this one."""
    code = "import sys; sys.path.insert(0, 'tests'); import test_figures as t; print('\\n'.join(t.digests()))"
    found = []
    for seed, day in (("1", "0"), ("2", "1700000000")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": day}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found.append(run.stdout.split())
    assert found[0] == found[1] == digests()
    assert len(set(found[0])) == 4


def test_files_hold_no_date_and_no_version() -> None:
    figure = example()
    for form in style.FORMATS:
        content = style.encode(figure, form)
        assert content == style.encode(figure, form)
        for word in (b"CreationDate", b"ModDate", b"Software", b"Producer", matplotlib.__version__.encode()):
            assert word not in content, (form, word)


def test_save_writes_every_format(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    files = style.save(example(), "figures/example", write)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["figures/example.png", "figures/example.pdf"]
    assert files[0].read_bytes()[:4] == b"\x89PNG" and files[1].read_bytes()[:4] == b"%PDF"
    with pytest.raises(ValueError, match="formats must be among png, pdf, got svg"):
        style.save(example(), "x", write, ("svg",))
    with pytest.raises(ValueError, match="formats must be among png, pdf, got none"):
        style.check_formats(())


def test_drawing_and_saving_leave_the_settings_of_the_process_alone() -> None:
    before = dict(matplotlib.rcParams)
    style.encode(example())
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "pdf.fonttype": 3}):
        assert style.encode(example(), "pdf") == style.encode(example(), "pdf")


# --- Style ------------------------------------------------------------------------------------------------------------


def test_every_figure_is_as_wide_as_a_page() -> None:
    for figure in (style.new_figure()[0], style.new_figure(3, 2, 1.0)[0], style.new_figure(2, 1, total=4.5)[0],
                   style.Page(1, "", "").figure):  # fmt: skip
        assert figure.get_figwidth() == style.WIDTH
    assert style.new_figure(3, 2, 1.0)[0].get_figheight() == 3.0
    assert style.new_figure(2, 1, total=4.5)[0].get_figheight() == 4.5
    png = style.encode(example(), "png", dpi=100)
    assert int.from_bytes(png[16:20], "big") == round(100 * style.WIDTH)  # not cropped to what is drawn


def test_roles_of_the_colours() -> None:
    assert style.PALETTE[-1] == style.CONTROL and style.PALETTE[:-1] == style.SERIES
    assert len(style.MARKERS) == len(style.PALETTE) == len(set(style.PALETTE))
    figure, ((axes,),) = style.new_figure()
    draw_series(axes, [0, 1], estimates(2), "asked", 1)
    draw_series(axes, [0, 1], estimates(2), "control", 0, control=True)
    baseline(axes, 50, "unedited")
    band(axes, [0, 1], [0, 0], [1, 1], "draws", [0.5, 0.5])
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]  # without the caps of intervals
    asked, control, unedited, mean = (to_hex(line.get_color()).upper() for line in drawn)
    assert (asked, control, unedited, mean) == (style.SERIES[1], style.CONTROL, style.BASELINE, style.CONTROL)
    assert to_hex(axes.collections[-1].get_facecolor()[0]).upper() == style.BAND
    for grey in (style.BASELINE, *style.CONTROLS, style.BAND, style.FAINT, style.EMPTY):  # comparisons are not coloured
        assert len({grey[1:3], grey[3:5], grey[5:7]}) == 1
    assert not {style.look(place, True)["color"] for place in range(9)} & set(style.SERIES)


def test_numbers_as_they_are_drawn() -> None:
    cases = {(-0.0, "+.1f"): "0.0", (-0.004, ".2f"): "0.00", (-0.5, ".0f"): "0", (12.0, "+.0f"): "+12",
             (-2.5, "+g"): "−2.5", (float("nan"), ".2f"): "–", (100.0, "g"): "100"}  # fmt: skip
    assert {case: style.number_text(*case) for case in cases} == cases
    assert numbers(np.array([[0.25, -0.05, np.nan, 1.0, 10.05]]), bare=True) == [[".25", "−.05", "", "1.00", "10.05"]]


def test_captions_break_between_words_only() -> None:
    lines = style.caption_lines("95 % of all " * 40, 50)
    assert max(map(len, lines)) <= 50 and not any(line.startswith("%") for line in lines)
    assert " ".join(lines).split() == ("95 % of all " * 40).split()


def test_sample_text() -> None:
    assert style.sample_text(estimates()) == "40 prompts in 20 clusters."
    table = pd.DataFrame({"n": [0, 1200, 30], "n_clusters": [np.nan, 12, 12]})
    assert style.sample_text(table) == "30 to 1,200 prompts in 12 clusters."


def texts_overlap(figure: Figure) -> list[str]:
    with style.in_style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        found = []
        boxes = [(one.get_text(), one.get_window_extent()) for legend in figure.legends for one in legend.get_texts()]
        boxes += [(axes.get_title(), axes.title.get_window_extent()) for axes in figure.axes if axes.get_title()]
        boxes += [(a.get_xlabel(), a.xaxis.label.get_window_extent()) for a in figure.axes if a.get_xlabel()]
        boxes += [(one.get_text(), one.get_window_extent()) for one in figure.texts]
        for i, (name, box) in enumerate(boxes):
            if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.width or box.y1 > figure.bbox.height:
                found.append(f"cut off: {name!r}")
            found += [f"{name!r} on {other!r}" for other, where in boxes[i + 1 :] if box.overlaps(where)]
        return found


def test_legend_panels_and_caption_do_not_meet() -> None:
    figure = example()
    for axes in figure.axes[:4]:
        axes.set_xlabel("across")
    names = [one.get_text() for one in figure.legends[0].get_texts()]
    assert sorted(names) == [
        "edited", "part 0", "part 1", "random, mean", "random, single draws", "shuffled", "unedited", "vectors",
    ]  # fmt: skip
    assert not texts_overlap(figure)
    low, ((axes,),) = style.new_figure()
    axes.plot([0, 1], label="line")
    axes.set_xlabel("across")
    low.legend(loc="outside lower center")  # where the caption goes
    style.note(low, "caption " * 40)
    assert not texts_overlap(low)


def test_a_label_twice_in_one_panel_stands_for_two_things() -> None:
    figure, axes = style.new_figure(1, 2)
    for panel in axes[0]:
        panel.plot([0, 1], label="same")
        panel.plot([1, 0], "--", label="same")
    style.legend(figure, axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["same", "same"]


# --- Heat maps --------------------------------------------------------------------------------------------------------


def test_marks_and_frames_lie_in_their_cells() -> None:
    figure, ((axes,),) = style.new_figure()
    marks = np.array([[0, CORRECTED, 0], [FAMILY_WISE, 0, 0]])
    frames = np.array([[False, False, True], [False, False, False]])
    values = np.array([[0.1, -0.9, 0.9], [-0.1, np.nan, 0.0]])
    matrix(axes, values, ["a", "b"], ["1", "2", "3"], Scale.signed(values), texts=numbers(values), marks=marks,
           frames=frames)  # fmt: skip
    dots = {(round(float(line.get_xdata()[0])), round(float(line.get_ydata()[0]))): line for line in axes.lines
            if line.get_marker() == "o"}  # fmt: skip
    assert dots.keys() == {(1, 0), (0, 1)} and heatmap.marked(figure)
    assert dots[1, 0].get_markerfacecolor() == "none" and dots[1, 0].get_markeredgecolor() == "white"
    assert dots[0, 1].get_markerfacecolor() == "black" == dots[0, 1].get_markeredgecolor()
    assert [patch.get_xy() for patch in axes.patches] == [(1.5, -0.5)] * 2
    written = {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.10", (1, 0): "−0.90", (2, 0): "0.90", (0, 1): "−0.10", (2, 1): "0.00"}
    plain, ((other,),) = style.new_figure()
    draw_matrix(other, values, ["a", "b"], ["1", "2", "3"], "")
    assert not heatmap.marked(plain)


def test_upwards_the_first_row_is_at_the_bottom() -> None:
    _, axes = style.new_figure(1, 2)
    for panel, upwards in zip(axes[0], (False, True), strict=True):
        matrix(panel, np.eye(3), "abc", "xyz", Scale(), texts=numbers(np.eye(3)), marks=np.eye(3, dtype=int),
               upwards=upwards)  # fmt: skip
        low, high = panel.get_ylim()
        assert (low < high) == upwards
        dots = [line for line in panel.lines if line.get_marker() == "o"]
        assert [round(float(dot.get_ydata()[0])) for dot in dots] == [0, 1, 2]
        above = [float(dot.get_ydata()[0]) - place for place, dot in enumerate(dots)]
        assert all((offset > 0) == upwards for offset in above)  # the upper corner of the cell, either way


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 7.0, -3.0, 1e-300, 1e300])
@pytest.mark.parametrize("signed", [False, True])
def test_a_figure_of_nothing_or_of_one_value(value: float, signed: bool) -> None:
    values = np.full((3, 4), value)
    figure, axes = style.new_figure(1, 2)
    draw_matrix(axes[0, 0], values, list("abc"), list("1234"), "Title", signed=signed, significant=values > 1)
    table = pd.DataFrame({"mean": values[0], "lower": values[0], "upper": values[0]})
    if abs(value) < 1e6 or np.isnan(value):
        draw_series(axes[0, 1], range(4), table, "all alike", 0)
        band(axes[0, 1], range(4), values[0], values[0], mean=values[0])
    for form in style.FORMATS:
        assert len(style.encode(figure, form)) > 1000


def test_scales() -> None:
    assert Scale.magnitude([]) == Scale.magnitude([np.nan, 0.0, -4.0]) == Scale(0.0, 1.0)
    assert Scale.magnitude([1, 2, np.nan], least=5).high == 5
    signed = Scale.signed([-3.0, 1.0, np.inf])
    assert (signed.low, signed.high, signed.colours) == (-3.0, 3.0, style.DIVERGING)
    assert Scale.magnitude(np.arange(101.0), quantile=0.9).high == pytest.approx(90)
    assert [Scale().beyond(v) for v in ([0, 1, np.nan], [-1], [2], [-1, 2], [])] == [
        "neither", "min", "max", "both", "neither",
    ]  # fmt: skip
    for wrong in ((1.0, 1.0), (2.0, 1.0), (0.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="a scale must go up"):
            Scale(*wrong)


@pytest.mark.parametrize("colours", [style.SEQUENTIAL, style.DIVERGING, style.CORRELATION])
def test_numbers_can_be_read_on_every_colour(colours: str) -> None:
    scale = Scale(-2.0, 3.0, colours)
    for value in np.linspace(-3, 4, 57):
        red, green, blue, _ = style.colour_map(colours)(np.clip((value + 2) / 5, 0, 1))
        assert scale.ink(value) == ("white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black")
    assert scale.ink(np.nan) == "black"


def test_large_matrices_leave_out_numbers_and_some_labels() -> None:
    """Layers x heads of a real model: no number fits, labels must not lie on top of each other."""
    figure, ((axes,),) = style.new_figure(height=2.6)
    draw_matrix(axes, np.random.default_rng(0).normal(size=(30, 24)), [str(i) for i in range(30)],
                [f"head {i}" for i in range(24)], "Effect", "+.2f", True, upwards=True)  # fmt: skip
    assert not axes.texts
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        with style.in_style():
            FigureCanvasAgg(figure).draw()
            boxes = [label.get_window_extent() for label in labels]
        assert 4 < len(boxes) < 24 and not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))
    small, ((axes,),) = style.new_figure(height=2.6)
    draw_matrix(axes, np.eye(4), list("abcd"), list("1234"), "Effect")
    assert len(axes.texts) == 16 and len(axes.get_xticklabels()) == len(axes.get_yticklabels()) == 4


def test_one_scale_for_all_panels() -> None:
    figure, axes = style.new_figure(1, 2)
    scale = Scale.signed([4.0])
    for panel, value in zip(axes[0], (1.0, 4.0), strict=True):
        draw_matrix(panel, np.full((2, 2), value), "ab", "12", "", scale=scale, bar=False)
        assert panel.images[0].get_clim() == (-4, 4) and panel.images[0].get_cmap().name == style.DIVERGING
    colour_bar(figure, scale, "points", of=axes, values=[5.0])
    assert len(figure.axes) == 3 and figure.axes[2].get_ylabel() == "points"


# --- Lines ------------------------------------------------------------------------------------------------------------


def test_series_are_shifted_and_keep_their_numbers() -> None:
    _, ((axes,),) = style.new_figure()
    table = estimates()
    for place in range(3):
        draw_series(axes, range(5), table, f"s{place}", place)
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert len({float(line.get_xdata()[0]) for line in lines}) == 3
    for line in lines:
        assert np.round(line.get_xdata()).tolist() == list(range(5))
        np.testing.assert_allclose(line.get_ydata(), 100 * table["mean"])
    np.testing.assert_allclose(spread(table, scale=100), [[10] * 5, [5] * 5])


def test_a_marker_at_zero_is_not_cut() -> None:
    _, ((axes,),) = style.new_figure()
    axes.plot([0, 1], [0, 10])
    from_zero(axes)
    low, high = axes.get_ylim()
    assert low < 0 < 10 <= high and abs(low) < 0.05 * high


def test_points_of_a_fraction() -> None:
    figure, ((axes,),) = style.new_figure()
    axes.plot([0, 1], [-0.25, 0.5])
    series.in_points(axes.yaxis)
    FigureCanvasAgg(figure).draw()
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert "0" in shown and "−20" in shown and "+40" in shown


# --- Nowhere else -----------------------------------------------------------------------------------------------------

MODULES = [path for package in ("lm", "codi", "steering", "lenses", "circuits", "experiments") for path in
           sorted((ROOT / package).rglob("*.py"))]  # fmt: skip
HEX = re.compile(r"#[0-9a-fA-F]{6}([0-9a-fA-F]{2})?")


def own_style(relative: str, source: str) -> list[str]:
    """What of the style a module has to itself: files, settings, colours, or matplotlib where nothing is drawn."""
    if relative.startswith("experiments/figures/"):
        return []
    found = []
    tree = ast.parse(source)
    draws = Path(relative).stem.endswith("figures") or relative in (
        "experiments/sweep/heatmaps.py", "experiments/sweep/curves.py",
    )  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("savefig", "rcParams", "rc_context", "rc", "rcdefaults"):
            found.append(f"line {node.lineno}: {node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and HEX.fullmatch(node.value):
            found.append(f"line {node.lineno}: a colour of its own, {node.value}")
        if isinstance(node, ast.Attribute) and node.attr in ("colormaps", "color_palette", "set_theme"):
            found.append(f"line {node.lineno}: {node.attr}")
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.split(".")[0] in ("matplotlib", "seaborn") and not draws:
                found.append(f"line {node.lineno}: imports {module}")
            if module.split(".")[0] == "seaborn" or module == "matplotlib.pyplot":
                found.append(f"line {node.lineno}: {module} has settings of its own")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_style_and_files_belong_to_the_figures_package(path: Path) -> None:
    assert own_style(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "figure.savefig('x.png')",
        "matplotlib.rcParams['font.size'] = 3",
        "with plt.rc_context({}): pass",
        "MINE = ('#0072B2', '#D55E00')",
        "import matplotlib",
        "def f():\n    from matplotlib import pyplot",
        "import seaborn",
    ],
)
def test_the_rule_bites(line: str) -> None:
    assert own_style("experiments/sweep/run.py", line)
    assert not own_style("experiments/figures/style.py", line)


def test_names_can_be_taken_without_waiting_for_matplotlib() -> None:
    code = (
        "import sys, experiments.figures.style, experiments.figures.series, experiments.figures.heatmap, "
        "experiments.sweep.draw, experiments.study.run, experiments.alternation.run, experiments.latents.probes\n"
        "print([name for name in ('matplotlib', 'seaborn') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
