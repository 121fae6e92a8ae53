"""From the name of a task to its items, in three parts that share nothing.

    indirect-objects-A (B, AL, BL, H, HL)  sentences to be completed, words that are single tokens (indirect_objects.py)
    babi-15, babi-16                       generated; babi-15:unseen, :training: another vocabulary (babi.py)
    ontology-1, -2, -3                     fictional ontologies of so many hops, words that no adapter was trained on
    arithmetic                             word problems (arithmetic.py)
    gsm8k, multiarith, svamp               the data sets of the hub
    qa15_….txt                             a published bAbI file; facebook/babi_qa:en-10k-qa15 on the hub
    mmlu:PLACE, arc:PLACE, agieval:PLACE, bigbench:PLACE
                                           multiple choice, a file (mmlu, bigbench: or folder) or hub id
    FILE.jsonl, .json, .csv, …             records with question, answer and, if you like, choices, id and cluster
    any other file, folder or hub id       problems with numbers as answers (readers)

A generated task has as many items as are asked for. A folder or hub data set gives the test items from its split
"test", the others from "train". A single file is divided by clusters, two thirds at most for derivation and validation
together. What shares its question with an item of an earlier part (test, then validation) is left out.

Records whose first answer holds no number, or that have choices, are questions answered in words; the others are
problems with numbers. Knows nothing about models; a tokenizer is needed for indirect objects only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from experiments.tasks import babi, choices, indirect_objects
from experiments.tasks.alignment import Tokenizer
from experiments.tasks.answers import numbers_in, parse_number
from experiments.tasks.items import AnswerKind, Item, ItemSplits
from experiments.tasks.problem import Problem

__all__ = ["ITEM_TASKS", "Sizes", "check_item_task", "item_of_choice", "item_of_problem", "load_items"]

HUB = {"gsm8k": "openai/gsm8k", "multiarith": "ChilleD/MultiArith", "svamp": "ChilleD/SVAMP"}
SETS = get_args(indirect_objects.SentenceSet)
HOPS = ("1", "2", "3")
CHOICE_READERS = ("mmlu", "arc", "agieval", "bigbench")
ITEM_TASKS = (
    *(f"indirect-objects-{one}" for one in SETS),
    "babi-15",
    "babi-16",
    *(f"ontology-{hops}" for hops in HOPS),
    "arithmetic",
    *HUB,
)
"""Tasks that are known by a word."""
_HELP = (
    f"allowed: {', '.join(ITEM_TASKS)}, a file with question and answer, a folder or hub id, or one of "
    f"{', '.join(f'{name}:PLACE' for name in CHOICE_READERS)}"
)
_BABI = re.compile(r"babi-(15|16)(?::(\w+))?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SHARE = 1 / 3
"""Largest share of a single file's clusters that derivation, and that validation, may take."""
_MORE = 3
"""So many times the items asked for are generated where some have to be left out."""

Group = Callable[[int, str], list[Item]]


@dataclass(frozen=True)
class Sizes:
    """How many items at most; None: all that there are (of a generated task: 0 or more must be said).

    Raises:
        ValueError: a number below 0, or no items at all.
    """

    derivation: int = 0
    validation: int = 0
    test: int | None = None

    def __post_init__(self) -> None:
        if min(self.derivation, self.validation, self.test or 0) < 0:
            raise ValueError(f"numbers of items must be 0 or more, got {self}")
        if self.derivation + self.validation == 0 and self.test == 0:
            raise ValueError("no items are asked for")


def check_item_task(task: str) -> None:
    """Refuse a name that can be seen to mean nothing, by a look at the disk.

    Raises:
        ValueError: no such task, file or folder.
    """
    found = _BABI.fullmatch(task)
    if found is not None:
        if found[2] and found[2] not in babi.VOCABULARIES:
            allowed = ", ".join(babi.VOCABULARIES)
            raise ValueError(f"task {task!r}: the vocabulary must be one of {allowed}, got {found[2]!r}")
        return
    prefix, colon, place = task.partition(":")
    if colon and prefix in CHOICE_READERS:
        task = place
    elif task in ITEM_TASKS:
        return
    if not Path(task).expanduser().exists() and not _HUB_ID.fullmatch(task):
        raise ValueError(f"unknown task {task!r}: no such file or folder; {_HELP}")


