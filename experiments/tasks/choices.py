"""Multiple choice and other questions whose answer is a text: `ChoiceProblem`, and readers of the published files.

    read_mmlu      CSV, header question, choice0..3, answer 0..3, or none: question, A, B, C, D, letter; cais/mmlu
                   (harness: mmlu, mmlu_generative, mmlu_flan_cot_zeroshot)
    read_arc       JSONL: id, question.stem, question.choices[].text and .label, answerKey; allenai/ai2_arc
                   (harness: arc_challenge_chat)
    read_agieval   JSONL: passage, question, options "(A)…", label; hails/agieval-* with query, choices, gold
                   (harness: agieval_*, choices by likelihood)
    read_bigbench  JSON of a task: examples with input and target or target_scores
                   (harness: bigbench_*)

In brackets stand the tasks of lm-evaluation-harness whose prompts (`prompt`) and scoring (experiments/tasks/
letters.py) are followed. Rows of a hub go through `mmlu_rows`, `arc_rows`, `agieval_rows`: any iterable of mappings.

Labels are letters throughout: 1..4 of some ARC questions become A..D, as in the harness.

Knows nothing about models or networks. A `Problem` has a number as its answer; here it is a letter or a text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

__all__ = [
    "ChoiceProblem", "Style", "agieval_rows", "arc_rows", "mmlu_rows", "prompt", "read_agieval", "read_arc",
    "read_bigbench", "read_mmlu",
]  # fmt: skip

Style: TypeAlias = Literal["plain", "mmlu", "flan", "arc-chat", "agieval"]
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class ChoiceProblem:
    """A question whose answer is a letter, or a text where there are no choices.

    Attributes:
        prompt_id: unique within its source.
        question: without passage and choices.
        choices: texts in order, labelled A, B, C, …; empty for a question with a free answer.
        labels: of the right choices; more than one only where the source says so. Empty without choices.
        answers: texts that are right: those of the right choices, or the targets of a free question.
        subject: MMLU subject, AGIEval set or BIG-bench task.
        passage: text to be read before the question.
        cluster: problems with the same value are not independent (one passage); the prompt id else.
    """

    prompt_id: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    subject: str = ""
    passage: str = ""
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip() and not self.passage.strip():
            raise ValueError(f"{self.prompt_id}: the question is empty")
        if not self.answers:
            raise ValueError(f"{self.prompt_id}: there is no right answer")
        if self.choices and not 2 <= len(self.choices) <= len(_ALPHABET):
            raise ValueError(f"{self.prompt_id}: 2 to {len(_ALPHABET)} choices are needed, got {len(self.choices)}")
        if bool(self.choices) != bool(self.labels) or any(label not in self.letters for label in self.labels):
            raise ValueError(f"{self.prompt_id}: labels must be of {self.letters!r}, got {', '.join(self.labels)!r}")

    @property
    def letters(self) -> str:
        """Labels of all choices, "ABCD"."""
        return _ALPHABET[: len(self.choices)]

    @property
    def label(self) -> str:
        """The right label; the first where several are; "" without choices."""
        return self.labels[0] if self.labels else ""

    def choice(self, letter: str) -> str:
        """Text of a choice.

        Raises:
            ValueError: no such letter.
        """
        if letter not in self.letters or len(letter) != 1:
            raise ValueError(f"{self.prompt_id}: letters are {self.letters!r}, got {letter!r}")
        return self.choices[self.letters.index(letter)]


def prompt(problem: ChoiceProblem, style: Style = "plain", suffix: str = "") -> str:
    """The text that a model reads.

    Args:
        problem: any.
        style: "plain": question, choices "(A) text" on lines of their own, suffix; "mmlu": as mmlu and mmlu_generative
            ("A. text", "Answer:"); "flan": as mmlu_flan_cot_zeroshot without its last sentence ("Q:", choices in one
            line, "A:"); "arc-chat": as arc_challenge_chat, whose answer begins "The best answer is"; "agieval": as the
            queries of hails/agieval-* ("Among A through D, the answer is").
        suffix: instruction, such as a sentence that asks for steps; after the choices, before "Answer:" or "A:".

    Raises:
        ValueError: an unknown style, or one other than "plain" for a question without choices.
    """
    if style not in get_args(Style):
        raise ValueError(f"style must be one of {', '.join(get_args(Style))}, got {style!r}")
    if style != "plain" and not problem.choices:
        raise ValueError(f"{problem.prompt_id}: style {style!r} is for questions with choices")
    asked = problem.question.strip()
    lettered = list(zip(problem.letters, problem.choices, strict=True))
    tail = f"\n{suffix.strip()}" if suffix.strip() else ""
    passage = f"{problem.passage.strip()}\n" if problem.passage.strip() else ""
    if style == "plain":
        return passage + "\n".join([asked, *(f"({a}) {text}" for a, text in lettered)]) + tail
    points = "".join(f"\n{a}. {text}" for a, text in lettered)
    if style == "mmlu":
        return f"{passage}{asked}{points}{tail}\nAnswer:"
    if style == "flan":
        return f"{passage}Q: {asked}\n" + " ".join(f"({a}) {text}" for a, text in lettered) + f"{tail}\nA:"
    if style == "arc-chat":
        every = f"{', '.join(problem.letters[:-1])} %s {problem.letters[-1]}"
        count = {2: "two", 3: "three", 4: "four", 5: "five"}.get(len(lettered), str(len(lettered)))
        return (
            f"{passage}Given the following question and {count} candidate answers ({every % 'and'}), choose the best "
            f'answer.\nQuestion: {asked}{points}\nYour response should end with "The best answer is '
            f'[the_answer_letter]" where the [the_answer_letter] is one of {every % "or"}.{tail}'
        )
    options = " ".join(f"({a}){text}" for a, text in lettered)
    return (
        f"{passage}Q: {asked} Answer Choices: {options}{tail}\nA: Among A through {problem.letters[-1]}, the answer is"
    )


def read_mmlu(path: str | Path) -> list[ChoiceProblem]:
    """MMLU: one CSV file, or a folder of them; the subject is the file's name without _dev, _val, _test, _train.

    Raises:
        ValueError: no such file, none in the folder, a record of another form (file and record are named).
    """
    path = Path(path)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: the folder has no CSV file")
    found: list[ChoiceProblem] = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            records = [record for record in csv.reader(lines) if record]
        header = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
        named = bool(records) and [cell.strip().lower() for cell in records[0]] == header
        subject = re.sub(r"_(dev|val|test|train)$", "", file.stem)
        for i, record in enumerate(records[named:]):
            where = f"{file}, record {i + 1}"
            if len(record) != 6:
                raise ValueError(f"{where}: question, four choices and the answer are needed, got {len(record)} fields")
            found.append(_lettered(f"{file.stem}-{i}", record[0], record[1:5], record[5], where, subject))
    if not found:
        raise ValueError(f"{path}: no record found")
    return found


def mmlu_rows(rows: Iterable[Mapping[str, Any]], name: str = "mmlu") -> list[ChoiceProblem]:
    """Rows of cais/mmlu: question, choices, answer (0..3), subject."""
    found = []
    for i, row in enumerate(rows):
        question, choices, answer = _fields(row, ("question", "choices", "answer"), f"{name}, row {i}")
        found.append(
            _lettered(f"{name}-{i}", question, choices, answer, f"{name}, row {i}", str(row.get("subject") or ""))
        )
    return found


def read_arc(path: str | Path) -> list[ChoiceProblem]:
    """ARC as published: JSONL with id, question.stem, question.choices and answerKey."""
    path = Path(path)
    found = []
    for where, record in _json_lines(path):
        key, question, answer = _fields(record, ("id", "question", "answerKey"), where)
        stem, choices = _fields(question, ("stem", "choices"), where)
        found.append(_arc(str(key), stem, [_fields(c, ("text", "label"), where) for c in choices], answer, where))
    return found


def arc_rows(rows: Iterable[Mapping[str, Any]], name: str = "arc") -> list[ChoiceProblem]:
    """Rows of allenai/ai2_arc: id, question, choices {text, label}, answerKey."""
    found = []
    for i, row in enumerate(rows):
        where = f"{name}, row {i}"
        key, question, choices, answer = _fields(row, ("id", "question", "choices", "answerKey"), where)
        texts, labels = _fields(choices, ("text", "label"), where)
        found.append(_arc(str(key), question, list(zip(texts, labels, strict=True)), answer, where))
    return found


def read_agieval(path: str | Path) -> list[ChoiceProblem]:
    """AGIEval v1: JSONL with passage, question, options "(A)…" and label; the subject is the file's name."""
    path = Path(path)
    found = []
    for i, (where, record) in enumerate(_json_lines(path)):
        question, options, label = _fields(record, ("question", "options", "label"), where)
        passage = str(record.get("passage") or "")
        found.append(_lettered(f"{path.stem}-{i}", question, _bare(options), label, where, path.stem, passage))
    return found


