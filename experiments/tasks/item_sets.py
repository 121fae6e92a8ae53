"""Several tasks of items side by side: the sets that a study takes its questions from, and which of them are akin.

Each set is a task of item_sources.py with so many items for derivation, validation and test. Items are called by the
name of their set ("mmlu" for mmlu:PLACE), and sets that differ only in a number at the end (ontology-1, ontology-3) are
one *family*: a vector derived without a family has seen nothing of its kind.

Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.tasks.alignment import Tokenizer
from experiments.tasks.item_sources import CHOICE_READERS, Sizes, load_items
from experiments.tasks.items import Item, ItemSplits

__all__ = ["family_of", "load_sets", "name_of"]


def name_of(task: str) -> str:
    """Short name of a set, for tables: the word of a task, or the name of its file, folder or data set."""
    word, colon, place = task.partition(":")
    if colon and word in CHOICE_READERS:
        path = Path(place.partition(":")[0])
        stem = path.parent.name if path.stem == "task" else path.stem
        return word if word == "mmlu" else f"{word}-{stem}" if not stem.lower().startswith(word) else stem
    if re.fullmatch(r"babi-1[56]", word):
        return word
    return Path(word).stem if Path(task).exists() else word.rpartition("/")[2]


def family_of(name: str) -> str:
    """Name of a set without the number at its end: "ontology" of "ontology-3"."""
    return re.sub(r"-\d+$", "", name)


def load_sets(
    derivation: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
    sizes: Sizes,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> ItemSplits:
    """Items of several tasks, in three parts that share nothing.

    Args:
        derivation, validation, test: tasks that each part is taken from; one may serve several parts.
        sizes: items of each set in each part; fewer where a source has no more.
        seed: of generators, division and choice.
        tokenizer: of the model, see `load_items`.

    Raises:
        ValueError: two sets of one name in a part, or what `load_items` refuses.
    """
    tasks = list(dict.fromkeys([*test, *validation, *derivation]))
    for part, sets in (("derivation", derivation), ("validation", validation), ("test", test)):
        names = [name_of(task) for task in sets]
        same = next((name for name in names if names.count(name) > 1), None)
        if same is not None:
            raise ValueError(f"two sets for {part} are called {same!r}: {', '.join(sets)}")
    parts: dict[str, list[Item]] = {"derivation": [], "validation": [], "test": []}
    for task in tasks:
        name = name_of(task)
        own = Sizes(
            sizes.derivation if task in derivation else 0,
            sizes.validation if task in validation else 0,
            sizes.test if task in test else 0,
        )
        if not own.derivation and not own.validation and own.test == 0:
            continue
        for part, items in load_items(task, own, seed, tokenizer).parts.items():
            parts[part] += [_of_set(item, name) for item in items]
    return ItemSplits(*(tuple(items) for items in parts.values()))


def _of_set(item: Item, name: str) -> Item:
    """An item under the name of its set: generators number their questions and clusters from 0 in every task."""
    cluster = f"{name}/{item.cluster}" if item.cluster else ""
    return replace(item, prompt_id=f"{name}/{item.prompt_id}", task=name, cluster=cluster)
