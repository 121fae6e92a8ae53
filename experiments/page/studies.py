"""The studies that pages of findings run and show: how each is called, and what of it is on the page. Data alone."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from experiments.commands import COMMANDS
from experiments.study.option_class import Options

__all__ = ["DATA_SETS", "LANGUAGE_STUDIES", "PUBLISHED_STUDIES", "STUDIES", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One study as it is called, and what of it is shown.

    Attributes:
        name: folder of its results under `--out`, and its name for `--only`.
        command: the words after `codi`; options may follow.
        question: one line for the page.
        figures: names of the figures that are shown, in this order; "curves-*" is every one that begins so.
        reads: options that name a folder which another study wrote, each with that study.
        model: of a page about several models, the one that it is run on.
        compared: it belongs to comparisons of several models; on the page of one it stands only where it is asked for.
        of_task: generated task that it is about: it is made on models that were trained on this task, or asked for.
    """

    name: str
    command: tuple[str, ...]
    question: str
    figures: tuple[str, ...] = ()
    reads: tuple[tuple[str, str], ...] = ()
    model: str = ""
    compared: bool = False
    of_task: str = ""

    def on(self, model: str, plain: Collection[str] = ()) -> Entry:
        """The same study on one of several models, its folder and pictures named after both.

        Args:
            model: folder or hub id.
            plain: studies whose folder is named after the study alone.
        """
        label = Path(model).name
        studies = (self.name, *(study for _, study in self.reads))
        names = {study: study if study in plain else f"{label}-{study}" for study in studies}
        reads = tuple((option, names[study]) for option, study in self.reads)
        return dataclasses.replace(self, name=names[self.name], reads=reads, model=model)

    def called(self, before: str = "") -> str:
        """Its command, with a word before it, and the model where the page is about several."""
        return f"`{before}{self.words}`" + (f", {Path(self.model).name}" if self.model else "")

    @property
    def words(self) -> str:
        """The command without options."""
        return " ".join(self.command[: next((i for i, w in enumerate(self.command) if w.startswith("-")), None)])

    @property
    def options(self) -> type[Options]:
        """The class of its options."""
        given = COMMANDS[self.command[0]].load_options()
        nested = [typing.get_args(one)[0] for one in typing.get_args(given)]  # of a command with subcommands
        members: list[type[Options]] = nested or [given]
        return next(member for member in members if member.COMMAND == self.words)


LENS = (("--lens", "lens"),)
STUDIES: tuple[Entry, ...] = (
    Entry("lens", ("lens", "train"), "Tuned lenses for every latent × layer: held-out KL.", ("held_out",)),
    Entry("lens-show", ("lens", "show"), "What the lenses read in one prompt.", ("heatmap",), LENS),
    Entry("lens-detect", ("lens", "detect"), "Are intermediate values and answers readable?", ("detection",), LENS),
    Entry("lens-transfer", ("lens", "transfer"), "Lenses of latents on text tokens, and back.", ("transfer",), LENS),
    Entry("lens-difference", ("lens", "difference"), "The lens on differences of latents.", (), LENS),
    Entry("lens-causal", ("lens", "causal"), "Does the model use what the lens reads?", ("causal",), LENS),
    Entry(
        "alternation",
        ("alternation",),
        "Do even latents store and odd latents compute?",
        ("alternation", "alternation-2"),
    ),  # fmt: skip
    Entry("probes", ("probes",), "What a linear map reads.", ("probes",)),
    Entry("necessity", ("necessity",), "Which latents the answer needs.", ("necessity",)),
    Entry("patch", ("patch",), "Which latents move the answer, and where to.", ("means", "values", "interchange")),
    Entry("transfer", ("transfer",), "Do latents carry the prompt?", ("transfer",)),
    Entry("anchors", ("anchors",), "Which latent the answer hangs on, who reads whom.", ("importance", "dependencies")),
    Entry("early-exit", ("early-exit",), "Answering after each latent.", ("early-exit",)),
    Entry("pca", ("pca",), "Components, and where each edit's effect goes.", ("components", "where")),
    Entry(
        "sweep",
        ("sweep", "--limit", "100", "--coefficients", "-1", "1"),
        "Does adding a difference of latents ever help, to the cache or to what is fed?",
        ("*-difference-c1",),
        compared=True,
    ),  # fmt: skip
    Entry(
        "polynomial",
        ("polynomial",),
        "Where the states of an iteration are read, which way its inputs go.",
        ("reads",),
        of_task="polynomial",
    ),  # fmt: skip
)

