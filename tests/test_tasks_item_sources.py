"""Every source of items gives three parts that share nothing; what cannot be read is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.tasks.item_sources import ITEM_TASKS, Sizes, check_item_task, load_items
from experiments.tasks.items import Item, ItemSplits

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GENERATED = [task for task in ITEM_TASKS if task not in ("gsm8k", "multiarith", "svamp")]


def traits(items: tuple[Item, ...]) -> set[str]:
    return {" ".join(item.question.split()) for item in items} | {item.cluster for item in items if item.cluster}


def check_apart(splits: ItemSplits) -> None:
    sets = [traits(items) for items in splits.parts.values()]
    for i, first in enumerate(sets):
        for second in sets[i + 1 :]:
            assert not first & second
    ids = [item.prompt_id for items in splits.parts.values() for item in items]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("task", [*GENERATED, "babi-15:unseen", "babi-16:training"])
def test_generated_tasks(task: str) -> None:
    splits = load_items(task, Sizes(12, 8, 9))
    assert [len(items) for items in splits.parts.values()] == [12, 8, 9]
    check_apart(splits)
    assert splits == load_items(task, Sizes(12, 8, 9))
    assert splits.test != load_items(task, Sizes(12, 8, 9), seed=1).test
    item = splits.test[0]
    assert item.kind == ("number" if task == "arithmetic" else "word")
    assert (item.form == "plain") == task.startswith("indirect")
    if task != "arithmetic":
        assert item.answer in item.choices and len(set(item.choices)) == len(item.choices) > 1
    with pytest.raises(ValueError, match="generated"):
        load_items(task, Sizes(2, 2, None))


def test_a_part_that_is_not_asked_for_is_empty() -> None:
    splits = load_items("babi-16", Sizes(0, 0, 5))
    assert not splits.derivation and not splits.validation and len(splits.test) == 5
    with pytest.raises(ValueError, match="no items"):
        Sizes(0, 0, 0)


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_a_file_of_questions_in_words(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"question": f"Who is number {i}?", "answer": f"name{i % 3}", "choices": ["name0", "name1", "name2"],
         "cluster": f"c{i // 2}"}
        for i in range(30)
    ]  # fmt: skip
    splits = load_items(str(write(tmp_path / "mine.jsonl", records)), Sizes(8, 100, None))
    check_apart(splits)
    assert len(splits.test) + len(splits.validation) + len(splits.derivation) <= 30
    assert len(splits.derivation) == 8  # 5 clusters of two, of which 8 items are taken
    assert len(splits.validation) == 10 and len(splits.test) == 10  # a third of the clusters at most
    assert {item.kind for item in splits.test} == {"word"} and splits.test[0].task == "mine"
    letters = [{"question": f"q{i}", "answer": "AB"[i % 2], "choices": ["A", "B"]} for i in range(6)]
    assert load_items(str(write(tmp_path / "letters.jsonl", letters)), Sizes(1, 1)).test[0].kind == "letter"
    numbers = [{"question": f"1+{i}?", "answer": 1 + i} for i in range(6)]
    found = load_items(str(write(tmp_path / "numbers.jsonl", numbers)), Sizes(1, 1))
    assert found.test[0].kind == "number" and not found.test[0].choices


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q?", "answer": "c", "choices": ["a", "b"]}, "the answer 'c' is none of its choices"),
        ({"question": "q?", "answer": "a", "choices": "ab"}, "choices must be a list"),
        ({"question": "q?", "answer": "a", "choices": ["a", "a"]}, "choices must be a list of different texts"),
        ({"question": " ", "answer": "a"}, "question must be a text"),
        ({"question": "q?", "answer": None}, "answer must be a text"),
    ],
)
def test_a_broken_record_is_named(record: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(3)] + [record])
    with pytest.raises(ValueError, match=message) as error:
        load_items(str(path), Sizes(1, 1))
    assert "line 4" in str(error.value) and "\n" not in str(error.value)


def test_too_few_items_and_unknown_names(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(2)])
    with pytest.raises(ValueError, match="2 independent items cannot be divided into 3 parts"):
        load_items(str(path), Sizes(1, 1))
    for task in ("indirect-objects-C", "babi-17", "mmlu:nowhere.csv", "ontology-4"):
        with pytest.raises(ValueError, match="unknown task"):
            check_item_task(task)
    with pytest.raises(ValueError, match="vocabulary must be one of"):
        check_item_task("babi-15:other")
    check_item_task("facebook/babi_qa:en-10k-qa15")


def test_splits_that_share_a_question_are_refused() -> None:
    item = Item("a", "t", "Who is it?", "x")
    with pytest.raises(ValueError, match="share their question"):
        ItemSplits(derivation=(item,), test=(Item("b", "t", "Who  is it?", "x"),))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"public data files are not at {SHARED}")
@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("babi/qa15_basic-deduction_train.txt", "word"),
        ("babi/qa16_basic-induction_train.txt", "word"),
        ("gsm8k/test.jsonl", "number"),
        ("svamp/SVAMP.json", "number"),
        ("multiarith/MultiArith.json", "number"),
        ("mmlu:mmlu", "letter"),
        ("arc:arc/ARC-Challenge-Dev.jsonl", "letter"),
        ("agieval:agieval/sat-math.jsonl", "letter"),
    ],
)
def test_published_files(place: str, kind: str) -> None:
    prefix, colon, path = place.rpartition(":")
    splits = load_items(f"{prefix}{colon}{SHARED / path}", Sizes(20, 10, 15))
    check_apart(splits)
    assert [len(items) for items in splits.parts.values()] == [20, 10, 15]
    assert {item.kind for item in splits.test} == {kind}


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for split, n, start in (("train", 12, 10), ("test", 5, 50)):
        rows = [{"question": f"{split} {start + i} + 1?", "answer": f"#### {start + i + 1}"} for i in range(n)]
        rows.append({"question": "the same?", "answer": "#### 1"})
        write(tmp_path / f"{split}.jsonl", rows)
    splits = load_items(str(tmp_path), Sizes(6, 4, None))
    check_apart(splits)
    assert [len(items) for items in splits.parts.values()] == [6, 4, 6]
    assert all(item.question.startswith("train") for item in (*splits.derivation, *splits.validation))
