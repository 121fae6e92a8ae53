"""The studies that pages of findings run and show: how each is called, and what of it is on the page. Data alone."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path

from experiments.commands import COMMANDS
from experiments.study.option_class import Options

__all__ = ["LANGUAGE_STUDIES", "STUDIES", "Entry"]


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
    """

    name: str
    command: tuple[str, ...]
    question: str
    figures: tuple[str, ...] = ()
    reads: tuple[tuple[str, str], ...] = ()
    model: str = ""

    def on(self, model: str) -> Entry:
        """The same study on one of several models, its folder and pictures named after both."""
        label = Path(model).name
        reads = tuple((option, f"{label}-{study}") for option, study in self.reads)
        return dataclasses.replace(self, name=f"{label}-{self.name}", reads=reads, model=model)

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
)

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
        "circuit-all",
        ("circuit", "--demonstrations", "0", "--positions", "all", "--limit", "8", "--what", "effects", "knockout"),
        "Heads patched at every token, as published: are the best ones enough?",
        ("effects", "knockout"),
    ),
    Entry(
        "circuit-shown",
        ("circuit", "--what", "flow", "mixing", "rift"),
        "The same behind six solved ontologies: sources, pairs of words, pretraining against context.",
        ("*",),
    ),
)
"""Studies of ordinary language models."""
