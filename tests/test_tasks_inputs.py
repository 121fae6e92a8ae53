"""What people bring: byte-order marks, odd lines, tables, joined fields, numbers that no float holds, folders of texts.

Each kind reads right, with the values, or is refused in one line that names file, record and field. The small files in
tests/data/cases are after public complaints; the published formats are written here by hand, so that nothing of value
is skipped where the public data sets are absent.
"""

from __future__ import annotations

import codecs
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from experiments.tasks import STEPS_HELP, Problem, load_task
from experiments.tasks.readers import read_file, read_problems
from experiments.tasks.split import check_disjoint, load_split

CASES = Path(__file__).resolve().parent / "data" / "cases"
PENS = "Ann has 7 pens and buys 5 more. How many pens has she now?"
EGGS = "A box holds 3 rows of 4 eggs. How many eggs?"
BOTH = [(PENS, 12), (EGGS, 12)]
BROKEN_LINE = "Ann has 7 pens.{}She buys 5 more. How many pens?"


def write(path: Path, content: object) -> Path:
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode("utf-8"))
    return path


def refusal(path: Path | str, **options: object) -> str:
    """The message of a refusal, which is one line and names the file."""
    with pytest.raises(ValueError) as caught:
        load_task(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def read(path: Path, **options: object) -> list[tuple[str, int | float]]:
    return [(problem.question, problem.answer) for problem in load_task(str(path), **options)]


# --- Every case ---

READ = {
    "alloneprompt.jsonl": [(PENS, 12)],
    "alpaca.json": [("Solve. Ann has 7 pens, buys 5. How many?", 12)],
    "bom.json": BOTH,
    "bom.jsonl": BOTH,
    "boxed_answer.jsonl": [("Ann has 7 pens, buys 5. How many?", 12)],
    "crlf.json": BOTH,
    "crlf.jsonl": BOTH,
    "crlf.txt": [("Ann has 7 pens and buys 5 more. How many?", 12), ("Bob has 3. Then 4. How many?", 7)],
    "data_key.json": BOTH,
    "dup_ids.jsonl": [("7+5?", 12), ("7+6?", 13)],
    "emoji.jsonl": [("Ann has 7 \U0001f34e and buys 5 more \U0001f34e. How many \U0001f34e?", 12)],
    "empty_after.jsonl": BOTH,
    "endash_answer.jsonl": [("3 minus 8?", -5)],
    "ff.txt": [(BROKEN_LINE.format("\f"), 12)],
    "frac_answer.jsonl": [("Half of 1 cake?", 0.5)],
    "fs.txt": [(BROKEN_LINE.format("\x1c"), 12)],
    "hf_rows.json": [(PENS, 12)],
    "ls_vt.txt": [(BROKEN_LINE.format("\v"), 12)],
    "negmoney_answer.jsonl": [("Ann has $5 and spends $8. Balance?", -3)],
    "nel.txt": [(BROKEN_LINE.format("\x85"), 12)],
    "nl_cot.jsonl": [("Ann has 7 pens and buys 5. How many?", 12)],
    "nulbyte.jsonl": [("Ann has 7 \0 pens and buys 5. How many?", 12)],
    "null_first.jsonl": [("7+5?", 12)],
    "pipes.txt": [("A || B: 7+5?", 12)],
    "single.json": [(PENS, 12)],
    "special_tokens.jsonl": [("Ann has 7 <|eocot|> pens and <|eot_id|> buys 5 [PAD]. How many?", 12)],
    "trailing_period.jsonl": [("Ann has 7 pens, buys 5. How many?", 12)],
    "u2028.json": [(BROKEN_LINE.format("\u2028"), 12)],
    "u2028.jsonl": [(BROKEN_LINE.format("\u2028"), 12)],
    "u2028.txt": [(BROKEN_LINE.format("\u2028"), 12)],
    "u2029.jsonl": [(BROKEN_LINE.format("\u2029"), 12)],
    "u2029.txt": [(BROKEN_LINE.format("\u2029"), 12)],
    "unit_answer.jsonl": [("Ann has 7 pens, buys 5. How many?", 12)],
    "upper.JSON": BOTH,
    "upper.JSONL": BOTH,
    "utf16.json": BOTH,
    "huge_question.jsonl": [("What is " + "9" * 400 + " minus itself?", 0)],
    "huge_step.txt": [("What?", 5)],
}
REFUSED = {
    "bool_answer.jsonl": "line 1 has no numeric answer: the field 'answer' holds True",
    "columns.json": "the fields question, answer; if these are columns, write records",
    "comma_answer.jsonl": "line 1 has no numeric answer: the field 'answer' holds '3,5' .*write 3.5",
    "digits5000.jsonl": "line 1 has no numeric answer: the field 'answer' holds '999.*too large",
    "huge_answer.jsonl": "line 1 has no numeric answer: the field 'answer' holds '999.*too large",
    "json_as_jsonl.json": "Extra data at line 2, column 1.*name the file .jsonl",
    "letter_answer.jsonl": "line 1 has no numeric answer: the field 'answer' holds 'B'",
    "list_in.jsonl": "line 1 must be an object .*, got list; a list of records belongs in a .json file",
    "messages.jsonl": "line 1 has no question: one of .*, got the fields messages",
    "nan.jsonl": "line 1 has no numeric answer: the field 'answer' holds nan",
    "nested.json": "record 1 has no question: .*'prompt' holds no text",
    "surrogate.jsonl": r"line 1: the field 'question' holds half a character \(.ud83c",
    "twins_surrogate.json": r"record 1: the field 'addition.prompt' holds half a character \(.ud83c",
}


def test_every_case_is_known() -> None:
    kept = {path.name for path in CASES.iterdir()} - {"README.md", ".gitattributes"}
    assert kept == {*READ, *REFUSED} and not {*READ} & {*REFUSED}


@pytest.mark.parametrize("name", READ)
def test_case_reads_right(name: str) -> None:
    found = read(CASES / name)
    if name == "huge_question.jsonl":
        assert found[0][0].startswith("What is 9999") and found[0][1] == 0
    else:
        assert found == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_case_is_refused(name: str) -> None:
    assert re.search(REFUSED[name], refusal(CASES / name))


# --- The published formats, one small file each ---

GSM8K = (
    '{"question": "Ann\u2019s box holds 3 rows of 4 eggs.\u2028 She eats  2. How many are left?", '
    '"answer": "There are 3*4=<<3*4=12>>12 eggs.\\nSo 12-2=<<12-2=10>>10 are left.\\n#### 10"}\n'
    '{"question": "Ben earns $1,200 a month. How much in a year?", "answer": "<<1200*12=14400>>\\n#### 14,400"}\n'
)
GSM8K_AUG = (
    "John cuts grass of 2 inches.  It costs $100. In 3 cuts?||<<100*3=300>> #### 300\n"
    "Half of 3 cups?||<<3*.5=1.5>> #### 1.5\nWhich?|| #### -7\n"
)
SVAMP = [
    {
        "ID": "chal-1",
        "Body": "Each pack costs 76 dollars. If there is a discount of 25 dollars",
        "Question": "How much is each pack?",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
        "Type": "Subtraction",
    },
    {"ID": "chal-2", "Body": "B 8.", "Question": "C?", "Equation": "8.0", "Answer": 8.0, "Type": "Common-Division"},
]
MULTIARITH = [
    {
        "iIndex": 0,
        "lAlignments": [80, 120],
        "lEquations": ["X=((32.0+42.0)-35.0)"],
        "lSolutions": [39.0],
        "sQuestion": " Debby had 32 pieces and her sister 42. They ate 35. How many are left? ",
    }
]


def test_gsm8k(tmp_path: Path) -> None:
    """Without ASCII escapes, as its own train file is when it is written anew: U+2028 is no end of a line."""
    first, second = load_task(str(write(tmp_path / "test.jsonl", GSM8K)))
    assert first.question == "Ann\u2019s box holds 3 rows of 4 eggs.\u2028 She eats 2. How many are left?"
    assert (first.answer, first.steps, first.intermediates) == (10, ("3*4=12", "12-2=10"), (12, 10))
    assert (first.prompt_id, first.cluster, first.numbers) == ("test-0", "2,3,4", (3, 4, 2))
    assert (second.answer, second.intermediates, second.numbers) == (14400, (14400,), (1200,))


def test_gsm8k_aug_text(tmp_path: Path) -> None:
    one, half, bare = load_task(str(write(tmp_path / "valid.txt", GSM8K_AUG)))
    assert (one.question, one.answer) == ("John cuts grass of 2 inches. It costs $100. In 3 cuts?", 300)
    assert one.chain == "<<100*3=300>>"
    assert (half.answer, half.intermediates, bare.answer, bare.steps) == (1.5, (1.5,), -7, ())


def test_svamp(tmp_path: Path) -> None:
    one, two = load_task(str(write(tmp_path / "SVAMP.json", SVAMP)))
    assert one.question == "Each pack costs 76 dollars. If there is a discount of 25 dollars How much is each pack?"
    assert (one.prompt_id, one.answer, one.operation, one.steps) == ("chal-1", 51, "subtraction", ("76-25=51",))
    assert (two.answer, two.operation, two.steps) == (8, "common-division", ())


def test_multiarith(tmp_path: Path) -> None:
    (problem,) = load_task(str(write(tmp_path / "MultiArith.json", MULTIARITH)))
    assert problem.question == "Debby had 32 pieces and her sister 42. They ate 35. How many are left?"
    assert (problem.answer, problem.steps, problem.intermediates) == (39, ("32+42=74", "74-35=39"), (74, 39))


def test_prompts(tmp_path: Path) -> None:
    made = {"id": "p0", "template_idx": 7, "X": 5, "Y": 3, "Z": 4}
    made["addition"] = {"prompt": "5 and 3,  each brings 4?", "ground_truth": 40}
    made["subtraction"] = {"prompt": "5 less 3, each brings 4?", "ground_truth": 10}
    plus, minus = load_task(str(write(tmp_path / "prompts.json", {"config": {}, "prompts": [made]})))
    assert (plus.question, plus.prompt_id, plus.template) == ("5 and 3,  each brings 4?", "p0-addition", "7")
    assert (plus.intermediates, minus.intermediates) == ((8, 32, 40), (2, 8, 10))
    made["addition"] = None  # either twin may be missing
    (only,) = load_task(str(write(tmp_path / "one.json", {"prompts": [made]})))
    assert only == minus


def test_hub_rows(tmp_path: Path) -> None:
    """What the viewer of the hub hands out, and the rows of its six known data sets in one file each."""
    rows = [{"row_idx": 0, "row": {"question": PENS, "steps": ["<<7+5=12>>"], "answer": "12"}, "truncated_cells": []}]
    (problem,) = load_task(str(write(tmp_path / "rows.json", {"features": [], "rows": rows})))
    assert (problem.question, problem.answer, problem.intermediates) == (PENS, 12, (12,))
    concatenated = {"question_concat": "A 7. B?", "Body": "A 7", "Question": "B?", "Answer": "7", "Equation": "7"}
    assert read(write(tmp_path / "svamp.json", [concatenated])) == [("A 7. B?", 7)]
    assert read(write(tmp_path / "hard.json", [{"instruction": PENS, "response": 12.5}])) == [(PENS, 12.5)]


# --- Bytes, lines and endings ---

MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXTS = {
    "a.txt": f"{PENS}||<<7+5=12>> #### 12\n{EGGS}||<<3*4=12>> #### 12\n",
    "a.jsonl": f'{{"question": "{PENS}", "answer": 12}}\n{{"question": "{EGGS}", "answer": 12}}\n',
    "a.json": f'[{{"question": "{PENS}", "answer": 12}},\n {{"question": "{EGGS}", "answer": 12}}]\n',
    "a.csv": f'question,answer\n"{PENS}",12\n"{EGGS}",12\n',
    "a.tsv": f"question\tanswer\n{PENS}\t12\n{EGGS}\t12\n",
}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("name", TEXTS)
def test_byte_order_marks(name: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(MARKS[encoding] + TEXTS[name].replace("\n", "\r\n").encode(encoding))
    assert read(path) == BOTH
    assert "\ufeff" not in load_task(str(path))[0].question


@pytest.mark.parametrize("name", TEXTS)
def test_packed_and_upper_case(name: str, tmp_path: Path) -> None:
    packed = tmp_path / (name + ".gz")
    packed.write_bytes(gzip.compress(TEXTS[name].encode()))
    assert read(packed) == BOTH and load_task(str(packed))[0].prompt_id == "a-0"
    assert read(write(tmp_path / name.upper(), TEXTS[name])) == BOTH
    upper = tmp_path / (name.upper() + ".GZ")
    upper.write_bytes(gzip.compress(TEXTS[name].encode()))
    assert read(upper) == BOTH
    packed.write_bytes(gzip.compress(TEXTS[name].encode())[:-9])
    assert "cannot be unpacked" in refusal(packed)
    packed.write_bytes(TEXTS[name].encode())
    assert "cannot be unpacked" in refusal(packed)


def test_joined_files_have_marks_in_the_middle(tmp_path: Path) -> None:
    line = f"{PENS}||<<7+5=12>> #### 12\n"
    assert read(write(tmp_path / "a.txt", "\ufeff" + line + "\ufeff" + line)) == [(PENS, 12)] * 2
    record = '{"question": "1?", "answer": 1}\n'
    assert read(write(tmp_path / "a.jsonl", "\ufeff" + record + "\ufeff" + record)) == [("1?", 1)] * 2


def test_a_mark_that_a_converter_left_in_the_first_field_goes(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", [{"question": "\ufeff 7 \ufeff?", "answer": 1}])) == [("7 \ufeff?", 1)]
    assert "has no question" in refusal(write(tmp_path / "a.json", [{"question": "\ufeff", "answer": 1}]))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_line_feed_ends_a_line(separator: str, tmp_path: Path) -> None:
    question = f"7 pens{separator}and 5?"
    assert read(write(tmp_path / "a.txt", f"{question}||<<7+5=12>> #### 12\r\n")) == [(question, 12)]
    if separator.isprintable() or separator in "\u2028\u2029\x85":  # JSON wants the others escaped
        line = f'{{"question": "{question}", "answer": 12}}\n'
        assert read(write(tmp_path / "a.jsonl", line)) == [(question, 12)]
    assert read(write(tmp_path / "a.csv", f'question,answer\n"{question}",12\n')) == [(question, 12)]


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("caf\u00e9?||<<1+1=2>> #### 2".encode("latin-1"))
    assert "not a UTF-8 text file (invalid continuation byte at byte 3)" in refusal(path)
    path.write_bytes(codecs.BOM_UTF16_LE + b"a")
    assert "not a UTF-16 text file" in refusal(path)
    write(path, "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    assert "git lfs pull" in refusal(path)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing")
    assert "not a readable parquet file" in refusal(tmp_path / "p.parquet")


# --- Tables ---


def test_tables(tmp_path: Path) -> None:
    text = 'id,question,steps,answer,note\na,"Ann, who has 7,\nbuys 5?",<<7+5=12>>,"1,200",\nb,"say ""3""?",,$3,x\n\n'
    one, two = load_task(str(write(tmp_path / "t.csv", text)))
    assert (one.prompt_id, one.question, one.answer, one.intermediates) == (
        "a",
        "Ann, who has 7,\nbuys 5?",
        1200,
        (12,),
    )
    assert (two.prompt_id, two.question, two.answer, two.steps) == ("b", 'say "3"?', 3, ())
    semicolons = "question;answer\nHalf of 7?;3,5\n"
    assert "'3,5'" in refusal(write(tmp_path / "s.csv", semicolons))
    assert read(tmp_path / "s.csv", decimal_comma=True) == [("Half of 7?", 3.5)]
    indexed = ",question,answer\n0,1?,1\n1,2?,2\n"  # as pandas writes it
    assert read(write(tmp_path / "i.csv", indexed)) == [("1?", 1), ("2?", 2)]


def test_broken_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert "record 2 (line 3) has 3 cells, the header has 2" in refusal(write(path, "question,answer\n1?,1\n2?,2,3\n"))
    assert "record 1 (line 2) has 1 cells" in refusal(write(path, "question,answer\n1?\n"))
    assert "line 1: the header has 'answer' twice" in refusal(write(path, "question,answer,answer\n1?,1,1\n"))
    assert "line 2: not a valid table" in refusal(write(path, 'question,answer\n"1?,1\n'))
    assert "record 1 (line 2) has no question" in refusal(write(path, "a,b\n1?,1\n"))
    assert "record 3 (line 5) has no numeric answer: the field 'answer' holds 'x'" in refusal(
        write(path, "question,answer\n1?,1\n\n2?,2\n3?,x\n")
    )
    assert "no prompts" in refusal(write(path, "question,answer\n"))


# --- A folder of text files ---


def test_a_folder_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "b.txt", "2?||<<1+1=2>> #### 2\n")
    write(folder / "a.TXT", "\ufeff1?||<<0+1=1>> #### 1\n")
    write(folder / "LICENSE", "any")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"3?||<<1+2=3>> #### 3\n"))
    assert [(p.prompt_id, p.answer) for p in load_task(str(folder))] == [("a-0", 1), ("b-0", 2), ("c-0", 3)]
    assert "has no split 'foo'" in refusal(folder, split="foo")
    write(folder / "d.txt", "no bars\n")
    with pytest.raises(ValueError, match=r"d\.txt, line 1: expected question"):
        load_task(str(folder))
    (folder / "d.txt").unlink()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(folder / "data.jsonl", '{"question": "4?", "answer": 4}')  # of another kind now: a hub data set
    assert "data set" in refusal(folder, split="foo")


