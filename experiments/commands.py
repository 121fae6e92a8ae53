"""Every subcommand of `codi`: where its options are, which function runs it, and what it is for.

Options are read, explained and checked with the module of the options alone, which should import neither torch nor
pandas; the module that runs is imported afterwards. Knows nothing about models or tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["COMMANDS", "Command", "available", "command_of_module", "study_of"]


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        options: "module:name" of a dataclass, or of a union of dataclasses (nested subcommands).
        run: "module:function", called with the options.
        line: what it is for, in one line.
        study: "module:name" of what `study_of` gives, where it is not found by the rule there.
    """

    options: str
    run: str
    line: str
    study: str = ""

    @property
    def module(self) -> str:
        """The module that runs it."""
        return self.run.split(":")[0]

    def load_options(self) -> Any:
        """The dataclass, or union of dataclasses, of its options."""
        return _named(self.options)

    def load_function(self) -> Callable[[Any], object]:
        """The function that runs it; imports what it needs."""
        return _named(self.run)


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


# Modules that are not there are not listed.
COMMANDS: dict[str, Command] = {
    "sweep": Command(
        "experiments.sweep.options:SweepOptions",
        "experiments.sweep.run:main",
        "steer every latent pair, position and coefficient, beside random controls",
    ),
    "stats": Command(
        "experiments.sweep.options:StatsOptions",
        "experiments.sweep.recompute:main",
        "recompute the statistics of a run folder from its trials",
    ),
    "plot": Command(
        "experiments.sweep.options:PlotOptions",
        "experiments.sweep.draw:main",
        "draw the figures of a run folder",
    ),
    "eval": Command(
        "experiments.evaluate.options:EvalOptions",
        "experiments.evaluate.run:main",
        "accuracy by number of latents and by mode of answering, with intervals",
    ),
    "train": Command(
        "experiments.train.options:TrainOptions",
        "experiments.train.run:main",
        "train a CODI model: teacher, then self-distillation",
    ),
    "tune": Command(
        "experiments.tune.options:TuneOptions",
        "experiments.tune.run:main",
        "train a LoRA adapter that writes a chain when asked for steps and answers at once otherwise",
    ),
    "reasoner": Command(
        "experiments.tune.options:ReasonerOptions",
        "experiments.tune.reasoner:main",
        "chains and accuracy of a language model asked for steps, for the answer at once, or for nothing",
    ),
    "lens": Command(
        "experiments.lens.options:OPTIONS",
        "experiments.lens.run:main",
        "logit lens and tuned lens on latents: train, show, detect, difference, transfer, causal",
    ),
    "ask": Command(
        "experiments.lens.options:AskOptions",
        "experiments.lens.ask:main",
        "one question: the answer, and what a lens reads at each latent",
    ),
    "alternation": Command(
        "experiments.alternation.options:AlternationOptions",
        "experiments.alternation.run:main",
        "do even latents store and odd latents compute? one test, one verdict",
    ),
    "probes": Command(
        "experiments.latents.options:ProbesOptions",
        "experiments.latents.probes:main",
        "what a linear map reads from each latent, space and layer",
    ),
    "patch": Command(
        "experiments.latents.options:PatchOptions",
        "experiments.latents.patch.run:main",
        "replace latents by means, values, other prompts' latents or noise",
    ),
    "necessity": Command(
        "experiments.latents.options:NecessityOptions",
        "experiments.latents.necessity:main",
        "which latents, and which subsets of them, the answer needs",
    ),
    "transfer": Command(
        "experiments.latents.options:TransferOptions",
        "experiments.latents.transfer:main",
        "ablate the prompt, carry latents from one prompt to another",
    ),
    "pca": Command(
        "experiments.latents.options:PcaOptions",
        "experiments.latents.pca.run:main",
        "principal components of latents and cache entries; where each edit's effect goes",
    ),
    "anchors": Command(
        "experiments.latents.options:AnchorsOptions",
        "experiments.latents.anchors:main",
        "thought anchors: resample a latent, suppress attention, see what changes",
    ),
    "polynomial": Command(
        "experiments.polynomial.options:PolynomialOptions",
        "experiments.polynomial.run:main",
        "polynomial iteration: where its states are read, which way its inputs go",
    ),
    "early-exit": Command(
        "experiments.latents.options:EarlyExitOptions",
        "experiments.latents.early_exit:main",
        "answer after each latent: agreement, calibration, latents saved",
    ),
    "cot": Command(
        "experiments.cot.options:OPTIONS",
        "experiments.cot.commands:main",
        "chain-of-thought vectors of a language model: derive, grid, eval, show; run does all",
    ),
    "control": Command(
        "experiments.control.options:OPTIONS",
        "experiments.control.run:main",
        "control vectors of ordinary language models: derive, sweep, show, transfer",
    ),
    "circuit": Command(
        "experiments.circuit.options:CircuitOptions",
        "experiments.circuit.run:main",
        "which heads make each word of a written chain of thought (language models)",
    ),
    "circuit-latents": Command(
        "experiments.circuit.options:LatentCircuitOptions",
        "experiments.circuit.latents:main",
        "which heads write the answer after a latent thought, and from which latent",
    ),
    "show": Command(
        "experiments.show.options:ShowOptions",
        "experiments.show.run:main",
        "look at a run: its summary, or question, unsteered and steered answer of a cell of a sweep",
    ),
    "findings": Command(
        "experiments.page.options:FindingsOptions",
        "experiments.page.findings:main",
        "run every study on one model or several and collect what they found; several are compared",
    ),
    "published": Command(
        "experiments.page.published_options:PublishedOptions",
        "experiments.page.published:main_published",
        "the published checkpoints: accuracy beside the published figures, grids, studies, one page (needs a GPU)",
    ),
    "findings-language": Command(
        "experiments.page.options:LanguageFindingsOptions",
        "experiments.page.findings:main_language",
        "the same for the studies of ordinary language models",
    ),
}


