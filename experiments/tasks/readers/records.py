"""Readers of data sets: files as they are published, and the same sets on the Hugging Face hub.

What a record means is told by its field names, so a file, a local folder and a hub id go through one function:

    fields                                   published as
    question, answer (text with "#### n")    GSM8K (JSONL), openai/gsm8k:main
    question||steps #### answer (text line)  GSM8K-Aug (da03/Internalize_CoT_Step_by_Step)
    question, cot, answer                    zen-E/GSM8k-Aug
    question, steps, answer                  whynlp/gsm8k-aug
    Body, Question, Equation, Answer         SVAMP (JSON)
    question_concat, Equation, Answer        ChilleD/SVAMP
    sQuestion, lEquations, lSolutions        MultiArith (JSON)
    question, final_ans                      ChilleD/MultiArith
    instruction, response                    juyoung-trl/gsm-hard
    addition, subtraction, X, Y, Z           prompts.json of Cywinski et al.: two problems per entry
    prompt | question, ground_truth | answer your own prompts (JSON or JSONL)

Files end in .json, .jsonl, .txt or .parquet. The stated answer is always the answer: it is neither computed from the
steps nor checked against them (in 111 of the 1,319 GSM8K test records the last step is not the answer; SVAMP chal-680
contradicts its own equation). Blanks in a question are closed up as in the published evaluation (`strip`, two blanks to
one), except in prompts.json.

Knows nothing about models or suffixes (see `experiments.tasks.load_task`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from experiments.tasks.answers import numbers_in, parse_number
from experiments.tasks.problem import Problem

__all__ = ["FILE_TYPES", "HUB_DEFAULTS", "TASK_HELP", "equation_steps", "read_file", "read_hub", "read_problems"]

FILE_TYPES = (".json", ".jsonl", ".txt", ".parquet")

# hub id -> (configuration, split that the published CODI evaluation reads)
HUB_DEFAULTS: dict[str, tuple[str | None, str]] = {
    "openai/gsm8k": ("main", "test"),
    "zen-E/GSM8k-Aug": (None, "test"),
    "whynlp/gsm8k-aug": (None, "test"),
    "ChilleD/SVAMP": (None, "train+test"),
    "ChilleD/MultiArith": (None, "test"),
    "juyoung-trl/gsm-hard": (None, "train"),
}

TASK_HELP = (
    f"allowed: arithmetic, templates, a file ending in {', '.join(FILE_TYPES)}, a folder in the layout of a hub data "
    f"set, or a hub id such as {', '.join(HUB_DEFAULTS)}"
)

_QUESTION_FIELDS = ("question_concat", "sQuestion", "question", "instruction", "prompt", "input")
_ANSWER_FIELDS = ("Answer", "lSolutions", "final_ans", "response", "ground_truth", "answer", "target")
_STEP_FIELDS = ("cot", "steps", "Equation", "lEquations", "answer")
_ANNOTATION = re.compile(r"<<(.*?)>>")
_EQUATION = re.compile(r"[-+*/().,\d\s]+=\s*[-+]?[.,\d]+")


def read_problems(source: str, split: str = "test") -> list[Problem]:
    """Problems of a file, a local folder or a hub id.

    Args:
        source: path, or hub id with an optional configuration after a colon.
        split: of a folder or hub data set; not used for a single file.

    Raises:
        ValueError: no such source (what is allowed is listed), unknown split, empty or broken file, record without
            question or numeric answer.
    """
    path = Path(source).expanduser()
    if path.is_dir() or Path(_named(str(path))[0]).is_dir():
        return read_hub(str(path), split)
    if path.exists():
        return read_file(path)
    if path.suffix in FILE_TYPES or path.is_absolute() or source.startswith((".", "~")):
        raise ValueError(f"no such file: {source}; {TASK_HELP}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return read_hub(source, split)
    raise ValueError(f"unknown task {source!r}; {TASK_HELP}")


def read_file(path: str | Path) -> list[Problem]:
    """Problems of one local file; see the table of formats in this module."""
    path = Path(path)
    if path.suffix not in FILE_TYPES:
        raise ValueError(f"{path}: the name must end in one of {', '.join(FILE_TYPES)}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        records: Iterable[Any] = pyarrow.parquet.read_table(path).to_pylist()
        return _problems(records, str(path), path.stem)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    if path.suffix == ".txt":
        return _problems(_text_records(text, str(path)), str(path), path.stem)
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        return _problems([_json(line, f"{path}, line {number}") for number, line in lines], str(path), path.stem)
    content = _json(text, str(path))
    if isinstance(content, dict):
        if "prompts" not in content:
            raise ValueError(
                f'{path}: expected a list of records or an object with a list "prompts", '
                f"got an object with {_names(content)}"
            )
        content = content["prompts"]
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of records, got {type(content).__name__}")
    return _problems(content, str(path), path.stem)


def read_hub(source: str, split: str = "test") -> list[Problem]:
    """Problems of a hub data set or of a local folder in the same layout, through `datasets`.

    Args:
        source: hub id or folder, with an optional configuration after a colon ("openai/gsm8k", "openai/gsm8k:main"). A
            folder with the last name of a known hub data set is taken for a copy of it.
        split: a split of the data set, "train+test" for both, or "published" (see `HUB_DEFAULTS`).
    """
    import datasets

    name, given = _named(source)
    folder = Path(name).is_dir()
    known = {hub_id.split("/")[1]: hub_id for hub_id in HUB_DEFAULTS}
    configuration, published = HUB_DEFAULTS.get(known.get(Path(name).name, "") if folder else name, (None, None))
    if split == "published":
        if published is None:
            raise ValueError(f"split 'published' is known for {', '.join(HUB_DEFAULTS)} only, got {source!r}")
        split = published
    try:
        if folder:
            offered = datasets.get_dataset_config_names(name)
            if not given and len(offered) > 1 and configuration not in offered:
                raise ValueError(f"it has several configurations: write {name}:NAME, NAME one of {', '.join(offered)}")
            configuration = configuration if configuration in offered else None
        data = datasets.load_dataset(name, given or configuration)
    except (OSError, ValueError) as error:  # ConnectionError and DatasetNotFoundError are OSErrors
        reason = " ".join(str(error).split())
        advice = "; without network, download it elsewhere and give the path of its folder instead of the id"
        advice = "" if folder else f"{advice}; {TASK_HELP}"
        raise ValueError(f"data set {source!r} cannot be loaded ({type(error).__name__}: {reason}){advice}") from error
    wanted = [part.strip() for part in split.split("+")]
    missing = [part for part in wanted if part not in data]
    if missing:
        raise ValueError(f"data set {source!r} has no split {missing[0]!r}; allowed: {', '.join(map(str, data))}")
    stem = Path(name).name
    parts = [_problems(data[part], f"{source} ({part})", f"{stem}-{part}") for part in wanted]
    return _unique([problem for part in parts for problem in part])


def _named(source: str) -> tuple[str, str]:
    """Data set and configuration ("" if none is given)."""
    name, colon, configuration = source.rpartition(":")
    return (name, configuration) if colon and not Path(source).is_dir() else (source, "")


def equation_steps(equation: str) -> tuple[str, ...]:
    """Steps of one nested equation in the order of evaluation.

    "X=((32.0+42.0)-35.0)" gives ("32+42=74", "74-35=39"); an equation that cannot be read gives ().
    """
    steps: list[str] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                sign, result = "+", left + right
            elif isinstance(node.op, ast.Sub):
                sign, result = "-", left - right
            elif isinstance(node.op, ast.Mult):
                sign, result = "*", left * right
            elif isinstance(node.op, ast.Div):
                sign, result = "/", left / right
            else:
                raise ValueError(f"operator {type(node.op).__name__}")
            steps.append(f"{_plain(left)}{sign}{_plain(right)}={_plain(result)}")
            return result
        raise ValueError(f"not arithmetic: {type(node).__name__}")

    try:
        value(ast.parse(equation.split("=")[-1].strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return ()
    return tuple(steps)


def _problems(records: Iterable[Any], source: str, stem: str) -> list[Problem]:
    problems: list[Problem] = []
    for index, record in enumerate(records):
        where = f"{source}: record {index}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} must be an object with a question and an answer, got {type(record).__name__}")
        if "addition" in record or "subtraction" in record:
            problems += _twins(record, where, f"{stem}-{index}")
        else:
            problems.append(_problem(record, where, f"{stem}-{index}"))
    if not problems:
        raise ValueError(f"{source}: no prompts in it")
    return _unique(problems)


def _problem(record: Mapping[str, Any], where: str, prompt_id: str) -> Problem:
    if "Body" in record and "Question" in record and "question_concat" not in record:
        question: Any = f"{record['Body']} {record['Question']}"
    else:
        question = _first(record, _QUESTION_FIELDS)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f"{where} has no question: one of {', '.join(_QUESTION_FIELDS)} is needed, got {_names(record)}"
        )
    question = question.strip().replace("  ", " ")
    answer = _answer(_first(record, _ANSWER_FIELDS), where, record)
    steps = _steps(record)
    whole = tuple(int(number) for number in numbers_in(question) if number.is_integer())
    given = record.get("ID", record.get("prompt_id", record.get("id")))
    return Problem(
        prompt_id=prompt_id if given is None else str(given),
        question=question,
        answer=answer,
        steps=steps,
        cluster=_cluster(question),
        operation=str(record.get("Type", "")).lower(),
        numbers=whole,
        intermediates=_values(steps),
    )


def _twins(record: Mapping[str, Any], where: str, prompt_id: str) -> list[Problem]:
    """The addition and the subtraction problem of one entry of prompts.json; either may be missing."""
    problems = []
    for operation, sign in (("addition", 1), ("subtraction", -1)):
        if operation not in record:
            continue
        twin = record[operation]
        if not isinstance(twin, Mapping) or not isinstance(twin.get("prompt"), str) or not twin["prompt"].strip():
            raise ValueError(f"{where}: {operation} has no prompt")
        answer = _answer(twin.get("ground_truth"), f"{where}: {operation}", twin)
        numbers = tuple(parse_number(record.get(name)) for name in "XYZ")
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
            whole = tuple(int(number) for number in numbers_in(twin["prompt"]) if number.is_integer())
            cluster = _cluster(twin["prompt"])
        template = record.get("template_idx")
        problems.append(
            Problem(
                prompt_id=f"{record.get('id', prompt_id)}-{operation}",
                question=twin["prompt"],
                answer=answer,
                steps=steps,
                cluster=cluster,
                template="" if template is None else str(template),
                operation=operation,
                numbers=whole,
                intermediates=values,
            )
        )
    return problems


def _text_records(text: str, source: str) -> list[dict[str, str]]:
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        question, bar, rest = line.partition("||")
        if not bar or "####" not in rest:
            raise ValueError(f"{source}, line {number}: expected question||<<steps>> #### answer, got {line[:60]!r}")
        records.append({"question": question, "answer": rest})
    return records


def _answer(value: Any, where: str, record: Mapping[str, Any]) -> int | float:
    if isinstance(value, list | tuple):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, str):
        value = value.rsplit("####", 1)[-1]
    number = parse_number(value)
    if number is None:
        raise ValueError(
            f"{where} has no numeric answer: one of {', '.join(_ANSWER_FIELDS)} is needed, "
            f"got {_names(record)}" + ("" if value is None else f" with {str(value)[:40]!r}")
        )
    return number


def _steps(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The first field that holds steps: annotations, equations, or one nested equation."""
    for field in _STEP_FIELDS:
        value = record.get(field)
        parts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
        if field in ("Equation", "lEquations"):
            steps = tuple(step for part in parts for step in equation_steps(str(part)))
        else:
            steps = tuple(step for part in parts for step in _annotated(str(part), field != "answer"))
        if steps:
            return steps
    return ()


