"""Options of `codi sweep`, `codi stats` and `codi plot`, and how their lists are read. Free of torch and pandas.

What can be seen to be wrong without a model is refused here: words, forms of numbers and pairs, combinations with
--legacy, a folder of another command. Bounds that depend on the model (latents, layers, kv-heads) are checked by
plan.py with the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro

from experiments.figures.style import DPI, WIDTH, WIDTHS
from experiments.study.manifest import command_of, read_manifest
from experiments.study.options import (
    AnswerOptions,
    Bounds,
    ControlOptions,
    ModelOptions,
    PublishedPromptOptions,
    RunOptions,
    ThreadOptions,
)
from lm.terms import CONTROLS, PARTS, SPACES, TIMINGS, KeyFrame, Timing

__all__ = [
    "Colours",
    "PlotOptions",
    "SettingOptions",
    "StatsOptions",
    "SweepOptions",
    "check_run",
    "parse_choices",
    "parse_coefficients",
    "parse_numbers",
    "parse_pairs",
    "timings_of",
]

DEFAULT_TASK = "arithmetic"
DEFAULT_STEPS: tuple[int | None, int | None] = (5, 5)
"""Steps of the default task's problems…"""
DEFAULT_REACH: int | None = 100
"""… and the value that each of them reaches: chosen, before any steering was run, so that the unsteered shipped model
is right in 55 to 85 % of them."""
LEGACY_TASK = "templates"

Colours = Annotated[float | Literal["shared", "each"], tyro.conf.arg(metavar="POINTS|shared|each")]
"""Colours of differences in figures; see `PlotOptions`."""
Word = TypeVar("Word", bound=str)
_Several = tuple[str, ...]


# --- Lists as a person writes them ------------------------------------------------------------------------------------


def _items(words: Sequence[str]) -> list[str]:
    return [item for word in words for item in word.split(",") if item.strip()]


def parse_choices(name: str, words: Sequence[str], allowed: Sequence[Word]) -> tuple[Word, ...]:
    """Words separated by blanks or commas, each one of `allowed`, repeats dropped; "none" alone gives ()."""
    given = tuple(dict.fromkeys(item.strip() for item in _items(words)))
    if given == ("none",) and "none" not in allowed:
        return ()
    known = {str(word): word for word in allowed}
    for item in given:
        if item not in known:
            raise ValueError(f"{name} must be among {', '.join(allowed)}, got {item!r}")
    if not given:
        raise ValueError(f"{name} must name at least one of {', '.join(allowed)}")
    return tuple(known[item] for item in given)


def parse_numbers(name: str, words: Sequence[str], highest: int | None) -> tuple[int, ...]:
    """Whole numbers 1..highest such as "1..6", "1,3,5" or "2 4", sorted, repeats dropped; "all" is every one.

    Args:
        name: of the option.
        words: as given.
        highest: largest allowed; None: not known yet, only the form is checked and "all" gives none.
    """
    allowed = f"in 1..{highest}" if highest is not None else "from 1"
    numbers: set[int] = set()
    for item in (item.strip() for item in _items(words)):
        if item == "all":
            numbers.update(range(1, (highest or 0) + 1))
            continue
        first, dots, last = item.partition("..")
        try:
            bounds = (int(first), int(last) if dots else int(first))
        except ValueError:
            message = f"{name} must be numbers {allowed} such as 1..{highest or 6} or 1,2, got {item!r}"
            raise ValueError(message) from None
        if highest is None:
            numbers.update(bounds)
            continue
        for bound in bounds:
            if not 1 <= bound <= highest:
                raise ValueError(f"{name} must be {allowed}, got {bound}")
        numbers.update(range(bounds[0], bounds[1] + 1))
    if not numbers and (highest is not None or not _items(words)):
        raise ValueError(f"{name} must name at least one number {allowed}, got {' '.join(words) or 'nothing'}")
    return tuple(sorted(numbers))


def parse_coefficients(words: Sequence[str]) -> tuple[float, ...]:
    """Finite numbers separated by blanks or commas, sorted, repeats dropped; 0, the baseline, is dropped too."""
    found = set()
    for item in _items(words):
        try:
            number = float(item)
        except ValueError:
            raise ValueError(f"coefficients must be numbers such as -1,0.5,2, got {item.strip()!r}") from None
        if not abs(number) < float("inf"):
            raise ValueError(f"coefficients must be finite, got {item.strip()!r}")
        if number:
            found.add(number)
    if not found:
        raise ValueError("coefficients must hold a number other than 0 (0 is the baseline, which is always computed)")
    return tuple(sorted(found))


