"""From a record to a problem: which fields hold the question, the answer and the steps, and what is refused.

Knows nothing about files: a record comes with the place that a message names (experiments/tasks/readers/files.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from experiments.tasks.answers import field_number, parse_number, written_numbers
from experiments.tasks.numbers import shown
from experiments.tasks.problem import Problem
from experiments.tasks.readers.equations import step_values, steps_of
from experiments.tasks.readers.files import Line, Placed, Record, names_of
from lm.characters import half_character

__all__ = ["problems_of", "unique"]

_QUESTION_FIELDS = ("question_concat", "sQuestion", "question", "instruction", "prompt", "input", "problem", "query")
_ANSWER_FIELDS = (
    *("Answer", "lSolutions", "final_ans", "response", "ground_truth", "answer", "target"),
    *("output", "solution"),
)
_TEXT_ONLY = ("solution",)
"""Answer fields that are often a whole text: of them only the number after "####" or in a box counts."""
_CONTEXT_FIELDS = (
    *(name.lower() for name in _QUESTION_FIELDS),
    *("body", "context", "passage", "story", "scenario", "background", "premise", "text", "paragraph", "document"),
    *("article", "description", "system", "setup", "facts", "table", "choices", "options"),
)
_CHOICE = re.compile(r"(?:choice|option)[_ ]?\w{1,2}")


def problems_of(
    placed: Iterable[Placed], source: str, stem: str, decimal_comma: bool = False
) -> list[tuple[str, Problem]]:
    """The problems of records, each with the place of its record.

    Args:
        placed: records with their places; a Line is a text `question||steps #### answer`.
        source: what the records are from, for the message that there are none.
        stem: prompt ids are "{stem}-{i}" where a record has none; i counts from 0.
        decimal_comma: see `experiments.tasks.numbers`.

    Raises:
        ValueError: no record, or one that cannot be read; the message begins with its place.
    """
    problems: list[tuple[str, Problem]] = []
    for index, (where, record) in enumerate(placed):
        if isinstance(record, Line):
            record = _line(record, where)
        if not isinstance(record, Mapping):
            hint = "; a list of records belongs in a .json file" if isinstance(record, list) else ""
            raise ValueError(
                f"{where} must be an object with a question and an answer, got {type(record).__name__}{hint}"
            )
        if isinstance(record, Record) and record.twice:
            raise ValueError(f"{where} has the field {shown(record.twice)} twice")
        if record.get("addition") is not None or record.get("subtraction") is not None:
            problems += [(where, twin) for twin in _twins(record, where, f"{stem}-{index}", decimal_comma)]
        else:
            problems.append((where, _problem(record, where, f"{stem}-{index}", decimal_comma)))
    if not problems:
        raise ValueError(f"{source}: no prompts in it")
    return problems


def unique(problems: Sequence[tuple[str, Problem]], source: str) -> list[Problem]:
    """The problems without their places.

    Raises:
        ValueError: two of them have the same prompt id.
    """
    seen: dict[str, str] = {}
    for where, problem in problems:
        if problem.prompt_id in seen:
            place = seen[problem.prompt_id].removeprefix(source).lstrip(":, ")
            raise ValueError(f"{where}: prompt id {shown(problem.prompt_id)} occurs twice, first in {place}")
        seen[problem.prompt_id] = where
    return [problem for _, problem in problems]


# --- One record ---


def _line(line: str, where: str) -> dict[str, str]:
    """A line `question||steps #### answer`; the last || before the steps separates."""
    head, marker, _ = line.rpartition("####")
    before_steps = [bar.start() for bar in re.finditer(r"\|\|(?=\s*<<)", head)]
    if len(before_steps) > 1:
        raise ValueError(f"{where}: || stands before << in {len(before_steps)} places: which one ends the question?")
    place = before_steps[0] if before_steps else head.rfind("||")
    if not marker or place < 0:
        raise ValueError(f"{where}: expected question||<<steps>> #### answer, got {shown(line, 60)}")
    return {"question": line[:place], "answer": line[place + 2 :]}


def _problem(record: Mapping[str, Any], where: str, prompt_id: str, decimal_comma: bool) -> Problem:
    question, fields = _question(record, where)
    _refuse_unread(record, question, fields, where)
    question = _bare(question).replace("  ", " ")
    answer = _answer(record, where, decimal_comma)
    steps, values = _steps(record, where, decimal_comma)
    given = record.get("ID", record.get("prompt_id", record.get("id")))
    kind = record.get("Type")
    return Problem(
        prompt_id=prompt_id if given is None else _whole(_plain(given), where, "id"),
        question=question,
        answer=answer,
        steps=steps,
        cluster=_cluster(question),
        operation="" if kind is None else _whole(_plain(kind), where, "Type").lower(),
        numbers=_numbers(question),
        intermediates=values,
    )


def _question(record: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    """The question of a record and the fields that it is read from."""
    if _text(record, "Question") and "question_concat" not in record:
        fields: tuple[str, ...] = ("Body", "Question") if _text(record, "Body") else ("Question",)
    elif _text(record, "instruction") and _text(record, "input") and not _text(record, "question"):
        fields = ("instruction", "input")
    else:
        fields = next(((name,) for name in _QUESTION_FIELDS if not _is_blank(record.get(name))), ())
    if not fields or not all(_text(record, name) for name in fields):
        kind = f", and {fields[0]!r} holds no text" if fields else ""
        raise ValueError(
            f"{where} has no question: one of {', '.join(_QUESTION_FIELDS)} is needed, got {names_of(record)}{kind}"
        )
    parts = [_whole(record[name], where, name) for name in fields]
    return (parts[0] if len(parts) == 1 else " ".join(parts)), fields


def _text(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return isinstance(value, str) and bool(_bare(value))


def _bare(text: str) -> str:
    """The text without blanks at its ends, or the byte-order mark of a file whose first field it was."""
    return text.strip().lstrip("\ufeff").strip()


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not _bare(value))


def _refuse_unread(record: Mapping[str, Any], question: str, fields: tuple[str, ...], where: str) -> None:
    """Raise where part of the question may stand in fields that were not read."""
    if fields == ("question_concat",):
        return  # Body and Question, put together by the publisher
    whole = " ".join(question.split())
    unread = [
        str(name)
        for name, value in record.items()
        if name not in fields
        and (str(name).lower() in _CONTEXT_FIELDS or _CHOICE.fullmatch(str(name).lower()))
        and (" ".join(value.split()) not in whole if isinstance(value, str) else bool(value))
    ]
    if unread:
        raise ValueError(
            f"{where}: the question is read from {' and '.join(fields)}, but part of it may stand in "
            f"{names_of(unread)}: put the whole question into one field and leave out or rename the others"
        )


def _answer(
    record: Mapping[str, Any], where: str, decimal_comma: bool, allowed: tuple[str, ...] = _ANSWER_FIELDS
) -> int | float:
    """The number that the record's answer fields give, if they agree."""
    read: dict[str, int | float] = {}
    trouble: dict[str, tuple[Any, str]] = {}
    for name in allowed:
        value = record.get(name)
        if _is_blank(value):
            continue
        if isinstance(value, str):
            _whole(value, where, name)
            if name in _TEXT_ONLY and "####" not in value and "boxed" not in value:
                continue
        elif isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        try:
            read[name] = field_number(value, decimal_comma)
        except ValueError as error:
            trouble[name] = (value, str(error))
    if len(set(read.values())) > 1:
        raise ValueError(
            f"{where}: the answer fields disagree ("
            + ", ".join(f"{name} {shown(number)}" for name, number in read.items())
            + "): leave one of them"
        )
    if read:
        return next(iter(read.values()))
    if trouble:
        name, (value, reason) = next(iter(trouble.items()))
        text = value.rsplit("####", 1)[-1].strip() if isinstance(value, str) else value
        raise ValueError(f"{where} has no numeric answer: the field {name!r} holds {shown(text)} ({reason})")
    raise ValueError(f"{where} has no numeric answer: one of {', '.join(allowed)} is needed, got {names_of(record)}")