DATA_SETS = {
    "gsm8k": "openai/gsm8k",
    "svamp": "ChilleD/SVAMP",
    "multiarith": "ChilleD/MultiArith",
    "gsm-hard": "juyoung-trl/gsm-hard",
}
"""What the published models were evaluated on: name here -> hub id."""
_AS_PUBLISHED = ("--split", "published", "--answers", "published", "--max-new-tokens", "256")
_ACCURACY = ("--modes", "latent", "--latents", "6", *_AS_PUBLISHED)
_SEED_STUDY = ("--legacy", "--limit", "1000", "--derivation-task", "zen-E/GSM8k-Aug", "--derivation", "500")
PUBLISHED_STUDIES: tuple[Entry, ...] = (
    *(
        Entry(
            f"{name}-{mask}",
            ("eval", "--task", task, "--mask", mask, *_ACCURACY),
            f"How often is the answer to {name} right, with the mask {mask}?",
        )
        for name, task in DATA_SETS.items()
        for mask in ("carried", "published")
    ),
    Entry("grid-legacy", ("sweep", *_SEED_STUDY), "The seed study's grids as it made them.", ("*-difference-c1",)),
    Entry("grid", ("sweep", "--task", "templates"), "The same grids, corrected.", ("*-difference-c1",)),
    *(entry for entry in STUDIES if not entry.compared),
)
"""What `codi published` runs on every published checkpoint: accuracy, the seed study's grids, the studies."""

VECTORS = ("--vectors", "control-derive")
COT = ("--vectors", "cot-derive")
LANGUAGE_STUDIES: tuple[Entry, ...] = (
    Entry("control-derive", ("control", "derive"), "Control vectors by every method, at every layer.", ("norms",)),
    Entry("control-show", ("control", "show"), "What the vectors say.", ("cosines",), (VECTORS,)),
    Entry(
        "control-sweep", ("control", "sweep"), "Does a control vector help, beside random ones?", ("curves-*", "map*")
    ),
    Entry(
        "control-hard",
        ("control", "sweep", "--task", "indirect-objects-H"),
        "The same where a third name distracts.",
        ("curves-*",),
    ),
    Entry("control-transfer", ("control", "transfer"), "The vector of one task on another.", ("transfer",)),
    Entry("cot-derive", ("cot", "derive"), "The vector from thinking step by step to answering at once.", ("vector",)),
    Entry(
        "cot-grid",
        ("cot", "grid"),
        "Which layer and coefficient bring chains, on validation questions.",
        ("grid",),
        (COT,),
    ),
    Entry(
        "cot-eval",
        ("cot", "eval"),
        "Steering beside prompts, on test questions.",
        ("rates", "pareto"),
        (COT, ("--grid", "cot-grid")),
    ),
    Entry(
        "circuit",
        ("circuit", "--demonstrations", "0", "--limit", "40", "--held-out", "20", "--traced", "20"),
        "Which heads make each word of a written chain of thought.",
        ("effects*", "*"),
    ),
    Entry(
        "circuit-shown",
        ("circuit", "--what", "flow", "mixing", "rift"),
        "The same behind six solved ontologies: sources, pairs of words, pretraining against context.",
        ("*",),
    ),
)
"""Studies of ordinary language models."""
