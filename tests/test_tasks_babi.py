"""bAbI 15 and 16: the same invariants hold for the published files and for what is generated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.tasks.babi import PUBLISHED, TRAINING, UNSEEN, VOCABULARIES, Babi, generate, read_file, read_rows

DATA = Path(__file__).resolve().parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "babi"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"published bAbI files are not at {SHARED}")


def check_deduction(items: Sequence[Babi], vocabulary=PUBLISHED) -> None:  # type: ignore[no-untyped-def]
    singular = {plural: one for one, plural in vocabulary.fearing}
    for item in items:
        fears, kinds = {}, {}
        for fact in item.facts:
            if found := re.fullmatch(r"(\w+) are afraid of (\w+)\.", fact):
                assert found[1].lower() != found[2]
                fears[singular[found[1].lower()]] = singular[found[2]]
            else:
                name, kind = re.fullmatch(r"(\w+) is an? (\w+)\.", fact).groups()  # type: ignore[union-attr]
                kinds[name] = kind
        assert len(item.facts) == 8 and len(fears) == 4 and len(kinds) == 4 and set(kinds.values()) <= set(fears)
        name = item.question.removeprefix("What is ").removesuffix(" afraid of?").capitalize()
        assert item.answer == fears[kinds[name]]
        kind, fear = (item.facts[i] for i in item.support)
        assert kind.startswith(f"{name} is a") and singular[fear.split()[0].lower()] == kinds[name]
        assert item.choices == tuple(sorted(fears)) and item.answer in item.choices
        assert item.chain[-1] == f"{name} is afraid of {fear.split()[-1]}" and item.chain[:2] == (kind, fear)
    assert set(Counter(item.cluster for item in items).values()) == {4}
    assert len({item.prompt_id for item in items}) == len(items)


def check_induction(items: Sequence[Babi]) -> tuple[int, Counter[int]]:
    conflicts, others = 0, Counter[int]()
    for item in items:
        kinds: dict[str, str] = {}
        colours: dict[str, str] = {}
        for fact in item.facts:
            name, verb, thing = re.fullmatch(r"(\w+) (is an?|is) (\w+)\.", fact).groups()  # type: ignore[union-attr]
            if verb == "is":
                assert name in kinds  # what one is comes first
                colours[name] = thing
            else:
                kinds[name] = thing
        name = item.question.removeprefix("What color is ").rstrip("?")
        assert len(item.facts) == 9 and len(kinds) == 5 and set(kinds) - set(colours) == {name}
        same = [other for other in kinds if other != name and kinds[other] == kinds[name]]  # in the order of the text
        own, other, colour = (item.facts[i] for i in item.support)
        assert own.startswith(f"{name} is a") and other.startswith(f"{same[-1]} is a")
        assert colour == f"{same[-1]} is {item.answer}."
        assert item.answer == colours[same[-1]] and set(item.choices) == set(colours.values())
        assert item.chain[-1] == f"{name} is {item.answer}."
        conflicts += len({colours[other] for other in same}) > 1
        others[len(same)] += 1
    return conflicts, others


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=lambda v: v.name)
def test_generated_stories(vocabulary) -> None:  # type: ignore[no-untyped-def]
    check_deduction(generate(200, 15, 3, vocabulary), vocabulary)
    conflicts, others = check_induction(generate(400, 16, 3, vocabulary))
    assert conflicts == 0 and set(others) == {1, 3, 4} and others[1] > 300
    conflicts, _ = check_induction(generate(400, 16, 3, vocabulary, conflicts=True))
    assert 15 <= conflicts <= 70
    # no answer, and no place of the support, is preferred
    answers = Counter(item.answer for item in generate(800, 15, 4, vocabulary))
    assert max(answers.values()) < 2 * min(answers.values())
    assert len({item.support for item in generate(400, 15, 4, vocabulary)}) > 40


@needs_shared
def test_published_files_have_these_invariants() -> None:
    deduction = read_file(SHARED / "qa15_basic-deduction_train.txt")
    assert len(deduction) == 1000 and deduction[0].task == 15
    check_deduction(deduction)
    assert deduction[0].answer == "wolf" and deduction[0].support == (1, 0)
    induction = read_file(SHARED / "qa16_basic-induction_train.txt")
    assert len(induction) == 1000
    conflicts, others = check_induction(induction)
    assert conflicts == 86 and others == {1: 881, 3: 104, 4: 15}


@needs_shared
def test_generated_stories_are_not_published_ones() -> None:
    published = {item.story for name in ("qa15_basic-deduction", "qa16_basic-induction")
                 for item in read_file(SHARED / f"{name}_train.txt")}  # fmt: skip
    assert not published & {item.story for task in (15, 16) for item in generate(400, task)}


def test_seeds_vocabularies_and_refusals() -> None:
    assert generate(30, 16, 1) == generate(30, 16, 1) != generate(30, 16, 2)
    assert len(generate(5, 15)) == 5
    words = [
        {w for task in (15, 16) for item in generate(200, task, 0, v) for w in re.findall("[A-Z]?[a-z]+", item.text)}
        for v in (TRAINING, UNSEEN)
    ]
    frame = {"What", "is", "afraid", "of", "color", "are", "a", "an", "lion"}
    assert words[0] & words[1] <= frame
    with pytest.raises(ValueError, match="15 or 16, got 14"):
        generate(3, 14)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        generate(0, 15)


def test_numbered_lines(tmp_path: Path) -> None:
    first, second, third = read_file(DATA / "qa15_made_up.txt")
    assert first.facts == ("Owls are afraid of geese.", "Ida is an owl.", "Geese are afraid of owls.")
    assert (first.answer, first.support) == ("goose", (1, 0))
    # questions are no facts: the numbers of the support count them, positions in `facts` do not
    assert (second.answer, second.support, len(second.facts)) == ("owl", (3, 2), 4)
    assert first.cluster == second.cluster != third.cluster and third.facts[0] == "Lily is a frog."
    assert third.chain == ("Greg is a frog.", "Lily is a frog.", "Lily is white.", "Greg is white.")
    for text, message in (
        ("1 A is b.\n2 What?\tx\n", "after tabs"),
        ("A is b.\n", "expected a number"),
        ("1 A is b.\n", "no question found"),
        ("1 A is b.\n2 What?\tx\t3\n", "not among the facts"),
    ):
        path = tmp_path / "qa15_x.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_file(path)
    (tmp_path / "story.txt").write_text("1 A is b.\n2 What?\tx\t1\n")
    with pytest.raises(ValueError, match="give the task"):
        read_file(tmp_path / "story.txt")
    assert read_file(tmp_path / "story.txt", 1)[0].choices == ("x",)


def test_hub_rows_are_the_same_items() -> None:
    rows: list[dict[str, Any]] = []
    for line in (DATA / "qa15_made_up.txt").read_text().splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            rows.append({"story": {f: [] for f in ("id", "type", "text", "supporting_ids", "answer")}})
        text, answer, support = [*rest.split("\t"), "", ""][:3]
        values = {"id": number, "type": int(bool(answer)), "text": text, "supporting_ids": support.split()}
        for field, value in {**values, "answer": answer}.items():
            rows[-1]["story"][field].append(value)
    found = read_rows(rows, 15)
    assert [(i.facts, i.question, i.answer, i.support) for i in found] == [
        (i.facts, i.question, i.answer, i.support) for i in read_file(DATA / "qa15_made_up.txt")
    ]
    with pytest.raises(ValueError, match="row 0: a story with id, type"):
        read_rows([{"text": "x"}], 15)