def available() -> dict[str, Command]:
    """The subcommands whose module is there, without importing it."""
    return {name: one for name, one in COMMANDS.items() if importlib.util.find_spec(one.module) is not None}


def study_of(words: str) -> Any:
    """What a command computes, for a process that has the model already.

    Found in the module that runs the command, for a nested command (`lens detect`) in the module of the same room that
    is called like it: the `Study` that is called STUDY there (run it with `experiments.study.run.run_study`), or the
    function `run(options, model=…, say=…)`, which gives a `Result`.

    Args:
        words: after `codi`, without options.

    Raises:
        LookupError: the command offers neither.
    """
    name, *nested = words.split()
    command = COMMANDS[name]
    if command.study:
        return _named(command.study)
    place = ".".join([command.module.rpartition(".")[0], nested[0]]) if nested else command.module
    module = importlib.import_module(place)
    if hasattr(module, "STUDY"):
        return module.STUDY
    function = getattr(module, "run", None)
    if function is not None:
        taken = inspect.signature(function).parameters
        needed = {one for one in taken if taken[one].default is inspect.Parameter.empty}
        if {"options", "model", "say"} <= taken.keys() and needed <= {"options", "model", "say"}:
            return function
    raise LookupError(f"codi {words}: {place} has no STUDY and no run(options, model=…, say=…)")


def command_of_module(module: str) -> str | None:
    """The subcommand that `python -m MODULE` runs: that of the module, or of the room that is called like it, that it
    is alone in, or whose `main` it runs."""
    for name, one in COMMANDS.items():
        if one.module == module:
            return name
    inside = [name for name, one in COMMANDS.items() if one.module.startswith(f"{module}.")]
    named = [name for name in inside if module == f"experiments.{name}"]
    mains = [name for name in inside if COMMANDS[name].run.endswith(":main")]
    found = named or (inside if len(inside) == 1 else mains)
    return found[0] if len(found) == 1 else None