def parse_pairs(words: Sequence[str], n_latents: int | None) -> tuple[tuple[int, int], ...]:
    """Ordered pairs such as "2-5,5-1"; "all" is every one of the n (n − 1).

    Args:
        words: as given.
        n_latents: of the model; None: not known yet, only the form is checked and "all" gives none.
    """
    pairs: dict[tuple[int, int], None] = {}
    allowed = f"in 1..{n_latents}" if n_latents is not None else "from 1"
    for item in _items(words):
        text = item.strip()
        if text == "all":
            every = range(1, (n_latents or 0) + 1)
            pairs.update({(a, b): None for a in every for b in every if a != b})
            continue
        first, dash, last = text.partition("-")
        if not (dash and first.isdecimal() and last.isdecimal()):
            raise ValueError(f"pairs must look like 2-5 (A-B, latents {allowed}) or be 'all', got {text!r}")
        a, b = int(first), int(last)
        if n_latents is not None and not (1 <= a <= n_latents and 1 <= b <= n_latents):
            raise ValueError(f"latents of a pair must be {allowed}, got {text!r}")
        if a == b:
            raise ValueError(f"the two latents of a pair must differ, got {text!r}")
        pairs[a, b] = None
    if not pairs and (n_latents is not None or not _items(words)):
        raise ValueError("pairs must name at least one pair such as 2-5, or 'all'")
    return tuple(sorted(pairs))


