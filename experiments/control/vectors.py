"""From items to control vectors: pairs of texts, the methods, and vectors of shuffled pairs.

A positive text is a question with its right answer (after solved examples, if any). What it is held against:

    swapped    the same question with another answer: the first other choice, or the answer of the next item
    letters    75 random letters
    failures   the same question with the model's own wrong answer; only items that it fails on
    given      texts of a file, JSONL with positive and negative

States are read at the last token, that of the answer (steering/contrasts.py). Knows nothing about steering.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.control.options import CONTRASTS, Negatives
from experiments.study.item_texts import Reader
from experiments.tasks.indirect_objects import negative_letters
from experiments.tasks.item_answers import read_answer
from experiments.tasks.items import Item, ItemSplits
from lm.generate import generate
from lm.terms import VectorMethod
from steering.contrasts import fit_contrasts
from steering.control_vectors import ControlVector
from steering.vector_files import load_vector

if TYPE_CHECKING:
    from experiments.study.parts import Workbench
    from lm.model import LanguageModel

__all__ = [
    "Made", "Making", "TaskItems", "contrast_texts", "halves", "made_vectors", "make_vectors", "read_vectors",
    "splits_of", "vector_files_hash",
]  # fmt: skip

PARTS = ("derivation", "validation", "test")

ANSWER_TOKENS = 32
"""Longest answer that is generated to find items that the model fails on, where answers are words."""
CHAIN_TOKENS = 256
"""The same where they are numbers."""


@dataclass(frozen=True)
class Making:
    """How vectors are made, plain values.

    Attributes:
        methods: names of steering/contrasts.py, or of the files.
        negatives, pairs, centred, instruction: see `VectorOptions`.
        examples: solved items before every text.
        shuffled: vectors of shuffled pairs.
        files: folder or file that vectors are read from; "": they are made.
        seed, batch_size: of what is drawn, and texts at once.
        task: whose derivation items, where there are several tasks; "": the only one.
    """

    methods: tuple[str, ...]
    negatives: Negatives = "swapped"
    pairs: str = ""
    centred: bool = True
    examples: int = 0
    instruction: str = ""
    shuffled: int = 0
    files: str = ""
    seed: int = 0
    batch_size: int = 64
    task: str = ""


@dataclass(frozen=True)
class TaskItems:
    """Items of several tasks; no two parts share anything, of whatever tasks.

    Raises:
        ValueError: they do.
    """

    tasks: Mapping[str, ItemSplits]

    def __post_init__(self) -> None:
        everyone = self.tasks.values()
        ItemSplits(*(tuple(item for one in everyone for item in one.parts[part]) for part in PARTS))

    def record(self) -> dict[str, str | int]:
        """Hashes and sizes, for the manifest."""
        return {f"{task}: {key}": value for task, one in self.tasks.items() for key, value in one.record().items()}

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per item, with the task as it was asked for."""
        return [{**record, "task": task} for task, one in self.tasks.items() for record in one.records()]

    def about(self) -> str:
        """Sizes in words."""
        return "; ".join(f"{task}: {one.about()}" for task, one in self.tasks.items())


def splits_of(bench: Workbench, task: str) -> ItemSplits:
    """Items of a task of a workbench."""
    prompts: ItemSplits | TaskItems = bench.prompts
    return prompts if isinstance(prompts, ItemSplits) else prompts.tasks[task]


@dataclass(frozen=True)
class Made:
    """Vectors by method, and of shuffled pairs by method and draw (none for readings, and for vectors of files)."""

    vectors: Mapping[str, ControlVector]
    shuffled: Mapping[tuple[str, int], ControlVector]
    n_pairs: int


def contrast_texts(
    reader: Reader, items: Sequence[Item], negatives: Negatives, seed: int = 0, pairs: str = ""
) -> tuple[list[str], list[str]]:
    """Positive and negative texts, pair by pair.

    Args:
        reader: of the items.
        items: that the texts are made of.
        negatives: see this module.
        seed: of random letters.
        pairs: file of given texts.

    Raises:
        ValueError: fewer than two pairs, or a file that cannot be read.
    """
    if negatives == "given":
        return _given(Path(pairs))
    positive = [reader.answered(item, item.answer) for item in items]
    if negatives == "letters":
        rng = random.Random(f"negatives-{seed}")
        return positive, [negative_letters(rng) for _ in items]
    if negatives == "swapped":
        wrong = [_other_answer(item, items, place) for place, item in enumerate(items)]
        return positive, [reader.answered(item, answer) for item, answer in zip(items, wrong, strict=True)]
    failed = [(item, answer) for item, answer in zip(items, _own_answers(reader, items), strict=True) if answer]
    if len(failed) < 2:
        raise ValueError(
            f"the model fails on {len(failed)} of {len(items)} derivation items, at least 2 are needed: give more "
            "(--derivation), a harder task, or other --negatives"
        )
    return (
        [reader.answered(item, item.answer) for item, _ in failed],
        [reader.answered(item, answer) for item, answer in failed],
    )


