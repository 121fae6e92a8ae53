"""Parts of a study as data: what is computed, by which function, from which plain values; and who computes them.

A `Part` names a function of a module, plain arguments and a seed. The function gets a `Workbench`, the loaded model and
the prompts with whatever the parts share, and gives back rows of a trial table. A part is therefore the same whoever
runs it: this process (`run_here`), or another one, which makes a workbench of its own from a `Recipe` (`run_part`).
An *executor* is any function like `run_here`: it takes parts that are missing and yields each with its rows, in the
order in which they become ready; what to do with the rows is not its business.

Knows nothing about files: which parts are missing is the run folder's, writing them the driver's business (run.py).
"""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import pandas as pd
import pyarrow as pa

from experiments.study.progress import Bar, no_bar

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["Executor", "Part", "Prompts", "Recipe", "Rows", "Workbench", "run_here", "run_part", "workbench_of"]

P = ParamSpec("P")
T = TypeVar("T")

Rows = pd.DataFrame | Mapping[str, Any]
"""Rows of a trial table: a frame, or column -> values."""


class Prompts(Protocol):
    """What a study asks a model: `Split` for CODI models, `ItemSplits` for ordinary language models."""

    def record(self) -> dict[str, str | int]:
        """Hashes and sizes, for the manifest."""

    def about(self) -> str:
        """Sizes in words; "" where nothing is asked."""

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per prompt: side, id, question, answer, steps, cluster; on both sides, twice."""


@dataclass(frozen=True)
class Recipe:
    """From what a workbench can be made in any process; plain values that can be pickled.

    Attributes:
        load: function of a module that loads the model.
        arguments: its arguments.
        prompts: evaluation and derivation prompts, or items.
    """

    load: Callable[..., LanguageModel]
    arguments: Mapping[str, Any]
    prompts: Prompts


class Workbench:
    """What the parts of a study work with in one process.

    Args:
        model: loaded; never modified. A `CodiModel`, or the `LanguageModel` of a study of one.
        prompts: evaluation and derivation prompts (`Split`), or items (`ItemSplits`).
        recipe: how another process makes this workbench; None: it cannot (the model was handed over in memory).
        advance: called with the number of rows that were just made.
        bar: makes the progress bars of long steps.
    """

    def __init__(
        self,
        model: Any,
        prompts: Any,
        recipe: Recipe | None = None,
        advance: Callable[[int], object] = lambda rows: None,
        bar: Bar = no_bar,
    ) -> None:
        self.model, self.prompts, self.recipe, self.advance, self.bar = model, prompts, recipe, advance, bar
        self._made: dict[tuple[Any, ...], Any] = {}

    def once(self, make: Callable[Concatenate[Workbench, P], T], *arguments: P.args, **options: P.kwargs) -> T:
        """`make(self, …)`, computed the first time that it is asked for with these arguments.

        Args:
            make: function of a module; its name and arguments are what the result is found by.
            *arguments, **options: values that can be hashed.
        """
        key = _key(make, arguments, options)
        if key not in self._made:
            self._made[key] = make(self, *arguments, **options)
        return self._made[key]

    def put(
        self, value: T, make: Callable[Concatenate[Workbench, P], T], *arguments: P.args, **options: P.kwargs
    ) -> None:
        """Give what `once` would compute from the same function and arguments, such as means that a run folder has."""
        self._made[_key(make, arguments, options)] = value


def _key(make: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[Any, ...]:
    return (make.__module__, make.__qualname__, arguments, tuple(sorted(options.items())))


@dataclass(frozen=True)
class Part:
    """One part of a study.

    Attributes:
        name: unique in its study; names the part's file.
        function: of a module, `function(bench, *, seed, **arguments) -> Rows`.
        arguments: plain values that can be pickled; nothing that was loaded or computed.
        seed: of everything random in the part.
        schema: columns and types of its rows; None: whatever the function gives (then a change of columns is not
            noticed in old run folders).
        table: trial table that it belongs to, which may have several parts; "": a table of its name.
        rows: how many rows it has; None: not known before.
        shared: where its rows are what `bench.once(function, *arguments)` gives: this function and these arguments.
            Parts that ask for it get them from the run folder when they were computed in an earlier sitting.

    Raises:
        ValueError: a function that cannot be found by its name, such as a lambda.
    """

    name: str
    function: Callable[..., Rows]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    schema: pa.Schema | None = None
    table: str = ""
    rows: int | None = None
    shared: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def __post_init__(self) -> None:
        found: Any = importlib.import_module(self.function.__module__)
        for word in self.function.__qualname__.split("."):
            found = getattr(found, word, None)
        if found is not self.function:
            raise ValueError(f"part {self.name}: {self.function.__qualname__} must be a function of a module")

    @property
    def belongs_to(self) -> str:
        """Name of its trial table."""
        return self.table or self.name

    def run(self, bench: Workbench) -> Rows:
        """Compute it."""
        return self.function(bench, seed=self.seed, **self.arguments)


class Executor(Protocol):
    """Computes parts, each as `run_here` does."""

    def __call__(self, parts: Sequence[Part], bench: Workbench) -> Iterator[tuple[Part, Rows]]:
        """Yield every part with its rows, in any order; `bench.recipe` is for those who work elsewhere."""


def run_here(parts: Sequence[Part], bench: Workbench) -> Iterator[tuple[Part, Rows]]:
    """One part after another, in this process."""
    for part in parts:
        yield part, part.run(bench)


def run_part(part: Part, recipe: Recipe) -> Rows:
    """Compute a part from the data alone: what a worker process calls. The workbench is kept for the next part."""
    return part.run(workbench_of(recipe))


_BENCHES: dict[str, Workbench] = {}


def workbench_of(recipe: Recipe) -> Workbench:
    """The workbench of this process for a recipe, made the first time that it is asked for. The last one is kept."""
    key = hashlib.sha256(pickle.dumps(recipe)).hexdigest()
    if key not in _BENCHES:
        _BENCHES.clear()  # one model at a time in memory
        _BENCHES[key] = Workbench(recipe.load(**recipe.arguments), recipe.prompts, recipe)
    return _BENCHES[key]