def test_a_folder_of_texts_named_after_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "1?||<<0+1=1>> #### 1\n")
    write(tmp_path / "test.txt", "2?||<<1+1=2>> #### 2\n")
    assert read(tmp_path) == [("2?", 2)]
    assert read(tmp_path, split="train") == [("1?", 1)]
    assert len(read(tmp_path, split="train+test")) == len(read(tmp_path, split="all")) == 2
    assert "no split 'valid'; allowed: test, train, all" in refusal(tmp_path, split="valid")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "1?", "answer": 1}\n')
    assert "a single file has no split 'foo', it is read whole: leave --split out" in refusal(path, split="foo")
    for split in ("test", "train", "derivation", "all", "published"):
        assert read(path, split=split) == [("1?", 1)]


def test_a_question_is_no_task() -> None:
    for task in ("a?\nb" * 10, "x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="unknown task .*; allowed: arithmetic") as caught:
            read_problems(task)
        assert "\n" not in str(caught.value)


# --- Questions in more than one field ---


def test_instruction_and_input_are_joined(tmp_path: Path) -> None:
    record = {"instruction": "Solve this.", "input": "7+5?", "output": "The sum.\n#### 12"}
    assert read(write(tmp_path / "a.jsonl", json.dumps(record))) == [("Solve this. 7+5?", 12)]
    record["input"] = " "
    assert read(write(tmp_path / "a.jsonl", json.dumps(record))) == [("Solve this.", 12)]


UNREAD = [
    {"question": "How many?", "context": "Ann has 7.", "answer": 7},
    {"question": "How many?", "passage": "Ann has 7.", "answer": 7},
    {"question": "How many?", "prompt": "Ann has 7. How many pens?", "answer": 7},
    {"question": "Which?", "choices": ["1", "2"], "answer": 1},
    {"question": "Which?", "choice0": "1", "choice1": "2", "answer": 1},
    {"instruction": "Solve.", "input": "7+5?", "question": "How?", "answer": 12},
    {"Question": "How many?", "Story": "Ann has 7.", "Answer": 7},
]


@pytest.mark.parametrize("record", UNREAD, ids=lambda record: "+".join(record))
def test_a_question_that_may_stand_in_unread_fields_is_refused(record: dict, tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.json", [{"question": "1?", "answer": 1}, record]))
    assert "record 2: the question is read from" in message
    read_from, unread = message.split(", but part of it may stand in ")
    names = set(record) - {"answer", "Answer"}
    assert {name for name in names if name in read_from.split("read from")[1]} | {
        name for name in names if name in unread
    } == names


def test_fields_that_repeat_the_question_are_no_trouble(tmp_path: Path) -> None:
    record = {"question": "Ann has 7.  How many?", "prompt": "Ann has 7. How many?", "context": "", "answer": 7}
    assert read(write(tmp_path / "a.json", [record])) == [("Ann has 7. How many?", 7)]


def test_answers_that_disagree_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    record = {"question": "7+5?", "response": "13", "answer": 12}
    assert "record 1: the answer fields disagree (response 13, answer 12)" in refusal(write(path, [record]))
    assert read(write(path, [{**record, "response": "12.0"}])) == [("7+5?", 12)]
    assert read(write(path, [{**record, "response": "She has twelve of 7+5."}])) == [("7+5?", 12)]
    assert "has the field 'answer' twice" in refusal(write(path, '[{"question": "a?", "answer": 1, "answer": 2}]'))


def test_a_worked_solution_gives_its_box(tmp_path: Path) -> None:
    record = {"problem": "7+5?", "solution": "We add 7 and 5, so it is $\\boxed{12}$ in all.", "level": "Level 1"}
    assert read(write(tmp_path / "a.json", [record])) == [("7+5?", 12)]
    record["solution"] = "We add 7 and 5, so it is 12."
    assert "no numeric answer" in refusal(write(tmp_path / "a.json", [record]))


# --- The last || before the steps ---


@pytest.mark.parametrize(
    ("line", "question", "steps"),
    [
        ("A || B: 7+5?||<<7+5=12>> #### 12", "A || B: 7+5?", ("7+5=12",)),
        ("P(A||B) || 7+5? || <<7+5=12>> <<12*1=12>> #### 12", "P(A||B) || 7+5?", ("7+5=12", "12*1=12")),
        ("|| a ||b|||| #### 12", "|| a ||b||", ()),
        ("a #### b || 7+5?||<<7+5=12>> #### 12", "a #### b || 7+5?", ("7+5=12",)),
    ],
)
def test_bars_in_a_question(line: str, question: str, steps: tuple[str, ...], tmp_path: Path) -> None:
    (problem,) = load_task(str(write(tmp_path / "a.txt", line)))
    assert (problem.question, problem.steps, problem.answer) == (question, steps, 12)


def test_bars_that_may_separate_in_two_places_are_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.txt", "1?||<<1+0=1>> #### 1\na||<<b>>||<<7+5=12>> #### 12\n"))
    assert "line 2: || stands before << in 2 places" in message


# --- Numbers, surrogates, places ---


def test_answers_that_no_float_holds_are_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = '{"question": "1?", "answer": 1}'
    for number in ("9" * 400, "9" * 5000, '"' + "9" * 400 + '"', "1e400", '"1e400"', "-1e99999", "1e-400", "NaN"):
        message = refusal(write(path, f'[{good}, {{"question": "2?", "answer": {number}}}]'))
        assert "record 2 has no numeric answer: the field 'answer' holds" in message and len(message) < 400
    exact = "12345678901234567890"
    for number in (exact, exact + ".0", f'"{exact}"', "1.234567890123456789e19"):
        assert read(write(path, f'[{{"question": "2?", "answer": {number}}}]')) == [("2?", int(exact))]


def test_numbers_of_a_question_are_exact(tmp_path: Path) -> None:
    text = "9007199254740993 and 1,200 and 2.0 and " + "9" * 400 + "?"
    (problem,) = load_task(str(write(tmp_path / "a.json", [{"question": text, "answer": 1}])))
    assert problem.numbers == (9007199254740993, 1200, 2)


def test_steps_that_no_float_holds_are_refused(tmp_path: Path) -> None:
    record = {"question": "1?", "answer": 1, "steps": ["1*1=1", "9*9=" + "9" * 400]}
    message = refusal(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert "line 1: in the field 'steps' the value of the step '9*9=999" in message and "too large" in message
    record["steps"] = ["1*1=1", "2/3=0,67"]  # a value that cannot be read: not known, and positions never shift
    (problem,) = load_task(str(write(tmp_path / "a.jsonl", json.dumps(record))))
    assert (len(problem.steps), problem.intermediates) == (2, ())


@pytest.mark.parametrize("field", ["question", "id", "Type", "steps", "answer"])
def test_half_characters_are_refused_with_their_field(field: str, tmp_path: Path) -> None:
    record: dict = {"id": "x", "question": "7+5?", "Type": "t", "steps": "<<7+5=12>>", "answer": "12"}
    record[field] = record[field][:2] + "\ud83c" + record[field][2:]
    message = refusal(write(tmp_path / "a.jsonl", '{"question": "1?", "answer": 1}\n\n' + json.dumps(record)))
    assert f"line 3: the field {field!r} holds half a character (\\ud83c, a lone surrogate)" in message
    message.encode("utf-8")


def test_records_are_counted_as_lines_are(tmp_path: Path) -> None:
    good = '{"question": "1?", "answer": 1}'
    assert "a.jsonl, line 4 has no num" in refusal(
        write(tmp_path / "a.jsonl", f'{good}\n\n{good}\n{{"question": "b"}}')
    )
    assert "a.json: record 2 has no num" in refusal(write(tmp_path / "a.json", f'[{good}, {{"question": "b"}}]'))
    assert "a.txt, line 3: expected" in refusal(write(tmp_path / "a.txt", "1?||<<1+0=1>> #### 1\n\nno\n"))
    twice = [{"id": 7, "question": "1?", "answer": 1}] * 2
    assert "record 2: prompt id '7' occurs twice, first in record 1" in refusal(write(tmp_path / "b.json", twice))
    lines = "\n".join(map(json.dumps, twice))
    assert "line 2: prompt id '7' occurs twice, first in line 1" in refusal(write(tmp_path / "b.jsonl", lines))


def test_odd_names_and_depths_stay_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert "'a\\nb'" in refusal(write(path, [{"a\nb": 1}]))
    assert "and 30 more" in refusal(write(path, [{f"f{i}": 1 for i in range(50)}]))
    assert "nested too deeply" in refusal(write(path, "[" * 100_000))
    long = {"question": "1?", "answer": 1, "Equation": "(" * 50_000}
    assert read(write(path, [long])) == [("1?", 1)]
    marks = {"question": "1?", "answer": 1, "cot": "<<" * 50_000}  # not quadratic
    assert read(write(path, [marks])) == [("1?", 1)]


# --- Known intermediate values ---


def test_the_steps_field(tmp_path: Path) -> None:
    ways = [["7+5=12", "12*3=36"], ["<<7+5=12>>", "<<12*3=36>>"], "<<7+5=12>> <<12*3=36>>"]
    for steps in ways:
        record = {"question": "7, 5, times 3?", "answer": 36, "steps": steps}
        (problem,) = load_task(str(write(tmp_path / "a.json", [record])))
        assert (problem.steps, problem.intermediates) == (("7+5=12", "12*3=36"), (12, 36))


def test_missing_steps_are_explained(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.json", [{"question": "1?", "answer": 1}]), min_steps=1)
    assert STEPS_HELP in message and "field 'steps'" in message
    known = {"question": "1?", "answer": 1, "steps": ["1+0=1"]}
    assert STEPS_HELP not in refusal(write(tmp_path / "a.json", [known]), min_steps=2)


# --- Directions from another task ---


def own(path: Path, count: int = 6, shift: int = 0) -> str:
    records = [{"question": f"{i + shift} and {i + 50}?", "answer": i, "id": f"q{i}"} for i in range(count)]
    return str(write(path, records))


def split_of(task: str, **options: object):
    return load_split(task, limit=None, derivation=4, seed=0, suffix=" Go.", **options)


@pytest.mark.parametrize("source", ["templates", "arithmetic", "file", "folder"])
def test_directions_from_another_task(source: str, tmp_path: Path) -> None:
    task = own(tmp_path / "own.json")
    if source == "file":
        source = own(tmp_path / "other.json", 9, shift=1)
    elif source == "folder":
        (tmp_path / "texts").mkdir()
        write(tmp_path / "texts" / "test.txt", "1 and 2?||<<1+2=3>> #### 3\n")
        write(
            tmp_path / "texts" / "train.txt", "".join(f"{i} or 9?||<<{i}+9={i + 9}>> #### {i + 9}\n" for i in range(7))
        )
        source = str(tmp_path / "texts")
    split = split_of(task, derivation_task=source)
    assert [p.question for p in split.evaluation] == [p.question + " Go." for p in load_task(task)]
    assert len(split.derivation) == 4 and all(p.question.endswith(" Go.") for p in split.derivation)
    assert not {p.prompt_id for p in split.derivation} & {p.prompt_id for p in split.evaluation}
    check_disjoint(split.derivation, split.evaluation)
    assert split == split_of(task, derivation_task=source)


def test_a_single_own_prompt_can_be_evaluated(tmp_path: Path) -> None:
    task = str(write(tmp_path / "one.jsonl", json.dumps({"question": "7 and 5?", "answer": 12})))
    with pytest.raises(ValueError, match=r"one\.jsonl: .*one cluster .*--derivation-task") as caught:
        split_of(task)
    assert "\n" not in str(caught.value)
    assert len(split_of(task, derivation_task="templates").evaluation) == 1
    two = [{"question": "7 and 5?", "answer": 12}, {"question": "8 and 5?", "answer": 13}]
    with pytest.raises(ValueError, match="1 prompts are left .*--derivation-task"):
        split_of(str(write(tmp_path / "two.json", two)))


def test_what_the_tasks_share_is_left_out(tmp_path: Path) -> None:
    task, same = own(tmp_path / "a.json"), own(tmp_path / "b.json", 8)  # the first six are the same prompts
    split = split_of(task, derivation_task=same)
    assert [problem.prompt_id for problem in split.derivation] == ["q6", "q7"]
    copy = own(tmp_path / "c.json")
    with pytest.raises(ValueError, match=r"c\.json: 0 prompts are left .*another one"):
        split_of(task, derivation_task=copy)
    assert split_of(task, derivation_task=task) == split_of(task)
    with pytest.raises(ValueError, match="legacy derives from the evaluated prompts"):
        split_of(task, derivation_task="templates", legacy=True)


def test_splits_without_another_task_are_what_they_were(tmp_path: Path) -> None:
    """The choice for a file and for a generated task, as it was before other tasks could be derived from."""
    task = own(tmp_path / "own.json", 20)
    split = split_of(task)
    problems = load_task(task, suffix=" Go.")
    groups = sorted("question:" + problem.question for problem in problems)
    random.Random(0).shuffle(groups)
    first = [p for p in problems if "question:" + p.question in groups[:4]]
    assert split.derivation == tuple(first) and len(split.evaluation) == 16


def test_problems_are_plain_values() -> None:
    problem = Problem("a", "1?", 1, steps=("1+0=1",))
    assert problem.chain == "<<1+0=1>>"


def test_read_file_and_load_task_agree() -> None:
    assert read_file(CASES / "bom.jsonl") == load_task(str(CASES / "bom.jsonl"))
