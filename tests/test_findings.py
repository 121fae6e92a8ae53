"""codi findings: the studies run on one loaded model, the page keeps a person's words, refusals are named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import planted_model

from codi import CodiModel
from experiments import cli
from experiments.commands import COMMANDS, study_of
from experiments.page import findings
from experiments.page.findings import arguments, fitting, options_of
from experiments.page.html import as_html
from experiments.page.markdown import claims_table, demoted, found, section, shown, write_page
from experiments.page.options import MARKER, FindingsOptions, LanguageFindingsOptions
from experiments.page.studies import STUDIES, Entry
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.folder import RunFolder
from experiments.study.result import FigureFiles, Result, Section
from experiments.study.run import Study

ENTRY = Entry("necessity", ("necessity",), "Which latents the answer needs.", ("necessity",))
QUICK = ("necessity", "--limit", "6", "--derivation", "8", "--resamples", "100", "--permutations", "100",
         "--draws", "1", "--no-all-subsets")  # fmt: skip
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def result(path: Path, **values: Any) -> Result:
    """A result in its folder."""
    made = Result("necessity", "Necessity of latents", "codi necessity", "tiny", path, **values)
    made.write(RunFolder(path).write)
    return made


def test_every_study_is_a_command_with_defaults_of_its_own() -> None:
    from experiments.cli import COMMANDS

    for study in STUDIES:
        assert study.command[0] in COMMANDS
        assert all(name in [one.name for one in STUDIES] for _, name in study.reads)
    assert arguments(FindingsOptions(), ENTRY) == ["--out", "runs/findings/necessity"]
    lens = next(study for study in STUDIES if study.name == "lens-show")
    asked = FindingsOptions(out=Path("a"), seed=3, rope="published", batch_size=5, page=Path("p.md"), only=("lens",))
    given = ["--seed", "3", "--batch-size", "5", "--rope", "published"]
    assert sorted(arguments(asked, lens)) == sorted(["show", *given, "--lens", "a/lens", "--out", "a/lens-show"])
    options = options_of(asked, ENTRY)
    assert (options.COMMAND, options.seed, options.rope, options.batch_size) == ("necessity", 3, "published", 5)
    assert options.out == Path("a/necessity")
    assert Entry("x", ("lens", "show", "--top", "3"), "?").words == "lens show"


def test_a_study_of_one_task_is_made_on_models_of_that_task(tmp_path: Path) -> None:
    def names(data: str, *only: str) -> list[str]:
        (tmp_path / "codi.json").write_text(json.dumps({"training": {"data": data}}))
        return [one.name for one in fitting(FindingsOptions(model=str(tmp_path), only=only), STUDIES)]

    every = [entry.name for entry in STUDIES]
    assert names("polynomial:m=97,b=3") == names("polynomial") == every
    assert names("arithmetic") == [name for name in every if name != "polynomial"]
    assert "polynomial" in names("arithmetic", "polynomial")  # asked for
    entry = next(entry for entry in STUDIES if entry.name == "polynomial")
    (tmp_path / "codi.json").write_text(json.dumps({"training": {"data": "polynomial:m=97,b=3"}}))
    given = arguments(FindingsOptions(model=str(tmp_path)), entry)
    assert given[given.index("--task") + 1] == "polynomial:m=97,b=3"


def test_a_study_is_found_by_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found_study = study_of("necessity")
    assert isinstance(found_study, Study) and found_study.name == "necessity"
    put(tmp_path, "room_for_tests/__init__.py", '"""A room."""')
    put(tmp_path, "room_for_tests/run.py", "def main(options): ...\ndef run(config, model, split): ...")
    put(tmp_path, "room_for_tests/detect.py", "def run(options, model=None, say=None): return 7")
    monkeypatch.syspath_prepend(tmp_path)
    command = cli.Command("room_for_tests.run:X", "room_for_tests.run:main", "…")
    monkeypatch.setitem(COMMANDS, "room", command)
    assert study_of("room detect")(None, model=None, say=print) == 7
    with pytest.raises(LookupError, match="codi room: room_for_tests.run has no STUDY and no run"):
        study_of("room")
    named = cli.Command("room_for_tests.run:X", "room_for_tests.run:main", "…", "experiments.latents.necessity:STUDY")
    monkeypatch.setitem(COMMANDS, "room", named)
    assert study_of("room") is found_study


def test_one_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model in the box: what the page says is what the command prints, and the figure lies beside it."""
    quick, wrong = Entry("necessity", QUICK, "…", ("necessity",)), Entry("patch", ("necessity", "--limit", "0"), "…")
    monkeypatch.setattr(findings, "STUDIES", (quick, wrong))
    page, html = tmp_path / "page.md", tmp_path / "page.html"
    put(tmp_path, "page.md", f"# My words\n\nkept\n\n{MARKER}\nof last week\n")
    options = FindingsOptions(model="checkpoints/tiny", out=tmp_path / "runs", page=page, html=html)
    findings.main(options)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# My words\n\nkept\n") and "of last week" not in text
    printed = Result.read(tmp_path / "runs" / "necessity").markdown()
    assert printed.splitlines()[0].startswith("# Necessity") and "\n### Necessity" in text
    assert printed.split("\n\n")[1] in text
    assert (tmp_path / "page" / "necessity-necessity.png").stat().st_size > 1000
    assert "Not run on this model: limit must be at least 1, got 0" in text
    assert json.loads((tmp_path / "runs" / "refused.json").read_text()) == {"patch": "limit must be at least 1, got 0"}
    assert "| `necessity` | C1" in text.split("## `codi")[0]  # the table of claims on top
    assert html.read_text(encoding="utf-8").count('src="data:image/png;base64,') == 1
    folder = tmp_path / "runs" / "necessity"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = FindingsOptions(model="checkpoints/tiny", out=tmp_path / "runs", page=page, seed=1)
    with pytest.raises(ValueError, match=r"codi necessity: .*options\.seed: 0 -> 1"):
        findings.main(other)  # another seed in the same folder: refused, and nothing is lost
    assert {path: path.read_bytes() for path in before} == before
    assert page.read_text(encoding="utf-8") == text


