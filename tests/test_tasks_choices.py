"""Multiple choice: readers of every format, prompts, and letters as the harness takes them from a text."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.tasks.choices import (
    ChoiceProblem,
    agieval_rows,
    arc_rows,
    mmlu_rows,
    prompt,
    read_agieval,
    read_arc,
    read_bigbench,
    read_mmlu,
)
from experiments.tasks.letters import (
    exact_text,
    flexible_letter,
    flexible_number,
    generated_letter,
    is_right,
    is_right_number,
    likelihood_choice,
    strict_letter,
    strict_number,
)

DATA = Path(__file__).resolve().parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"published data files are not at {SHARED}")


def test_mmlu_with_and_without_header() -> None:
    named, bare = read_mmlu(DATA / "geology_dev.csv"), read_mmlu(DATA / "geology_test.csv")
    assert [replace(p, prompt_id="", cluster="") for p in named] == [replace(p, prompt_id="", cluster="") for p in bare]
    first = named[0]
    assert (first.label, first.answers, first.subject) == ("B", ("Pumice, when dry",), "geology")
    assert first.question == "Which rock floats, at least for a while?" and first.choice("D") == "Marble"
    assert first.prompt_id == "geology_dev-0" and bare[1].prompt_id == "geology_test-1"
    rows = [
        {"question": r["question"], "choices": [r[f"choice{i}"] for i in range(4)], "answer": int(r["answer"]),
         "subject": "geology"}
        for r in csv.DictReader((DATA / "geology_dev.csv").open())
    ]  # fmt: skip
    assert [replace(p, prompt_id="", cluster="") for p in mmlu_rows(rows)] == [
        replace(p, prompt_id="", cluster="") for p in named
    ]
    with pytest.raises(ValueError, match="letters are 'ABCD', got 'E'"):
        first.choice("E")


def test_arc_file_and_rows() -> None:
    three, four = read_arc(DATA / "arc_made_up.jsonl")
    assert (three.letters, three.label, three.answers) == ("ABC", "A", ("ice",))
    assert (four.letters, four.label, four.answers) == ("ABCD", "D", ("light",))  # 4 becomes D
    rows = []
    for line in (DATA / "arc_made_up.jsonl").read_text().splitlines():
        record = json.loads(line)
        choices = {k: [c[k] for c in record["question"]["choices"]] for k in ("text", "label")}
        row = {"id": record["id"], "question": record["question"]["stem"], "choices": choices}
        rows.append({**row, "answerKey": record["answerKey"]})
    assert arc_rows(rows) == [three, four]


def test_agieval_file_and_rows() -> None:
    items = read_agieval(DATA / "sat-made-up.jsonl")
    assert [i.label for i in items] == ["B", "C", "A"] and items[0].choices == ("2", "3", "4", "7")
    assert items[1].passage == "A bus holds 10." and items[0].cluster != items[1].cluster == items[2].cluster
    rows: list[dict[str, Any]] = [
        {"query": prompt(i, "agieval"), "choices": [f"({a}){t}" for a, t in zip("ABCD", i.choices, strict=True)],
         "gold": ["ABCD".index(i.label)]}
        for i in items
    ]  # fmt: skip
    found = agieval_rows(rows, "sat-made-up")
    assert [(f.choices, f.labels, f.answers, f.subject) for f in found] == [
        (i.choices, i.labels, i.answers, i.subject) for i in items
    ]
    assert found[0].question == items[0].question
    assert found[1].question == "A bus holds 10.\nHow many people fit into 3 buses?"
    two = agieval_rows([{**rows[0], "gold": [1, 3]}], "x")[0]
    assert two.labels == ("B", "D") and is_right("D", two) and not is_right("A", two)
    with pytest.raises(ValueError, match="positions of the 4 choices, got .9."):
        agieval_rows([{**rows[0], "gold": [9]}], "x")


def test_bigbench() -> None:
    yes_no, colour, birds, total = read_bigbench(DATA / "bigbench_made_up.json")
    assert (yes_no.choices, yes_no.label, yes_no.subject) == (("yes", "no"), "B", "made_up_task")
    assert yes_no.passage == "Answer in one word." and prompt(yes_no).startswith("Answer in one word.\nIs ice warm?")
    assert colour.choices == () and colour.answers == ("blue", "grey") and colour.label == ""
    assert birds.labels == ("A", "C") and birds.answers == ("owl", "hen") and total.answers == ("7",)
    with pytest.raises(ValueError, match="is for questions with choices"):
        prompt(total, "mmlu")


def test_broken_records_are_named(tmp_path: Path) -> None:
    cases: list[tuple[Any, str, str, str]] = [
        (read_mmlu, "x_dev.csv", "q,a,b,c,d,E\n", "x_dev.csv, record 1: the answer must be one of A, B, C, D or 0..3"),
        (read_mmlu, "x_dev.csv", "q,a,b,1\n", "got 4 fields"),
        (read_mmlu, "x_dev.csv", "question,choice0,choice1,choice2,choice3,answer\n", "no record found"),
        (read_mmlu, "x_dev.csv", "q,a,b,c,d,4\n", "got '4'"),
        (read_arc, "x.jsonl", "{}\n", "line 1: id, question, answerKey are needed"),
        (read_arc, "x.jsonl", "\n", "the file is empty"),
        (read_arc, "x.jsonl", '{"id": 1, "question": {"stem": "s", "choices": [{"text": "a", "label": "A"}]}, '
         '"answerKey": "B"}', "'B' is none of the labels A"),
        (read_agieval, "x.jsonl", "{", "line 1: not valid JSON"),
        (read_agieval, "x.jsonl", '{"question": "q", "options": ["(A)1", "(B)2"], "label": "C"}', "got 'C'"),
        (read_bigbench, "x.json", "[]", 'expected an object with a list "examples"'),
        (read_bigbench, "x.json", '{"examples": [{"input": "q"}]}', "target or target_scores is needed"),
        (read_bigbench, "x.json", '{"examples": [{"input": "q", "target_scores": {"a": 0, "b": 0}}]}', "above 0"),
    ]  # fmt: skip
    for reader, name, text, message in cases:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            reader(tmp_path / name)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="the folder has no CSV file"):
        read_mmlu(tmp_path / "none")
    with pytest.raises(ValueError, match="2 to 26 choices"):
        ChoiceProblem("x", "q", ("a",), ("A",), ("a",))


@needs_shared
def test_published_files() -> None:
    dev = read_mmlu(SHARED / "mmlu")
    assert len(dev) == 57 * 5 and len({p.subject for p in dev}) == 57 and len({p.prompt_id for p in dev}) == 285
    assert all(len(p.choices) == 4 and p.answers == (p.choice(p.label),) for p in dev)
    arc = read_arc(SHARED / "arc" / "ARC-Challenge-Dev.jsonl")
    assert len(arc) == 294 and {p.label for p in arc} >= set("ABCD") and arc[0].label == "D"
    sat = read_agieval(SHARED / "agieval" / "sat-math.jsonl")
    assert len(sat) == 220 and sat[0].label == "D" and sat[0].choices == ("2", "4", "9", "10")
    assert all(len(p.choices) == 4 for p in sat)


def test_prompts() -> None:
    problem = read_mmlu(DATA / "geology_dev.csv")[1]
    assert prompt(problem, "mmlu") == ("What is sand mostly made of?\nA. Quartz\nB. Salt\nC. Iron\nD. Coal\nAnswer:")
    assert prompt(problem, "flan", "Let's think step by step.") == (
        "Q: What is sand mostly made of?\n(A) Quartz (B) Salt (C) Iron (D) Coal\nLet's think step by step.\nA:"
    )
    assert prompt(problem) == "What is sand mostly made of?\n(A) Quartz\n(B) Salt\n(C) Iron\n(D) Coal"
    three = read_arc(DATA / "arc_made_up.jsonl")[0]
    assert "three candidate answers (A, B and C), choose" in prompt(three, "arc-chat")
    assert prompt(problem, "arc-chat").startswith(
        "Given the following question and four candidate answers (A, B, C and D), choose the best answer.\n"
        "Question: What is sand mostly made of?\nA. Quartz\n"
    )
    assert prompt(problem, "agieval").endswith(
        "Answer Choices: (A)Quartz (B)Salt (C)Iron (D)Coal\nA: Among A through D, the answer is"
    )
    with pytest.raises(ValueError, match="style must be one of plain, mmlu"):
        prompt(problem, "chat")  # type: ignore[arg-type]


PROBLEM = ChoiceProblem("x", "q", ("red fox", "blue", "blue whale", "12"), ("B",), ("blue",))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("First (A), no: (B) it is.", "B"),
        ("(B) or (Z)", "Z"),  # labels nothing: wrong, as in the harness
        ("It must be the Red Fox!", "A"),
        ("a red fox, or a blue whale", "B"),  # "blue" is found first at that place
        ("the answer: C", "C"),
        ("Answer:\n D", "D"),
        ("(b)", None),
        ("no idea", None),
        ("it is 12.", "D"),
    ],
)
def test_flexible_letter(text: str, letter: str | None) -> None:
    assert flexible_letter(text, PROBLEM) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So the answer is (B).", "B"),
        ("So the answer is (B)", "B"),
        ("So the answer is B", None),  # its last character is left out
        ("The answer is B.", "B"),
        ("The answer is B, I think.", None),
        ("The answer is \nThe final answer: (C).", "C"),
        ("The answer is (A). No, the answer is (B).", None),
        ("B", None),
    ],
)
def test_strict_letter(text: str, letter: str | None) -> None:
    assert strict_letter(text, PROBLEM) == letter


def test_generated_letter() -> None:
    assert [generated_letter(t, PROBLEM) for t in (" B", "(b).\n\nNext", "B because", "\nB", "E", "")] == [
        "B", "B", None, None, None, None,
    ]  # fmt: skip
    arc = [generated_letter(t, PROBLEM, "arc_challenge_chat") for t in (" B. As", "\nB", "B or C", "[D]\n\nx")]
    assert arc == ["B", "B", None, "D"]
    with pytest.raises(ValueError, match="mmlu_generative or arc_challenge_chat"):
        generated_letter("B", PROBLEM, "mmlu")  # type: ignore[arg-type]
    assert not is_right(None, PROBLEM) and is_right("B", PROBLEM)


def test_numbers_and_texts() -> None:
    assert flexible_number("It is 3 + 4 = $1,207.") == "1207" and flexible_number("no") is None
    assert flexible_number("about -5") == "-5" and flexible_number("7 ...") == ".."
    assert strict_number("x #### 1,200\n#### 3") == "1200" and strict_number("18") is None
    assert is_right_number("18", "She makes 18.\n#### 18") and is_right_number("1200", "#### 1,200")
    assert is_right_number("18", 18) and not is_right_number("18.0", 18) and not is_right_number(None, 18)
    assert exact_text("It's 7.", ["x", "Its 7"]) and not exact_text("Blue", ["blue"])
    assert likelihood_choice([-2.0, -3.0], ["a", "abcd"]) == 0
    assert likelihood_choice([-2.0, -3.0], ["a", "abcd"], normalised=True) == 1
    with pytest.raises(ValueError, match="got 1 and 2"):
        likelihood_choice([-1.0], ["a", "b"])
