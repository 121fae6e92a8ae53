"""Data-set readers: published files where they are at hand, and small files and folders of the same layouts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from experiments.tasks import Problem, load_task, split_by_cluster, with_suffix
from experiments.tasks.answers import parse_number
from experiments.tasks.readers import HUB_DEFAULTS, equation_steps, read_file, read_hub, read_problems

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="the public data files (../shared/data) are not here; small files in the same formats are tested instead",
)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def last_value(problem: Problem) -> float | None:
    value = parse_number(problem.steps[-1].rsplit("=", 1)[-1]) if problem.steps else None
    return None if value is None else float(value)


# --- The published files ---


@needs_data
def test_gsm8k_files_agree_and_the_last_step_is_not_always_the_answer() -> None:
    original = read_file(DATA / "gsm8k" / "test.jsonl")
    augmented = read_file(DATA / "gsm8k_aug" / "test.txt")
    assert len(original) == len(augmented) == 1319
    assert [problem.answer for problem in original] == [problem.answer for problem in augmented]
    # 111 of 1,319: the last annotated step is missing or is not the answer
    assert sum(last_value(problem) != problem.answer for problem in augmented) == 111
    first = augmented[0]
    assert (first.answer, first.steps, first.intermediates) == (18, ("16-3-4=9", "9*2=18"), (9, 18))
    assert first.chain == "<<16-3-4=9>><<9*2=18>>"
    assert first.numbers == (16, 2) and "  " not in first.question
    assert len(read_file(DATA / "gsm8k" / "train.jsonl")) == 7473
    assert len(read_file(DATA / "gsm8k_aug" / "valid.txt")) == 500


@needs_data
def test_svamp_keeps_the_stated_answer_where_the_equation_says_otherwise() -> None:
    problems = {problem.prompt_id: problem for problem in read_file(DATA / "svamp" / "SVAMP.json")}
    assert len(problems) == 1000
    odd = {key: problem for key, problem in problems.items() if last_value(problem) != problem.answer}
    assert set(odd) == {"chal-680", "chal-555"}
    assert (odd["chal-680"].answer, odd["chal-680"].steps) == (1, ("4-2=2", "2+3=5"))
    assert (odd["chal-555"].answer, odd["chal-555"].steps) == (8, ())  # its equation is the bare number
    first = problems["chal-1"]
    assert (first.answer, first.operation, first.intermediates) == (51, "subtraction", (51,))
    assert first.question.endswith("on each pack How much do you have to pay to buy each pack?")


@needs_data
def test_multiarith_equations_give_the_answer() -> None:
    problems = read_file(DATA / "multiarith" / "MultiArith.json")
    assert len(problems) == 600
    assert all(problem.intermediates[-1] == problem.answer for problem in problems)
    assert problems[0].steps == ("32+42=74", "74-35=39")
    assert problems[0].question == problems[0].question.strip()


# --- One table of layouts, as single files and as folders of a hub data set ---

QUESTION = "Ann has 7 pens and buys 5 boxes of 3. How many?"
LAYOUTS = {
    "openai/gsm8k": ({"question": QUESTION, "answer": "5*3=<<5*3=15>>15\n<<7+15=22>>\n#### 22"}, True),
    "zen-E/GSM8k-Aug": ({"question": QUESTION, "cot": "<<5*3=15>> <<7+15=22>>", "answer": "22"}, True),
    "whynlp/gsm8k-aug": ({"question": QUESTION, "steps": ["<<5*3=15>>", "<<7+15=22>>"], "answer": "22"}, True),
    "steps without brackets": ({"question": QUESTION, "steps": ["5*3=15", "7+15=22"], "answer": 22}, True),
    "ChilleD/SVAMP": (
        {"question_concat": QUESTION, "Body": "", "Question": "", "Equation": "((5 * 3.0 ) + 7.0 )", "Answer": "22"},
        True,
    ),
    "ChilleD/MultiArith": ({"question": QUESTION, "final_ans": "22"}, False),
    "juyoung-trl/gsm-hard": ({"instruction": QUESTION, "response": 22.0}, False),
    "own prompts": ({"prompt": QUESTION, "ground_truth": 22}, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_one_problem(name: str, tmp_path: Path) -> None:
    record, has_steps = LAYOUTS[name]
    (problem,) = read_file(write(tmp_path / "a.jsonl", json.dumps(record) + "\n"))
    assert (problem.question, problem.answer, problem.numbers) == (QUESTION, 22, (7, 5, 3))
    assert isinstance(problem.answer, int)
    assert problem.intermediates == ((15, 22) if has_steps else ())
    assert (problem.cluster, problem.prompt_id) == ("3,5,7", "a-0")
    assert read_file(write(tmp_path / "a.json", [record])) == [problem]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_in_the_layout_of_a_hub_data_set(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    record, has_steps = LAYOUTS[name]
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        frame = pd.DataFrame([record] * count)
        path = folder / "data" / f"{split}-00000-of-00001.{suffix}"
        if suffix == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records", lines=suffix == "jsonl")
    problems = load_task(str(folder), split="test")
    assert [problem.prompt_id for problem in problems] == ["set-test-0", "set-test-1"]
    assert {(problem.question, problem.answer) for problem in problems} == {(QUESTION, 22)}
    assert problems[0].intermediates == ((15, 22) if has_steps else ())
    if suffix == "parquet":
        assert len(read_hub(str(folder), "train+test")) == 5
        with pytest.raises(ValueError, match="no split 'validation'; allowed: train, test"):
            read_hub(str(folder), "validation")
        with pytest.raises(ValueError, match="'published' is known for openai/gsm8k"):
            read_hub(str(folder), "published")


def test_a_downloaded_copy_keeps_its_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of openai/gsm8k: configurations main and socratic, named in the data card."""
    import pandas as pd

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("gsm8k", "other"):
        card = "---\nconfigs:\n"
        for configuration, answer in (("main", 1), ("socratic", 2)):
            folder = tmp_path / name / configuration
            folder.mkdir(parents=True)
            frame = pd.DataFrame([{"question": f"{configuration}?", "answer": f"<<1+1=2>>\n#### {answer}"}])
            frame.to_parquet(folder / "test-00000-of-00001.parquet")
            card += f"- config_name: {configuration}\n  data_files:\n  - split: test\n    path: {configuration}/*\n"
        (tmp_path / name / "README.md").write_text(card + "---\n")
    copy, other = str(tmp_path / "gsm8k"), str(tmp_path / "other")
    assert [problem.answer for problem in load_task(copy)] == [1]
    assert [problem.answer for problem in load_task(copy, split="published")] == [1]
    assert [problem.answer for problem in load_task(copy + ":socratic")] == [2]
    assert [problem.answer for problem in load_task(other + ":main")] == [1]
    with pytest.raises(ValueError, match="several configurations: .*one of main, socratic"):
        load_task(other)
    with pytest.raises(ValueError, match="cannot be loaded .*nope"):
        load_task(other + ":nope")


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_task(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_hub_ids_use_the_published_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None) -> dict[str, list]:
        asked.append((name, configuration))
        record = LAYOUTS[name][0]
        return {"train": [record], "test": [{**record}, {**record}], "validation": [record]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sizes = {name: len(read_problems(name, "published")) for name in HUB_DEFAULTS}
    assert sizes == {
        "openai/gsm8k": 2,
        "zen-E/GSM8k-Aug": 2,
        "whynlp/gsm8k-aug": 2,
        "ChilleD/SVAMP": 3,
        "ChilleD/MultiArith": 2,
        "juyoung-trl/gsm-hard": 1,
    }
    assert asked[0] == ("openai/gsm8k", "main")
    read_problems("openai/gsm8k:socratic", "train")
    assert asked[-1] == ("openai/gsm8k", "socratic")


def test_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match="openai/gsm8k.*Couldn't reach the hub.*path of its folder") as caught:
        read_problems("openai/gsm8k")
    assert "\n" not in str(caught.value)