def test_the_model_is_loaded_once_and_goes_to_every_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    got: list[tuple[str, CodiModel, str]] = []
    monkeypatch.setattr(
        "experiments.study.options.ModelOptions.load",
        lambda options, attention="sdpa": loaded.append(attention) or planted_model(),
    )

    def toy(attention: str, stop: bool = False) -> Any:
        def run_study(study: Any, options: Any, model: CodiModel, say: Callable[[str], None]) -> Result:
            got.append((study.attention, model, options.out.name))
            if interrupted:
                interrupted.clear()
                raise KeyboardInterrupt
            return result(options.out, sections=(Section(f"Number {len(got)}."),))

        monkeypatch.setattr(findings, "run_study", run_study)
        return Study(options=None, title="", prompts=None, plan=None, parts=None, conclude=None, attention=attention)  # type: ignore[arg-type]

    interrupted = [True]
    entries = tuple(Entry(name, ("necessity",), f"{name}?") for name in ("a", "b", "c"))
    studies = iter([toy("sdpa"), toy("sdpa"), toy("eager"), toy("sdpa")])
    monkeypatch.setattr(findings, "STUDIES", entries)
    monkeypatch.setattr(findings, "study_of", lambda words: next(studies))
    options = FindingsOptions(out=tmp_path / "runs", page=tmp_path / "page.md")
    with pytest.raises(KeyboardInterrupt):
        findings.main(options)
    assert loaded == ["sdpa"] and not (tmp_path / "page.md").exists()
    findings.main(options)
    assert loaded == ["sdpa", "sdpa", "eager"] and [one[0] for one in got] == ["sdpa", "sdpa", "eager", "sdpa"]
    assert got[1][1] is got[3][1] is not got[2][1]
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("Number")] == ["Number 2.", "Number 3.", "Number 4."]