def _annotated(text: str, bare: bool) -> list[str]:
    found = [step.strip() for step in _ANNOTATION.findall(text)]
    if not found and bare and _EQUATION.fullmatch(text.strip()):
        found = [text.strip()]
    return found


def _values(steps: tuple[str, ...]) -> tuple[int | float, ...]:
    """Value of each step; () if one of them cannot be read, so that positions never shift."""
    values = [parse_number(step.rsplit("=", 1)[-1]) if "=" in step else None for step in steps]
    return tuple(value for value in values if value is not None) if None not in values else ()


def _cluster(question: str) -> str:
    """The numbers of a question, sorted; its text where it has fewer than two."""
    numbers = sorted(numbers_in(question))
    return ",".join(f"{number:.15g}" for number in numbers) if len(numbers) > 1 else " ".join(question.lower().split())


def _first(record: Mapping[str, Any], fields: Iterable[str]) -> Any:
    return next((record[field] for field in fields if record.get(field) is not None), None)


def _unique(problems: list[Problem]) -> list[Problem]:
    seen: set[str] = set()
    for problem in problems:
        if problem.prompt_id in seen:
            raise ValueError(f"prompt id {problem.prompt_id!r} occurs twice")
        seen.add(problem.prompt_id)
    return problems


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {place})") from None


def _names(record: Mapping[str, Any]) -> str:
    return "the fields " + ", ".join(map(str, record)) if record else "no fields"


def _plain(number: Fraction) -> str:
    return str(number.numerator) if number.denominator == 1 else f"{float(number):g}"