def agieval_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[ChoiceProblem]:
    """Rows of hails/agieval-*: query (with the choices in it), choices "(A)…", gold (list of positions).

    The question is the query without "Q:", its choices and the beginning of the answer; a passage stays in it.
    """
    found = []
    for i, row in enumerate(rows):
        where = f"{name}, row {i}"
        query, options, gold = _fields(row, ("query", "choices", "gold"), where)
        question = re.split(r"\s*Answer Choices:", str(query))[0].strip()
        question = re.sub(r"(?:^|(?<=\s))Q:\s*", "", question, count=1)
        choices = _bare(options)
        places = [int(place) for place in (gold if isinstance(gold, Sequence) else [gold])]
        if not places or not all(0 <= place < len(choices) for place in places):
            raise ValueError(f"{where}: gold must be positions of the {len(choices)} choices, got {gold!r}")
        labels = tuple(_ALPHABET[place] for place in places)
        answers = tuple(choices[place] for place in places)
        key = f"{name}-{i}"
        found.append(ChoiceProblem(key, question.strip(), tuple(choices), labels, answers, name, "", key))
    return found


def read_bigbench(path: str | Path) -> list[ChoiceProblem]:
    """A BIG-bench task in JSON (the JSON tasks of BIG-bench Lite are of this form).

    With target_scores the choices are its keys, in order, and the right ones those with the highest score; with target
    (a text or a list) the answer is free. The task's prefix becomes the passage.

    Raises:
        ValueError: not such a file, or an example without a positive score or target.
    """
    path = Path(path)
    content = _json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, Mapping) or not isinstance(content.get("examples"), list) or not content["examples"]:
        raise ValueError(f'{path}: expected an object with a list "examples"')
    name = str(content.get("name") or (path.parent.name if path.stem == "task" else path.stem))
    passage = str(content.get("task_prefix") or "")
    found = []
    for i, example in enumerate(content["examples"]):
        where, key = f"{path}, example {i}", f"{name}-{i}"
        (question,) = _fields(example, ("input",), where)
        scores = example.get("target_scores")
        if isinstance(scores, Mapping) and len(scores) > 1:
            best = max(scores.values())
            if best <= 0:
                raise ValueError(f"{where}: no choice has a score above 0")
            choices = tuple(str(text) for text in scores)
            right = [place for place, score in enumerate(scores.values()) if score == best]
            labels, answers = tuple(_ALPHABET[p] for p in right), tuple(choices[p] for p in right)
        else:
            target = example.get("target")
            texts = target if isinstance(target, list) else [] if target is None else [target]
            choices, labels, answers = (), (), tuple(str(text) for text in texts)
            if not answers:
                raise ValueError(f"{where}: target or target_scores is needed")
        found.append(ChoiceProblem(key, str(question), choices, labels, answers, name, passage, key))
    return found