# --- The sweep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepOptions(ControlOptions, AnswerOptions, RunOptions, PublishedPromptOptions, ModelOptions):
    """Steer every latent pair, position and coefficient, beside random controls.

    Lists are separated by commas or blanks. The same command goes on with an interrupted run.

    --task left alone is arithmetic, and arithmetic without bounds has problems of 5 steps in which some value is 100 or
    more. --batch-size left alone: what memory allows, halved by itself if it runs out.

    --legacy reproduces the published scripts: label A-B but direction mean_B - mean_A, raw keys, means over the
    evaluation prompts (KV: the addition ones), early exit, embedding edits by means of states after one extra latent,
    one answer token, questions as they are, task templates. The published embedding means are those of 500 GSM8K-Aug
    questions: --derivation-task with --derivation 500 takes them from there.
    """

    COMMAND: ClassVar[str] = "sweep"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"part_prompts": 1}

    out: Path = Path("runs/sweep")
    task: str | None = None  # type: ignore[assignment]  # None: by --legacy, see chosen_task
    prompts: Path | None = None
    """Evaluation prompts from this file; the same as --task FILE."""
    limit: int | None = 150
    derivation: int = 256

    space: Annotated[_Several, tyro.conf.arg(metavar="kv|embedding|hidden …")] = ("kv", "embedding")
    """What is edited: the cache slot of a latent, the vector fed at it, or the state it is projected from."""
    part: Annotated[_Several, tyro.conf.arg(metavar="keys|values|both …")] = ("both",)
    """Which part of the cache slot; kv space only."""
    timing: Annotated[_Several, tyro.conf.arg(metavar="early-exit|continue|cached …")] = ("default",)
    """When: early-exit stops thinking after the edited latent; continue edits and computes the remaining latents on the
    edited past; cached computes all latents, then edits. default: cached, and early-exit with --legacy."""
    keys: KeyFrame = "content"
    """Frame of key directions: content (un-rotated before averaging, rotated to the edited slot) or raw (as cached, the
    published way)."""
    layers: Annotated[_Several, tyro.conf.arg(metavar="1..N|all")] = ("all",)
    """Layers to edit, 1 = first; kv space only."""
    kv_heads: Annotated[_Several, tyro.conf.arg(metavar="1..N|all")] = ("all",)
    """Key-value heads to edit, 1 = first; kv space only."""
    key_scale: float = 1.0
    """Factor on the coefficient of the keys."""
    value_scale: float = 1.0
    """Factor on the coefficient of the values."""
    pairs: Annotated[_Several, tyro.conf.arg(metavar="A-B,…|all")] = ("all",)
    """Ordered pairs of latents; the direction of A-B is mean_A - mean_B."""
    latents: Annotated[_Several, tyro.conf.arg(metavar="1..6")] = ("all",)
    """Latents that are edited (positions), 1 = first."""
    coefficients: Annotated[_Several, tyro.conf.arg(metavar="C,…")] = ("-2", "-1", "-0.5", "0.5", "1", "2")
    """Signed multiples of one mean difference. 0 is the baseline and always computed."""

    draws: int = 40  # +c and -c of a pair share them: 38 allow a family-wise p of 0.05, 2 more for families of draws
    batch_size: int | None = None  # type: ignore[assignment]  # None: what memory allows
    part_prompts: int = 16
    """Prompts in one part of the trial table: how much an interruption can cost."""
    plots: bool = True
    """Draw the figures at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None and self.prompts is not None:
            raise ValueError(f"give --task or --prompts, not both: got {self.task} and {self.prompts}")
        parse_choices("space", self.space, SPACES)
        parse_choices("part", self.part, PARTS)
        timings_of(self)
        parse_choices("controls", self.controls, CONTROLS)
        parse_coefficients(self.coefficients)
        parse_pairs(self.pairs, None)
        for name in ("latents", "layers", "kv_heads"):
            parse_numbers(name.replace("_", "-"), getattr(self, name), None)

    def check_inputs(self) -> None:
        super().check_inputs()
        number = self.known_latents()
        parse_numbers("latents", self.latents, number)
        parse_pairs(self.pairs, number)

    def check_legacy(self) -> None:
        """Refuse what the published scripts cannot do.

        Raises:
            ValueError: with --legacy, another timing than early-exit, hidden space, or only some layers or kv-heads.
        """
        if not self.legacy:
            return
        timings = timings_of(self)
        if timings != ("early-exit",):
            raise ValueError(f"legacy steering is early-exit, got timing {', '.join(timings)}")
        if "hidden" in parse_choices("space", self.space, SPACES):
            raise ValueError("legacy steering exists in kv and embedding space, got hidden")

    @property
    def chosen_task(self) -> str:
        """--prompts or --task; left alone: arithmetic, and templates with --legacy."""
        if self.prompts is not None:
            return str(self.prompts)
        return self.task or (LEGACY_TASK if self.legacy else DEFAULT_TASK)

    @property
    def bounds(self) -> Bounds:
        least, most, reach = self.min_steps, self.max_steps, self.reach
        if self.chosen_task == DEFAULT_TASK and (least, most, reach) == (None, None, None):
            (least, most), reach = DEFAULT_STEPS, DEFAULT_REACH
        return {"min_steps": least, "max_steps": most, "reach": reach}


def timings_of(options: SweepOptions) -> tuple[Timing, ...]:
    """The timings that are asked for.

    Raises:
        ValueError: an unknown timing.
    """
    if tuple(options.timing) == ("default",):
        return ("early-exit",) if options.legacy else ("cached",)
    return parse_choices("timing", options.timing, TIMINGS)


# --- Its statistics and figures ---------------------------------------------------------------------------------------


def check_run(run: Path) -> None:
    """Refuse what is not the run folder of a sweep. A folder without a manifest may hold trials of a sweep.

    Raises:
        ValueError: no such folder, a damaged manifest, or a run of another command.
    """
    if not run.is_dir():
        raise ValueError(f"no run folder {str(run)!r}")
    if not (run / "manifest.json").exists():
        return
    command = command_of(read_manifest(run)["identity"])
    if command != "sweep":
        raise ValueError(f"{run} is a run of `codi {command}`, not of `codi sweep`")


@dataclass(frozen=True, kw_only=True)
class SettingOptions(ThreadOptions):
    """Settings of the statistics; what is not given stays as it was in the run folder."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"resamples": 100, "permutations": 100, "seed": 0}

    resamples: int | None = None
    """Bootstrap resamples of clusters behind every interval. None: as before in this folder, else 2000."""
    permutations: int | None = None
    """Sign flips behind the family-wise p, permutations behind rank consistency. None: as before, else 5000."""
    level: float | None = None
    """Coverage of the intervals, a fraction. None: as before, else 0.95."""
    alpha: float | None = None
    """Level at which a corrected p-value counts, a fraction. None: as before, else 0.05."""
    seed: int | None = None
    """Seed of resamples and permutations: same trials and settings, same tables. None: as before, else 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("level", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")

    @property
    def given(self) -> dict[str, float]:
        """The settings that are given."""
        names = ("resamples", "permutations", "level", "alpha", "seed")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class StatsOptions(SettingOptions):
    """Recompute the statistics of a run folder from its trials alone, write them there and print a summary."""

    COMMAND: ClassVar[str] = "stats"

    run: tyro.conf.Positional[Path]
    """Run folder of `codi sweep` (it holds trials/part-*.parquet)."""
    calibrate: bool = False
    """Also try the rule behind the verdicts on the random draws alone, where nothing is to be found; the table is
    printed and written as statistics/calibration.csv."""

    def check_inputs(self) -> None:
        super().check_inputs()
        check_run(self.run)


@dataclass(frozen=True)
class PlotOptions(SettingOptions):
    """Draw the figures of a run folder from its trials, as PNG and PDF in RUN/figures."""

    COMMAND: ClassVar[str] = "plot"

    run: tyro.conf.Positional[Path]
    """Run folder of `codi sweep` (it holds trials/part-*.parquet)."""
    only: tuple[str, ...] = ()
    """Draw these figures only: names, parts of names, or patterns in quotes such as "kv-*-difference-*". Empty: all."""
    caption: bool = True
    """Write the caption below every figure: what it shows, how many prompts, which intervals."""
    width: float = WIDTH
    """Inches, from 7.2 (a page): panels grow with it, letters keep their size."""
    scale: Colours = "shared"
    """Colours of differences: shared, one range for all |c| of a space and timing, so that figures can be compared
    (large effects at a large |c| leave small ones pale); each, one range for each |c|; or half the range in points,
    such as 5, where whatever lies beyond has the colours of the ends."""
    dpi: int = DPI
    """Dots per inch of the PNG files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 <= self.dpi <= 1200:
            raise ValueError(f"dpi must be in 50..1200, got {self.dpi}")
        if not WIDTHS[0] <= self.width <= WIDTHS[1]:
            raise ValueError(f"width must be in {WIDTHS[0]:g}..{WIDTHS[1]:g} inches, got {self.width:g}")
        if not isinstance(self.scale, str) and not 0 < self.scale <= 100:
            raise ValueError(f"scale must be shared, each, or above 0 and at most 100 points, got {self.scale:g}")

    def check_inputs(self) -> None:
        super().check_inputs()
        check_run(self.run)