def _other_answer(item: Item, items: Sequence[Item], place: int) -> str:
    """Another choice of the item, or the next different answer among the items."""
    others = [choice for choice in item.choices if choice != item.answer]
    others = others or [other.answer for other in (*items[place:], *items[:place]) if other.answer != item.answer]
    if not others:
        raise ValueError(f"{item.prompt_id}: no other answer is known: every item has the answer {item.answer!r}")
    return others[0]


def _own_answers(reader: Reader, items: Sequence[Item]) -> list[str]:
    """The model's own answer to every item that it fails on; "" where it is right or nothing was read."""
    longest = CHAIN_TOKENS if any(item.kind == "number" for item in items) else ANSWER_TOKENS
    texts = generate(reader.model, reader.encode(items), longest).texts
    read = [read_answer(item, text) for item, text in zip(items, texts, strict=True)]
    return ["" if one.correct else one.prediction for one in read]


def _given(path: Path) -> tuple[list[str], list[str]]:
    positive: list[str] = []
    negative: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        right, wrong = (record.get(name) if isinstance(record, dict) else None for name in ("positive", "negative"))
        if not isinstance(right, str) or not isinstance(wrong, str) or not right or not wrong:
            raise ValueError(f"{path}, line {number}: a pair has the texts positive and negative")
        positive.append(right)
        negative.append(wrong)
    if len(positive) < 2:
        raise ValueError(f"{path}: at least 2 pairs are needed, got {len(positive)}")
    return positive, negative


def make_vectors(model: LanguageModel, items: Sequence[Item], making: Making) -> Made:
    """Every method at every layer, from one pass over the texts.

    Args:
        model: that is read.
        items: of the derivation side; the first ones are the solved examples.
        making: how.

    Raises:
        ValueError: as `contrast_texts`, or a principal component of texts that do not differ.
    """
    reader, positive, negative = _texts(model, items, making)
    return _fitted(reader, positive, negative, making)


def halves(model: LanguageModel, items: Sequence[Item], making: Making) -> tuple[Made, Made]:
    """The same from every other pair, and from the pairs between: how alike two samples of vectors are."""
    reader, positive, negative = _texts(model, items, making)
    if len(positive) < 4:
        raise ValueError(f"two halves take at least 4 pairs, got {len(positive)}")
    first, second = (_fitted(reader, positive[i::2], negative[i::2], making) for i in (0, 1))
    return first, second


def _texts(
    model: LanguageModel, items: Sequence[Item], making: Making
) -> tuple[Reader, list[str], list[str]]:  # fmt: skip
    examples, own = items[: making.examples], items[making.examples :]
    reader = Reader.of(model, own, examples, making.instruction)
    return reader, *contrast_texts(reader, own, making.negatives, making.seed, making.pairs)


def _fitted(reader: Reader, positive: Sequence[str], negative: Sequence[str], making: Making) -> Made:
    read = fit_contrasts(
        reader.model, positive, negative, batch_size=making.batch_size, draws=making.shuffled, seed=making.seed
    )
    vectors = {}
    for name in making.methods:
        method: VectorMethod = name  # type: ignore[assignment]  # the options have checked it
        vectors[name] = read.vector(method, centred=making.centred)
    shuffled = {
        (name, draw): read.shuffled(draw, vectors[name])
        for name in making.methods
        if name in CONTRASTS
        for draw in range(making.shuffled)
    }
    return Made(vectors, shuffled, len(positive))


def made_vectors(bench: Workbench, making: Making) -> Made:
    """The vectors of a workbench, made from its derivation items or read from files; for `bench.once`."""
    if making.files:
        found = read_vectors(making.files, bench.model)
        return Made(found, {}, max((vector.origin.n or 0) for vector in found.values()))
    return make_vectors(bench.model, splits_of(bench, making.task).derivation, making)


# --- Files ------------------------------------------------------------------------------------------------------------


def _files(place: str | Path) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_file():
        return [path]
    found = sorted((path / "vectors").glob("*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{path} holds no vectors (.safetensors): make them with codi control derive")
    return found


def read_vectors(place: str | Path, model: LanguageModel) -> dict[str, ControlVector]:
    """The vectors of a folder or file, by the names of their files.

    Raises:
        ValueError: none there, a file that is no control vector, or one of another model.
    """
    return {path.stem: load_vector(path, model) for path in _files(place)}


def vector_files_hash(place: str | Path) -> str:
    """SHA-256 over the names and contents of the files that `read_vectors` reads."""
    digest = hashlib.sha256()
    for path in _files(place):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
