"""The tree in README.md has one line for every module and no line without a file.

`python tests/test_readme.py` prints the section as it should be, from the first sentence of every module.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lm", "codi", "steering", "lenses", "circuits", "experiments", "benchmarks")
OTHERS = {
    "checkpoints/tiny/": "the model in the box, with its model card",
    "docs/": "figures of this page, findings",
    "tests/": "one file per module; conftest.py makes tiny random models of every family, golden/ holds cases",
}
WIDTH, NAMES = 138, 24
"""Longest line of the tree, and room for the name of a module."""


def modules() -> dict[str, list[str]]:
    """Folder ("experiments/sweep/") -> names of its modules."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda one: (one.parent.as_posix(), one.name)):
            found.setdefault(path.relative_to(ROOT).parent.as_posix() + "/", []).append(path.name)
    return found


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, without the command that it begins with."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    words = " ".join(docstring.split("\n\n")[0].split())
    words = re.sub(r"^`[^`]+`: (?=\S)", "", words)
    return re.split(r"(?<=[\w)`?]{2})\. ", words)[0].removesuffix(".")


def tree() -> str:
    """The section as it should be: every folder with its modules, then the folders without modules."""
    lines = []
    for folder, names in modules().items():
        lines.append(folder)
        for name in names:
            text = textwrap.shorten(sentence(ROOT / folder / name), WIDTH - NAMES - 2, placeholder=" …")
            lines.append(f"  {name:<{NAMES}}{text}")
    lines += [f"{folder:<26}{text}" for folder, text in OTHERS.items()]
    return "\n".join(lines)


def listed(section: str) -> dict[str, list[str]]:
    """Folder -> modules that the section names, without those folders that stand on a line with their text."""
    found: dict[str, list[str]] = {}
    for line in section.splitlines():
        if re.fullmatch(r"\S+/", line):
            folder = line
            found[folder] = []
        elif line.startswith("  "):
            name, text = line.split(maxsplit=1)
            assert text, f"{folder}{name} is not explained"
            found[folder].append(name)
    return found


def differences(there: Mapping[str, list[str]], told: Mapping[str, list[str]]) -> list[str]:
    """Modules without a line, lines without a module, and lines that stand twice."""
    files = [f"{folder}{name}" for folder, names in there.items() for name in names]
    lines = [f"{folder}{name}" for folder, names in told.items() for name in names]
    wrong = [f"{file} has no line" for file in files if file not in lines]
    wrong += [f"{line} has no file" for line in lines if line not in files]
    return wrong + [f"{line} stands twice" for line in sorted(set(lines)) if lines.count(line) > 1]


def section_of(readme: str) -> str:
    """What stands in the tree section."""
    found = re.search(r"^## The tree\n+```\n(.*?)\n```$", readme, flags=re.S | re.M)
    assert found, "README.md has no section 'The tree' with a fenced tree"
    return found[1]


def test_the_tree_has_every_module_and_nothing_else() -> None:
    section = section_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert differences(modules(), listed(section)) == []
    for folder in re.findall(r"^(\S+/)\s+\S", section, flags=re.M):
        assert (ROOT / folder).is_dir(), f"there is no folder {folder}"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("lm/\n  a.py  one\n", ["lm/b.py has no line"]),
        ("lm/\n  a.py  one\n  b.py  two\n  c.py  three\n", ["lm/c.py has no file"]),
        ("lm/\n  a.py  one\n  b.py  two\n  a.py  one\n", ["lm/a.py stands twice"]),
        ("lm/\n  a.py  one\n  b.py  two\ndocs/   figures\n", []),
    ],
)
def test_the_rule_about_the_tree_bites(section: str, says: list[str]) -> None:
    assert differences({"lm/": ["a.py", "b.py"]}, listed(section)) == says


def test_the_tree_that_is_printed_is_one_that_passes() -> None:
    printed = tree()
    assert differences(modules(), listed(printed)) == [] and max(map(len, printed.splitlines())) <= WIDTH


if __name__ == "__main__":
    print(tree())