def load_items(
    task: str,
    sizes: Sizes,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> ItemSplits:
    """The items of a task.

    Args:
        task: see this module.
        sizes: how many of each part.
        seed: of generator, division and choice.
        tokenizer: of the model; indirect objects take words that are single tokens of it.

    Raises:
        ValueError: an unknown task, a generated task without a number of test items, a broken or empty source, or none
            left for a part that is asked for.
    """
    check_item_task(task)
    generate = _generator(task, seed, tokenizer)
    if generate is not None:
        if sizes.test is None:
            raise ValueError(f"task {task!r} is generated: say how many items are asked for")
        groups = {
            name: (generate(_MORE * wanted if name != "test" else wanted, name) if wanted else [])
            for name, wanted in (("derivation", sizes.derivation), ("validation", sizes.validation),
                                 ("test", sizes.test))
        }  # fmt: skip
    else:
        groups = _read(task, sizes, seed)
    return _apart(task, groups, sizes, seed)


# --- Generated --------------------------------------------------------------------------------------------------------


def _generator(task: str, seed: int, tokenizer: Tokenizer | None) -> Group | None:
    """What makes n items of a part; None: the task is read."""
    found = _BABI.fullmatch(task)
    if found is not None:
        number, vocabulary = int(found[1]), babi.VOCABULARIES[found[2] or "published"]

        def stories(n: int, part: str) -> list[Item]:
            made = babi.generate(n, number, f"{part}-{seed}", vocabulary)
            return [_of_babi(one, f"babi-{number}") for one in made]

        return stories
    if task.startswith("indirect-objects-") and task in ITEM_TASKS:
        sentences: Any = task.removeprefix("indirect-objects-")
        return lambda n, part: [_of_sentence(one, task) for one in _sentences(n, sentences, part, seed, tokenizer)]
    if task.startswith("ontology-") and task in ITEM_TASKS:
        return lambda n, part: _ontologies(n, task, f"{part}-{seed}")
    if task == "arithmetic":
        return lambda n, part: _sums(n, part, seed)
    return None


def _sentences(
    n: int, sentences: indirect_objects.SentenceSet, part: str, seed: int, tokenizer: Tokenizer | None
) -> list[indirect_objects.IndirectObject]:
    """No two parts can share one: a combination of words belongs to one of them."""
    return indirect_objects.generate(n, sentences, part, seed, tokenizer)


def _of_sentence(one: indirect_objects.IndirectObject, task: str) -> Item:
    return Item(one.prompt_id, task, one.question, one.answer, "word", one.choices, one.cluster, form="plain")


def _of_babi(one: babi.Babi, task: str) -> Item:
    several = one.choices if len(one.choices) > 1 else ()
    return Item(one.prompt_id, task, one.text, one.answer, "word", several, one.cluster, one.chain)


def _ontologies(n: int, task: str, seed: str) -> list[Item]:
    from experiments.tasks import reasoner

    made = reasoner.generate(n, seed, "test", task, "neutral")
    return [
        Item(one.sample_id, task, one.question, one.answer, "word", one.choices, one.sample_id, one.chain)
        for one in made
    ]


def _sums(n: int, part: str, seed: int) -> list[Item]:
    """Numbers of the test split are in no other; derivation and validation share one split and are held apart later."""
    from experiments.tasks import arithmetic
    from experiments.tasks.reasoner import arithmetic_chain

    own = "test" if part == "test" else "derivation"
    made = arithmetic.generate(n, seed + (part == "validation"), own, 1, 3)
    return [item_of_problem(one, "arithmetic", arithmetic_chain(one), f"{part}-") for one in made]


# --- Read -------------------------------------------------------------------------------------------------------------


def item_of_problem(problem: Problem, task: str, chain: Sequence[str] = (), prefix: str = "") -> Item:
    """A problem with a number as its answer."""
    answer = problem.answer
    text = str(int(answer)) if float(answer).is_integer() else f"{answer:g}"
    name = prefix + problem.prompt_id
    return Item(name, task, problem.question, text, "number", (), problem.cluster, tuple(chain) or problem.steps)


def item_of_choice(problem: choices.ChoiceProblem, task: str) -> Item:
    """A multiple-choice problem, answered by a letter; one without choices, in words."""
    right, letters = (problem.labels, tuple(problem.letters)) if problem.choices else (problem.answers, ())
    return Item(
        problem.prompt_id, task, choices.prompt(problem, "plain"), right[0], "letter" if letters else "word", letters,
        problem.cluster, accepted=tuple(right[1:]), texts=problem.choices,
    )  # fmt: skip


def _read(task: str, sizes: Sizes, seed: int) -> dict[str, list[Item]]:
    """All items of a source, by part."""
    prefix, colon, place = task.partition(":")
    reader = prefix if colon and prefix in CHOICE_READERS else ""
    source = HUB.get(task, place if reader else task)
    path = Path(source).expanduser()
    whole = path.is_file() or (path.is_dir() and reader in ("mmlu", "bigbench"))
    if whole:
        return _divided(_items(source, "test", reader), sizes, seed, task)
    wanted = {"test": sizes.test != 0, "train": bool(sizes.derivation or sizes.validation)}
    read = {split: _items(source, split, reader) if wanted[split] else [] for split in wanted}
    random.Random(f"items-{seed}").shuffle(read["train"])
    cut = sizes.derivation / max(1, sizes.derivation + sizes.validation)
    first, second = _cut(read["train"], cut)
    return {"derivation": first, "validation": second, "test": read["test"]}


def _items(source: str, split: str, reader: str) -> list[Item]:
    """Items of a file, or of one split of a folder or hub data set."""
    path = Path(source).expanduser()
    if reader:
        return [item_of_choice(one, one.subject or reader) for one in _choice_problems(source, split, reader)]
    if path.is_file() and re.match(r"qa\d+", path.name):
        return [_of_babi(one, f"babi-{one.task}") for one in babi.read_file(path)]
    if source.partition(":")[0].endswith("babi_qa"):
        number = re.search(r"qa(\d+)$", source)
        if number is None:
            raise ValueError(f"{source}: the configuration must end in the number of the task, such as en-10k-qa15")
        rows = _rows(source, split)
        return [_of_babi(one, f"babi-{one.task}") for one in babi.read_rows(rows, int(number[1]), f"babi_qa-{split}")]
    if path.is_file():
        from experiments.tasks.readers.files import read_placed, stem_of

        placed = read_placed(path)
        if _in_words(placed[0][1] if placed else None):
            return [_of_record(where, record, stem_of(path), i) for i, (where, record) in enumerate(placed)]
    from experiments.tasks.readers import read_problems

    name = Path(source.partition(":")[0]).stem
    return [item_of_problem(one, name) for one in read_problems(source, split)]


def _choice_problems(source: str, split: str, reader: str) -> list[choices.ChoiceProblem]:
    path = Path(source).expanduser()
    if path.is_dir() and reader == "bigbench":
        tasks = sorted(path.rglob("*.json"))
        if not tasks:
            raise ValueError(f"{path}: the folder has no JSON file")
        return [problem for file in tasks for problem in choices.read_bigbench(file)]
    if path.exists():
        files = {
            "mmlu": choices.read_mmlu, "arc": choices.read_arc, "agieval": choices.read_agieval,
            "bigbench": choices.read_bigbench,
        }  # fmt: skip
        return files[reader](path)
    rows = _rows(source, split)
    if reader == "mmlu":
        return choices.mmlu_rows(rows)
    if reader == "arc":
        return choices.arc_rows(rows)
    if reader == "agieval":
        return choices.agieval_rows(rows, source.rpartition("/")[2])
    raise ValueError(f"bigbench:{source}: no such file; the tasks are read from the JSON files of BIG-bench")


def _rows(source: str, split: str) -> list[Mapping[str, Any]]:
    from experiments.tasks.readers.hub import hub_records

    return [record for placed in hub_records(source, split).values() for _, record in placed]


def _in_words(record: Any) -> bool:
    """Whether a record is a question answered in words, or has choices."""
    if not isinstance(record, Mapping) or "question" not in record or "answer" not in record:
        return False
    answer = record["answer"]
    return bool(record.get("choices")) or (isinstance(answer, str) and not numbers_in(answer))


def _of_record(where: str, record: Any, stem: str, index: int) -> Item:
    """A record with question, answer and, if it has them, choices, id and cluster."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with question and answer, got {type(record).__name__}")
    texts = {name: record.get(name) for name in ("question", "answer")}
    for name, value in texts.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"{where}: {name} must be a text that is not empty, got {value!r}")
    given = record.get("choices") or ()
    if isinstance(given, str) or not isinstance(given, Sequence) or len(set(map(str, given))) < len(given):
        raise ValueError(f"{where}: choices must be a list of different texts, got {given!r}")
    answer, offered = str(texts["answer"]).strip(), tuple(str(one).strip() for one in given)
    if offered and answer not in offered:
        raise ValueError(f"{where}: the answer {answer!r} is none of its choices {', '.join(offered)}")
    kind: AnswerKind = "number" if parse_number(answer) is not None else "word"
    if offered and all(re.fullmatch(r"[A-Z]", one) for one in offered):
        kind = "letter"
    name = str(record.get("id") or record.get("prompt_id") or f"{stem}-{index}")
    return Item(name, stem, str(texts["question"]).strip(), answer, kind, offered, str(record.get("cluster") or ""))


# --- Three parts that share nothing -----------------------------------------------------------------------------------


def _traits(item: Item) -> set[tuple[str, str]]:
    own = {("question", " ".join(item.question.split()))}
    return own | {("cluster", item.cluster)} if item.cluster else own


def _cut(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """The first items, a share of them, and the others; a cluster stays whole."""
    clusters = list(dict.fromkeys(item.cluster or item.prompt_id for item in items))
    kept = set(clusters[: round(share * len(clusters))])
    sides: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        sides[(item.cluster or item.prompt_id) not in kept].append(item)
    return sides


def _divided(items: list[Item], sizes: Sizes, seed: int, task: str) -> dict[str, list[Item]]:
    """A single file in three: derivation and validation as many as asked for, but no more than a third each."""
    names = [name for name, wanted in (("derivation", sizes.derivation), ("validation", sizes.validation)) if wanted]
    clusters = list(dict.fromkeys(item.cluster or item.prompt_id for item in items))
    if sizes.test != 0 and len(clusters) < len(names) + 1:
        raise ValueError(f"{task}: {len(clusters)} independent items cannot be divided into {len(names) + 1} parts")
    mixed = sorted(clusters)
    random.Random(f"items-{seed}").shuffle(mixed)
    owner: dict[str, str] = {}
    start = 0
    for name in names:
        wanted, share = getattr(sizes, name), _SHARE if sizes.test != 0 else 1 / len(names)
        number = max(1, min(wanted, int(share * len(mixed))))
        owner |= dict.fromkeys(mixed[start : start + number], name)
        start += number
    groups: dict[str, list[Item]] = {"derivation": [], "validation": [], "test": []}
    for item in items:
        groups[owner.get(item.cluster or item.prompt_id, "test")].append(item)
    return groups


def _apart(task: str, groups: Mapping[str, list[Item]], sizes: Sizes, seed: int) -> ItemSplits:
    """As many items as asked for; of what two parts share, the later one keeps nothing."""
    seen: set[tuple[str, str]] = set()
    found: dict[str, tuple[Item, ...]] = {}
    for name in ("test", "validation", "derivation"):
        wanted: int | None = getattr(sizes, name)
        free = [] if wanted == 0 else [item for item in groups[name] if not _traits(item) & seen]
        chosen = _chosen(free, wanted, f"{name}-{seed}")
        if wanted != 0 and not chosen:
            raise ValueError(f"{task}: no item is left for {name}: ask for fewer, or give a larger source")
        seen |= {trait for item in chosen for trait in _traits(item)}
        found[name] = tuple(chosen)
    return ItemSplits(found["derivation"], found["validation"], found["test"])


def _chosen(items: Iterable[Item], number: int | None, seed: str) -> list[Item]:
    everyone = list(items)
    if number is None or number >= len(everyone):
        return everyone
    kept = sorted(random.Random(seed).sample(range(len(everyone)), number))
    return [everyone[i] for i in kept]
