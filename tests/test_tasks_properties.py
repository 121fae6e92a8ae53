"""Whatever is written in one of the formats reads back the same: questions, answers, steps and ids (hypothesis)."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from experiments.tasks import Problem, load_task

steady = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\ufeff")
QUESTIONS = st.text(CHARACTERS, min_size=1, max_size=30) | st.text("a 7|<#\u2028\x85\f\r\n,;\t\"'\u00a0", min_size=1)
NUMBERS = st.integers(-(10**18), 10**18) | st.floats(-1e15, 1e15).map(lambda value: round(value, 3))
STEPS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda p: f"{p[0]}+{p[1]}={sum(p)}"), max_size=3)
ENCODINGS = (
    ("utf-8", b""),
    ("utf-8", codecs.BOM_UTF8),
    ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-32-le", codecs.BOM_UTF32_LE),
)
FORMATS = ("jsonl", "json", "prompts", "gsm8k", "txt", "csv", "tsv", "parquet")

Row = tuple[str, int | float, list[str]]


def content_of(kind: str, rows: list[Row], order: random.Random, escaped: bool) -> str:
    """The rows as a file of this kind."""
    if kind == "txt":
        return "".join(f"{q}||{' '.join(f'<<{s}>>' for s in steps)} #### {a!r}\n" for q, a, steps in rows)
    records = []
    for number, (question, answer, steps) in enumerate(rows):
        fields: dict[str, object] = {"id": f"r{number}", "question": question, "answer": answer, "steps": steps}
        if kind == "gsm8k":
            fields["answer"] = "".join(f"<<{step}>>\n" for step in fields.pop("steps")) + f"#### {answer!r}"  # type: ignore[attr-defined]
        elif kind in ("csv", "tsv"):
            fields["steps"] = " ".join(f"<<{step}>>" for step in steps)
        keys = list(fields)
        order.shuffle(keys)
        records.append({key: fields[key] for key in keys})
    if kind in ("csv", "tsv"):
        out = io.StringIO()
        table = csv.DictWriter(
            out,
            list(records[0]),
            delimiter="\t" if kind == "tsv" else ",",
            quoting=csv.QUOTE_ALL,
            lineterminator=order.choice(("\n", "\r\n")),
        )
        table.writeheader()
        table.writerows(records)
        return out.getvalue()
    if kind in ("jsonl", "gsm8k"):
        return "".join(json.dumps(record, ensure_ascii=escaped) + "\n" for record in records)
    made = {"prompts": records} if kind == "prompts" else records
    return json.dumps(made, ensure_ascii=escaped, indent=order.choice((None, 1)))


def write(folder: Path, kind: str, rows: list[Row], order: random.Random) -> Path:
    """A file of this kind, in an encoding and packing that `order` draws."""
    ending = {"prompts": "json", "gsm8k": "jsonl"}.get(kind, kind)
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        path = folder / "f.parquet"
        columns = {
            "id": [f"r{i}" for i in range(len(rows))],
            "question": [q for q, _, _ in rows],
            "answer": [str(a) for _, a, _ in rows],
            "steps": pyarrow.array([steps for _, _, steps in rows], pyarrow.list_(pyarrow.string())),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    encoding, mark = order.choice(ENCODINGS)
    data = mark + content_of(kind, rows, order, order.random() < 0.5).encode(encoding)
    path = folder / f"f.{ending if order.random() < 0.8 else ending.upper()}"
    if order.random() < 0.3:
        path, data = path.with_name(path.name + ".gz"), gzip.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@steady
@given(
    rows=st.lists(st.tuples(QUESTIONS, NUMBERS, STEPS), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_what_is_written_reads_back(kind: str, rows: list[Row], order: random.Random, tmp_path: Path) -> None:
    assume(all(question.strip() for question, _, _ in rows))
    if kind == "txt":
        assume(not any(re.search(r"\n|\|\|\s*<<", question) for question, _, _ in rows))
    path = write(tmp_path, kind, rows, order)
    found = load_task(str(path))
    path.unlink()
    assert [problem.question for problem in found] == [q.strip().replace("  ", " ") for q, _, _ in rows]
    assert [problem.answer for problem in found] == [answer for _, answer, _ in rows]
    assert [problem.steps for problem in found] == [tuple(steps) for _, _, steps in rows]
    assert [len(problem.intermediates) for problem in found] == [len(steps) for _, _, steps in rows]
    assert [p.prompt_id for p in found] == [f"f-{i}" if kind == "txt" else f"r{i}" for i in range(len(rows))]
    assert all(isinstance(problem, Problem) and problem.cluster for problem in found)