def test_a_model_that_is_not_there_is_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(findings, "run", lambda *arguments: pytest.fail("a study was run"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["findings", "--model", "nope", "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "p.md")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "nope" in error
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "notes.md", "my notes")
    with pytest.raises(ValueError, match="choose another --page"):
        FindingsOptions(out=tmp_path, page=tmp_path / "notes.md").check_inputs()
    with pytest.raises(ValueError, match="choose another --page"):
        write_page(tmp_path / "notes.md", [], "tiny")
    assert (tmp_path / "notes.md").read_text() == "my notes"
    with pytest.raises(ValueError, match="no study: 'patches'"):
        FindingsOptions(only=("patches",))


def test_plain_text_is_fenced_and_tables_are_not() -> None:
    text = "held-out KL\nlayer  1  2"
    assert shown(Section(text, form="plain")) == "```text\nheld-out KL\nlayer  1  2\n```"
    assert shown(Section("| S1 | 2 |", "Claims")) == "**Claims.** | S1 | 2 |"
    assert demoted("# Title\n\n## Part\n**bold**") == "### Title\n\n#### Part\n**bold**"
    assert demoted("```\n# no heading\n```\n#tag") == "```\n# no heading\n```\n#tag"


def test_claims_of_all_studies_in_one_table(tmp_path: Path) -> None:
    claims = ClaimsTable([
        Claim("C9", "it rains", "drops", "held", 0.5, 0.4, 0.6, 10, 5),
        Claim("C8", "it snows", "flakes", "not testable", note="too warm"),
        Claim("C7", "it freezes", "ice", "undecided", 0.5, 0.4, 0.6, 10, 5),
        Claim("C6", "it is dry", "drops", "held", 0.0, 0.0, 0.3, 10, 5, mark="floor"),
    ])  # fmt: skip
    entries = [Entry("patch", ("patch",), "…"), Entry("early-exit", ("early-exit",), "Answering after each latent.")]
    result(tmp_path / "patch", claims=claims)
    table = claims_table(found(tmp_path, entries))
    assert table[2] == "| `patch` | C9 | it rains | 0.500 [0.400, 0.600], n = 10 in 5 clusters | **held** |"
    assert table[3] == "| `patch` | C8 | it snows | – | **not testable** |"
    assert table[4].endswith("| **undecided at this power** |") and table[5].endswith("| **held (rests on a floor)** |")
    assert section(found(tmp_path, entries)[1], {}) == []  # not run: not on the page
    put(tmp_path, "refused.json", json.dumps({"early-exit": "no numbers here"}))
    page = tmp_path / "page.md"
    write_page(page, found(tmp_path, entries), "tiny")
    text = page.read_text(encoding="utf-8")
    assert "Not run on this model: no numbers here" in text
    assert "4 claims: 2 held, 0 not held, 1 undecided, 1 not testable." in text and "too small to say" in text


def test_the_page_says_which_command_has_to_be_run_again(tmp_path: Path) -> None:
    """Folders without a result, as those of early versions, and damaged ones."""
    put(tmp_path, "necessity/manifest.json", "{}")
    put(tmp_path, "necessity/printed.md", "# Necessity of last year")
    put(tmp_path, "patch/result.json", "{")
    known = found(tmp_path, [ENTRY, Entry("patch", ("patch",), "?"), Entry("pca", ("pca",), "?")])
    text = write_page(tmp_path / "page.md", known, "tiny")
    assert "run `codi necessity` (or `codi findings --only necessity`) again" in text and "last year" not in text
    assert "patch/result.json is damaged" in text and "pca" not in text


def test_figures_are_copied_with_their_captions(tmp_path: Path) -> None:
    figures = (FigureFiles("other", ("figures/other.png",)), FigureFiles("necessity", ("figures/n.png",), "By latent."))
    result(tmp_path / "runs" / "necessity", figures=figures)
    (tmp_path / "runs" / "necessity" / "figures").mkdir()
    (tmp_path / "runs" / "necessity" / "figures" / "n.png").write_bytes(PNG)
    text = write_page(tmp_path / "page.md", found(tmp_path / "runs", [ENTRY]), "tiny")
    assert "![necessity: necessity](page/necessity-necessity.png)\n\n*By latent.*" in text and "other" not in text
    assert (tmp_path / "page" / "necessity-necessity.png").read_bytes() == PNG
    made = as_html(text, tmp_path)
    assert f'src="data:image/png;base64,{base64.b64encode(PNG).decode()}"' in made and "page/necessity" not in made


def test_html_of_what_a_page_holds(tmp_path: Path) -> None:
    text = (
        "# T & U\n\n<!-- gone -->\ntwo\nlines, **bold *a*** and `a|<b>`\n\n| a | b |\n|---|---|\n| x \\| y | *z* |\n\n"
        "- one\n- two\n  more\n\n```text\n# <raw>  x\n```\n\n[here](https://x.org/?a=1&b) ![no picture](none.png)\n"
        "A − B at c = 2 * 3 * 4, snake_case_name\n## Next"
    )
    made = as_html(text, tmp_path)
    for piece in (
        "<title>T &amp; U</title>", "<h1>T &amp; U</h1>",
        "<p>two lines, <strong>bold <em>a</em></strong> and <code>a|&lt;b&gt;",
        "<tr><th>a</th><th>b</th></tr>\n<tr><td>x | y</td><td><em>z</em></td></tr>",
        "<ul><li>one</li><li>two more</li></ul>", "<pre># &lt;raw&gt;  x</pre>",
        '<a href="https://x.org/?a=1&amp;b">here</a> [no picture]', "2 * 3 * 4, snake_case_name</p>", "<h2>Next</h2>",
    ):  # fmt: skip
        assert piece in made, piece
    assert "gone" not in made and "<script" not in made and "http" not in made.replace("https://x.org", "")


def test_a_study_on_several_models_has_a_folder_and_a_name_for_each():
    entry = Entry("b", ("lens", "show"), "?", reads=(("--lens", "a"),))
    on = entry.on("checkpoints/smollm2")
    assert (on.name, on.reads, on.words) == ("smollm2-b", (("--lens", "smollm2-a"),), "lens show")
    assert on.called("codi ") == "`codi lens show`, smollm2" and entry.called() == "`lens show`"


def test_models_of_a_page_have_different_names():
    with pytest.raises(ValueError, match="different last names, got a/x, b/x"):
        LanguageFindingsOptions(models=("a/x", "b/x"))
