"""codi findings --model A B …: a page for each, and one that compares them; folders of before are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import cli
from experiments.page import findings
from experiments.page.comparison import Column, agreement, alone, lines_of, move_words, write_comparison
from experiments.page.findings import arguments, told
from experiments.page.markdown import Found
from experiments.page.options import COMPARISON, MARKER, FindingsOptions
from experiments.page.studies import STUDIES, Entry
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.folder import RunFolder
from experiments.study.result import Result, Section

A, B = Entry("necessity", ("necessity",), "Which?"), Entry("sweep", ("sweep",), "Ever?", compared=True)


def claim(name: str, verdict: Any, estimate: float = 0.5) -> Claim:
    if verdict == "not testable":
        return Claim(name, f"says {name}", "rule", verdict, note="too warm")
    return Claim(
        name, f"says {name}", "rule", verdict, estimate, estimate - 0.1, estimate + 0.1, 10, 5, "seen: 9 points"
    )


def result(path: Path, model: str, claims: list[Claim], study: str = "necessity") -> Result:
    """A result in a run folder that says whose it is."""
    made = Result(study, study.title(), f"codi {study}", model, path, (Section("Text."),), claims=ClaimsTable(claims))
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({"identity": {"study": study}, "model": model}))
    made.write(RunFolder(path).write)
    return made


def columns(tmp_path: Path) -> list[Column]:
    """Three models; the third cannot run the second study."""
    verdicts = {
        "guided": {"C1": "held", "C2": "held", "C3": "undecided", "C4": "held"},
        "plain": {"C1": "held", "C2": "not held", "C3": "not held", "C4": "undecided"},
        "poly": {"C1": "not testable", "C2": "not held", "C3": "held"},
    }
    made = []
    for label, own in verdicts.items():
        first = Found(A, result(tmp_path / label, label, [claim(name, verdict) for name, verdict in own.items()]))
        second = Found(B, result(tmp_path / f"{label}-s", label, [claim("S5 (kv, cached)", "not held", 0.0)], "sweep"))
        if label == "poly":
            second = Found(B, lacking="Not run on this model: no numbers here")
        made.append(Column(f"checkpoints/{label}", tmp_path / f"page-{label}.md", (first, second), "arithmetic"))
    return made


def test_every_claim_on_every_model(tmp_path: Path) -> None:
    lines = {line.name: line for line in lines_of(columns(tmp_path))}
    assert list(lines) == ["C1", "C2", "C3", "C4", "S5 (kv, cached)"]
    assert lines["C1"].cells == {
        "guided": "**held** 0.500 [0.400, 0.600], n = 10 in 5 clusters",
        "plain": "**held** 0.500 [0.400, 0.600], n = 10 in 5 clusters",
        "poly": "**not testable**",
    }
    assert lines["C4"].cells["poly"] == "–" and lines["S5 (kv, cached)"].cells["poly"] == "**not testable** (not run)"
    assert lines["C3"].cells["guided"].startswith("**undecided at this power** 0.500")


def test_agreement_and_what_is_found_in_one_alone(tmp_path: Path) -> None:
    lines = {line.name: line for line in lines_of(columns(tmp_path))}
    assert agreement(lines["C1"]) == "agree: held (2 of 3)"
    assert agreement(lines["C2"]) == "differ: held in guided; not held in plain, poly"
    assert agreement(lines["C3"]) == "differ: held in poly; not held in plain"
    assert agreement(lines["C4"]) == "–"  # one model decides it: nobody agrees or differs
    every = list(lines.values())
    assert [line.name for line in alone(every, "guided")] == ["C2"]  # not C4, which nobody else decides
    assert [line.name for line in alone(every, "poly")] == ["C3"] and not alone(every, "plain")


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\nkept\n\n{MARKER}\nof last week\n", encoding="utf-8")
    text = write_comparison(page, columns(tmp_path), ["## First", ""])
    assert text == page.read_text(encoding="utf-8") and text.startswith("# Mine\n\nkept\n") and "last week" not in text
    assert text.index("## First") < text.index("## Models") < text.index("## Claims by model")
    assert "| [guided](page-guided.md) | `checkpoints/guided` | arithmetic | 2 of 2 | 5 claims: 3 held" in text
    steering = text.split("## Does steering ever help?")[1].split("## ")[0]
    assert "| plain | S5 (kv, cached): says S5 (kv, cached) | **not held** | 0.000 [-0.100, 0.100]" in steering
    assert "seen: 9 points" in steering and "| poly | S5 (kv, cached)" in steering and "(not run)" in steering
    assert "| guided | plain | 3 | 2 (67 %) |" in text  # C1, C2, S5
    assert "**guided** (arithmetic): 1 claim.\n\n- `necessity`, C2: says C2 (guided held, 0.500" in text
    assert "**plain** (arithmetic): 0 claims." in text
    assert "- `codi sweep` on poly: no numbers here" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (5, 6, 8) for line in tables) and text.count("|---|---|---|---|---|---|---|") == 1


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FindingsOptions]:
    """Options for two models whose studies are written by a toy: `necessity` runs on both, `sweep` not on b."""
    for label in "ab":
        (tmp_path / label).mkdir()
    monkeypatch.setattr("experiments.study.options.ModelOptions.load", lambda *given, **named: object())
    monkeypatch.setattr(findings, "STUDIES", (A, B))

    def run(entry: Entry, options: Any, models: Any, say: Any) -> Result:
        assert options.model == entry.model
        if entry.command == B.command and entry.model.endswith("b"):
            raise ValueError("the task is unknown to it")
        verdict = "held" if entry.model.endswith("a") else "not held"
        return result(options.out / entry.name, entry.model, [claim("C1", verdict)], entry.command[0])

    monkeypatch.setattr(findings, "run", run)

    def options(**changes: Any) -> FindingsOptions:
        given = {
            "model": (str(tmp_path / "a"), str(tmp_path / "b")),
            "out": tmp_path / "runs",
            "page": tmp_path / "p.md",
        }
        return FindingsOptions(**{**given, **changes})

    return options


def test_two_models_end_to_end(
    toys: Callable[..., FindingsOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "runs" / "necessity"  # of a page about a alone, as `codi findings --model a` wrote it
    result(old, str(tmp_path / "a"), [claim("C1", "undecided")])
    (tmp_path / "p.md").write_text(
        f"# About a\n\nmy words\n\n{MARKER}\n### Necessity: {tmp_path / 'a'}\n", encoding="utf-8"
    )
    findings.main(toys(html=tmp_path / "p.html"))
    folders = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert folders == {"necessity", "a-sweep", "b-necessity"}  # a's old folder was found and went on
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert COMPARISON in text and text.startswith("# What the studies show: a, b\n")
    assert "differ: held in a; not held in b" in text and "- `codi sweep` on b: the task is unknown to it" in text
    assert "my words" not in text and "my words" in (tmp_path / "p-a.md").read_text(encoding="utf-8")
    assert "Not run on this model: the task is unknown to it" in (tmp_path / "p-b.md").read_text(encoding="utf-8")
    assert "<h2>Claims by model</h2>" in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<h1>" in (tmp_path / "p-b.html").read_text(encoding="utf-8")
    assert f"the comparison of a, b is {tmp_path / 'p.md'}" in capsys.readouterr().out


def test_pages_from_what_is_there(
    toys: Callable[..., FindingsOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings.main(toys())
    before = (tmp_path / "p.md").read_text(encoding="utf-8")
    for file in tmp_path.glob("p*.md"):
        file.unlink()
    monkeypatch.setattr(findings, "run", lambda *given: pytest.fail("a study was run"))
    monkeypatch.setattr(findings, "Models", _NoModels)
    findings.main(toys(run=False))
    assert (tmp_path / "p.md").read_text(encoding="utf-8") == before
    assert (tmp_path / "p-a.md").exists() and (tmp_path / "p-b.md").exists()


class _NoModels:
    def get(self, *given: Any) -> None:
        pytest.fail("a model was loaded")


def test_a_study_that_breaks_on_one_model_does_not_end_the_others(
    toys: Callable[..., FindingsOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(entry: Entry, options: Any, models: Any, say: Any) -> Result:
        folder = options.out / entry.name
        if entry.model.endswith("a"):  # begun, and refused in the middle
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text("{}")
            raise ValueError("no step is known")
        return result(folder, entry.model, [claim("C1", "held")], entry.command[0])

    monkeypatch.setattr(findings, "run", run)
    findings.main(toys())
    text = (tmp_path / "p.md").read_text(encoding="utf-8")
    assert "**not testable** (not run)" in text and "on a: no step is known" in text and "**held** 0.500" in text
    result(tmp_path / "runs" / "a-necessity", "x", [claim("C1", "held")])  # a finished run of something else
    with pytest.raises(ValueError, match="codi necessity: no step is known"):
        findings.main(toys(only=("necessity",)))


def test_one_model_leaves_a_comparison_alone_and_has_no_sweep_unless_asked(
    toys: Callable[..., FindingsOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings.main(toys())
    before = (tmp_path / "p.md").read_text(encoding="utf-8")
    ran: list[str] = []

    def run(entry: Entry, options: Any, models: Any, say: Any) -> Result:
        ran.append(entry.name)
        return result(options.out / entry.name, options.model, [claim("C9", "held")], entry.command[0])

    monkeypatch.setattr(findings, "run", run)
    one = str(tmp_path / "a")
    findings.main(toys(model=one, out=tmp_path / "other"))
    assert (tmp_path / "p.md").read_text(encoding="utf-8") == before and ran == ["necessity"]
    assert "C9" in (tmp_path / "p-a.md").read_text(encoding="utf-8")
    findings.main(toys(model=one, out=tmp_path / "other", only=("sweep",), page=tmp_path / "q.md"))
    assert ran == ["necessity", "sweep"] and "C9" in (tmp_path / "q.md").read_text(encoding="utf-8")


def test_words_of_a_page_about_another_model_stay(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    page.write_text(f"# T\n\nwords\n\n{MARKER}\n### Necessity: checkpoints/tiny\n### Patch: checkpoints/tiny\n")
    assert move_words(page, {"checkpoints/plain": tmp_path / "p-plain.md"}) == [] and page.exists()
    (tmp_path / "p-tiny.md").write_text("mine")
    assert move_words(page, {"checkpoints/tiny": tmp_path / "p-tiny.md"}) == [] and page.exists()
    (tmp_path / "p-tiny.md").unlink()
    assert len(move_words(page, {"checkpoints/tiny": tmp_path / "p-tiny.md"})) == 1 and not page.exists()
    assert "words" in (tmp_path / "p-tiny.md").read_text()


# --- Options ----------------------------------------------------------------------------------------------------------


def test_one_model_or_several_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def parse(*words: str) -> FindingsOptions:
        return cli.parse(FindingsOptions, list(words), "codi findings")

    assert parse().model == "checkpoints/tiny" and parse("--model", "a/x").models == ("a/x",)
    assert parse("--model", "a/x", "b/y", "--seed", "3").models == ("a/x", "b/y") and not parse("--no-run").run
    assert parse("--model", "a/x", "b/y").on("b/y").page == Path("docs/findings-y.md")
    with pytest.raises(cli.UsageError, match="different last names, got a/x, b/x"):
        parse("--model", "a/x", "b/x")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["findings", "--model", "checkpoints/tiny", "nope"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "no checkpoint 'nope'" in error


def test_what_is_handed_on_to_a_study(tmp_path: Path) -> None:
    sweep = next(entry for entry in STUDIES if entry.name == "sweep")
    assert all(not entry.compared for entry in STUDIES if entry is not sweep) and sweep.compared
    poly = tmp_path / "poly"
    poly.mkdir()
    training = {"data": "templates", "step_weight": 2.0, "kd_weight": 20.0}
    (poly / "codi.json").write_text(json.dumps({"n_latents": 4, "training": training}))
    options = FindingsOptions(model=(str(poly), "checkpoints/tiny"), limit=8)
    on = options.on(str(poly))
    given = arguments(on, sweep.on(str(poly)))
    assert given[:2] == ["--limit", "8"] and given.count("--limit") == 1 and given.count("--model") == 1
    assert given[given.index("--task") + 1] == "templates" and on.known_latents() == 4
    assert given[-1] == "runs/findings/poly-sweep"
    assert "--limit" not in arguments(on, Entry("x", ("train",), "?"))  # which has no such option
    assert "--task" not in arguments(options.on("checkpoints/tiny"), A)  # trained on the default task
    assert "--task" not in arguments(FindingsOptions(), A) and "--limit" not in arguments(FindingsOptions(), A)
    assert told(on) == "templates; guided by: step term (2)" and told(FindingsOptions(model="x/y")) == ""
    (poly / "codi.json").write_text(json.dumps({"training": {**training, "step_weight": 0.0}}))
    assert told(on) == "templates; no guidance of single latents"
    chosen = Entry("x", ("sweep", "--mask", "carried"), "?")
    assert arguments(FindingsOptions(mask="published"), chosen)[:2] == ["--mask", "carried"]  # the entry's own word
    kept = Entry("lens-show", ("lens", "show"), "?", reads=(("--lens", "lens"),)).on("c/tiny", {"lens"})
    assert (kept.name, kept.reads) == ("tiny-lens-show", (("--lens", "lens"),))