def _lettered(
    key: str, question: Any, choices: Sequence[Any], answer: Any, where: str, subject: str, passage: str = ""
) -> ChoiceProblem:
    """A problem whose answer is given as a letter or as a position from 0."""
    letters = _ALPHABET[: len(choices)]
    text = str(answer).strip()
    place = int(text) if text.isdigit() else letters.find(text.upper()) if len(text) == 1 else -1
    if not 0 <= place < len(choices):
        allowed = f"{', '.join(letters)} or 0..{len(choices) - 1}"
        raise ValueError(f"{where}: the answer must be one of {allowed}, got {answer!r}")
    texts = tuple(str(choice).strip() for choice in choices)
    cluster = f"passage:{passage}" if passage.strip() else key
    return ChoiceProblem(
        key, str(question).strip(), texts, (letters[place],), (texts[place],), subject, passage, cluster
    )


def _arc(key: str, question: Any, choices: Sequence[Sequence[Any]], answer: Any, where: str) -> ChoiceProblem:
    labels = [str(label) for _, label in choices]
    if str(answer) not in labels:
        raise ValueError(f"{where}: the answer {answer!r} is none of the labels {', '.join(labels)}")
    return _lettered(key, question, [text for text, _ in choices], labels.index(str(answer)), where, "")


def _bare(options: Any) -> list[str]:
    """Options without their "(A)"."""
    return [re.sub(r"^\s*\([A-Z]\)\s*", "", str(option)) for option in options or []]


def _fields(record: Any, names: Sequence[str], where: str) -> list[Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    missing = [name for name in names if record.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {', '.join(names)} are needed, {', '.join(missing)} missing")
    return [record[name] for name in names]


def _json_lines(path: Path) -> list[tuple[str, Any]]:
    lines = [(i, line) for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    return [(f"{path}, line {i}", _json(line, f"{path}, line {i}")) for i, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {place})") from None
