"""Options: groups check once, keep their help texts, and say what belongs to a run's identity as runs of today do."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest

from codi import load_codi
from experiments import cli
from experiments.commands import COMMANDS
from experiments.latents.options import NecessityOptions
from experiments.study.answers import answer_table
from experiments.study.manifest import fingerprint
from experiments.study.options import (
    DrawOptions,
    IntervalOptions,
    JudgingOptions,
    ModelOptions,
    Options,
    PromptOptions,
    QuestionOptions,
    RunOptions,
    SplitOptions,
    StatisticsOptions,
    StudyOptions,
    changed,
    command_line,
    identity_of,
)
from experiments.study.run import study_identity
from experiments.sweep.options import SweepOptions
from experiments.tasks import TASK_NAMES, Reading

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"
HEAVY = ("torch", "pandas", "numpy", "transformers", "pyarrow")


@dataclass(frozen=True)
class Own(DrawOptions, StudyOptions):
    """A study for the tests."""

    COMMAND: ClassVar[str] = "own"
    AT_LEAST: ClassVar[dict[str, float]] = {"limit": 2, "depth": 1}

    out: Path = Path("runs/own")
    draws: int = 7
    depth: int = 4
    """How deep."""
    names: tuple[str, ...] = ("a", "b")
    """Which."""


def test_an_overridden_default_keeps_its_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(Own, ["--help"], "codi own")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    draws = "Draws of every random replacement or control, seeded; use 200 for a publication."
    out = "Run folder. One that holds the same run is continued; one that holds another run is refused."
    assert f"--draws INT {draws} (default: 7)" in shown and f"--out PATH {out} (default: runs/own)" in shown
    assert "--depth INT How deep. (default: 4)" in shown
    assert shown.index("--model") < shown.index("--task") < shown.index("--out") < shown.index("--depth")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"limit": 1}, "limit must be at least 2, got 1"),  # the study asks for more than the group
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"derivation": 1}, "derivation must be at least 2, got 1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1, got 0"),
        ({"resamples": 99}, "resamples must be at least 100, got 99"),
        ({"permutations": 10}, "permutations must be at least 100, got 10"),
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0"),
        ({"min_steps": 4, "max_steps": 3}, "min-steps must not exceed max-steps, got 4 and 3"),
    ],
)
def test_values_are_checked_once_where_the_option_is(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        Own(**changes)
    assert str(caught.value) == says
    assert Own(limit=None, max_new_tokens=None, max_steps=3).limit is None


def test_identity_is_what_decides_the_result() -> None:
    moved = Own(model="other", device="cpu", out=Path("x"), batch_size=3, resamples=100, permutations=100, level=0.9)
    assert identity_of(moved) == identity_of(Own())
    elsewhere = {"model", "device", "out", "batch_size", "resamples", "permutations", "level"}
    assert not elsewhere & identity_of(Own()).keys()
    for changes in ({"seed": 1}, {"depth": 5}, {"rope": "published"}, {"task": "arithmetic"}, {"names": ("a",)}):
        assert identity_of(Own(**changes)) != identity_of(Own()), changes
    json.dumps(identity_of(Own()))


def test_an_option_that_came_later_changes_no_old_identity() -> None:
    assert "reach" not in identity_of(Own()) and identity_of(Own(reach=100))["reach"] == 100

    @dataclass(frozen=True)
    class Later(RunOptions, SplitOptions, ModelOptions):
        """A command without --rope in its early runs, whose numbers depend on the batch."""

        LATER: ClassVar[frozenset[str]] = frozenset({"rope", "min_steps", "max_steps"})
        IDENTITY: ClassVar[frozenset[str]] = frozenset({"batch_size"})

        batch_size: int = 64

    early = {"base", "protocol", "lora_alpha", "mask", "dtype", "task", "limit", "suffix", "split", "seed"}
    early.add("batch_size")
    assert identity_of(Later()).keys() == early
    assert identity_of(Later(rope="published")).keys() == early | {"rope"}


def test_identity_of_a_study_is_that_of_todays_manifest() -> None:
    today = json.loads((DATA / "manifest_necessity.json").read_text(encoding="utf-8"))
    model = load_codi(ROOT / "checkpoints" / "tiny")
    options = NecessityOptions()
    identity = study_identity(options, model, options.load_split(options.seed, model.protocol.question_suffix))
    assert json.loads(json.dumps(identity)) == today["identity"]
    assert fingerprint(identity) == today["fingerprint"]


@pytest.mark.parametrize(
    ("module", "known"),
    [
        ("transfer", "074c25ee10a83466f86d97fb3eed085b6575492566ad13b750f37b7b5afb1f66"),
        ("anchors", "e8de4ed5f446d85a803b9395d4dcaa8c9e2e4affa216b3f4be6e8a7241f51a21"),
        ("early_exit", "5543f47d4ae20c6670ab815de78f746fe9d61d827088dde3754c1e4c019d0241"),
    ],
)
def test_run_folders_of_studies_go_on(module: str, known: str) -> None:
    """The fingerprint of a run with default options, from before the studies were data."""
    study = importlib.import_module(f"experiments.latents.{module}").STUDY
    model, options = load_codi(ROOT / "checkpoints" / "tiny"), study.options()
    prompts = study.prompts(options, model)
    assert fingerprint(study_identity(options, model, prompts)) == known


def test_identity_of_a_sweep_is_that_of_todays_manifest() -> None:
    from experiments.sweep.plan import resolve

    today = json.loads((DATA / "manifest_sweep.json").read_text(encoding="utf-8"))
    model = load_codi(ROOT / "checkpoints" / "tiny")
    identity = resolve(SweepOptions(limit=200, draws=20), model).identity()
    assert fingerprint(identity) == today["fingerprint"]
    other = resolve(SweepOptions(limit=200, draws=20, answers="published"), model).identity()
    assert other == {**identity, "reading": {"answers": "published"}}


def _classes() -> dict[str, type[Options]]:
    """Words of every command that takes options of ours -> their class."""
    found = {}
    for command in COMMANDS.values():
        given = command.load_options()
        for one in [get_args(member)[0] for member in get_args(given)] or [given]:
            found[one.COMMAND] = one
    return found


JUDGES = {
    *("sweep", "eval", "train", "lens detect", "alternation", "findings", "published", "polynomial"),
    *("necessity", "transfer", "anchors", "early-exit", "patch", "pca", "control sweep", "control transfer"),
}
"""Commands that say which answers are right."""


def test_every_command_that_judges_answers_takes_the_rule_and_old_identities_stay() -> None:
    classes = _classes()
    assert {name for name, one in classes.items() if issubclass(one, JudgingOptions)} == JUDGES
    for name, one in classes.items():
        fields = {field.name for field in dataclasses.fields(one)}
        # a language model's items come in three parts of one task; codi polynomial asks its own task only
        if issubclass(one, QuestionOptions) and name != "polynomial":
            assert ("derivation" in fields) == ("derivation_task" in fields), name
        if issubclass(one, QuestionOptions) and name != "sweep":
            assert not {"answers", "decimal_comma", "derivation_task"} & identity_of(one()).keys(), name
            assert identity_of(one(decimal_comma=True)) != identity_of(one()), name
            assert one(decimal_comma=True).reading == Reading("common", True)
            if name in JUDGES:
                assert identity_of(one(answers="published"))["answers"] == "published", name
                assert one(answers="published").reading == Reading("published")
                with pytest.raises(ValueError, match="the published rule knows no decimal commas"):
                    one(answers="published", decimal_comma=True)


def test_the_rule_goes_with_the_prompts_to_every_row() -> None:
    """The rule of the options is that of every prompt they load, so no study can forget it."""
    given: dict[str, Any] = {"limit": 6, "derivation": 8, "answers": "published"}
    for options in (Own(**given), Own(**given, legacy=True), Own(**given, derivation_task="arithmetic")):
        split = options.load_split(0)
        assert {problem.reading for problem in (*split.evaluation, *split.derivation)} == {Reading("published")}
        problem = split.evaluation[0]
        text = f"#### {problem.answer} (and not 5)"
        (row,) = answer_table([problem], [0], [text]).to_dict("records")
        assert row["prediction"] == 5 and not row["correct"]
        again = Own(**{**given, "answers": "common"}).load_split(0).evaluation[0]
        (row,) = answer_table([again], [0], [f"#### {again.answer} (and not 5)"]).to_dict("records")
        assert row["prediction"] == again.answer and row["correct"]


def test_decimal_commas_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "Half of 7?", "answer": "3,5"}\n')
    with pytest.raises(ValueError, match="write 3.5, or say that commas are decimal"):
        SplitOptions(task=str(file)).load_problems(0)
    (problem,) = SplitOptions(task=str(file), decimal_comma=True).load_problems(0).evaluation
    assert problem.answer == 3.5 and problem.is_answered_by("3,5") and problem.is_answered_by("it is 3.5")
    assert not problem.is_answered_by("5")


def test_directions_from_another_task(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "What is 7 times 31?", "answer": 217}\n')
    one = ["--task", str(file), "--derivation", "8"]
    with pytest.raises(ValueError, match="cannot split 1 problems .*: give --derivation-task"):
        cli.parse(NecessityOptions, one, "codi necessity").load_split(0)
    split = cli.parse(NecessityOptions, [*one, "--derivation-task", "templates"], "codi necessity").load_split(0)
    assert len(split.evaluation) == 1 and len(split.derivation) == 8
    with pytest.raises(ValueError, match="unknown task 'templatez': no such file"):
        NecessityOptions(derivation_task="templatez").check_inputs()
    with pytest.raises(ValueError, match="legacy takes means from the evaluated prompts: leave --derivation-task out"):
        NecessityOptions(legacy=True, derivation_task="arithmetic").check_inputs()
    SweepOptions(legacy=True, derivation_task="arithmetic").check_inputs()  # its embedding means


def test_known_steps_are_asked_for_in_words_that_help(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    records = [{"question": f"What is {i} plus {i + 40}?", "answer": 2 * i + 40} for i in range(9)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = SplitOptions(task=str(file))
    with pytest.raises(ValueError, match="at least 1 known intermediate value; 9 of 9 have fewer, 'own-0' has 0: give"):
        options.load_problems(0, known_steps=1)
    for record in records:
        record["steps"] = [f"{record['answer'] - 40}+40={record['answer']}"]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(options.load_problems(0, known_steps=1).evaluation) == 9
    with pytest.raises(ValueError, match="9 of 9 have fewer, 'own-0' has 1: give --min-steps 2"):
        options.load_problems(0, known_steps=2)


def test_the_command_as_it_is_typed() -> None:
    options = Own(suffix=False, names=("x y", "z"), reach=3, legacy=True)
    assert changed(options) == {"suffix": False, "names": ("x y", "z"), "reach": 3, "legacy": True}
    line = command_line(options)
    assert line.startswith("codi own ") and "--no-suffix" in line and "--names 'x y' z" in line and "--legacy" in line
    given = ["--no-suffix", "--names", "x y", "z", "--reach", "3", "--legacy"]
    assert cli.parse(Own, given, "codi own") == options
    assert command_line(Own()) == "codi own"


def test_prompts_come_from_the_groups() -> None:
    both = PromptOptions(limit=12, derivation=8, min_steps=9).load_split(0, " Think.")  # steps: not for templates
    assert (len(both.evaluation), len(both.derivation)) == (12, 8)
    assert all(problem.question.endswith(" Think.") for problem in both.evaluation)
    bare = PromptOptions(limit=12, derivation=8, suffix=False).load_split(0, " Think.")
    assert not any(problem.question.endswith(" Think.") for problem in bare.evaluation)
    one = SplitOptions(task="arithmetic", limit=5, split="train", reach=50).load_problems(0)
    assert len(one.evaluation) == 5 and one.derivation == ()
    assert all(max(problem.answer, *problem.intermediates) >= 50 for problem in one.evaluation)
    with pytest.raises(ValueError, match="99 known intermediate values"):
        SplitOptions(limit=5).load_problems(0, known_steps=99)


def test_inputs_are_looked_at_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'templatez': no such file or folder; allowed: arithmetic"):
        NecessityOptions(task="templatez").check_inputs()
    NecessityOptions(task="openai/gsm8k:main", out=tmp_path).check_inputs()
    (tmp_path / "manifest.json").write_bytes((DATA / "manifest_sweep.json").read_bytes())
    with pytest.raises(ValueError, match="is a run of `codi sweep`, not of `codi necessity`"):
        NecessityOptions(out=tmp_path).check_inputs()
    (tmp_path / "manifest.json").write_bytes((DATA / "manifest_necessity.json").read_bytes())
    NecessityOptions(out=tmp_path, batch_size=3).check_inputs()
    with pytest.raises(ValueError, match=r"options\.draws: 3 -> 4"):
        NecessityOptions(out=tmp_path, draws=4).check_inputs()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SplitOptions(split="foo"), "split must be one of test, derivation, all for the task 'templates', got 'foo'"),
        (
            SplitOptions(task="arithmetic", split="all"),
            "split must be one of train, derivation, test for the task 'arithmetic', got",
        ),
        (SplitOptions(task="FILE", split="foo"), "a single file has no split 'foo', it is read whole: leave --split"),
    ],
)
def test_a_split_that_is_not_there_is_seen_before_anything_is_read(
    options: SplitOptions, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("not yet read")
    if options.task == "FILE":
        options = dataclasses.replace(options, task=str(file))
    with pytest.raises(ValueError, match=re.escape(says)):
        options.check_inputs()
    SplitOptions(task=str(file), split="derivation").check_inputs()
    SplitOptions(task="openai/gsm8k", split="foo").check_inputs()  # only reading tells


def test_generated_tasks_have_the_splits_that_are_listed() -> None:
    from experiments.tasks import GENERATED_SPLITS, arithmetic, load_task

    assert set(GENERATED_SPLITS) == set(TASK_NAMES) and set(GENERATED_SPLITS["arithmetic"]) == set(arithmetic.SPLITS)
    for task, splits in GENERATED_SPLITS.items():
        for split in splits:
            assert len(load_task(task, split, 2)) == 2


def test_latents_are_known_without_loading(tmp_path: Path) -> None:
    assert ModelOptions(model=str(ROOT / "checkpoints" / "tiny")).known_latents() == 6
    assert ModelOptions(model="someone/something").known_latents() is None
    (tmp_path / "codi.json").write_text("{")
    assert ModelOptions(model=str(tmp_path)).known_latents() is None


def test_intervals_alone() -> None:
    settings = IntervalOptions(resamples=300, level=0.9).statistics(4)
    assert (settings.resamples, settings.level, settings.seed) == (300, 0.9, 4)
    assert StatisticsOptions(permutations=700).statistics(1).permutations == 700
    with pytest.raises(ValueError, match="resamples must be at least 100, got 99"):
        IntervalOptions(resamples=99)


def test_every_field_of_a_group_is_explained() -> None:
    from tyro._docstrings import get_field_docstring

    for group in (*Options.__subclasses__(), StudyOptions, NecessityOptions):
        for field in dataclasses.fields(group):
            assert get_field_docstring(group, field.name, ()), f"{group.__name__}.{field.name}"


NESTED = {
    "lens": ("train", "show", "detect", "difference", "transfer", "causal"),
    "cot": ("derive", "grid", "eval", "show", "run"),
}
WORDS = [words for name in sorted(COMMANDS) for words in (name, *(f"{name} {inner}" for inner in NESTED.get(name, ())))]


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("arguments", [["--help"], ["--limit", "0"], ["--out", "FOREIGN"], ["--task", "nowhere"]])
def test_help_and_refusals_import_nothing_heavy(name: str, arguments: list[str], tmp_path: Path) -> None:
    foreign = "manifest_necessity.json" if name == "sweep" else "manifest_sweep.json"
    (tmp_path / "manifest.json").write_bytes((DATA / foreign).read_bytes())
    given = [*name.split(), *(str(tmp_path) if word == "FOREIGN" else word for word in arguments)]
    code = (
        f"import sys\nfrom experiments.cli import main\ntry:\n    main({given!r})\n"
        f"except SystemExit as stop:\n    print(stop.code)\nprint(sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, stopped, heavy = done.stdout.splitlines()
    assert stopped == ("0" if arguments == ["--help"] else "2") and heavy == "[]"
    assert bool(done.stderr) == (arguments != ["--help"]) and done.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["sweep", "--pairs", "one-two"], "pairs must look like 2-5"),
        (["sweep", "--latents", "x"], "latents must be numbers from 1"),
        (["sweep", "--latents", "40"], "latents must be in 1..6, got 40"),  # the model's folder says how many
        (["sweep", "--pairs", "2-7"], "latents of a pair must be in 1..6, got '2-7'"),
        (["sweep", "--controls", "placebo"], "controls must be among random"),
        (["sweep", "--legacy", "--space", "hidden"], "legacy steering exists in kv and embedding space"),
        (["sweep", "--task", "a", "--prompts", "b"], "give --task or --prompts"),
        (["stats", "FOREIGN"], "is a run of `codi necessity`, not of `codi sweep`"),
        (["plot", "FOREIGN"], "is a run of `codi necessity`, not of `codi sweep`"),
        (["stats", "FOREIGN/nowhere"], "no run folder"),
        (["stats", "FOREIGN", "--resamples", "5"], "resamples must be at least 100, got 5"),
        (["plot", "FOREIGN", "--dpi", "5"], "dpi must be in 50..1200"),
        (["plot", "FOREIGN", "--alpha", "1"], "alpha must lie between 0 and 1"),
    ],
)
def test_what_a_sweep_refuses_without_a_model(given: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((DATA / "manifest_necessity.json").read_bytes())
    words = [word.replace("FOREIGN", str(tmp_path)) for word in given]
    code = (
        f"import sys\nfrom experiments.cli import main\ntry:\n    main({words!r})\n"
        f"except SystemExit as stop:\n    print(stop.code)\nprint(sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2", "[]"] and says in done.stderr and done.stderr.count("\n") == 1