def _steps(
    record: Mapping[str, Any], where: str, decimal_comma: bool
) -> tuple[tuple[str, ...], tuple[int | float, ...]]:
    name, steps = steps_of(record)
    for step in steps:
        _whole(step, where, name)
    try:
        return steps, step_values(steps, decimal_comma)
    except ValueError as error:
        raise ValueError(f"{where}: in the field {name!r} {error}") from None


def _twins(record: Mapping[str, Any], where: str, prompt_id: str, decimal_comma: bool) -> list[Problem]:
    """The addition and the subtraction problem of one entry of prompts.json; either may be missing."""
    problems = []
    for operation, sign in (("addition", 1), ("subtraction", -1)):
        twin = record.get(operation)
        if twin is None:
            continue
        if not isinstance(twin, Mapping) or not _text(twin, "prompt"):
            raise ValueError(f"{where}: {operation} has no prompt")
        question = _whole(twin["prompt"], where, f"{operation}.prompt").lstrip("\ufeff")
        answer = _answer(twin, f"{where}: {operation}", decimal_comma, ("ground_truth",))
        numbers = tuple(parse_number(record.get(name), decimal_comma) for name in "XYZ")
        steps: tuple[str, ...] = ()
        values: tuple[int | float, ...] = ()
        if all(isinstance(number, int) for number in numbers):
            x, y, z = (int(number) for number in numbers if number is not None)
            first = x + sign * y
            second = first * z
            if first + second == answer:  # another formula than the published one: its steps are not known
                steps = (
                    f"{x}{'+' if sign > 0 else '-'}{y}={first}",
                    f"{first}*{z}={second}",
                    f"{first}+{second}={first + second}",
                )
                values = (first, second, first + second)
            whole: tuple[int, ...] = (x, y, z)
            cluster = f"{x},{y},{z}"
        else:
            whole = _numbers(question)
            cluster = _cluster(question)
        template = record.get("template_idx")
        given = record.get("id")
        name = prompt_id if given is None else _whole(_plain(given), where, "id")
        problems.append(
            Problem(
                prompt_id=f"{name}-{operation}",
                question=question,
                answer=answer,
                steps=steps,
                cluster=cluster,
                template="" if template is None else _whole(_plain(template), where, "template_idx"),
                operation=operation,
                numbers=whole,
                intermediates=values,
            )
        )
    return problems


# --- Fields ---


def _whole(text: str, where: str, field: str) -> str:
    """The text, if it is one: half of a surrogate pair is no character and no tokenizer takes it."""
    if half := half_character(text):
        raise ValueError(
            f"{where}: the field {field!r} holds half a character ({half}, a lone surrogate): "
            "write the whole character, or leave it out"
        )
    return text


def _plain(value: Any) -> str:
    """A name given as anything: text as it is, numbers as they were written."""
    return str(Decimal(value)) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _numbers(question: str) -> tuple[int, ...]:
    """The whole numbers of a question that a float holds, exactly, in order."""
    found = [(text, float(text)) for text in written_numbers(question)]
    return tuple(int(Decimal(text)) for text, number in found if math.isfinite(number) and number.is_integer())


def _cluster(question: str) -> str:
    """The numbers of a question, sorted; its text where it has fewer than two."""
    numbers = sorted(float(text) for text in written_numbers(question))
    return ",".join(f"{number:.15g}" for number in numbers) if len(numbers) > 1 else " ".join(question.lower().split())