# --- prompts.json ---


def entry(x: int, y: int, z: int, template: int = 0) -> dict:
    made = {"id": f"{template}-{x}-{y}-{z}", "template_idx": template, "X": x, "Y": y, "Z": z}
    for operation, sign in (("addition", 1), ("subtraction", -1)):
        first = x + sign * y
        made[operation] = {"prompt": f" {operation}:  {x}, {y}, {z}? ", "ground_truth": first * z + first}
    return made


def test_prompts_file_gives_twins_with_their_steps(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.json", {"config": {}, "prompts": [entry(5, 3, 4, 7), entry(8, 1, 2)]})
    problems = read_file(path)
    assert [problem.operation for problem in problems] == ["addition", "subtraction"] * 2
    plus, minus = problems[:2]
    assert (plus.answer, plus.steps, plus.intermediates) == (40, ("5+3=8", "8*4=32", "8+32=40"), (8, 32, 40))
    assert (minus.answer, minus.steps, minus.intermediates) == (10, ("5-3=2", "2*4=8", "2+8=10"), (2, 8, 10))
    assert plus.cluster == minus.cluster == "5,3,4" != problems[2].cluster
    assert (plus.template, plus.numbers, plus.prompt_id) == ("7", (5, 3, 4), "7-5-3-4-addition")
    assert plus.question == " addition:  5, 3, 4? "  # used as it is


def test_prompts_file_with_another_formula_keeps_the_answer_and_claims_no_steps(tmp_path: Path) -> None:
    changed = entry(5, 3, 4)
    changed["addition"]["ground_truth"] = 41
    plus, minus = read_file(write(tmp_path / "prompts.json", {"prompts": [changed]}))
    assert (plus.answer, plus.steps, plus.intermediates) == (41, (), ())
    assert minus.intermediates == (2, 8, 10)


# --- Bad input: one clear line ---

BAD = {
    "empty.json": ("", "empty.json: the file is empty"),
    "blank.txt": ("\n \n", "the file is empty"),
    "none.json": ("[]", "no prompts in it"),
    "no_prompts.json": ('{"prompts": []}', "no prompts in it"),
    "broken.json": ('[{"question": "a", ', "not valid JSON .*line 1"),
    "broken.jsonl": ('{"question": "1?", "answer": "2"}\n{oops}\n', "broken.jsonl, line 2: not valid JSON"),
    "object.json": ('{"data": 3}', 'expected a list of records or an object with a list "prompts".*data'),
    "number.json": ("3", "expected a list of records, got int"),
    "strings.json": ('["how many?"]', "record 1 must be an object with a question and an answer, got str"),
    "no_answer.json": ('[{"prompt": "a", "answer": 3}, {"prompt": "b"}]', "record 2 has no numeric answer.*prom"),
    "words.json": ('[{"question": "b?", "answer": "a dozen"}]', "record 1 has no numeric answer.*'a dozen'"),
    "no_question.json": ('[{"answer": 3}]', "record 1 has no question"),
    "blank_question.json": ('[{"question": " ", "answer": 3}]', "record 1 has no question"),
    "twin.json": ('{"prompts": [{"addition": {"prompt": "a?"}}]}', "record 1: addition has no numeric answer"),
    "twice.json": ('[{"ID": 1, "prompt": "a", "answer": 3}, {"ID": 1, "prompt": "b","answer": 3}]', "'1' occurs twice"),
    "line.txt": ("a question without bars\n", "line 1: expected question"),
    "half.txt": ("a?||<<1+1=2>>\n", "line 1: expected question"),
    "table.doc": ("a,b", "must end in one of .json, .jsonl, .txt, .parquet, .csv, .tsv"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        load_task(str(write(tmp_path / name, content)))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[\xff\xfe]")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        read_file(path)


@pytest.mark.parametrize("task", ["nope", "arithmetics", "a b", "missing.json", "./missing", "/no/such/place"])
def test_unknown_task_lists_what_is_allowed(task: str) -> None:
    with pytest.raises(ValueError, match="allowed: arithmetic, polynomial .*, templates, .*openai/gsm8k") as caught:
        load_task(task)
    assert task in str(caught.value) and "\n" not in str(caught.value)


# --- load_task ---


def many(tmp_path: Path, count: int = 30) -> str:
    records = [{"question": f"{i} and {i + 1}?", "answer": i, "steps": ["1+1=2"] * (i % 4)} for i in range(count)]
    return str(write(tmp_path / "many.json", records))


def test_limit_is_a_seeded_choice_in_file_order(tmp_path: Path) -> None:
    path = many(tmp_path)
    chosen = [problem.answer for problem in load_task(path, limit=8, seed=1)]
    assert chosen == sorted(chosen) and len(set(chosen)) == 8
    assert chosen == [problem.answer for problem in load_task(path, limit=8, seed=1)]
    assert chosen != [problem.answer for problem in load_task(path, limit=8, seed=2)]
    assert len(load_task(path, limit=500)) == len(load_task(path)) == 30
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_task(path, limit=0)


def test_number_of_steps(tmp_path: Path) -> None:
    path = many(tmp_path)
    assert {len(problem.steps) for problem in load_task(path)} == {0, 1, 2, 3}
    assert {len(problem.steps) for problem in load_task(path, min_steps=2)} == {2, 3}
    assert {len(problem.steps) for problem in load_task(path, max_steps=2)} == {1, 2}
    with pytest.raises(ValueError, match="no problem has between 9"):
        load_task(path, min_steps=9)
    with pytest.raises(ValueError, match="must not exceed"):
        load_task(path, min_steps=3, max_steps=2)
    everything = load_task(path)
    bound = sorted(problem.answer for problem in everything)[len(everything) // 2]
    large = [problem for problem in everything if max((problem.answer, *problem.intermediates)) >= bound]
    assert 0 < len(large) < len(everything) and load_task(path, reach=bound) == large
    with pytest.raises(ValueError, match="no problem has a value of 1000000 or more"):
        load_task(path, reach=10**6)


def test_suffix_is_added_once_and_can_be_left_out(tmp_path: Path) -> None:
    suffix = " Output only the answer and nothing else."
    path = str(write(tmp_path / "a.json", [{"question": "1?", "answer": 1}, {"question": "2?" + suffix, "answer": 2}]))
    assert [problem.question for problem in load_task(path)] == ["1?", "2?" + suffix]
    once = load_task(path, suffix=suffix)
    assert [problem.question for problem in once] == ["1?" + suffix, "2?" + suffix]
    assert with_suffix(once, suffix) == once
    with pytest.raises(ValueError, match="question_suffix, got True"):
        load_task(path, suffix=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["arithmetic", "polynomial", "polynomial:m=97,b=3", "templates"])
def test_generated_tasks(task: str) -> None:
    problems = load_task(task, split="test", limit=40, seed=3, suffix=" Go.")
    assert len(problems) == 40 == len({problem.prompt_id for problem in problems})
    assert all(problem.question.endswith(" Go.") and problem.cluster for problem in problems)
    assert problems == load_task(task, split="test", limit=40, seed=3, suffix=" Go.")
    for problem in problems:  # an independent reading of the steps
        values = [eval(step.split("=")[0]) for step in problem.steps]
        assert tuple(values) == problem.intermediates and values[-1] == problem.answer
    derivation = load_task(task, split="derivation", limit=40, seed=3)
    assert not {problem.cluster for problem in problems} & {problem.cluster for problem in derivation}


def test_bounds_on_generated_tasks() -> None:
    assert {len(problem.steps) for problem in load_task("arithmetic", limit=30, min_steps=3, max_steps=4)} == {3, 4}
    large = load_task("arithmetic", limit=30, min_steps=4, reach=100)
    assert min(max(problem.intermediates) for problem in large) >= 100 > min(problem.answer for problem in large)
    with pytest.raises(ValueError, match="are one set: leave min_steps, max_steps and reach out"):
        load_task("templates", min_steps=2)


# --- Splits by cluster ---


def test_split_by_cluster_shares_neither_cluster_nor_question() -> None:
    problems = [Problem(f"p{i}", f"question {i // 2}", i, cluster=f"c{i % 15}") for i in range(60)]
    problems += [Problem(f"q{i}", f"other {i}", i, cluster=f"d{i // 3}") for i in range(60)]
    first, second = split_by_cluster(problems, fraction=0.5, seed=0)
    assert sorted(problem.prompt_id for problem in first + second) == sorted(problem.prompt_id for problem in problems)
    for name in ("cluster", "question"):
        assert not {getattr(problem, name) for problem in first} & {getattr(problem, name) for problem in second}
    assert first and second
    assert (first, second) == split_by_cluster(problems, fraction=0.5, seed=0)
    assert first != split_by_cluster(problems, fraction=0.5, seed=1)[0]
    smaller, larger = split_by_cluster(problems, fraction=0.2, seed=0)
    assert len(smaller) < len(larger)


def test_split_needs_two_clusters() -> None:
    with pytest.raises(ValueError, match="one cluster"):
        split_by_cluster([Problem("a", "a?", 1, cluster="c"), Problem("b", "b?", 1, cluster="c")])
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_cluster([], fraction=1.0)


# --- Equations ---


@pytest.mark.parametrize(
    ("equation", "steps"),
    [
        ("X=((32.0+42.0)-35.0)", ("32+42=74", "74-35=39")),
        ("( 4.0 / 3.0 )", ("4/3=1.33333",)),
        ("( 0.1 + 0.2 )", ("0.1+0.2=0.3",)),
        ("(-3.0 * 2.0)", ("-3*2=-6",)),
        ("8.0", ()),
        ("1/0", ()),
        ("2 ** 3", ()),
        ("__import__('os')", ()),
        ("((", ()),
    ],
)
def test_equation_steps(equation: str, steps: tuple[str, ...]) -> None:
    assert equation_steps(equation) == steps


@needs_data
def test_most_clusters_of_a_data_set_are_small() -> None:
    sizes = Counter(problem.cluster for problem in read_file(DATA / "gsm8k" / "test.jsonl"))
    assert max(sizes.values()) <= 5 and sum(sizes.values()) == 1319
