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
    instruction, input, output | answer      Alpaca style: instruction and input are joined by a blank
    addition, subtraction, X, Y, Z           prompts.json of Cywinski et al.: two problems per entry
    prompt | question, ground_truth | answer your own prompts (JSON, JSONL or a table)

`steps` (or `cot`) gives the known intermediate values of your own prompts: the equations in the order in which they are
worked out, the last one with the answer, each with its value after "=". In JSON a list, ["7+5=12", "12*3=36"]; in a
table or a text one string, "<<7+5=12>> <<12*3=36>>". Studies that look for intermediate values need it. Text of another
kind in these fields is left alone: the steps are then unknown.

Files end in .json, .jsonl, .txt, .csv, .tsv (both with a header) or .parquet, in letters of either case; all but the
last may be packed (.jsonl.gz), may begin with a byte-order mark (UTF-8, UTF-16, UTF-32; UTF-8 without one), and have
lines that end in \\n or \\r\\n and in nothing else. A folder that holds nothing but such .txt files is read as one
data set, or by splits where its files are named after them (train.txt, test.txt).

The stated answer is always the answer: it is neither computed from the steps nor checked against them (in 111 of the
1,319 GSM8K test records the last step is not the answer; SVAMP chal-680 contradicts its own equation). Numbers are read
by experiments/tasks/numbers.py. Blanks in a question are closed up as in the published evaluation (`strip`, two blanks
to one), except in prompts.json; nothing else in it is changed.

Whatever cannot be read is refused in one line that names file, line or record (counted from 1, as lines are) and field.
Knows nothing about models or suffixes (see `experiments.tasks.load_task`).
"""

from __future__ import annotations

import re
from pathlib import Path

from experiments.tasks.numbers import shown
from experiments.tasks.problem import Problem
from experiments.tasks.readers.equations import equation_steps
from experiments.tasks.readers.files import FILE_TYPES, read_placed, split_files, stem_of, type_of
from experiments.tasks.readers.hub import HUB_DEFAULTS, TASK_HELP, named, read_hub
from experiments.tasks.readers.records import problems_of, unique

__all__ = [
    "FILE_TYPES",
    "HUB_DEFAULTS",
    "TASK_HELP",
    "check_file_split",
    "equation_steps",
    "read_file",
    "read_hub",
    "read_problems",
]

FILE_SPLITS = ("test", "train", "derivation", "all", "published")
"""What may be asked of a single file, which has no splits: the splits that commands ask for by default."""


def read_problems(source: str, split: str = "test", decimal_comma: bool = False) -> list[Problem]:
    """Problems of a file, a local folder or a hub id.

    Args:
        source: path, or hub id with an optional configuration after a colon.
        split: of a folder or hub data set; a single file is read whole, whichever of FILE_SPLITS is asked for.
        decimal_comma: read "3,5" in a field as 3.5, and "1.234" as 1234.

    Raises:
        ValueError: no such source (what is allowed is listed), unknown split, empty or broken file, record without
            question or numeric answer.
    """
    path = Path(source).expanduser()
    if len(source) > 4096 or "\n" in source or "\0" in source:  # a question, perhaps, but the name of nothing
        raise ValueError(f"unknown task {shown(source)}; {TASK_HELP}")
    if path.is_dir() and (files := split_files(path, split)):
        return unique([(where, p) for file in files for where, p in _placed_problems(file, decimal_comma)], source)
    if path.is_dir() or Path(named(str(path))[0]).is_dir():
        return read_hub(str(path), split, decimal_comma)
    if path.exists():
        check_file_split(source, split)
        return read_file(path, decimal_comma)
    if type_of(path) in FILE_TYPES or path.is_absolute() or source.startswith((".", "~")):
        raise ValueError(f"no such file: {source}; {TASK_HELP}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return read_hub(source, split, decimal_comma)
    raise ValueError(f"unknown task {source!r}; {TASK_HELP}")


def check_file_split(source: str, split: str) -> None:
    """Refuse a split that a file, or a folder of text files, does not have; what only reading tells is let pass.

    Raises:
        ValueError: no such split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        split_files(path, split)
    elif path.exists() and split not in FILE_SPLITS:
        raise ValueError(f"{source}: a single file has no split {split!r}, it is read whole: leave --split out")


def read_file(path: str | Path, decimal_comma: bool = False) -> list[Problem]:
    """Problems of one local file; see the table of formats in this module."""
    return unique(_placed_problems(Path(path), decimal_comma), str(path))


def _placed_problems(path: Path, decimal_comma: bool) -> list[tuple[str, Problem]]:
    return problems_of(read_placed(path), str(path), stem_of(path), decimal_comma)
